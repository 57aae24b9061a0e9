"""COAP: correlation-aware gradient projection (arXiv:2412.00071, CVPR 2025).

With t from 0 and R = down(G):

    t = 0              P ← rSVD(G; Ω ~ N(0,1))                                 moments start at zero
    t mod λT_u = 0     P ← rSVD(G; Ω = P)                                      Eq. 6
    t mod T_u = 0      P ← P - 0.1·clip(∇J(P))                                 Eq. 5, see correlation.py and tucker.py
    restore_state      m ← down(up(m)),  v ← down(up(√v))²                     from the old basis to the new
    always             the base update on R;  W ← W - η·scale·up(N)

Convolutions are projected on both channel modes (Tucker-2), their basis by higher-order orthogonal iteration.
"""

from __future__ import annotations

from typing import ClassVar, Unpack

from lowmem_compile.errors import OptionError
from lowmem_compile.optim.base import LowRankOptimizer
from lowmem_compile.optim.bases import normal, sketched_vectors
from lowmem_compile.optim.correlation import correlation_gradient, descend
from lowmem_compile.optim.projector import Factors, down, up
from lowmem_compile.optim.settings import Common, ParamsLike
from lowmem_compile.optim.tucker import higher_order_basis, tucker_gradients
from lowmem_compile.optim.units import Group, Move, Refresh


class COAP(LowRankOptimizer):
    """COAP with AdamW or Adafactor, moments in any storage.

    Args:
        params: parameters, named parameters or groups. Matrices are projected; convolution weights above 9216 elements too;
            parameters of other shapes in a projected group get the base update unprojected.
        lr: learning rate.
        rank: r of every projected parameter of a group; ``None`` in a group leaves it unprojected.
        rank_ratio: instead of a rank: r = max(min(O, I) // ratio, 1); convolutions O // √ratio and I // √ratio.
        update_interval: T_u, steps between refreshes.
        reproject_factor: λ; every λ-th refresh is a randomised SVD, the others one step on the projector.
        scale: multiplies the projected update.
        restore_state: carry the moments to the new basis (the second one with AdamW alone).
        seed: of the first test matrix.
        **common: see :class:`lowmem_compile.optim.settings.Common`.

    State: A [I, r] (right) or L [O, r] (left), and the base's moments of R.

    Raises:
        OptionError: see :meth:`LowRankOptimizer.add_param_group`; also Adafactor without momentum and λ > 1: the step on
            the projector needs one.
    """

    projects_convolutions: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsLike,
        lr: float = 1e-3,
        *,
        rank: int | None = None,
        rank_ratio: float | None = None,
        update_interval: int = 32,
        reproject_factor: int = 5,
        scale: float = 1.0,
        restore_state: bool = False,
        seed: int = 3407,
        **common: Unpack[Common],
    ) -> None:
        options = {
            "lr": lr,
            "rank": rank,
            "rank_ratio": rank_ratio,
            "update_interval": update_interval,
            "reproject_factor": reproject_factor,
            "scale": scale,
            "restore_state": restore_state,
            "seed": seed,
        }
        super().__init__(params, options, common)

    def _check_group(self, group: Group, where: str, shared: object) -> None:
        super()._check_group(group, where, shared)
        projected = group["rank"] is not None or group["rank_ratio"] is not None
        if projected and group["base"] == "adafactor" and group["betas"][0] == 0 and group["reproject_factor"] > 1:
            raise OptionError(
                f"COAP: {where} has base='adafactor' and betas={group['betas']!r}: without a momentum there is no step on the "
                "projector. Use betas=(0.9, ...), or reproject_factor=1 to refresh by randomised SVD alone."
            )

    def new_factors(self, refresh: Refresh) -> Factors:
        group, plan, G, old = refresh.group, refresh.plan, refresh.G, refresh.old
        recalibrate = refresh.t % (group["update_interval"] * group["reproject_factor"]) == 0
        if plan.side in ("both", "out"):
            if old is None or recalibrate:
                return higher_order_basis(G, plan.ranks)
            return tuple(descend(P, g) for P, g in zip(old, tucker_gradients(old, refresh.momentum(), G), strict=True))
        if old is None:
            n = G.shape[1 if plan.side == "right" else 0]
            return (sketched_vectors(G, normal((n, plan.ranks[0]), group["seed"], G.device, G.dtype), plan.side),)
        if recalibrate:
            return (sketched_vectors(G, old[0], plan.side),)
        return (descend(old[0], correlation_gradient(old[0], refresh.momentum(), G, plan.side)),)

    def carry(self, move: Move) -> None:
        if not move.group["restore_state"]:
            return
        side = move.plan.side
        for slot in move.slots:
            if slot.key == "exp_avg":
                slot.save(move.state, down(up(slot.load(move.state), move.old, side), move.new, side))
            elif slot.key == "exp_avg_sq":
                slot.save(move.state, down(up(slot.load(move.state).sqrt(), move.old, side), move.new, side).square())
