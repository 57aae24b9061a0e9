"""Flora: momentum in a random subspace that is drawn anew (arXiv:2402.03293, ICML 2024).

Written from the paper's equations. A [I, r] has entries N(0, 1/r), so E[A Aᵀ] = I; κ is ``update_interval``:

    t mod κ = 0    A' from the next seed;  C ← C (Aᵀ A')          nothing is formed at full size
    always         C ← β₁ C + (1-β₁) G A,  then the base update on C Aᵀ

On the left side L [O, r] and C [r, I]: C ← (L'ᵀ L) C, and C ← β₁ C + (1-β₁) Lᵀ G. The base update sees C Aᵀ in place of the
gradient: Adafactor with a factored second moment of full size and no momentum of its own, or plain SGD.
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from lowmem_compile.optim.base import LowRankOptimizer
from lowmem_compile.optim.bases import gaussian
from lowmem_compile.optim.moments import (
    Rates,
    Update,
    apply_update,
    clip_rms,
    decay_of,
    factored_rate,
    factored_slots,
    factored_step,
    rates_of,
)
from lowmem_compile.optim.projector import Factors, Plan, up
from lowmem_compile.optim.settings import Common, ParamsLike
from lowmem_compile.optim.slots import Slot, State, compute_dtype, moment_slot
from lowmem_compile.optim.units import Group, Move, Work


class Flora(LowRankOptimizer):
    """Momentum under a random projection from a seed, with Adafactor or SGD.

    Args:
        params: parameters, named parameters or groups. Matrices are projected.
        lr: learning rate.
        rank: r of every projected parameter of a group; ``None`` in a group leaves its momentum at full size.
        rank_ratio: instead of a rank: r = max(min(O, I) // ratio, 1).
        update_interval: κ, steps between new projections.
        scale: multiplies the update of projected parameters.
        base: ``"adafactor"`` or ``"sgd"``.
        seed: from which each parameter's own seed comes.
        **common: see :class:`lowmem_compile.optim.settings.Common`; β₁ is the momentum's decay.

    State: C [O, r] (right) or [r, I] (left), Adafactor's O + I numbers, and a seed; the projector is drawn again each step.
    No step needs the whole gradient.

    Raises:
        OptionError: see :meth:`LowRankOptimizer.add_param_group`.
    """

    bases: ClassVar[tuple[str, ...]] = ("adafactor", "sgd")
    stores_projector: ClassVar[bool] = False
    refresh_needs_gradient: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsLike,
        lr: float = 1e-3,
        *,
        rank: int | None = None,
        rank_ratio: float | None = None,
        update_interval: int = 1000,
        scale: float = 1.0,
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        options = {
            "lr": lr,
            "rank": rank,
            "rank_ratio": rank_ratio,
            "update_interval": update_interval,
            "scale": scale,
            "seed": seed,
        }
        settings: dict[str, Any] = {"base": "adafactor", **common}
        super().__init__(params, options, settings)

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group, plan: Plan | None) -> tuple[Slot, ...]:
        momentum = moment_slot("exp_avg", shape if plan is None else plan.low_shape(shape), dtype, group)
        return (momentum, *factored_slots(shape, dtype)) if group["base"] == "adafactor" else (momentum,)

    def drawn_factors(self, plan: Plan, seed: int, like: Tensor) -> Factors:
        ((n, rank),) = plan.factor_shapes
        return (gaussian(n, rank, seed, like.device, compute_dtype(like.dtype)),)

    def carry(self, move: Move) -> None:
        overlap = move.old[0].T @ move.new[0]
        C = move.slots[0].load(move.state)
        move.slots[0].save(move.state, C @ overlap if move.plan.side == "right" else overlap.T @ C)

    def projected_step(self, work: Work) -> None:
        C = self._advance(work.state, work.slots[0], work.low, work.group)
        M = up(C, work.factors, work.plan.side)
        rates = rates_of(work.group, work.state["step"]) if work.rates is None else work.rates
        self._finish(work.param, work.state, work.slots, M, work.group, work.group["scale"], rates)

    def unprojected_step(
        self, p: Tensor, grad: Tensor, state: State, slots: tuple[Slot, ...], group: Group, rates: Rates | None = None
    ) -> None:
        m = self._advance(state, slots[0], grad.to(compute_dtype(p.dtype)), group)
        self._finish(p, state, slots, m, group, 1.0, rates_of(group, state["step"]) if rates is None else rates)

    def _advance(self, state: State, slot: Slot, R: Tensor, group: Group) -> Tensor:
        """The momentum after R."""
        beta = group["betas"][0]
        C: Tensor = slot.load(state) * beta + R * (1 - beta)
        slot.save(state, C)
        return C

    def _finish(
        self, p: Tensor, state: State, slots: tuple[Slot, ...], M: Tensor, group: Group, scale: float, rates: Rates
    ) -> None:
        """The base update on a momentum of full size."""
        if group["base"] == "sgd":
            apply_update(p, M, Update(M, rates.lr * scale, decay_of(rates.lr, group), True))
            return
        rate = factored_rate(p, group, rates)
        u = clip_rms(factored_step(state, slots[1:], M, group, rates), group["clip_threshold"]) * rate
        apply_update(p, u, Update(u, scale, decay_of(rate, group), True))
