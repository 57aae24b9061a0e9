"""A linear whose weight is quantised and frozen, beside a trained low-rank factor.

Shapes: x [..., I], y [..., O], rank r, scale s. W_q is the quantised weight, P the frozen (quantised) projector, B is trained:

    side     P         B         y                                     G_B                        kept of x for G_B
    right    [I, r]    [O, r]    x deq(W_q)ᵀ + s·(x P) Bᵀ + b          s·dYᵀ(x P) = s·G P         x P  [..., r]
    left     [O, r]    [r, I]    x deq(W_q)ᵀ + s·(x Bᵀ) Pᵀ + b         s·(dY P)ᵀ x = s·Pᵀ G       x    [..., I]

with G = dYᵀ x the gradient of the whole weight, which is never formed: G_B is s times GaLore's projected gradient.

deq(W_q) and P are functions of buffers alone. Compiled, the partition recomputes them in the backward pass; in eager mode
:class:`FrozenLinear` does. The input gradient is dX = dY deq(W_q) + s·(dY B) Pᵀ, or with Pᵀ and B in each other's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowmem_compile.errors import LowMemError
from lowmem_compile.optim.loqt.nf4 import NF4, Format
from lowmem_compile.optim.projector import Side
from lowmem_compile.optim.slots import compute_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

WEIGHT, PROJECTOR, FULL = "weight", "projector", "full"
TABLES = "tables"


class LoQTLinear(nn.Module):
    """What :func:`lowmem_compile.loqt` puts in the place of an ``nn.Linear``.

    Until its first merge it holds the whole weight (buffer ``full``) and computes what the linear did. From then on it holds the
    stored tensors of W_q (buffers ``weight_*``) and of P (``projector_*``).

    Attributes:
        B: the trained factor, [O, r] or [r, I], in the weight's dtype; zero until the first merge.
        bias: the linear's own bias parameter, or ``None``.
        side: of P.
        rank: r.
        scale: s.
        formats: how W_q and P are stored, by ``"weight"`` and ``"projector"``.
        started: a merge of the model has taken place.
        intercept: set while a merge is under way: takes the place of the forward pass.
    """

    bias: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear, *, side: Side, rank: int, scale: float, weight_format: Format, projector_format: Format
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.side, self.rank, self.scale = side, rank, scale
        self.formats: dict[str, Format] = {PROJECTOR: projector_format, WEIGHT: weight_format}
        self.weight_was_trained = linear.weight.requires_grad
        self.started = False
        self.intercept: Callable[[LoQTLinear, Tensor], Tensor] | None = None
        weight = linear.weight.detach()
        shape = (self.out_features, rank) if side == "right" else (rank, self.in_features)
        self.B = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        self.register_parameter("bias", linear.bias)
        self.register_buffer(FULL, weight)
        for name, table in weight_format.tables(weight.device).items():
            self.register_buffer(f"{TABLES}_{name}", table, persistent=False)
        self.train(linear.training)

    @property
    def merged(self) -> bool:
        """Whether the weight is held as W_q, P and B."""
        return FULL not in self._buffers

    @property
    def weight(self) -> Tensor:
        """The weight that the layer stands for, deq(W_q) + s·B Pᵀ, in B's dtype: computed anew, without a gradient."""
        return self.merged_weight().to(self.B.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W = deq(W_q) + s·B Pᵀ (left: s·P B), [O, I], in the dtype that merges are computed in."""
        wide = compute_dtype(self.B.dtype)
        if not self.merged:
            return self._buffer(FULL).to(wide)
        P, B = self.decoded(PROJECTOR, wide), self.B.to(wide)
        W = self.decoded(WEIGHT, wide)
        return torch.addmm(W, B, P.T, alpha=self.scale) if self.side == "right" else torch.addmm(W, P, B, alpha=self.scale)

    def decoded(self, what: str, dtype: torch.dtype) -> Tensor:
        """deq(W_q) [O, I] (``"weight"``) or P (``"projector"``)."""
        return self.formats[what].decode(self.stored(what), self._tables(), dtype)

    def stored(self, what: str) -> dict[str, Tensor]:
        """The stored tensors of W_q or P, by the names of their format."""
        return {name: self._buffer(f"{what}_{name}") for name in self.formats[what].parts()}

    @torch.no_grad()
    def store(self, what: str, value: Tensor) -> None:
        """Encode a new W_q or P into the buffers, in place where they exist."""
        for name, tensor in self.formats[what].encode(value).items():
            key = f"{what}_{name}"
            if key in self._buffers:
                self._buffer(key).copy_(tensor)
            else:
                self.register_buffer(key, tensor.contiguous().clone())

    def take_merged_form(self) -> None:
        """Hold W_q and P from here on, as yet undefined, in place of the whole weight."""
        self.drop_full()
        for what, form in self.formats.items():
            for name, (shape, dtype) in form.parts().items():
                self.register_buffer(f"{what}_{name}", torch.empty(shape, dtype=dtype, device=self.B.device))
        self.started = True

    def drop_full(self) -> None:
        """Let go of the whole weight: from here on W_q, P and B hold it."""
        self._buffers.pop(FULL, None)

    def forward(self, x: Tensor) -> Tensor:
        """Y [..., O] of x [..., I].

        Raises:
            LowMemError: training was begun before the first merge, so that B has no basis.
        """
        if self.intercept is not None:
            return self.intercept(self, x)
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """The layer's own forward pass."""
        if not self.merged:
            if self.training and torch.is_grad_enabled() and not self.started:
                raise LowMemError(
                    "a LoQT layer is trained before its first merge, which makes its basis from a gradient: call before_step(...)"
                    " of what lowmem_compile.loqt returned at the start of every training step, the first included."
                )
            return F.linear(x, self._buffer(FULL), self.bias)
        if self.side == "right":
            update = F.linear(self._times(PROJECTOR, x, transposed=True) * self.scale, self.B)
        else:
            update = self._times(PROJECTOR, F.linear(x, self.B) * self.scale)
        return self._times(WEIGHT, x, self.bias) + update

    def _times(self, what: str, x: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
        """X Mᵀ + b, or x M, with M = deq(W_q) or P; M is computed again in the backward pass."""
        form = self.formats[what]
        if torch.compiler.is_compiling() or not isinstance(form, NF4) or not torch.is_grad_enabled():
            M = self.decoded(what, self.B.dtype)
            return F.linear(x, M.T if transposed else M, bias)
        stored = self.stored(what)
        apply: Any = FrozenLinear.apply
        out: Tensor = apply(x, bias, form, self._tables(), self.B.dtype, transposed, tuple(stored), *stored.values())
        return out

    def _tables(self) -> dict[str, Tensor]:
        prefix = f"{TABLES}_"
        return {k.removeprefix(prefix): v for k, v in self._buffers.items() if k.startswith(prefix) and v is not None}

    def _buffer(self, key: str) -> Tensor:
        value = self._buffers[key]
        assert value is not None
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoQTLinear:
        """As in any module, but scales and tables stay float32 when the model's dtype is changed."""
        kept = {k: v for k, v in self._buffers.items() if v is not None and k != FULL and v.is_floating_point()}
        quantised = isinstance(self.formats[WEIGHT], NF4)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for key, before in kept.items():
            after = self._buffer(key)
            if quantised and after.dtype != before.dtype:
                self._buffers[key] = before.to(after.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the form of the checkpoint, merged or not yet; a plain linear's weight is taken before the first merge."""
        keys = [f"{what}_{name}" for what, how in self.formats.items() for name in how.parts()]
        if not self.merged and all(prefix + key in state_dict for key in keys):
            self.take_merged_form()
        elif self.merged and prefix + FULL in state_dict:
            for key in keys:
                self._buffers.pop(key, None)
            self.register_buffer(FULL, torch.empty(self.out_features, self.in_features, dtype=self.B.dtype, device=self.B.device))
        if not self.merged and prefix + "weight" in state_dict and prefix + FULL not in state_dict:
            plain = cast("dict[str, Any]", state_dict)
            plain[prefix + FULL] = plain.pop(prefix + "weight")
            plain.setdefault(prefix + "B", torch.zeros_like(self.B))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Sizes, rank, side and form, for ``print(model)``."""
        form = "merged" if self.merged else "not merged yet"
        bias = self.bias is not None
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"
        return f"{sizes}, rank={self.rank}, side={self.side}, scale={self.scale}, {form}"


class FrozenLinear(torch.autograd.Function):
    """X Mᵀ + b or x M in eager mode, with M stored as NF4: keeps the codes, not M, for the gradient of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        form: NF4,
        tables: Mapping[str, Tensor],
        dtype: torch.dtype,
        transposed: bool,
        names: tuple[str, ...],
        *stored: Tensor,
    ) -> Tensor:
        """See the class."""
        ctx.save_for_backward(*stored)
        ctx.form, ctx.tables, ctx.dtype, ctx.transposed, ctx.names = form, tables, dtype, transposed, names
        ctx.with_bias = bias is not None
        M = form.decode(dict(zip(names, stored, strict=True)), tables, dtype)
        return F.linear(x, M.T if transposed else M, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        dX = db = None
        if ctx.needs_input_grad[0]:
            M = ctx.form.decode(dict(zip(ctx.names, ctx.saved_tensors, strict=True)), ctx.tables, ctx.dtype).to(dY.dtype)
            dX = dY @ (M.T if ctx.transposed else M)
        if ctx.with_bias and ctx.needs_input_grad[1]:
            db = dY.reshape(-1, dY.shape[-1]).sum(0)
        return (dX, db, *(None,) * (len(ctx.needs_input_grad) - 2))


def layers_of(model: nn.Module) -> Iterator[tuple[str, LoQTLinear]]:
    """The LoQT layers of a model, each once, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LoQTLinear):
            yield name, module
