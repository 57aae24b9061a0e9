"""COAP's correlation-aware step on a projector, from products with G alone (arXiv:2412.00071, Eq. 5).

    J(P) = J₁·J₂      J₁ = mean((up(down(G)) - G)²)      J₂ = 1 - mean over rows i of cos(up(m)_i, G_i)
    P ← P - 0.1·∇J·min(1, 1/‖∇J‖)                        one step; m, the momentum in the old basis, is a constant

Rows are rows of G [O, I] on both sides. The gradient in closed form, with H = G A, a = m Aᵀ,
g_i = ‖G_i‖ and the cosines c_i (right):

    ∇J₁ = 2/(OI)·[ GᵀH·AᵀA - 2 GᵀH + A (AᵀGᵀH) ]
    ∇J₂ = -(1/O)·[ Gᵀ diag(1/(‖a‖g)) m - A mᵀ diag(c/‖a‖²) m ]          ∇J = J₂ ∇J₁ + J₁ ∇J₂

and with H = Lᵀ G, a = L m (left):

    ∇J₁ = 2/(OI)·[ GHᵀ·LᵀL - 2 GHᵀ + L (Lᵀ G Hᵀ) ]
    ∇J₂ = -(1/O)·[ diag(1/(‖a‖g)) G mᵀ - diag(c/‖a‖²) L m mᵀ ]

GᵀG [I, I] and a, G - up(down(G)) [O, I] are never formed. What is needed of G: H, the norms of its rows, and one product of
Gᵀ (left: G) with 2r columns. A compiled backward pass has all three from X and dY, so the functions take them, not G.
Norms below 1e-8 count as 1e-8, as in torch's cosine similarity. Cost O(O·I·r); extra memory a few tensors of r columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowmem_compile.optim.projector import Side

STEP_SIZE = 0.1
EPS = 1e-8
Product = Callable[[Tensor], Tensor]


def right_gradient(A: Tensor, m: Tensor, H: Tensor, norms: Tensor, transposed: Product) -> Tensor:
    """∇J on the right side.

    Args:
        A: projector [I, r].
        m: momentum [O, r].
        H: G A [O, r].
        norms: norms of the rows of G [O].
        transposed: maps Y [O, k] to Gᵀ Y [I, k].
    """
    O, r = H.shape
    scale = 2 / (O * A.shape[0])
    AtA = A.T @ A
    squares = ((m @ AtA) * m).sum(1).clamp(min=0)
    weight, cosine, curve = _cosines(squares, (m * H).sum(1), norms)
    GtH, Gtm = transposed(torch.cat([H, weight[:, None] * m], 1)).split(r, 1)
    J1 = (norms.square().sum() - 2 * H.square().sum() + ((H @ AtA) * H).sum()).clamp(min=0) * (scale / 2)
    J2 = 1 - cosine.mean()
    dJ1 = scale * (GtH @ AtA - 2 * GtH + A @ (H.T @ H))
    dJ2 = -(Gtm - A @ (m.T @ (curve[:, None] * m))) / O
    total: Tensor = J2 * dJ1 + J1 * dJ2
    return total


def left_gradient(L: Tensor, m: Tensor, H: Tensor, norms: Tensor, product: Product) -> Tensor:
    """∇J on the left side.

    Args:
        L: projector [O, r].
        m: momentum [r, I].
        H: Lᵀ G [r, I].
        norms: norms of the rows of G [O].
        product: maps Y [I, k] to G Y [O, k].
    """
    r, I = H.shape
    O = L.shape[0]
    scale = 2 / (O * I)
    LtL, mmt = L.T @ L, m @ m.T
    GHt, Gmt = product(torch.cat([H, m]).T).split(r, 1)
    squares = ((L @ mmt) * L).sum(1).clamp(min=0)
    weight, cosine, curve = _cosines(squares, (L * Gmt).sum(1), norms)
    J1 = (norms.square().sum() - 2 * H.square().sum() + ((LtL @ H) * H).sum()).clamp(min=0) * (scale / 2)
    J2 = 1 - cosine.mean()
    dJ1 = scale * (GHt @ LtL - 2 * GHt + L @ (H @ H.T))
    dJ2 = -(weight[:, None] * Gmt - (curve[:, None] * L) @ mmt) / O
    total: Tensor = J2 * dJ1 + J1 * dJ2
    return total


def correlation_gradient(P: Tensor, m: Tensor, G: Tensor, side: Side) -> Tensor:
    """∇J from a whole gradient G [O, I]; ``side`` is "right" or "left"."""
    norms = torch.linalg.vector_norm(G, dim=1)
    if side == "right":
        return right_gradient(P, m, G @ P, norms, lambda Y: G.T @ Y)
    return left_gradient(P, m, P.T @ G, norms, lambda Y: G @ Y)


def descend(P: Tensor, gradient: Tensor) -> Tensor:
    """The projector after the step: the gradient is clipped to norm 1; the result is not made orthonormal again."""
    norm = torch.linalg.vector_norm(gradient)
    stepped: Tensor = P - STEP_SIZE * (1 / (norm + 1e-6)).clamp(max=1) * gradient
    return stepped


def _cosines(squares: Tensor, dots: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1/(‖a‖g), the cosines c, and c/‖a‖² (0 where ‖a‖ counts as 1e-8, and is constant) of each row."""
    lengths = squares.sqrt()
    weight = 1 / (lengths.clamp(min=EPS) * norms.clamp(min=EPS))
    cosine = dots * weight
    return weight, cosine, torch.where(lengths > EPS, cosine / squares.clamp(min=EPS**2), 0.0)
