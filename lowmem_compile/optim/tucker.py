"""COAP on convolutions: the Tucker-2 basis and the correlation-aware step on two channel modes.

G [O, I, K] is a weight's gradient with the kernel dimensions flattened to K, U [O, m], V [I, n].

    basis     higher-order orthogonal iteration (De Lathauwer et al. 2000): from the singular vectors of both unfoldings, in turn
              U ← m left singular vectors of (G ×₂ Vᵀ) unfolded along O,  V ← n of (G ×₁ Uᵀ) unfolded along I,
              three times, then until the relative error changes by less than 1e-4, at most 100 times
    step      J as for matrices, with rows i replaced by (o, k): cosines over the input channels. In closed form, with
              E = up(down(G)) - G,  a = up(m),  D = ∂J₂/∂a = -(1/OK)·( G/(‖a‖g) - c a/‖a‖² ):
              ∇_U J₁ = 2/(OIK)·[ E·(GVVᵀ U)-contractions of both orders ],  ∇_U J₂ = ⟨D, m ×₂ V⟩,  and the same for V
    signs     each basis vector's entry of largest magnitude is positive, so bases do not depend on the LAPACK in use

Each factor's gradient is clipped to norm 1 on its own. In COAP's released code the gradients of earlier steps stay in the
sum until the next recalibration; here each step has its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem_compile.optim.correlation import EPS
from lowmem_compile.optim.projector import Factors

TOLERANCE = 1e-4
MOST_ITERATIONS = 100


def higher_order_basis(G: Tensor, ranks: tuple[int, ...]) -> Factors:
    """U [O, m] and V [I, n], or U alone if there is one rank, of G [O, I, ...] in float32 or float64."""
    G = G.flatten(2)
    if len(ranks) == 1:
        return (_leading(G.flatten(1), ranks[0]),)
    m, n = ranks
    U, V = _leading(G.flatten(1), m), _leading(_by_input(G), n)
    whole = torch.linalg.vector_norm(G)
    errors: list[float] = []
    for _ in range(MOST_ITERATIONS):
        U = _leading(torch.einsum("abk,bn->ank", G, V).flatten(1), m)
        V = _leading(_by_input(torch.einsum("abk,am->mbk", G, U)), n)
        core = torch.linalg.vector_norm(torch.einsum("abk,am,bn->mnk", G, U, V))
        errors.append(float((whole**2 - core**2).abs().sqrt() / whole.clamp(min=torch.finfo(G.dtype).tiny)))
        if len(errors) > 2 and abs(errors[-2] - errors[-1]) < TOLERANCE:
            break
    return U, V


def tucker_gradients(factors: Factors, m: Tensor, G: Tensor) -> Factors:
    """∇J for each factor; m is the momentum [m, n, ...] (one factor: [m, I, ...])."""
    G, m = G.flatten(2), m.flatten(2)
    U = factors[0]
    V = factors[1] if len(factors) == 2 else None
    O, I, K = G.shape
    GV = G if V is None else torch.einsum("abk,bn->ank", G, V)  # [O, n, K]
    core = torch.einsum("ank,am->mnk", GV, U)
    mV = m if V is None else torch.einsum("mnk,bn->mbk", m, V)  # [m, I, K]
    a = torch.einsum("mbk,am->abk", mV, U)
    coreV = core if V is None else torch.einsum("mnk,bn->mbk", core, V)
    E = torch.einsum("mbk,am->abk", coreV, U) - G
    lengths = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    weight = 1 / (lengths.clamp(min=EPS) * torch.linalg.vector_norm(G, dim=1, keepdim=True).clamp(min=EPS))
    cosine = (a * G).sum(1, keepdim=True) * weight
    J1, J2 = E.square().mean(), 1 - cosine.mean()
    D = -(weight * G - torch.where(lengths > EPS, cosine / lengths.clamp(min=EPS).square(), 0.0) * a) / (O * K)
    scale = 2 / (O * I * K)
    EV = E if V is None else torch.einsum("abk,bn->ank", E, V)
    dU1 = torch.einsum("ank,mnk->am", EV, core) + torch.einsum("ank,mnk->am", GV, torch.einsum("ank,am->mnk", EV, U))
    dU = J2 * scale * dU1 + J1 * torch.einsum("abk,mbk->am", D, mV)
    if V is None:
        return (dU,)
    GU, EU = torch.einsum("abk,am->mbk", G, U), torch.einsum("abk,am->mbk", E, U)
    dV1 = torch.einsum("mbk,mnk->bn", EU, core) + torch.einsum("mbk,mnk->bn", GU, torch.einsum("mbk,bn->mnk", EU, V))
    dV2 = torch.einsum("mbk,mnk->bn", torch.einsum("abk,am->mbk", D, U), m)
    return dU, J2 * scale * dV1 + J1 * dV2


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The first left singular vectors, with fixed signs."""
    U = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    signed: Tensor = U * torch.where(largest < 0, -1.0, 1.0)
    return signed.contiguous()


def _by_input(G: Tensor) -> Tensor:
    """The unfolding of G [O, I, K] along I: [I, O·K]."""
    return G.transpose(0, 1).flatten(1)
