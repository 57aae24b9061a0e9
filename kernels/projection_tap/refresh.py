"""Bases made inside the backward pass: ``lowmem::refresh_tap`` and ``lowmem::fresh_factors``.

``lowmem::refresh_tap``: as ``lowmem::projection_tap``, for a step that makes its basis inside the backward pass.

The whole gradient G = dYᵀ x exists inside one operation of the backward graph: it is formed, handed to the optimizer, which makes
the basis, and projected. The graph knows the optimizer by a number, so nothing of it is baked into compiled code.

``lowmem::fresh_factors`` is for backward graphs that update the weight too: it takes the whole gradient, which such a graph has
in hand for one weight at a time, and returns new factors. It changes nothing; the graph itself writes them into the state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch

from lowmem_compile.errors import GradientError


class Refresher:
    """What takes a whole gradient and returns its projection in the basis it made from it, or, for ``fresh_factors``, that basis.

    Attributes:
        ticket: int64 scalar that stands for it in a graph.
    """

    def __init__(self, take: Callable[[torch.Tensor], Any]) -> None:
        self.take = take
        number = next(_NUMBERS)
        self.ticket = torch.tensor(number, dtype=torch.int64)
        _REFRESHERS[number] = self


_NUMBERS = itertools.count()
_REFRESHERS: WeakValueDictionary[int, Refresher] = WeakValueDictionary()


@torch.library.custom_op("lowmem::refresh_tap", mutates_args=())
def refresh_tap(
    y: torch.Tensor,
    x: torch.Tensor,  # noqa: ARG001
    ticket: torch.Tensor,  # noqa: ARG001
    zero: torch.Tensor,  # noqa: ARG001
    left: bool,  # noqa: ARG001
) -> torch.Tensor:
    """A copy of y; the gradient of ``zero`` is what the refresher of the ticket makes of dYᵀ x.

    Args:
        y: [..., O], output of the linear without a gradient for its weight.
        x: [..., I], its input.
        ticket: of a :class:`Refresher`.
        zero: [O, r], or [r, I] if ``left``.
        left: the output side is projected.
    """
    return y.clone()


@refresh_tap.register_fake
def _(y: torch.Tensor, x: torch.Tensor, ticket: torch.Tensor, zero: torch.Tensor, left: bool) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(y)


@torch.library.custom_op("lowmem::refresh_basis", mutates_args=())
def refresh_basis(grad: torch.Tensor, x: torch.Tensor, ticket: torch.Tensor, rank: int, left: bool) -> torch.Tensor:
    """Form dYᵀ x, let the refresher make a basis from it, and return the projection [O, r] or [r, I].

    Args:
        grad: dY [N, O].
        x: [N, I].
        ticket: of a :class:`Refresher`.
        rank: r.
        left: the output side is projected.

    Raises:
        GradientError: the optimizer is gone.
    """
    refresher = _REFRESHERS.get(int(ticket))
    if refresher is None:
        raise GradientError("the optimizer that was to make a basis in this backward pass was deleted after the forward pass.")
    low: torch.Tensor = refresher.take(grad.T @ x)
    expected = (rank, x.shape[1]) if left else (grad.shape[1], rank)
    if tuple(low.shape) != expected:
        raise AssertionError(f"a refresher returned {tuple(low.shape)}, not {expected}")
    return low.to(grad.dtype).contiguous()


@refresh_basis.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, ticket: torch.Tensor, rank: int, left: bool) -> torch.Tensor:  # noqa: ARG001
    return grad.new_empty((rank, x.shape[1]) if left else (grad.shape[1], rank))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    _, x, ticket, zero, ctx.left = inputs
    ctx.dtype, ctx.rank = zero.dtype, zero.shape[0 if ctx.left else 1]
    ctx.save_for_backward(x, ticket)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, ticket = ctx.saved_tensors
    low = None
    if ctx.needs_input_grad[3]:
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.to(grad.dtype).reshape(-1, x.shape[-1])
        low = torch.ops.lowmem.refresh_basis(rows, inputs, ticket, ctx.rank, ctx.left).to(ctx.dtype)
    return grad, None, None, low, None


refresh_tap.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("lowmem::fresh_factors", mutates_args=())
def fresh_factors(grad: torch.Tensor, ticket: torch.Tensor, shape: Sequence[int]) -> list[torch.Tensor]:
    """The factors of a new basis from a whole gradient; nothing is changed.

    Args:
        grad: G, in float32 or float64.
        ticket: of a :class:`Refresher` that returns factors.
        shape: rows and columns of each factor, one after the other.

    Raises:
        GradientError: the optimizer is gone, or the gradient is not finite.
    """
    refresher = _REFRESHERS.get(int(ticket))
    if refresher is None:
        raise GradientError("the optimizer that was to make a basis in this backward pass was deleted after the forward pass.")
    made = refresher.take(grad)
    if [size for factor in made for size in factor.shape] != list(shape):
        raise AssertionError(f"a refresher returned {[tuple(factor.shape) for factor in made]}, not {list(shape)}")
    return [factor.to(grad.dtype).clone(memory_format=torch.contiguous_format) for factor in made]


@fresh_factors.register_fake
def _(grad: torch.Tensor, ticket: torch.Tensor, shape: Sequence[int]) -> list[torch.Tensor]:  # noqa: ARG001
    return [grad.new_empty((rows, columns)) for rows, columns in zip(shape[::2], shape[1::2], strict=True)]
