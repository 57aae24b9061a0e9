"""attention_backward: against float64, whatever the layout, the mask and the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmem_compile.kernels.attention_backward import attention_backward, chunk_of, op
from lowmem_compile.kernels.attention_backward.reference import attention_backward_reference
from tests.helpers import TOLERANCE, error

aten = torch.ops.aten
INF = float("inf")


Four = tuple[Tensor, Tensor, Tensor, Tensor]
SIZES = (2, 3, 5, 5, 4, 4)
"""Batch, heads, queries, keys, width of a query and of a value."""


def inputs(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Four:
    """dO, Q, K and V, laid out as a layer's linear makes them."""
    (b, h, s, t, d, e), generator = sizes, torch.Generator().manual_seed(0)
    grad, q, k, v = (
        torch.randn(size, generator=generator).to(dtype).transpose(1, 2)
        for size in ((b, s, h, e), (b, s, h, d), (b, t, h, d), (b, t, h, e))
    )
    return grad, q, k, v


def double(given: Four) -> Four:
    grad, q, k, v = (t.double() for t in given)
    return grad, q, k, v


def check(given: Four, mask: Tensor | None, causal: bool, scale: float = 0.3) -> None:
    got = attention_backward(*given, mask, causal, scale, True)
    wide = None if mask is None else mask.double()
    want = attention_backward_reference(*double(given), wide, causal, scale)
    for g, w, like in zip(got, want, (*given[1:], given[0]), strict=True):
        assert g.dtype == like.dtype
        assert g.shape == like.shape
        assert error(g, w) <= TOLERANCE[given[0].dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3, 5, 5, 4, 4), (1, 1, 1, 1, 1, 1), (3, 2, 17, 9, 8, 6), (2, 5, 33, 33, 16, 16)])
def test_matches_float64(sizes: tuple[int, ...], causal: bool, dtype: torch.dtype) -> None:
    check(inputs(sizes, dtype), None, causal and sizes[2] == sizes[3])


@pytest.mark.parametrize("scores", [1, 60, 100, 150, 1000])
def test_any_chunk_gives_the_same(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "SCORES", scores)
    for causal in (False, True):
        check(inputs((3, 2, 5, 5, 4, 4)), None, causal)
    mask = torch.randn(3, 1, 1, 5)
    check(inputs((3, 2, 5, 5, 4, 4)), mask, False)


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 40), heads=st.integers(1, 40), queries=st.integers(1, 3000), keys=st.integers(1, 3000))
def test_chunks_cover_the_batch_and_stay_small(batch: int, heads: int, queries: int, keys: int) -> None:
    rows, some = chunk_of(batch, heads, queries, keys)
    assert 1 <= rows <= batch
    assert 1 <= some <= heads
    assert rows == 1 or some == heads
    assert rows * some == 1 or rows * some * queries * keys <= op.SCORES


@pytest.mark.parametrize("shape", [(5,), (5, 5), (1, 1, 5, 5), (3, 1, 1, 5), (3, 2, 5, 5), (1, 2, 1, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_are_broadcast(shape: tuple[int, ...], causal: bool) -> None:
    check(inputs((3, 2, 5, 5, 4, 4)), torch.randn(shape), causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masked_rows_are_those_of_pytorch(dtype: torch.dtype) -> None:
    """A row that attends to nothing has no gradient, and a hidden key has none."""
    given = inputs((2, 2, 4, 4, 8, 8), dtype)
    mask = torch.zeros(2, 1, 4, 4, dtype=dtype)
    mask[0, :, 1] = -INF
    mask[1, :, :, 3] = -INF
    dq, dk, dv, made = attention_backward(*given, mask, False, 8**-0.5, True)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*given[1:], attn_mask=mask)
    wanted = aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, out, lse, 0.0, False, attn_mask=mask)
    for g, w in zip((dq, dk, dv, made), (*wanted, out), strict=True):
        assert error(g, w) <= TOLERANCE[dtype]
    assert not dq[0, :, 1].any()
    assert not dk[1, :, 3].any()
    assert not dv[1, :, 3].any()


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_a_query_that_is_no_number_reaches_its_gradient(bad: float) -> None:
    grad, q, k, v = inputs((1, 2, 4, 4, 4, 4), torch.bfloat16)
    q = q.clone()
    q[0, 1, 2, 0] = bad
    dq, dk, *_ = attention_backward(grad, q, k, v, torch.zeros(1, 1, 4, 4, dtype=q.dtype), False, 0.5)
    assert not dq[0, 1, 2].isfinite().any()
    assert not dk[0, 1].isfinite().any()
    assert dq[0, 0].isfinite().all()
    assert dk[0, 0].isfinite().all()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3), (3, 1, 2, 0)])
def test_any_strides(order: tuple[int, ...]) -> None:
    back = [order.index(i) for i in range(4)]
    grad, q, k, v = (t.permute(order).contiguous().permute(back) for t in inputs(SIZES))
    check((grad, q[:, :1].expand(-1, 3, -1, -1), k, v), None, False)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0)])
def test_empty(sizes: tuple[int, ...]) -> None:
    given = inputs((*sizes, 4, 4))
    for g, like in zip(attention_backward(*given, None, False, 0.5, True), (*given[1:], given[0]), strict=True):
        assert g.shape == like.shape
        assert not g.any()


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 5, 5)])
def test_the_operation_is_registered_correctly(mask: Any, output: bool) -> None:
    torch.library.opcheck(torch.ops.lowmem.attention_backward.default, (*inputs(SIZES), mask, False, 0.5, output))


def test_the_output_is_made_where_it_is_asked_for() -> None:
    assert attention_backward(*inputs(SIZES), None, False, 0.5)[3].shape == (0,)


def test_in_bfloat16_the_error_is_about_pytorchs() -> None:
    """Mean square over the three gradients, sharp attention; more of it in dQ, less in dV."""
    grad, q, k, v = inputs((2, 4, 64, 64, 32, 32), torch.bfloat16)
    given = (grad, q * 3, k, v)
    scale = 32**-0.5
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*given[1:])
    theirs = aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, out, lse, 0.0, False)
    ours = attention_backward(*given, None, False, scale)[:3]
    exact = attention_backward_reference(*double(given), None, False, scale)[:3]
    errors = [sum(float((g.double() - w).norm() / w.norm()) ** 2 for g, w in zip(x, exact, strict=True)) for x in (ours, theirs)]
    assert errors[0] <= 1.25 * errors[1]
