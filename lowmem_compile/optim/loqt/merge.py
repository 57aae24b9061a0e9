"""A merge: the trained factor goes into the quantised weight, and the layer gets a new basis from a gradient.

For one layer, with its whole weight W and the gradient G = ∂loss/∂W of one batch (LoQT, arXiv:2405.16528, algorithms 1 and 2):

    W ← deq(W_q) + s·B Pᵀ                                                   (left: s·P B)
    P ← NF4(first r right singular vectors of G)                            (left: left ones)
    Ŵ ← W;  C times:  Q = NF4(Ŵ),  B = (W - deq Q) P (PᵀP)⁺/s,  Ŵ ← W - s·B Pᵀ
    W_q, B ← those of the C rounds with the least ‖W - deq Q - s·B Pᵀ‖_F

The inner line is the error compensation: B starts as the part of the quantisation error that P can express, P after its own
quantisation. Without quantisation the error is zero: W_q ← W, B ← 0. C = 0: W_q = NF4(W), B = 0. Algorithm 2 of the paper prints
Ŵ in the equation of B, where the released code has W, which is the least-squares solution; so here.

All layers are merged during the one backward pass that gives the gradients, each as soon as its own gradient is complete: of
whole weights and whole gradients only those of one layer exist at a time. What the layer gave in the forward pass stays valid,
because dX is computed before the layer changes, and W itself changes only by what quantisation and compensation leave over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_compile.errors import GradientError
from lowmem_compile.optim.bases import mix, randomised_vectors, singular_vectors
from lowmem_compile.optim.loqt.linear import PROJECTOR, WEIGHT, LoQTLinear
from lowmem_compile.optim.loqt.nf4 import Plain
from lowmem_compile.optim.projector import Side
from lowmem_compile.optim.slots import compute_dtype


class Compensated(NamedTuple):
    """What to store for a weight: the value to quantise, the factor that makes up for its error, and ‖error‖_F."""

    value: Tensor
    B: Tensor
    error: float


def compensate(layer: LoQTLinear, W: Tensor, rounds: int) -> Compensated:
    """The best of some rounds of error compensation.

    Args:
        layer: holds the new projector already; gives formats, scale and side.
        W: the weight to store, [O, I], float32 or float64.
        rounds: C, at least 0.
    """
    zero = W.new_zeros(layer.B.shape)
    form = layer.formats[WEIGHT]
    if isinstance(form, Plain):
        return Compensated(W, zero, 0.0)
    tables = form.tables(W.device)
    P = layer.decoded(PROJECTOR, W.dtype)
    inverse = torch.linalg.pinv(P) if rounds else None
    best = None
    guess = W
    for _ in range(max(rounds, 1)):
        error = W - form.decode(form.encode(guess), tables, W.dtype)
        B = zero if inverse is None else _factor(error, inverse, layer.side) / layer.scale
        update = layer.scale * _product(B, P, layer.side)
        left = float(torch.linalg.norm(error - update))
        if best is None or left < best.error:
            best = Compensated(guess, B, left)
        guess = W - update
    assert best is not None
    return best


def _factor(error: Tensor, inverse: Tensor, side: Side) -> Tensor:
    """The least-squares solution of B Pᵀ = error (left: P B = error), from P⁺."""
    return error @ inverse.T if side == "right" else inverse @ error


def _product(B: Tensor, P: Tensor, side: Side) -> Tensor:
    return B @ P.T if side == "right" else P @ B


@dataclass(frozen=True)
class MergeSettings:
    """How bases are made and errors compensated.

    Attributes:
        compensation: C, rounds.
        svd: "exact" or "randomised".
        seed: of the randomised SVD.
    """

    compensation: int
    svd: str
    seed: int


@torch.no_grad()
def merge_layer(layer: LoQTLinear, G: Tensor, settings: MergeSettings, seed: int) -> float:
    """Merge one layer and give it a new basis.

    Args:
        layer: changed in place.
        G: gradient of its whole weight, [O, I].
        settings: how.
        seed: of this layer and merge.

    Returns:
        ‖W - deq(W_q) - s·B Pᵀ‖_F / ‖W‖_F, what the layer's weight lost (0 without quantisation).
    """
    W = layer.merged_weight()
    G = G.to(W.dtype)
    if settings.svd == "exact":
        P = singular_vectors(G, layer.rank, layer.side)
    else:
        P = randomised_vectors(G, layer.rank, layer.side, seed)
    layer.store(PROJECTOR, P)
    del P, G
    found = compensate(layer, W, settings.compensation)
    layer.store(WEIGHT, found.value)
    layer.B.copy_(found.B)
    layer.drop_full()
    norm = float(torch.linalg.norm(W))
    return found.error / norm if norm else 0.0


@dataclass
class Merge:
    """One merge of a model: takes the place of the layers' forward passes, and merges each in the backward pass.

    Attributes:
        settings: how.
        number: of this merge, for seeds.
        names: of the layers.
        uses: forward passes of each layer that have no gradient yet; a layer that is used several times (weight sharing between
            blocks) is merged when the last has come.
        errors: relative error of each merged layer, by name.
        refused: layers whose gradient was not finite.
    """

    settings: MergeSettings
    number: int
    names: dict[LoQTLinear, str]
    uses: dict[LoQTLinear, int] = field(default_factory=dict)
    pending: dict[LoQTLinear, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    backward: bool = False

    def intercept(self, layer: LoQTLinear, x: Tensor) -> Tensor:
        """The layer's forward pass, with its merge in the backward pass."""
        if not torch.is_grad_enabled():
            return layer.compute(x)
        if not self.backward:  # a forward pass that checkpointing repeats is not counted again
            self.uses[layer] = self.uses.get(layer, 0) + 1
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        apply: Any = _MergeInBackward.apply
        out: Tensor = apply(x, anchor, layer, self)
        return out

    def receive(self, layer: LoQTLinear, G: Tensor) -> None:
        """Take the gradient of one use of a layer; merge the layer if it was the last.

        Raises:
            GradientError: the layer has been merged in this backward pass already.
        """
        name = self.names[layer]
        if name in self.errors:
            raise GradientError(
                f"{name} is used several times inside reentrant checkpointing (use_reentrant=True): its gradient cannot be "
                "completed before it is merged. Use use_reentrant=False."
            )
        self.uses[layer] = self.uses.get(layer, 0) - 1
        G = self.pending.pop(layer) + G if layer in self.pending else G
        if self.uses[layer] > 0:
            self.pending[layer] = G
        else:
            self._finish(layer, G)

    def finish_pending(self) -> None:
        """Merge the layers of which one use had no part in the loss."""
        for layer in list(self.pending):
            self._finish(layer, self.pending.pop(layer))

    def _finish(self, layer: LoQTLinear, G: Tensor) -> None:
        name = self.names[layer]
        if not bool(G.isfinite().all()):
            self.refused.append(name)
            return
        ordinal = list(self.names).index(layer)
        seed = mix(mix(self.settings.seed, ordinal), self.number)
        self.errors[name] = merge_layer(layer, G, self.settings, seed)


class _MergeInBackward(torch.autograd.Function):
    """A LoQT layer whose backward pass gives dX, then hands the whole gradient of its weight to a merge."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: LoQTLinear, merge: Merge) -> Tensor:  # noqa: ARG004
        """See the class."""
        ctx.save_for_backward(x)
        ctx.layer, ctx.merge = layer, merge
        return layer.compute(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        (dY,), (x,), layer = grads, ctx.saved_tensors, ctx.layer
        with torch.no_grad():
            dX = (dY @ layer.weight.to(dY.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
            wide = torch.promote_types(dY.dtype, x.dtype)
            rows, columns = dY.reshape(-1, dY.shape[-1]).to(wide), x.reshape(-1, x.shape[-1]).to(wide)
            G = (rows.T @ columns).to(compute_dtype(layer.B.dtype))
            del rows, columns
            ctx.merge.receive(layer, G)
        return dX, torch.zeros((), device=dY.device), None, None
