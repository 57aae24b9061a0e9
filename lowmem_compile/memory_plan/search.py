"""The largest batch and the longest sequence that fit, from traces at two sizes.

Every kernel's live bytes are taken as affine in the size, each with its own coefficients, so that the peak is convex and
piecewise affine. The second trace lies near the answer of lowmem's default; the answers of contenders that fit less lie between
the two. A third trace is made at lowmem's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lowmem_compile.memory_plan.trace import Run

LARGEST = 1 << 20


@dataclass(frozen=True)
class Line:
    """The peak as a function of a size: the highest of one affine function a kernel.

    Attributes:
        size: at which ``low`` was found.
        low: live bytes.
        slope: bytes a unit of size.
    """

    size: int
    low: np.ndarray
    slope: np.ndarray

    def peak(self, size: float) -> float:
        """Peak in bytes at a size."""
        return float(np.max(self.low + self.slope * (size - self.size)))


def line_of(one: Run, at: int, other: Run, at_other: int) -> Line:
    """The peak between and beyond two sizes; from the peaks alone where the two graphs do not have the same kernels."""
    first, second = (np.array([p.live_bytes + r.held for p in (*r.forward, *r.backward)], dtype=float) for r in (one, other))
    if first.shape != second.shape:
        first, second = np.array([float(one.peak)]), np.array([float(other.peak)])
    return Line(at, first, (second - first) / (at_other - at))


def largest_size(need: Callable[[int], float], room: float, steps: Sequence[int] | range) -> int:
    """The largest of ascending sizes for which ``need`` is at most ``room``; 0 if there is none.

    ``need`` must not fall as the size grows.
    """
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        if need(steps[middle]) <= room:
            low = middle + 1
        else:
            high = middle
    return steps[low - 1] if low else 0


def first_guess(peak: int, resident: int, size: int, room: float) -> int:
    """A size near which ``room`` is full, if all of the peak but ``resident`` grows with the size."""
    growing = max(peak - resident, 1)
    return max(1, int(size * max(room - resident, 0) / growing))
