"""The partition: never above Inductor; and what the backward pass may recompute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.saved import Partition
from tests.helpers import TOLERANCE, assert_same, check_gradients, compile_graphs, run, run_double

D, WIDE, ROWS = 16, 64, 12


class Layer(nn.Module):
    """Pre-norm attention-free transformer layer."""

    def __init__(self, act: Callable[[Tensor], Tensor], gated: bool, frozen: bool) -> None:
        super().__init__()
        self.act, self.gated = act, gated
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, WIDE), nn.Linear(WIDE, D)
        self.gate = nn.Linear(D, WIDE)
        self.adapter = nn.Linear(D, D)
        if frozen:
            for part in (self.norm, self.up, self.down, self.gate):
                part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        a = self.act(self.up(h))
        if self.gated:
            a = a * self.gate(h)
        out: Tensor = x + self.down(a) + self.adapter(h)
        return out


def model_of(gated: bool, frozen: bool) -> nn.Module:
    act = F.silu if gated else F.gelu
    return nn.Sequential(nn.Linear(D, D), Layer(act, gated, frozen), Layer(act, gated, frozen), nn.Linear(D, 3))


def saved(partition: Partition) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {n.name: (tuple(n.meta["val"].shape), n.meta["val"].dtype) for n in partition.kept()}


@pytest.mark.parametrize("recompute", ["pointwise", "inductor"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize(("gated", "frozen"), [(False, False), (False, True), (True, False), (True, True)])
def test_never_above_inductor_or_its_one_flag(gated: bool, frozen: bool, autocast: torch.dtype | None, recompute: str) -> None:
    model, x = model_of(gated, frozen), torch.randn(ROWS, D, requires_grad=True)
    graphs = compile_graphs(model, recompute=recompute, gradients="exact")
    got = run(graphs, model, [x], autocast=autocast)
    sizes = {name: p.saved_bytes() for name, p in graphs.only.partitions.items()}
    assert set(sizes) == {"inductor", "one_flag", "lowmem"}
    assert sizes[graphs.only.chosen] <= sizes["inductor"]
    if recompute == "pointwise":
        assert sizes[graphs.only.chosen] <= sizes["one_flag"]
    assert_same(got, run_double(model, [x]), TOLERANCE[autocast or torch.float32])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_codes_save_more_than_the_exact_passes(autocast: torch.dtype | None) -> None:
    model, x = model_of(gated=False, frozen=True), torch.randn(ROWS, D, requires_grad=True)
    sizes = []
    for gradients in ("approximate", "exact"):
        graphs = compile_graphs(model, gradients=gradients)
        run(graphs, model, [x], autocast=autocast)
        sizes.append(graphs.chosen.saved_bytes())
    assert sizes[0] < sizes[1]


def test_an_activation_is_recomputed_for_a_matmul() -> None:
    model = nn.Sequential(nn.Linear(D, WIDE), nn.GELU(), nn.Linear(WIDE, D))
    x, kept = torch.randn(ROWS, D, requires_grad=True), {}
    for recompute in ("pointwise", "inductor"):
        graphs = compile_graphs(model, recompute=recompute, gradients="exact")
        check_gradients(graphs, model, [x])
        kept[recompute] = sum(shape == (ROWS, WIDE) for shape, _ in saved(graphs.only.partitions["lowmem"]).values())
    assert kept == {"pointwise": 1, "inductor": 2}


def test_autocast_copies_of_weights_are_made_again() -> None:
    model = nn.Sequential(nn.Linear(D, WIDE), nn.Tanh(), nn.Linear(WIDE, D), nn.Tanh(), nn.Linear(D, D))
    graphs = compile_graphs(model, gradients="exact")
    run(graphs, model, [torch.randn(ROWS, D, requires_grad=True)], autocast=torch.bfloat16)
    kinds = {name: [t.kind for t in p.saved_tensors()] for name, p in graphs.only.partitions.items()}
    assert "weight copy" in kinds["inductor"]
    assert "weight copy" not in kinds["lowmem"]


def test_no_float32_twin_of_a_narrow_tensor_is_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, WIDE), nn.Linear(WIDE, D)

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            y: Tensor = self.down((h.float().exp() + h.float().sin()).to(h.dtype))
            return y

    model = Model()
    graphs = compile_graphs(model, gradients="exact")
    run(graphs, model, [torch.randn(ROWS, D, requires_grad=True)], autocast=torch.bfloat16)
    large = [d for s, d in saved(graphs.only.partitions["lowmem"]).values() if s == (ROWS, WIDE)]
    assert large == [torch.bfloat16]


def test_one_storage_is_counted_once() -> None:
    """Views of a saved tensor take no further bytes."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.w = nn.Linear(D, WIDE), nn.Parameter(torch.randn(WIDE, ROWS))

        def forward(self, x: Tensor) -> Any:
            h = self.up(x)
            return h @ self.w, h.t() @ x, h.reshape(-1, 4) * 2

    model = Model()
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [torch.randn(ROWS, D, requires_grad=True)])
    roots = [n.name for n in graphs.chosen.kept()]
    assert len(roots) == len(set(roots))
    assert graphs.chosen.saved_bytes() <= ROWS * WIDE * 4


def test_bytes_of_a_dynamic_shape_use_the_hint() -> None:
    model = nn.Sequential(nn.Linear(D, WIDE), nn.GELU(), nn.Linear(WIDE, D))
    graphs = compile_graphs(model, gradients="exact")
    check_gradients(graphs, model, [torch.randn(ROWS, D, requires_grad=True)], mark=0)
    assert graphs.chosen.saved_bytes() == ROWS * WIDE * 4
