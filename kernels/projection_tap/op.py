"""``lowmem::projection_tap``: the output of a linear, whose backward also gives the projected gradient of the weight.

Forward is the identity on y. ``zero`` is an input that is 0 everywhere; its gradient is the projected gradient. The pipeline
takes the op out of the joint graph, so nothing is left of it but the two products of the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch

from lowmem_compile.kernels.projection_tap.reference import projected_gradient_reference


@torch.library.custom_op("lowmem::projection_tap", mutates_args=())
def projection_tap(
    y: torch.Tensor,
    x: torch.Tensor,  # noqa: ARG001
    basis: torch.Tensor,  # noqa: ARG001
    zero: torch.Tensor,  # noqa: ARG001
    left: bool,  # noqa: ARG001
) -> torch.Tensor:
    """A copy of y; the gradient of ``zero`` is :func:`projected_gradient_reference`, x and basis get none.

    Args:
        y: [..., O], output of the linear without a gradient for its weight.
        x: [..., I], its input.
        basis: A [I, r], or L [O, r] if ``left``.
        zero: [O, r], or [r, I] if ``left``.
        left: the output side is projected.
    """
    return y.clone()


@projection_tap.register_fake
def _(y: torch.Tensor, x: torch.Tensor, basis: torch.Tensor, zero: torch.Tensor, left: bool) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(y)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    _, x, basis, zero, ctx.left = inputs
    ctx.dtype = zero.dtype
    ctx.save_for_backward(x, basis)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, basis = ctx.saved_tensors
    low = None
    if ctx.needs_input_grad[3]:
        low = projected_gradient_reference(grad, x, basis, ctx.left).to(ctx.dtype)
    return grad, None, None, low, None


projection_tap.register_autograd(_backward, setup_context=_setup)
