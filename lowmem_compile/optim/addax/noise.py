"""The random direction z of a step: any block of rows of any parameter, from one seed, whenever it is needed.

z has a standard normal number for each element of each parameter, in float32. Parameter k, read as a matrix [rows, width] of its
first dimension by all others (a vector has width 1), is cut into blocks of R rows: about a 128th of its elements, but at least
8192 and at most 2²⁰ of them, and at least one row. Block j is the output of a generator seeded with mix(mix(s, k), j), s the seed
of the step (SplitMix64, :func:`lowmem_compile.optim.bases.mix`). So z depends on the seed, the place of the parameter, its shape
and the kind of device, not on who asks for which part.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowmem_compile.optim.bases import mix
from lowmem_compile.optim.slots import compute_dtype

SMALLEST, LARGEST, SHARE = 2**13, 2**20, 128
"""Elements of a block: a 128th of the parameter, between 32 KiB and 4 MiB in float32."""


def rows_of(p: Tensor) -> Tensor:
    """The parameter with a first dimension: itself, or a view of a number as a vector of one."""
    return p if p.dim() else p.view(1)


def block_rows(p: Tensor) -> int:
    """R: rows in a block of z."""
    elements = min(max(p.numel() // SHARE, SMALLEST), LARGEST)
    return max(1, elements // max(1, p.shape[1:].numel()))


def spans(p: Tensor, elements: int = 0) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover the parameter, of whole blocks: as many as have so many elements, at least one."""
    R = block_rows(p)
    step = max(1, elements // max(1, R * p.shape[1:].numel())) * R
    return ((a, min(a + step, p.shape[0])) for a in range(0, p.shape[0], step))


def draw(p: Tensor, seed: int, ordinal: int, start: int, end: int) -> Tensor:
    """z of the rows ``start`` (where a block begins) to ``end`` of a parameter: float32 [end - start, ...].

    Args:
        p: gives shape and device; not read.
        seed: of the step.
        ordinal: the parameter's place among those of the optimizer.
        start: first row, a multiple of :func:`block_rows`.
        end: behind the last row.
    """
    z = torch.empty((end - start, *p.shape[1:]), dtype=torch.float32, device=p.device)
    R, own = block_rows(p), mix(seed, ordinal)
    if start % R:
        raise AssertionError(f"row {start} is not the first of a block of {R}")
    for a in range(start, end, R):
        generator = torch.Generator(device=p.device).manual_seed(mix(own, a // R))
        part = z[a - start : min(a + R, end) - start]
        if end - a < R and end < p.shape[0]:  # normal numbers come in pairs: half a block is the beginning of a whole one
            whole = torch.empty((R, *p.shape[1:]), dtype=torch.float32, device=p.device).normal_(generator=generator)
            part.copy_(whole[: len(part)])
        else:
            part.normal_(generator=generator)
    return z


def perturbed_rows(p: Tensor, start: int, end: int, seed: int, scale: float, ordinal: int) -> Tensor:
    """p + scale·z for some rows, computed in float32 (float64 for float64), rounded once to the parameter's dtype."""
    z = draw(p, seed, ordinal, start, end).to(compute_dtype(p.dtype))
    return z.mul_(scale).add_(p[start:end]).to(p.dtype)


@torch.no_grad()
def move(p: Tensor, seed: int, ordinal: int, step: float, decay: float) -> None:
    """p ← p·(1 - decay) - step·z in place, a block at a time; computed wide and rounded once."""
    p = rows_of(p)
    for a, b in spans(p):
        z = draw(p, seed, ordinal, a, b).to(compute_dtype(p.dtype))
        z.mul_(-step)
        if decay:
            z.add_(p[a:b], alpha=1 - decay)
        else:
            z.add_(p[a:b])
        p[a:b] = z
