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

from lowmem_compile._torch import Gathered, gathered_by_fsdp
from lowmem_compile.errors import GradientError
from lowmem_compile.kernels.projection_tap import Refresher
from lowmem_compile.optim.gradient import ProjectedGradient, add_gradient
from lowmem_compile.optim.projector import Side
from lowmem_compile.optim.row_gradients import add_to_rows

if TYPE_CHECKING:
    from lowmem_compile.optim.base import LowRankOptimizer
    from lowmem_compile.optim.fused import Fused
    from lowmem_compile.optim.intake import GradientIntake

_OWNERS: Any = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Tap:
    """One basis of one parameter, as the compiled graph uses it.

    Attributes:
        side: "right" or "left".
        basis: A [I, r] or L [O, r], in the dtype of the parameter; the ticket of the refresher if there is one.
        zero: leaf of the shape and dtype of the projected gradient; all elements are one number in memory, 0.
        generation: which refresh made the basis, or makes it.
        refresher: makes the basis inside the backward pass.
    """

    side: Side
    basis: Tensor
    zero: Tensor
    generation: int
    refresher: Refresher | None = None


def make_tap(
    param: Tensor, side: Side, basis: Tensor, shape: tuple[int, ...], generation: int, gathered: Gathered | None = None
) -> Tap:
    """A tap whose gradients go to ``param.grad``.

    Args:
        param: the optimizer's.
        side: "right" or "left".
        basis: A or L, in the dtype that the graph reads the parameter in.
        shape: of the projected gradient.
        generation: which refresh made the basis.
        gathered: of a parameter that FSDP shards, how its gradient is reduced.
    """

    def wrap(low: Tensor) -> ProjectedGradient:
        return ProjectedGradient(low, basis, side, generation)

    return Tap(side, basis, _zero(param, basis.dtype, shape, wrap, gathered), generation)


def make_refresh_tap(optimizer: GradientIntake, param: Tensor, side: Side, shape: tuple[int, ...], generation: int) -> Tap:
    """A tap that makes its basis in the backward pass; its gradients go to ``param.grad``."""
    of, to = weakref.ref(optimizer), weakref.ref(param)

    def both() -> tuple[GradientIntake, Tensor]:
        found, target = of(), to()
        if found is None or target is None:
            raise GradientError(
                "the optimizer that was to make a basis in this backward pass was deleted after the forward pass."
            )
        return found, target

    def take(G: Tensor) -> Tensor:
        found, target = both()
        return found.make_basis(target, G)

    def wrap(low: Tensor) -> ProjectedGradient:
        found, target = both()
        tap = found.tap(target)
        if isinstance(tap, Tap) and tap.refresher is None:
            return ProjectedGradient(low, tap.basis, side, generation)
        none = low.new_full((param_rows(target, side), low.shape[1 if side == "right" else 0]), float("nan"))
        return ProjectedGradient(low, none, side, generation)

    refresher = Refresher(take)
    return Tap(side, refresher.ticket, _zero(param, param.dtype, shape, wrap), generation, refresher)


def param_rows(param: Tensor, side: Side) -> int:
    """Rows of a basis of this side."""
    return int(param.shape[1 if side == "right" else 0])


def _zero(
    param: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    wrap: Callable[[Tensor], ProjectedGradient],
    gathered: Gathered | None = None,
) -> Tensor:
    """A leaf of zeros in 4 bytes; what arrives as its gradient is added to ``param.grad``."""
    to = weakref.ref(param)

    def receive(zero: Tensor) -> None:
        low, zero.grad = zero.grad, None
        target = to()
        if target is None or low is None:
            return
        if gathered is None:
            add_gradient(target, wrap(low))
        else:
            add_to_rows(target, wrap(low), gathered)

    zero = torch.zeros((), dtype=dtype, device=param.device).expand(shape).requires_grad_()
    zero.register_post_accumulate_grad_hook(receive)
    return zero


def announce(optimizer: LowRankOptimizer, params: list[Tensor]) -> None:
    """Enter parameters of an optimizer into the table."""
    for p in params:
        owners = [ref for ref in _OWNERS.get(p, ()) if ref() is not None and ref() is not optimizer]
        _OWNERS[p] = (*owners, weakref.ref(optimizer))


def owners_of(param: Tensor) -> list[LowRankOptimizer]:
    """The living optimizers of this package that hold the parameter."""
    return [optimizer for ref in _OWNERS.get(param, ()) if (optimizer := ref()) is not None]


def held_parameter(param: Tensor) -> Tensor:
    """The parameter that an optimizer holds in the place of one that a graph reads: of one that FSDP gathered, its rows."""
    gathered = gathered_by_fsdp(param)
    held = None if gathered is None else gathered.sharded
    return param if held is None else held


def tap_or_reason(param: Tensor) -> Tap | str | None:
    """The tap of a parameter that a graph reads; why it has none; or ``None`` if no optimizer of this package holds it."""
    gathered, read, param = gathered_by_fsdp(param), param, held_parameter(param)
    owners = owners_of(param)
    if not owners:
        return None
    if len(owners) > 1:
        return "two optimizers hold the parameter, and each has its own projector"
    if owners[0].fusion.foreign_hooks(param):
        return "the parameter has hooks on its gradient, which have to see it whole"
    if gathered is not None and read.device != param.device:
        return "FSDP keeps the parameter on another device (offloading)"
    return owners[0].tap(param, read.dtype, gathered)


def fused_or_none(param: Tensor) -> Fused | str | None:
    """How a graph is to update a parameter in its backward pass; why its gradient must come out; or ``None`` if it need not."""
    owners = owners_of(param)
    return owners[0].fusion.of_parameter(param) if len(owners) == 1 else None


def state_bytes(param: Tensor) -> int:
    """Bytes of state that the optimizer of a tapped parameter keeps for it, on this rank."""
    held = held_parameter(param)
    return owners_of(held)[0].state_bytes(held)
