"""Step times of several variants, interleaved, as ratios with an interval.

The machine's speed drifts while a benchmark runs. In each round every variant runs once, and a variant is
compared with the baseline of the same round; the ratio reported is the median over rounds.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios and the bounds of its 90 % bootstrap interval."""

    median: float
    low: float
    high: float


def paired_ratio(times: Sequence[float], baseline: Sequence[float], *, resamples: int = 2000) -> Ratio:
    """The median of ``times[i] / baseline[i]`` over rounds i; deterministic.

    Raises:
        ValueError: no rounds, or different numbers of them.
    """
    if not times or len(times) != len(baseline):
        raise ValueError(f"paired times of the same rounds are needed, not {len(times)} and {len(baseline)}")
    ratios = [t / b for t, b in zip(times, baseline, strict=True)]
    generator = random.Random(0)  # noqa: S311
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(resamples))
    cut = resamples // 20
    return Ratio(statistics.median(ratios), medians[cut], medians[-cut - 1])


def round_order(names: Sequence[str], round_index: int) -> list[str]:
    """The order in which variants run in a round: shuffled, so that none always follows the same one."""
    generator = random.Random(round_index)  # noqa: S311
    return generator.sample(list(names), len(names))
