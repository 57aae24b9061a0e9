"""When to merge: exponentially growing gaps.

    T_0 = 0,  T_1 = τ,  T_{k+1} = T_k + τ + ⌊ψᵏ⌋  for k = 1, 2, …

With τ = 100 and ψ = 1.2: 0, 100, 201, 302, 403, 505, … (LoQT, arXiv:2405.16528, section 3.3, and its released schedule).
"""

from __future__ import annotations

from collections.abc import Iterator


def merge_steps(interval: int, growth: float) -> Iterator[int]:
    """The steps before which to merge, ascending, without end.

    Args:
        interval: τ, steps from 1.
        growth: ψ, at least 0 (0: after the first gap, always τ).
    """
    yield 0
    at, factor = interval, growth
    while True:
        yield at
        gap, factor = interval + int(factor), factor * growth
        at += gap


def next_merge(step: int, interval: int, growth: float) -> int:
    """The first merge at or after a step."""
    return next(at for at in merge_steps(interval, growth) if at >= step)
