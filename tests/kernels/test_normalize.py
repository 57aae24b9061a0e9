"""lowmem::normalize: a norm without affine whose backward reads its output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_compile.kernels.normalize import (
    normalize,
    normalize_backward,
    normalize_backward_reference,
    normalize_reference,
)

SHAPES = [((5, 7), 1), ((2, 3, 9), 1), ((2, 3, 9), 2), ((13,), 1), ((1, 1), 1), ((4, 1024), 1)]
EPS = 1e-5


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values contiguous, as a transpose, as a slice of something wider, and expanded."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x.detach()
    return {
        "contiguous": x,
        "transposed": x.mT.contiguous().mT if x.dim() > 1 else x,
        "strided": wide[..., ::2],
    }


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("shape", "ndim"), SHAPES)
def test_against_the_library_in_float64(shape: tuple[int, ...], ndim: int, center: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(shape, dtype=torch.float64)
    xhat, rstd = normalize(x, ndim, EPS, center)
    (dx,) = torch.autograd.grad(xhat, x, grad)
    want = (F.layer_norm if center else F.rms_norm)(x, shape[-ndim:], eps=EPS)
    (want_dx,) = torch.autograd.grad(want, x, grad)
    torch.testing.assert_close(xhat, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, want_dx, rtol=1e-9, atol=1e-9)
    assert rstd.shape == (*shape[:-ndim], *([1] * ndim))


@pytest.mark.parametrize("center", [True, False])
def test_gradcheck(center: bool) -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: normalize(x, 1, EPS, center)[0], [x])


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_layouts_and_dtypes(dtype: torch.dtype, layout: str, center: bool) -> None:
    x = layouts(torch.randn(6, 33).to(dtype))[layout].requires_grad_()
    xhat, rstd = normalize(x, 1, EPS, center)
    assert (xhat.dtype, rstd.dtype) == (torch.float32, torch.float32)
    assert xhat.is_contiguous()
    grad = torch.randn(6, 33)
    (dx,) = torch.autograd.grad(xhat, x, grad)
    assert dx.dtype == dtype
    wide = x.detach().double().requires_grad_()
    want, _ = normalize_reference(wide, 1, EPS, center)
    (want_dx,) = torch.autograd.grad(want, wide, grad.double())
    torch.testing.assert_close(xhat.double(), want, rtol=1e-5, atol=1e-5)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(dx.double(), want_dx, rtol=2 * rounding, atol=1e-5)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype, layout: str, center: bool) -> None:
    x = layouts(torch.randn(4, 6, dtype=dtype))[layout].detach().requires_grad_()
    torch.library.opcheck(normalize, (x, 1, EPS, center), atol=1e-5, rtol=1e-5)
    xhat, rstd = (t.detach() for t in normalize(x, 1, EPS, center))
    torch.library.opcheck(normalize_backward, (torch.randn(4, 6), xhat, rstd, 1, center))


@pytest.mark.parametrize("center", [True, False])
def test_backward_from_a_rounded_output(center: bool) -> None:
    """What norm_from_output computes: the output rounded to bf16, all else in float32."""
    x, grad = (
        torch.randn(8, 64, dtype=torch.float64, requires_grad=True),
        torch.randn(8, 64, dtype=torch.float64),
    )
    xhat, rstd = normalize_reference(x, 1, EPS, center)
    (want,) = torch.autograd.grad(xhat, x, grad)
    got = normalize_backward_reference(grad.float(), xhat.detach().bfloat16(), rstd.detach().float(), 1, center)
    assert (got - want).abs().max() <= 2**-7 * want.abs().max()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    xhat, rstd = normalize(x, 1, EPS, True)
    assert (xhat.shape, rstd.shape) == (x.shape, (*shape[:-1], 1))
    xhat.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_row_stays_so_and_alone(value: float) -> None:
    x = torch.randn(3, 8)
    x[1, 2] = value
    x.requires_grad_()
    normalize(x, 1, EPS, True)[0].sum().backward()
    assert x.grad is not None
    assert torch.isnan(x.grad[1]).all()
    assert torch.isfinite(x.grad[[0, 2]]).all()


def test_double_backward_is_refused() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(normalize(x, 1, EPS, True)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lowmem"):
        dx.sum().backward()
