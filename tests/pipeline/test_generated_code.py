"""Through Inductor's code generation: the compiled model does what its graphs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch.nn import functional as F

import lowmem_compile
from tests.helpers import TOLERANCE, assert_same, compile_graphs, run, run_double

pytestmark = pytest.mark.e2e
D, WIDE, ROWS = 16, 64, 12


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, WIDE), nn.Linear(WIDE, D).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, WIDE), nn.Linear(WIDE, D)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.inner(x)
        a = self.up(self.norm(h))
        y: Tensor = h + self.down(a * torch.sigmoid(a))
        return y


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="lowmem", options={"strict": True, "report": False, **options})


def test_codes_with_dynamic_rows() -> None:
    model = Mlp()
    call, graphs = compiled(model), compile_graphs(model)
    for rows in (ROWS, ROWS + 3):
        x = torch.randn(rows, D, requires_grad=True)
        assert_same(run(call, model, [x], mark=0), run(graphs, model, [x], mark=0), TOLERANCE[torch.float32])
    assert graphs.rewritten("approximate_activation") == 1


def test_norms_under_autocast() -> None:
    model, x = Block(), torch.randn(ROWS, D, requires_grad=True)
    got = run(compiled(model, gradients="exact"), model, [x], autocast=torch.bfloat16)
    assert_same(got, run_double(model, [x]), TOLERANCE[torch.bfloat16])


def test_packed_dropout_masks() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(D, WIDE)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.up(x), 0.5)

    model, x = Dropped(), torch.randn(ROWS, D)
    y = compiled(model)(x)
    y.sum().backward()
    assert model.up.bias.grad is not None
    torch.testing.assert_close(model.up.bias.grad, (y.detach() != 0).sum(0) * 2.0)


def test_the_graph_cache_stays_usable(fresh_inductor_cache: Path) -> None:
    model, x = Mlp(), torch.randn(ROWS, D)
    reports, hits, grads = [], [], []
    with functorch_config.patch(enable_autograd_cache=True):
        for _ in range(2):
            torch.compiler.reset()
            counters.clear()
            model.zero_grad()
            compiled(model, report=True)(x).sum().backward()
            hits.append(counters["aot_autograd"]["autograd_cache_hit"])
            reports.append(lowmem_compile.report(model).graphs[0])
            assert model.up.weight.grad is not None
            grads.append(model.up.weight.grad.clone())
        assert hits == [0, 1]
        assert [r.from_cache for r in reports] == [False, True]
        assert reports[0].saved == reports[1].saved
        assert torch.equal(*grads)
        torch.compiler.reset()
        counters.clear()
        compiled(model, gradients="exact")(x)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 0
