"""encode_saved: tensors that stay exact, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.passes.encode_saved import SMALLEST
from tests.helpers import check_gradients, compile_graphs, run
from tests.passes.encoding import (
    NAME,
    ROWS,
    WIDE,
    Block,
    Function,
    check,
    check_exact,
    rows,
)


def test_a_small_tensor_declines() -> None:
    assert 32 * WIDE < SMALLEST <= 64 * WIDE
    check_exact(Block(), [rows(32)], ["LM305"])
    model = Block()
    graphs = compile_graphs(model, codec="int8")
    run(graphs, model, [rows(64)])
    assert graphs.rewritten(NAME) == 1


def test_an_output_of_the_graph_declines() -> None:
    class Model(Block):
        def forward(self, x: Tensor) -> Any:
            hidden = torch.tanh(self.up(x))
            return self.down(hidden), hidden.view(2, -1)

    check_exact(Model(), [rows()], ["LM302"])


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize(
    "function",
    [
        F.elu,
        F.softplus,
        F.softsign,
        F.hardswish,
        torch.abs,
        torch.cos,
        lambda h: 1 / (9 + h),
        lambda h: h.detach().sigmoid() / (9 + h),
        lambda h: torch.log(9 + h),
        lambda h: torch.sqrt(9 + h),
        lambda h: torch.where((h > 0.5) | (h < -0.5), h.sin(), h.cos()),
    ],
    ids=["elu", "softplus", "softsign", "hardswish", "abs", "cos", "reciprocal", "division", "log", "sqrt", "where"],
)
def test_a_use_that_amplifies_an_error_declines(function: Function, frozen: bool) -> None:
    model = Block(function)
    model.down.requires_grad_(not frozen)
    graphs = compile_graphs(model, codec="int8", disable=["approximate_activation"])
    check_gradients(graphs, model, [rows()])
    assert set(graphs.codes(NAME)) == {"LM212"}


def test_options_that_keep_it_exact() -> None:
    check_exact(Block(), [rows()], ["LM211"], keep_exact=["up"])
    check_exact(Block(), [rows()], ["LM201"], gradients="exact")
    check_exact(Block(), [rows()], [], codec="none")
    check_exact(Block(), [rows()], [], disable=[NAME])


def test_keep_exact_names_one_of_two_modules() -> None:
    model = nn.Sequential(Block(), Block())
    graphs = compile_graphs(model, codec="int8", keep_exact=["1.up"])
    check(graphs, model, [rows()], 0.01)
    assert sorted(graphs.codes(NAME)) == ["LM100", "LM100", "LM211"]


def test_statistics_decline() -> None:
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    check_exact(model, [torch.randn(SMALLEST, 64, requires_grad=True)], ["LM212", "LM212"])


def test_a_copy_of_a_weight_declines() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(96, 8) / 8), nn.Parameter(torch.randn(8, 64) / 8)

        def forward(self, x: Tensor) -> Any:
            return F.linear(x, self.up @ self.down)

    check_exact(Model(), [rows()], ["LM212"])


def test_float64_declines() -> None:
    model = Block().double()
    check_exact(model, [torch.randn(ROWS, 64, dtype=torch.float64, requires_grad=True)], ["LM203"])


def test_no_fewer_bytes_decline() -> None:
    model = Block()
    graphs = compile_graphs(model, codec="bf16")
    run(graphs, model, [rows()], autocast=torch.bfloat16)
    assert set(graphs.codes(NAME)) == {"LM306"}
