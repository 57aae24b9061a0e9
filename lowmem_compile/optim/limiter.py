"""Scaling a whole gradient by what Adam did to its projection, and the limit on how fast that may grow.

φ is ‖N‖/(‖R‖ + 1e-8) along the rank axis: one number a row on the right side, one a column on the left (Fira, arXiv:2410.01623,
Eq. 6 to 8; APOLLO, arXiv:2412.05270, Eq. 5), or one for the whole matrix (APOLLO-Mini). The norm-growth limiter is
Fira's Eq. 10, γ = 1.01: if ‖S‖ > γ·‖S_prev‖ then S ← S·γ·‖S_prev‖/‖S‖; the norm after limiting is what the next step sees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowmem_compile.optim.projector import Side

GAMMA = 1.01
TINY = 1e-8


def norm_ratio(N: Tensor, R: Tensor, side: Side, *, whole: bool = False) -> Tensor:
    """Φ, in a shape that multiplies the gradient: [O, 1] right, [1, I] left, scalar if ``whole``."""
    if whole:
        ratio: Tensor = torch.linalg.vector_norm(N) / (torch.linalg.vector_norm(R) + TINY)
        return ratio
    axis = 1 if side == "right" else 0
    above, below = (torch.linalg.vector_norm(x, dim=axis, keepdim=True) for x in (N, R))
    along: Tensor = above / (below + TINY)
    return along


def limit_growth(
    S: Tensor, previous: Tensor, gamma: float = GAMMA, total: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """S after the limiter, and its norm.

    Args:
        S: any shape.
        previous: the norm this returned on the step before, a scalar tensor; infinity for a first step, which is not limited.
            Zero is taken for a first step too: the published rule would let S grow from 1e-8 by 1 % a step after a gradient
            of zero.
        gamma: most growth a step.
        total: sums over the ranks that hold the other rows of S.
    """
    norm = torch.linalg.vector_norm(S)
    if total is not None:
        norm = total(norm.square()).sqrt()
    factor, after = growth(norm, previous, gamma)
    return S / factor, after


def growth(norm: Tensor, previous: Tensor, gamma: float = GAMMA) -> tuple[Tensor, Tensor]:
    """What S is divided by, at least 1, and its norm after that; see :func:`limit_growth`."""
    before = torch.where(previous > 0, previous.to(norm.dtype), torch.inf)
    factor = (norm / (before + TINY)).clamp(min=gamma) / gamma
    return factor, norm / factor
