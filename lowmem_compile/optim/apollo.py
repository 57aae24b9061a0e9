"""APOLLO and APOLLO-Mini: Adam's scaling estimated in a random subspace (arXiv:2412.05270, MLSys 2025).

Written from the paper's equations (Algorithm 1). P has entries N(0, 1/r), drawn anew every T steps; moments are kept:

    R = down(G),  N = Adam(R),  φ = ‖N‖/‖R‖ along the rank axis (Mini: r = 1 and one φ for the matrix)
    W ← W - η·scale·limiter(φ ⊙ G)
"""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from torch import Tensor

from lowmem_compile.optim.base import LowRankOptimizer
from lowmem_compile.optim.bases import gaussian
from lowmem_compile.optim.fira import scaled_norm_slot
from lowmem_compile.optim.limiter import limit_growth, norm_ratio
from lowmem_compile.optim.moments import take_step
from lowmem_compile.optim.projector import Factors, Plan
from lowmem_compile.optim.settings import Common, ParamsLike
from lowmem_compile.optim.slots import Slot, compute_dtype
from lowmem_compile.optim.units import Group, Work

MINI_SCALE = 128**0.5
"""The α that the paper gives for APOLLO-Mini."""


class APOLLO(LowRankOptimizer):
    """APOLLO with AdamW, moments in any storage. Every step needs the whole gradient.

    Args:
        params: parameters, named parameters or groups. Matrices are scaled so.
        lr: learning rate.
        rank: r of every projected parameter of a group; ``None`` in a group leaves it to plain AdamW.
        rank_ratio: instead of a rank: r = max(min(O, I) // ratio, 1).
        mini: one scaling factor for each matrix instead of one for each channel; ``True`` makes 1 the default rank. By
            default, where the rank given is 1.
        update_interval: T, steps between new projections.
        scale: α, multiplies the update; by default 1, and √128 for Mini.
        seed: from which each parameter's own seed comes.
        **common: see :class:`lowmem_compile.optim.settings.Common`; ``base`` is ``"adamw"``.

    State: m and v of R, the norm of the last update, and a seed; the projector is drawn again each step.

    Raises:
        OptionError: see :meth:`LowRankOptimizer.add_param_group`.
    """

    bases: ClassVar[tuple[str, ...]] = ("adamw",)
    stores_projector: ClassVar[bool] = False
    refresh_needs_gradient: ClassVar[bool] = False
    needs_full_gradient: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsLike,
        lr: float = 1e-3,
        *,
        rank: int | None = None,
        rank_ratio: float | None = None,
        mini: bool | None = None,
        update_interval: int = 200,
        scale: float | None = None,
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        options = {
            "lr": lr,
            "rank": 1 if mini and rank is None and rank_ratio is None else rank,
            "rank_ratio": rank_ratio,
            "mini": mini,
            "update_interval": update_interval,
            "scale": scale,
            "seed": seed,
        }
        super().__init__(params, options, common)

    def _check_group(self, group: Group, where: str, shared: object) -> None:
        if group["mini"] is None:
            group["mini"] = group["rank"] == 1
        if group["scale"] is None:
            group["scale"] = MINI_SCALE if group["mini"] else 1.0
        super()._check_group(group, where, shared)

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group, plan: Plan | None) -> tuple[Slot, ...]:
        slots = super().slots(shape, dtype, group, plan)
        return slots if plan is None else (*slots, scaled_norm_slot())

    def drawn_factors(self, plan: Plan, seed: int, like: Tensor) -> Factors:
        ((n, rank),) = plan.factor_shapes
        return (gaussian(n, rank, seed, like.device, compute_dtype(like.dtype)),)

    def projected_step(self, work: Work) -> None:
        assert work.full is not None
        update = take_step(work.state, work.slots, work.low, work.param, work.group, work.rates)
        ratio = norm_ratio(update.direction, work.low, work.plan.side, whole=work.group["mini"])
        S, norm = limit_growth(ratio * work.full, work.slots[-1].load(work.state), total=work.total)
        work.slots[-1].save(work.state, norm)
        self.apply(work, S, update)
