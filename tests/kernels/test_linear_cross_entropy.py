"""lowmem::linear_cross_entropy: loss and gradients in one sweep over chunks of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lowmem_compile.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    op,
)

IGNORE = -100


@pytest.fixture(autouse=True)
def _plain(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernel as plain PyTorch, in chunks of a few rows; `e2e` tests keep the generated one."""
    fused = op._fused if request.node.get_closest_marker("e2e") else lambda: op.chunk_loss_
    with patch.object(op, "_fused", fused), patch.object(op, "CHUNK_BYTES", 512):
        yield


def inputs(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    target = torch.randint(0, vocabulary, (rows,))
    target[::4] = IGNORE
    h, weight = torch.randn(rows, width), torch.randn(vocabulary, width)
    b = torch.randn(vocabulary).to(dtype).requires_grad_() if bias else None
    return h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), b, target


def compare(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, tolerance: float, smoothing: float = 0.0, z: float = 0.0
) -> None:
    """Loss and every gradient, through an outer factor, against float64."""
    leaves = [t for t in (h, weight, bias) if t is not None and t.requires_grad]
    z_weight = torch.tensor(z) if z else None
    loss = linear_cross_entropy(h, weight, bias, target, IGNORE, smoothing, weight.requires_grad, z_weight)[0]
    got = [loss, *torch.autograd.grad(loss * 0.37, leaves)]
    wide = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (h, weight, bias)]
    assert wide[0] is not None
    assert wide[1] is not None
    want_loss = linear_cross_entropy_reference(wide[0], wide[1], wide[2], target, IGNORE, smoothing, z)
    want = [
        want_loss,
        *torch.autograd.grad(want_loss * 0.37, [t for t in wide if t is not None and t.requires_grad]),
    ]
    for mine, theirs in zip(got, want, strict=True):
        scale = theirs.abs().max().clamp(min=1e-12)
        assert (mine.double() - theirs).abs().max() <= tolerance * scale, (mine, theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 1, 2), (7, 5, 11), (33, 8, 50), (64, 3, 129)])
def test_against_float64(rows: int, width: int, vocabulary: int, bias: bool, smoothing: float) -> None:
    compare(*inputs(rows, width, vocabulary, bias=bias), tolerance=1e-5, smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_z_loss_counts_every_row(smoothing: float) -> None:
    compare(*inputs(33, 8, 50), tolerance=1e-5, smoothing=smoothing, z=0.125)
    h, weight, _, target = inputs(12, 4, 20, bias=False)
    compare(h, weight, None, torch.full_like(target, IGNORE), 1e-5, z=0.5)


def test_float64_is_computed_in_float64() -> None:
    compare(*inputs(20, 6, 30, torch.float64), tolerance=1e-12)


def test_bfloat16() -> None:
    compare(*inputs(20, 6, 30, torch.bfloat16), tolerance=3e-2)


def test_a_frozen_weight_gets_no_gradient() -> None:
    h, weight, _, target = inputs(20, 6, 30)
    weight = weight.detach()
    out = linear_cross_entropy(h, weight, None, target, IGNORE, 0.0, False)
    assert (out[2].numel(), out[3].numel()) == (0, 0)
    compare(h, weight, None, target, 1e-5)


def test_strided_inputs() -> None:
    h, weight, bias, target = inputs(20, 6, 30)
    h = torch.stack([h.detach(), torch.full_like(h, float("nan"))], -1)[..., 0].requires_grad_()
    weight = weight.detach().t().contiguous().t().requires_grad_()
    target = target.repeat_interleave(2)[::2]
    assert not h.is_contiguous()
    assert not weight.is_contiguous()
    compare(h, weight, bias, target, 1e-5)


def test_no_rows() -> None:
    h, weight, bias, _ = inputs(0, 6, 30)
    loss = linear_cross_entropy(h, weight, bias, torch.empty(0, dtype=torch.int64), IGNORE, 0.0, True)[0]
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_rows_that_are_ignored_get_no_gradient() -> None:
    h, weight, bias, target = inputs(20, 6, 30)
    linear_cross_entropy(h, weight, bias, target, IGNORE, 0.1, True)[0].backward()
    assert h.grad is not None
    assert not h.grad[target == IGNORE].any()
    assert h.grad[target != IGNORE].abs().sum(1).all()


def test_a_non_finite_row_reaches_the_loss_and_the_gradients() -> None:
    h, weight, bias, target = inputs(20, 6, 30)
    h = h.detach()
    h[3, 2] = float("nan")
    target[3] = 5
    h.requires_grad_()
    loss = linear_cross_entropy(h, weight, bias, target, IGNORE, 0.0, True)[0]
    loss.backward()
    assert torch.isnan(loss)
    assert h.grad is not None
    assert torch.isnan(h.grad[3]).all()
    assert torch.isfinite(h.grad[[i for i in range(20) if i != 3]]).all()


def test_large_logits_do_not_overflow() -> None:
    h, weight, bias, target = inputs(20, 6, 30)
    compare((h.detach() * 1e3).requires_grad_(), weight, bias, target, 1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("want_weight", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, want_weight: bool, bias: bool) -> None:
    h, weight, b, target = inputs(9, 4, 12, dtype, bias)
    if not want_weight:
        weight, b = weight.detach(), None if b is None else b.detach()
    torch.library.opcheck(linear_cross_entropy, (h, weight, b, target, IGNORE, 0.0, want_weight), atol=1e-2, rtol=1e-2)


def test_opcheck_strided_weight() -> None:
    h, weight, b, target = inputs(9, 4, 12)
    strided = weight.detach().t().contiguous().t().requires_grad_()
    torch.library.opcheck(linear_cross_entropy, (h, strided, b, target, IGNORE, 0.0, True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "itemsize"),
    [(0, 10, 4), (1, 10, 4), (1000, 50_000, 2), (7, 10**6, 4), (10**6, 10, 4)],
)
def test_chunks_cover_the_rows(rows: int, vocabulary: int, itemsize: int) -> None:
    step = op.chunk_rows(rows, vocabulary, itemsize)
    assert step >= 1
    assert -(-rows // step) <= op.MOST_CHUNKS


@pytest.mark.e2e
@pytest.mark.parametrize("z", [0.0, 0.125])
def test_the_generated_kernel(z: float) -> None:
    compare(*inputs(33, 8, 50), tolerance=1e-5, z=z)
