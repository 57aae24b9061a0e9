"""A gradient of which only the projection exists, in the place of ``param.grad``.

:class:`ProjectedGradient` has the shape, dtype and device of its parameter, as PyTorch asks of a gradient, and holds R = G A
[O, r] (right) or R = Lᵀ G [r, I] (left) alone: r/I or r/O of the bytes. It takes part in what training loops do to gradients:

    accumulation            R + R', or R + down(G') where a whole gradient comes in
    clip_grad_norm_         the norm that is seen is ‖R‖; the factor multiplies R
    GradScaler              unscales R and looks for infinities in it
    zero_grad               drops it, or sets R to zero (``set_to_none=False``)

Anything else is a GradientError that says so: no operation makes the whole tensor unless :meth:`whole` is called, which gives
up(R), the part of the gradient that lies in the basis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from lowmem_compile._torch import rows_like
from lowmem_compile.errors import GradientError
from lowmem_compile.optim.projector import Side, down, up
from lowmem_compile.optim.sharded import Ranks, is_sharded, local

aten = torch.ops.aten


class ProjectedGradient(Tensor):
    """The projection of a gradient.

    Attributes:
        low: R, [O, r] or [r, I], in the dtype of the parameter.
        basis: A [I, r] or L [O, r], in that dtype.
        side: "right" or "left".
        generation: of the basis: which refresh made it.
        empty: it was set to zero and nothing was added since.
        full: a whole gradient that was added in place to an empty one, and then stands for it; usually ``None``.
        ranks: those that hold the same R, each for the rows of G that belong to its rows of L; or ``None``.
    """

    low: Tensor
    basis: Tensor
    side: Side
    generation: int
    empty: bool
    full: Tensor | None
    ranks: Ranks | None

    @staticmethod
    def __new__(
        cls, low: Tensor, basis: Tensor, side: Side, generation: int, *, empty: bool = False, ranks: Ranks | None = None
    ) -> Self:
        shape = (low.shape[0], basis.shape[0]) if side == "right" else (basis.shape[0], low.shape[1])
        make: Callable[..., Self] = Tensor._make_wrapper_subclass
        self = make(cls, shape, dtype=low.dtype, device=low.device)
        self.low, self.basis, self.side, self.generation, self.empty, self.full = low, basis, side, generation, empty, None
        self.ranks = ranks
        return self

    @property
    def held(self) -> Tensor:
        """The tensor that is there: R, or the whole gradient that replaced it."""
        return self.low if self.full is None else self.full

    def hold(self, held: Tensor) -> ProjectedGradient:
        """Another one with the same basis that holds this in place of :attr:`held`."""
        new = self.with_low(held) if self.full is None else self.with_low(self.low)
        new.full, new.empty = None if self.full is None else held, self.empty
        return new

    def with_low(self, low: Tensor) -> ProjectedGradient:
        """Another projection in the same basis."""
        basis = self.basis if low.dtype == self.basis.dtype else self.basis.to(low.dtype)
        return ProjectedGradient(low, basis, self.side, self.generation, ranks=self.ranks)

    def project(self, G: Tensor) -> Tensor:
        """The projection of a whole gradient in this basis; of its rows, with the others' added, where ranks share R."""
        low = down(G.to(self.dtype), (self.basis,), self.side)
        return low if self.ranks is None else self.ranks.total(low)

    def share_of_norm(self, order: float) -> float:
        """What this rank's part of a norm over all ranks is of ‖R‖: where n ranks hold one R, each counts n^(-1/order) of it."""
        return 1.0 if self.ranks is None or self.full is not None else float(self.ranks.number ** (-1 / order))

    def whole(self) -> Tensor:
        """up(R): the part of the gradient that lies in the basis, in full size."""
        if self.full is not None:
            return self.full
        return up(self.low, (self.basis,), self.side)

    def plus(self, other: Tensor) -> Tensor:
        """The sum with another gradient of the same parameter, in this basis.

        Raises:
            GradientError: the other is a projection in a basis of another refresh.
        """
        if self.full is not None:
            return other.plus(self.full) if isinstance(other, ProjectedGradient) else self.full + other
        if not isinstance(other, ProjectedGradient):
            return other.clone() if self.empty else self.with_low(self.low + self.project(other))
        if other.full is not None:
            return self.plus(other.full)
        if self.empty or other.empty:
            return other if self.empty else self
        if other.generation != self.generation:
            raise GradientError(
                "two projected gradients of one parameter are in different bases: between their forward passes optimizer.step() "
                "made a new one. Call optimizer.zero_grad() after the step that makes a basis."
            )
        return self.with_low(self.low + other.low)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ProjectedGradient(shape={tuple(self.shape)}, side={self.side!r}, low={self.low!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = HANDLERS.get(func)
        if handler is None:
            raise GradientError(
                f"{func} is not defined for a gradient that is kept projected: sums, scaling, norms and GradScaler's check are. "
                "Use grad.low for the projection, grad.whole() for its part of the full gradient, or compile with "
                "options={'disable': ['projection_taps']} to get whole gradients."
            )
        return handler(func, args, kwargs or {})


def _each(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply the operation to what the gradient holds, and wrap the result."""
    grad: ProjectedGradient = args[0]
    result = func(grad.held, *args[1:], **kwargs)
    return grad if result is grad.held else grad.hold(result)


def _factor(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product or quotient with a number."""
    first, second = args[:2]
    if isinstance(first, ProjectedGradient) and (not isinstance(second, Tensor) or second.dim() == 0):
        return _each(func, args, kwargs)
    if isinstance(second, ProjectedGradient) and first.dim() == 0 and func is aten.mul.Tensor:
        return second.hold(func(first, second.held))
    raise GradientError(f"{func} of a projected gradient is defined with a number alone, not with a tensor of its shape.")


def _add(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A sum of gradients of one parameter."""
    first, second = args[:2]
    if not isinstance(second, Tensor) or first.shape != second.shape:
        raise GradientError(f"{func} of a projected gradient is defined with another gradient of its parameter alone.")
    alpha = kwargs.get("alpha", 1)
    addend = second if alpha == 1 else second * alpha
    if not isinstance(first, ProjectedGradient):
        if func is aten.add_.Tensor:
            raise GradientError(
                "a projected gradient cannot be added to a whole tensor in place: only the optimizer of lowmem_compile.optim "
                "that holds the parameter can use it."
            )
        assert isinstance(addend, ProjectedGradient)
        return addend.plus(first)
    total = first.plus(addend)
    if func is not aten.add_.Tensor:
        return total
    first.empty = False
    if isinstance(total, ProjectedGradient):
        first.low, first.basis, first.generation, first.full = total.low, total.basis, total.generation, None
    else:
        first.full = total
    return first


def _zero(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
    args[0].low.zero_()
    args[0].empty, args[0].full = True, None
    return args[0]


def _norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The norm of R over all elements; a norm over some dimensions is not known."""
    if len(args) > 2 and args[2] is not None:
        raise GradientError("of a projected gradient the norm over all elements alone is known")
    return func(args[0].held, *args[1:], **kwargs) * args[0].share_of_norm(_order(args))


def _norms(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The norms of a list of gradients."""
    shares = [g.share_of_norm(_order(args)) if isinstance(g, ProjectedGradient) else 1.0 for g in args[0]]
    return [norm * share for norm, share in zip(_lists(func, args, kwargs), shares, strict=True)]


def _order(args: tuple[Any, ...]) -> float:
    return float(args[1]) if len(args) > 1 else 2.0


def _lists(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on a list of gradients."""
    grads = [g.held if isinstance(g, ProjectedGradient) else g for g in args[0]]
    return func(grads, *args[1:], **kwargs)


HANDLERS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar), _factor),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar), _factor),
    **dict.fromkeys((aten.add.Tensor, aten.add_.Tensor), _add),
    **dict.fromkeys(
        (aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default, aten.neg.default), _each
    ),
    **dict.fromkeys((aten.linalg_vector_norm.default, aten.norm.Scalar), _norm),
    aten._foreach_norm.Scalar: _norms,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _lists,
    **dict.fromkeys((aten._foreach_mul_.Scalar, aten._foreach_mul_.Tensor), _lists),
    aten.zero_.default: _zero,
}
"""What may be done to a projected gradient."""


CONSUMED = (
    "the gradient was consumed by the update in the backward pass (fused_backward=True). It cannot be accumulated, clipped, "
    "unscaled or read: use fused_backward=False for that."
)


class ConsumedGradient(Tensor):
    """Stands in ``param.grad`` for a gradient that is gone; every operation but ``zero_`` and ``detach_`` is a GradientError."""

    @staticmethod
    def __new__(cls, param: Tensor) -> Self:
        make: Callable[..., Self] = Tensor._make_wrapper_subclass
        return make(cls, param.shape, dtype=param.dtype, device=param.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ConsumedGradient(shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (aten.zero_.default, aten.detach_.default, aten.detach.default):
            return args[0]
        raise GradientError(CONSUMED)


def whole_gradient(param: Tensor) -> Tensor | None:
    """The whole gradient of a parameter (its rows, if the parameter is sharded), or ``None`` if only a projection is there."""
    grad = param.grad
    if isinstance(grad, ConsumedGradient):
        return None
    held = _inner(grad)
    if not isinstance(held, ProjectedGradient):
        return grad
    return None if held.full is None else _like(param, held.full)


def projected_gradient(param: Tensor) -> ProjectedGradient | None:
    """The projected gradient of a parameter, or ``None`` if there is none or a whole one."""
    held = _inner(param.grad)
    return held if isinstance(held, ProjectedGradient) and held.full is None else None


def add_gradient(param: Tensor, low: ProjectedGradient) -> None:
    """Add a projected gradient to what ``param.grad`` holds; of a sharded parameter, that of its rows."""
    held = _inner(param.grad)
    if held is None:
        total: Tensor = low
    elif isinstance(held, ProjectedGradient):
        total = held.plus(low)
    else:
        total = low.plus(held)
    param.grad = _like(param, total)


def _inner(grad: Tensor | None) -> Tensor | None:
    """What a gradient holds on this rank."""
    return grad if grad is None else local(grad)


def _like(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a parameter from what this rank has of it."""
    return rows_like(param, grad) if is_sharded(param) else grad
