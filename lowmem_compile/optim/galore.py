"""GaLore: gradient low-rank projection (arXiv:2403.03507, ICML 2024), with exact or randomised singular vectors.

t mod T = 0    P ← the first r singular vectors of G (right: of its rows' space)      moments are kept as they are
always         the base update on R = down(G);  W ← W - η·scale·up(N)
"""

from __future__ import annotations

from typing import Literal, Unpack

from lowmem_compile.errors import OptionError
from lowmem_compile.optim.base import LowRankOptimizer
from lowmem_compile.optim.bases import mix, randomised_vectors, singular_vectors
from lowmem_compile.optim.projector import Factors
from lowmem_compile.optim.settings import Common, ParamsLike
from lowmem_compile.optim.units import Group, Refresh

SVDS = ("exact", "randomised")


class GaLore(LowRankOptimizer):
    """GaLore with AdamW or Adafactor, moments in any storage.

    Args:
        params: parameters, named parameters or groups. Matrices are projected.
        lr: learning rate.
        rank: r of every projected parameter of a group; ``None`` in a group leaves it unprojected.
        rank_ratio: instead of a rank: r = max(min(O, I) // ratio, 1).
        update_interval: T, steps between refreshes (``update_proj_gap`` of galore-torch); may differ between groups.
        scale: multiplies the projected update; 0.25 in the published scripts.
        svd: ``"exact"``, or ``"randomised"`` (8 vectors more and one power iteration; the cost falls from O·I·min(O, I)
            to O·I·r).
        seed: of the randomised SVD.
        **common: see :class:`lowmem_compile.optim.settings.Common`.

    State: A [I, r] (right) or L [O, r] (left), and the base's moments of R.

    Raises:
        OptionError: see :meth:`LowRankOptimizer.add_param_group`.
    """

    def __init__(
        self,
        params: ParamsLike,
        lr: float = 1e-3,
        *,
        rank: int | None = None,
        rank_ratio: float | None = None,
        update_interval: int = 200,
        scale: float = 0.25,
        svd: Literal["exact", "randomised"] = "exact",
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        options = {
            "lr": lr,
            "rank": rank,
            "rank_ratio": rank_ratio,
            "update_interval": update_interval,
            "scale": scale,
            "svd": svd,
            "seed": seed,
        }
        super().__init__(params, options, common)

    def _check_group(self, group: Group, where: str, shared: object) -> None:
        super()._check_group(group, where, shared)
        if group["svd"] not in SVDS:
            raise OptionError(f"{type(self).__name__}: {where} has svd={group['svd']!r}; it is {' or '.join(map(repr, SVDS))}.")

    def new_factors(self, refresh: Refresh) -> Factors:
        (rank,), side, group = refresh.plan.ranks, refresh.plan.side, refresh.group
        if group["svd"] == "exact":
            return (singular_vectors(refresh.G, rank, side),)
        return (randomised_vectors(refresh.G, rank, side, mix(group["seed"], refresh.t // group["update_interval"])),)
