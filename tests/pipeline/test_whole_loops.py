"""Loops whose size the divisor of an index does not divide: PyTorch 2.13 forgets what is left (pytorch#195582)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import sympy
import torch
from torch import Tensor

from lowmem_compile._torch import loop_splitting
from lowmem_compile.kernels.group_codes import CODECS
from lowmem_compile.whole_loops import leaves_rest, unless_rest

I, J = sympy.symbols("i j", integer=True, nonnegative=True)


def poison(like: Tensor) -> None:
    """Leave not-a-numbers in the memory that the next tensors of this size get."""
    kept = [torch.full_like(like, torch.nan) for _ in range(8)]
    del kept


@pytest.mark.e2e
@pytest.mark.parametrize("width", [2048, 2056, 2049, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_padded_rows(width: int, dtype: torch.dtype) -> None:
    groups = -(-width // 128)

    def scaled(codes: Tensor, scales: Tensor) -> Tensor:
        cells = codes.to(torch.float32).reshape(4, groups, 128) * scales.to(torch.float32).reshape(4, groups, 1)
        return cells.to(dtype).reshape(4, -1)[:, :width].contiguous()

    codes, scales = torch.randint(-9, 9, (4, groups * 128), dtype=torch.int8), torch.randn(4, groups, dtype=torch.bfloat16)
    want = scaled(codes, scales)
    compiled = torch.compile(scaled, backend="lowmem", fullgraph=True)
    for _ in range(3):
        poison(want)
        assert torch.equal(compiled(codes, scales), want)


@pytest.mark.e2e
def test_sizes_of_one() -> None:
    compiled = torch.compile(lambda x: (x.reshape(4, 1, 9) * 2).sum(0), backend="lowmem", fullgraph=True)
    x = torch.randn(4, 9)
    torch.testing.assert_close(compiled(x), (x * 2).sum(0, keepdim=True))


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["int8", "int10", "int6"])
@pytest.mark.parametrize("width", [2056, 500, 4112])
def test_codes_of_padded_rows(name: str, width: int) -> None:
    codec = CODECS[name]
    x = torch.randn(4, width)
    parts = codec.encode(x)
    want = codec.decode(parts, width, torch.float32)

    def decode(*given: Tensor) -> Tensor:
        return codec.decode(given, width, torch.float32) * 1.0

    compiled = torch.compile(decode, backend="lowmem", fullgraph=True)
    for _ in range(3):
        poison(want)
        torch.testing.assert_close(compiled(*parts), want, rtol=1e-6, atol=0)


def node(size: int | sympy.Expr, *indices: sympy.Expr) -> SimpleNamespace:
    exprs = {f"index{k}": e for k, e in enumerate(indices)}
    body = SimpleNamespace(var_ranges={I: 4, J: size}, indexing_exprs=exprs)
    return SimpleNamespace(node=SimpleNamespace(get_default_sizes_body=lambda: (((4, size), ()), body, ((), ()))))


def test_a_rest_is_seen() -> None:
    floor_div = loop_splitting().FloorDiv
    by_128, size = 17 * I + floor_div(J, 128), sympy.Symbol("s", integer=True, positive=True)
    assert leaves_rest(node(2056, by_128, J), floor_div)
    assert leaves_rest(node(size, by_128), floor_div)
    assert not leaves_rest(node(2048, by_128), floor_div)
    assert not leaves_rest(node(128 * size, by_128), floor_div)
    assert not leaves_rest(node(2056, 2056 * I + J), floor_div)
    assert not leaves_rest(node(2056, sympy.Integer(0), floor_div(I + J, 128)), floor_div)  # Inductor splits no loop of this


def test_loops_with_a_rest_are_left_whole() -> None:
    floor_div = loop_splitting().FloorDiv
    even, uneven = (node(n, floor_div(J, 128)) for n in (2048, 2056))
    split = unless_rest(lambda _scheduling, nodes: [*nodes, "split"], floor_div)
    assert split(None, [even]) == [even, "split"]
    assert split(None, [even, uneven]) == [even, uneven]
