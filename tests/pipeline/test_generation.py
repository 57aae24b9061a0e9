"""Cheaper code generation: the same text as without it, and what it leaves out."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile._torch import code_writing, generated_source
from lowmem_compile.generation import cheaper, covers_nothing, once, unless_equal
from lowmem_compile.graph import copy_module
from lowmem_compile.saved import Partition
from tests.helpers import compile_graphs


class Block(nn.Module):
    """A norm, an activation, a mask, and a matrix read both ways; of sizes that tiles of 16 divide, or do not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1)
        scores = torch.softmax(h @ h.mT, -1)
        y: Tensor = x + scores @ h
        return y.transpose(1, 2).contiguous().relu()


def partition(rows: int, width: int, dtype: torch.dtype, codec: str) -> Partition:
    model = Block(width).to(dtype)
    graphs = compile_graphs(model, codec=codec)
    graphs(torch.randn(4, rows, width, dtype=dtype, requires_grad=True)).sum().backward()
    return graphs.chosen


@pytest.mark.parametrize(("rows", "width", "codec", "dtype"), [(32, 64, "auto", torch.bfloat16), (33, 96, "int6", torch.float32)])
def test_the_text_is_the_same(rows: int, width: int, codec: str, dtype: torch.dtype) -> None:
    parts = partition(rows, width, dtype, codec)
    for graph, backward in ((parts.forward, False), (parts.backward, True)):
        texts = []
        for context in (contextlib.nullcontext(), cheaper()):
            with context:
                texts.append(generated_source(copy_module(graph), {}, is_backward=backward)[0])
        assert texts[0] == texts[1]
        assert "at::vec::Vectorized" in texts[0]


def test_the_rest_of_a_divided_loop_is_left_out() -> None:
    assert not covers_nothing(SimpleNamespace())
    assert not covers_nothing(SimpleNamespace(tail_size=None))
    assert not covers_nothing(SimpleNamespace(tail_size=3, inner_tail_size=3, outer_tail_size=None))
    assert covers_nothing(SimpleNamespace(tail_size=0))
    assert covers_nothing(SimpleNamespace(tail_size=None, inner_tail_size=None, outer_tail_size=0))


def test_a_table_is_filled_once() -> None:
    filled: list[object] = []
    fill, one, other = once(filled.append), object(), object()
    for table in (one, one, other):
        fill(table)
    assert filled == [one, other]


def test_indices_are_remembered() -> None:
    private = code_writing()
    original = private.sizevars.stride_at
    with cheaper():
        more = private.sizevars.stride_at
        assert more is not original
        assert private.cpp.stride_at_vec_range is private.sizevars.stride_at_vec_range
    with cheaper():
        assert private.sizevars.stride_at is more
        assert more.cache_parameters()["maxsize"] > original.cache_parameters()["maxsize"]
        x, y = sympy.symbols("x y", integer=True)
        assert more(3 * x + y, x) == original(3 * x + y, x) == 3


def test_ranges() -> None:
    private = code_writing()
    tighten = unless_equal(private.ValueRanges.tighten)
    narrow, wide = private.ValueRanges(1, 3), private.ValueRanges(0, 3)
    assert tighten(narrow, private.ValueRanges(1, 3)) is narrow
    assert tighten(wide, narrow) == narrow


def test_inductor_is_as_before_outside() -> None:
    private = code_writing()
    before = (private.ResultTypes.__init__, private.SchedulerNode.codegen, private.ValueRanges.tighten)
    with cheaper():
        assert private.SchedulerNode.codegen is not before[1]
    assert (private.ResultTypes.__init__, private.SchedulerNode.codegen, private.ValueRanges.tighten) == before


def test_another_torch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    private = code_writing()
    before = private.SchedulerNode.codegen
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    with cheaper():
        assert private.SchedulerNode.codegen is before
