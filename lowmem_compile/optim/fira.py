"""Fira: full-rank training under a low-rank constraint (arXiv:2410.01623, NeurIPS 2025), in the paper's form.

    t mod T = 0    P ← the first r singular vectors of G, as in GaLore
    always         N = Adam(R),  φ = ‖N‖/‖R‖ along the rank axis,  S = limiter(φ ⊙ (G - up(R)))
                   W ← W - η·scale·(up(N) + S)

φ scales whole rows or columns, so φ ⊙ up(R) = up(φ ⊙ R). With the limiter's factor f the direction is then
up(N - φ/f ⊙ R) + φ/f ⊙ G: one product with P in place of two, and S is never formed.

The released package multiplies up(R) by α inside S instead: both are the same at α = 1 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor

from lowmem_compile.optim.galore import GaLore
from lowmem_compile.optim.limiter import growth, norm_ratio
from lowmem_compile.optim.moments import take_step
from lowmem_compile.optim.projector import Plan, Side, up
from lowmem_compile.optim.settings import Common, ParamsLike
from lowmem_compile.optim.slots import Slot
from lowmem_compile.optim.units import Group, Work


class Fira(GaLore):
    """Fira with AdamW, moments in any storage. Every step needs the whole gradient.

    Args:
        params: parameters, named parameters or groups. Matrices are projected.
        lr: learning rate.
        rank: r of every projected parameter of a group; ``None`` in a group leaves it unprojected.
        rank_ratio: instead of a rank: r = max(min(O, I) // ratio, 1).
        update_interval: T, steps between refreshes (``update_proj_gap`` of the package).
        scale: α of the paper; multiplies the whole update.
        svd: ``"exact"`` (published) or ``"randomised"``.
        seed: of the randomised SVD.
        **common: see :class:`lowmem_compile.optim.settings.Common`; ``base`` is ``"adamw"``.

    State: the projector, m and v of R, and one number, the norm of the last S.

    Raises:
        OptionError: see :meth:`LowRankOptimizer.add_param_group`.
    """

    bases: ClassVar[tuple[str, ...]] = ("adamw",)
    needs_full_gradient: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsLike,
        lr: float = 1e-3,
        *,
        rank: int | None = None,
        rank_ratio: float | None = None,
        update_interval: int = 200,
        scale: float = 1.0,
        svd: Literal["exact", "randomised"] = "exact",
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            lr,
            rank=rank,
            rank_ratio=rank_ratio,
            update_interval=update_interval,
            scale=scale,
            svd=svd,
            seed=seed,
            **common,
        )

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group, plan: Plan | None) -> tuple[Slot, ...]:
        slots = super().slots(shape, dtype, group, plan)
        return slots if plan is None else (*slots, scaled_norm_slot())

    def projected_step(self, work: Work) -> None:
        assert work.full is not None
        G, R, side, slot = work.full, work.low, work.plan.side, work.slots[-1]
        update = take_step(work.state, work.slots, R, work.param, work.group, work.rates)
        N = update.direction
        ratio = norm_ratio(N, R, side)
        factor, norm = growth(_scaled_norm(ratio, G, R, side, work.total), slot.load(work.state))
        slot.save(work.state, norm)
        ratio = ratio / factor
        self.apply(work, up(N - ratio * R, work.factors, side) + ratio * G, update)


def _scaled_norm(ratio: Tensor, G: Tensor, R: Tensor, side: Side, total: Callable[[Tensor], Tensor] | None) -> Tensor:
    """‖φ ⊙ (G - up(R))‖ without that matrix: P has orthonormal columns, so along the rank axis it is √(‖G‖² - ‖R‖²).

    Args:
        ratio: φ.
        G: [O, I].
        R: its projection.
        side: of the projector.
        total: sums over the ranks that hold the other rows of G; R is whole on the left side.
    """
    axis = 1 if side == "right" else 0
    whole, kept = (x.square().sum(axis, keepdim=True) for x in (G, R))
    if total is not None and side == "left":
        whole = total(whole)
    square = (ratio.square() * (whole - kept).clamp(min=0)).sum()
    return (square if total is None or side == "left" else total(square)).sqrt()


def scaled_norm_slot() -> Slot:
    """The limiter's memory: ‖S‖ of the last step, infinity before the first."""
    return Slot("scaled_norm", (), torch.float32, fill=float("inf"))
