"""How a compiled model and its optimizer find each other: through the parameters.

A tap stands for one basis of one parameter. The compiled graph computes the projected gradient as the gradient of ``zero``, an
extra input of the graph that is 0 in every element and takes 4 bytes; a hook on it puts the result into ``param.grad``.

Parameters are looked up in a weak table: neither the model nor the optimizer keeps the other alive, and when the optimizer is
gone, gradients are whole again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lowmem_compile.optim.gradient import ProjectedGradient, add_gradient
from lowmem_compile.optim.projector import Side

if TYPE_CHECKING:
    from lowmem_compile.optim.base import LowRankOptimizer

_OWNERS: Any = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Tap:
    """One basis of one parameter, as the compiled graph uses it.

    Attributes:
        side: "right" or "left".
        basis: A [I, r] or L [O, r], in the dtype of the parameter.
        zero: leaf of the shape and dtype of the projected gradient; all elements are one number in memory, 0.
        generation: which refresh made the basis.
    """

    side: Side
    basis: Tensor
    zero: Tensor
    generation: int


def make_tap(param: Tensor, side: Side, basis: Tensor, shape: tuple[int, ...], generation: int) -> Tap:
    """A tap whose gradients go to ``param.grad``."""
    zero = torch.zeros((), dtype=param.dtype, device=param.device).expand(shape).requires_grad_()
    zero.register_post_accumulate_grad_hook(_receiver(weakref.ref(param), basis, side, generation))
    return Tap(side, basis, zero, generation)


def _receiver(param: weakref.ref[Tensor], basis: Tensor, side: Side, generation: int) -> Callable[[Tensor], None]:
    def receive(zero: Tensor) -> None:
        low, zero.grad = zero.grad, None
        target = param()
        if target is not None and low is not None:
            add_gradient(target, ProjectedGradient(low, basis, side, generation))

    return receive


def announce(optimizer: LowRankOptimizer, params: list[Tensor]) -> None:
    """Enter parameters of an optimizer into the table."""
    for p in params:
        owners = [ref for ref in _OWNERS.get(p, ()) if ref() is not None and ref() is not optimizer]
        _OWNERS[p] = (*owners, weakref.ref(optimizer))


def owners_of(param: Tensor) -> list[LowRankOptimizer]:
    """The living optimizers of this package that hold the parameter."""
    return [optimizer for ref in _OWNERS.get(param, ()) if (optimizer := ref()) is not None]


def tap_or_reason(param: Tensor) -> Tap | str | None:
    """The tap of a parameter; why it has none; or ``None`` if no optimizer of this package holds it."""
    owners = owners_of(param)
    if not owners:
        return None
    if len(owners) > 1:
        return "two optimizers hold the parameter, and each has its own projector"
    if param.grad_fn is not None or not param.requires_grad:
        return "the parameter is frozen"
    return owners[0].tap(param)


def state_bytes(param: Tensor) -> int:
    """Bytes of state that the optimizer of a tapped parameter keeps for it."""
    return owners_of(param)[0].state_bytes(param)
