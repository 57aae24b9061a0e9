"""Bases to project on: exact and randomised singular vectors, and Gaussian matrices from a seed.

All take the gradient in float32 or float64 and return a factor [n, r] of that dtype: of the input side for "right", of the
output side for "left". Nothing reads or moves PyTorch's global random state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowmem_compile.optim.projector import Side

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def mix(seed: int, index: int) -> int:
    """A seed for the index-th stream of a seed: SplitMix64's output function (Steele et al. 2014), in 63 bits."""
    z = (seed + (index + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1


def normal(shape: tuple[int, int], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers that depend on the seed and the kind of device alone (drawn in float32)."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def gaussian(n: int, rank: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A [n, r] with entries N(0, 1/r), so that E[A Aᵀ] = I."""
    return normal((n, rank), seed, device, dtype) / math.sqrt(rank)


def singular_vectors(G: Tensor, rank: int, side: Side) -> Tensor:
    """The first r right (left) singular vectors of G [O, I]."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    basis: Tensor = Vh[:rank].T if side == "right" else U[:, :rank]
    return basis.contiguous()


def sketched_vectors(G: Tensor, omega: Tensor, side: Side) -> Tensor:
    """Randomised SVD from a test matrix (COAP's rSVD): approximate singular vectors, as many as Ω has columns.

    right: Y = G Ω, Q = qr(Y), B = Qᵀ G, and Aᵀ = Vᴴ of svd(B). left: the same on Gᵀ. Cost O(O·I·r).

    Args:
        G: [O, I].
        omega: [I, r] for the right side, [O, r] for the left.
        side: "right" or "left".
    """
    M = G if side == "right" else G.T
    return _right_vectors_within(M, M @ omega)


def randomised_vectors(G: Tensor, rank: int, side: Side, seed: int, *, oversample: int = 8, power: int = 1) -> Tensor:
    """Randomised SVD with oversampling and power iterations (Halko et al. 2011, algorithms 4.4 and 5.1).

    Args:
        G: [O, I].
        rank: r, the vectors returned.
        side: "right" or "left".
        seed: of the test matrix.
        oversample: columns of the test matrix beyond r.
        power: power iterations, each a product with G and one with Gᵀ.
    """
    M = G if side == "right" else G.T
    columns = min(rank + oversample, *G.shape)
    Y = M @ normal((M.shape[1], columns), seed, G.device, G.dtype)
    for _ in range(power):
        Y = M @ torch.linalg.qr(M.T @ torch.linalg.qr(Y).Q).Q
    return _right_vectors_within(M, Y)[:, :rank].contiguous()


def _right_vectors_within(M: Tensor, Y: Tensor) -> Tensor:
    """Right singular vectors of M restricted to the column space of Y."""
    Q, _ = torch.linalg.qr(Y)
    Vh: Tensor = torch.linalg.svd(Q.T @ M, full_matrices=False).Vh
    return Vh.T.contiguous()
