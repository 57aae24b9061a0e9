"""Inductor's estimate of the peak, as lowmem corrects it: scratch memory counts, what is overwritten counts once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem_compile
from lowmem_compile import peak_estimate
from lowmem_compile._torch import inductor_peaks, narrow_products
from lowmem_compile.peak_estimate import better_peak_estimate, estimate

D, HEADS = 64, 4


class Block(nn.Module):
    """Attention, and a hidden layer whose gradient Inductor would like to keep for the block before."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        hidden: Tensor = self.down(F.gelu(self.up(x)))
        return x + hidden


def test_it_is_in_place_only_while_active() -> None:
    memory = inductor_peaks().memory
    before = memory.estimate_peak_memory
    with better_peak_estimate():
        assert memory.estimate_peak_memory is estimate
    assert memory.estimate_peak_memory is before


def test_a_version_without_the_estimate_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_estimate, "inductor_peaks", lambda: SimpleNamespace(there=False))
    with better_peak_estimate():
        pass


@pytest.mark.e2e
@pytest.mark.skipif(narrow_products(torch.bfloat16) == "none", reason="the processor's own attention is not replaced")
def test_the_estimate_is_the_peak_of_the_generated_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of forward and backward within a tenth, which the caller holds: decisions about reuse are made on what is alive."""
    found: list[int] = []

    def spy(*args: Any) -> tuple[int, list[int]]:
        result = estimate(*args)
        found.append(result[0])
        return result

    monkeypatch.setattr(peak_estimate, "estimate", spy)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3))).bfloat16()
    options: dict[str, Any] = {"strict": True, "inductor": {"force_disable_caches": True}}
    compiled = torch.compile(model, backend="lowmem", options=options)
    compiled(torch.randn(8, 128, D).bfloat16()).square().sum().backward()
    graph = lowmem_compile.report(compiled).training_graphs[0]
    for phase in ("forward", "backward"):
        alive = max(p.live_bytes for p in graph.timelines["lowmem"] if p.phase == phase)
        assert any(0.9 * alive <= peak <= 1.05 * alive for peak in found), (phase, alive, found)
