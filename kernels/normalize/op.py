"""``lowmem::normalize``: a norm without affine as one op, so that it stays whole until the partition decides.

Forward returns (xhat, rstd); the autograd formula reads only those two, never the input. The pipeline expands the op
into plain ATen before code generation, so Inductor fuses it like any other norm; called eagerly it runs the reference.
"""

from __future__ import annotations

from typing import Any

import torch

from lowmem_compile.kernels.normalize.reference import (
    compute_dtype,
    normalize_backward_reference,
    normalize_reference,
)


@torch.library.custom_op("lowmem::normalize", mutates_args=())
def normalize(x: torch.Tensor, ndim: int, eps: float, center: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(xhat, rstd) of x over its last ``ndim`` dimensions; see :func:`normalize_reference`."""
    if not x.numel():
        dtype = compute_dtype(x.dtype)
        stats = [*x.shape[: x.dim() - ndim], *([1] * ndim)]
        return x.new_empty(x.shape, dtype=dtype), x.new_full(stats, eps, dtype=dtype).rsqrt()
    xhat, rstd = normalize_reference(x, ndim, eps, center)
    return xhat.contiguous(), rstd.contiguous()


@torch.library.custom_op("lowmem::normalize_backward", mutates_args=())
def normalize_backward(grad: torch.Tensor, xhat: torch.Tensor, rstd: torch.Tensor, ndim: int, center: bool) -> torch.Tensor:
    """dx of :func:`normalize` from its output; see :func:`normalize_backward_reference`."""
    return normalize_backward_reference(grad, xhat, rstd, ndim, center).contiguous()


@normalize.register_fake
def _(x: torch.Tensor, ndim: int, eps: float, center: bool) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG001
    dtype = compute_dtype(x.dtype)
    stats = [*x.shape[: x.dim() - ndim], *([1] * ndim)]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(stats, dtype=dtype)


@normalize_backward.register_fake
def _(
    grad: torch.Tensor,  # noqa: ARG001
    xhat: torch.Tensor,
    rstd: torch.Tensor,
    ndim: int,  # noqa: ARG001
    center: bool,  # noqa: ARG001
) -> torch.Tensor:
    return xhat.new_empty(xhat.shape, dtype=rstd.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, ctx.ndim, _, ctx.center = inputs
    ctx.x_dtype = x.dtype
    xhat, rstd = output
    ctx.save_for_backward(xhat, rstd)


def _backward(ctx: Any, grad: torch.Tensor, _grad_rstd: Any) -> tuple[torch.Tensor | None, None, None, None]:
    xhat, rstd = ctx.saved_tensors
    dx = torch.ops.lowmem.normalize_backward(grad, xhat, rstd, ctx.ndim, ctx.center)
    return dx.to(ctx.x_dtype), None, None, None


normalize.register_autograd(_backward, setup_context=_setup)
