"""norm_from_output: under autocast the normalised value is kept once, in the compute dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import TOLERANCE, Graphs, assert_same, compile_graphs, error, run, run_double

NAME = "norm_from_output"
D, ROWS = 32, 24


class Gemma(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (h * (1.0 + self.weight.float())).type_as(x)


class Block(nn.Module):
    """A norm of a float32 tensor that nothing else keeps, read by two linears under autocast."""

    def __init__(self, norm: nn.Module, dropout: float = 0.0, frozen: bool = False) -> None:
        super().__init__()
        self.inner, self.norm, self.dropout = nn.Linear(D, D), norm, nn.Dropout(dropout)
        self.a, self.b = nn.Linear(D, 3 * D), nn.Linear(D, 3 * D, bias=False)
        if frozen:
            for part in (self.norm, self.a, self.b):
                part.requires_grad_(False)

    def hidden(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h: Tensor = self.inner(x)
        return h

    def forward(self, x: Tensor) -> Any:
        y = self.dropout(self.norm(self.hidden(x)))
        return self.a(y) + self.b(y)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(D),
    "LayerNorm, no bias": lambda: nn.LayerNorm(D, bias=False),
    "LayerNorm, no affine": lambda: nn.LayerNorm(D, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(D, eps=1e-6),
    "Gemma": Gemma,
}


def compiled(model: nn.Module, x: Tensor, **options: Any) -> Graphs:
    """Compile, run, and compare forward and every gradient with float64."""
    graphs = compile_graphs(model, **{"gradients": "exact", **options})
    got = run(graphs, model, [x], autocast=torch.bfloat16)
    assert_same(got, run_double(model, [x]), TOLERANCE[torch.bfloat16])
    return graphs


def decisions(graphs: Graphs) -> list[tuple[str, str, int]]:
    return [(t.decision, t.dtype, t.nbytes) for t in graphs.chosen.saved_tensors()]


@pytest.mark.parametrize("norm", NORMS)
def test_fires_once_and_matches_float64(norm: str) -> None:
    graphs = compiled(Block(NORMS[norm]()), torch.randn(ROWS, D, requires_grad=True))
    assert graphs.rewritten(NAME) == 1
    assert graphs.only.chosen == "lowmem"
    assert ("normalised output, bfloat16", "bfloat16", ROWS * D * 2) in decisions(graphs)


def test_saves_the_output_in_place_of_the_input() -> None:
    model, x = Block(nn.LayerNorm(D)), torch.randn(ROWS, D, requires_grad=True)
    with_pass = compiled(model, x).chosen
    without = compiled(model, x, disable=[NAME]).chosen
    assert without.saved_bytes() - with_pass.saved_bytes() >= ROWS * D * 2
    names = {n.name for n in with_pass.kept()}
    assert not any(n.meta["val"].dtype == torch.float32 and n.meta["val"].numel() >= ROWS * D for n in with_pass.kept()), names


def test_the_forward_pass_is_untouched() -> None:
    model, x = Block(nn.LayerNorm(D)), torch.randn(ROWS, D)
    outputs = []
    for disable in ([], [NAME]):
        graphs = compile_graphs(model, disable=disable)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(graphs(x))
        outputs[-1].float().sum().backward()
    assert torch.equal(*outputs)


def test_gradients_differ_by_one_rounding_of_the_output() -> None:
    model, x = Block(nn.LayerNorm(D)), torch.randn(ROWS, D, requires_grad=True)
    got = run(compile_graphs(model), model, [x], autocast=torch.bfloat16)
    want = run(compile_graphs(model, disable=[NAME]), model, [x], autocast=torch.bfloat16)
    assert all(error(got[k], want[k]) <= 2**-7 for k in want)


def test_a_frozen_model_below_the_norm_keeps_nothing_for_it() -> None:
    model = Block(nn.LayerNorm(D))
    model.inner.requires_grad_(False)
    model.norm.requires_grad_(False)
    graphs = compiled(model, torch.randn(ROWS, D))
    assert graphs.rewritten(NAME) == 0
    assert set(graphs.codes(NAME)) <= {"LM303"}


def test_frozen_linears_need_the_norms_own_backward_alone() -> None:
    compiled(Block(nn.LayerNorm(D), frozen=True), torch.randn(ROWS, D, requires_grad=True))


def test_without_autocast_nothing_is_recognised() -> None:
    model, x = Block(nn.LayerNorm(D)), torch.randn(ROWS, D, requires_grad=True)
    graphs = compile_graphs(model, gradients="exact")
    assert_same(run(graphs, model, [x]), run_double(model, [x]), TOLERANCE[torch.float32])
    assert graphs.sites(NAME) == []


def test_a_float32_reader_declines() -> None:
    class Mixed(Block):
        def forward(self, x: Tensor) -> Any:
            y = self.norm(self.hidden(x))
            with torch.autocast("cpu", enabled=False):
                exact = self.b(y.to(self.b.weight.dtype))
            return self.a(y) + exact

    graphs = compiled(Mixed(nn.LayerNorm(D)), torch.randn(ROWS, D, requires_grad=True))
    assert graphs.rewritten(NAME) == 0
    assert graphs.codes("recognise_norm") == ["LM301"]


def test_another_user_of_the_norm() -> None:
    """A post-norm model: the residual reads the affine too."""

    class PostNorm(Block):
        def forward(self, x: Tensor) -> Any:
            y = self.norm(self.hidden(x))
            return y + F.gelu(self.a(y))[..., :D] + self.b(y)[..., D : 2 * D]

    graphs = compiled(PostNorm(nn.LayerNorm(D)), torch.randn(ROWS, D, requires_grad=True))
    assert graphs.rewritten("recognise_norm") == 1


def test_an_output_of_the_model() -> None:
    class Returned(Block):
        def forward(self, x: Tensor) -> Any:
            y = self.norm(self.hidden(x))
            return self.a(y), y

    compiled(Returned(nn.LayerNorm(D)), torch.randn(ROWS, D, requires_grad=True))


def test_dropout_between_norm_and_linear() -> None:
    """p = 0 is the identity; with p > 0 the saved mask stands between the norm and the rebuilt activation."""
    compiled(Block(nn.LayerNorm(D), dropout=0.0), torch.randn(ROWS, D, requires_grad=True))
    model, x = Block(nn.LayerNorm(D), dropout=0.4), torch.randn(ROWS, D, requires_grad=True)
    grads = []
    for disable in ([], [NAME]):
        graphs = compile_graphs(model, inductor={"fallback_random": True}, disable=disable)
        graphs(x)
        torch.manual_seed(3)
        grads.append(run(graphs, model, [x], autocast=torch.bfloat16))
    assert_same(grads[0], grads[1], 2**-7)


def test_two_norms_in_a_chain() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(nn.LayerNorm(D)), Block(nn.RMSNorm(D, eps=1e-6))
            self.narrow = nn.Linear(3 * D, D)

        def forward(self, x: Tensor) -> Any:
            y: Tensor = self.second(self.narrow(torch.tanh(self.first(x))).to(x.dtype))
            return y

    graphs = compiled(Chain(), torch.randn(ROWS, D, requires_grad=True))
    assert graphs.rewritten(NAME) == 2


def test_dynamic_dimension() -> None:
    model = Block(nn.LayerNorm(D))
    graphs = compile_graphs(model, gradients="exact")
    for rows in (ROWS, ROWS + 3):
        x = torch.randn(rows, D, requires_grad=True)
        assert_same(
            run(graphs, model, [x], autocast=torch.bfloat16, mark=0),
            run_double(model, [x]),
            TOLERANCE[torch.bfloat16],
        )
    assert len(graphs.entries) == 1
    assert graphs.rewritten(NAME) == 1
