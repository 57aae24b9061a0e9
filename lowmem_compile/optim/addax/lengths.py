"""Which examples get a zeroth-order step and which a first-order one: the long and the short ones.

    D₀ = {i : length_i > L_T}     forward passes alone
    D₁ = {i : length_i ≤ L_T}     backward too

Addax-WA ("without assignment") draws both batches from all examples. Where L_T should lie follows from memory: the backward pass
on L_T tokens should not need more than there is (:meth:`LengthPartition.within`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_compile.errors import BudgetError, OptionError
from lowmem_compile.planner.budget import budget_of


@dataclass(frozen=True)
class LengthPartition:
    """Indices of the examples for each part.

    Attributes:
        zeroth: D₀, in the order of the data.
        first: D₁.
        threshold: L_T; ``None`` for Addax-WA.
    """

    zeroth: tuple[int, ...]
    first: tuple[int, ...]
    threshold: int | None

    @classmethod
    def at(cls, lengths: Sequence[int], threshold: int) -> LengthPartition:
        """Split at L_T: longer ones get zeroth-order steps. Works for a data set as for one batch.

        Raises:
            OptionError: a side would be empty.
        """
        zeroth = tuple(i for i, n in enumerate(lengths) if n > threshold)
        first = tuple(i for i, n in enumerate(lengths) if n <= threshold)
        if not zeroth or not first:
            side = "long (zeroth-order)" if not zeroth else "short (first-order)"
            seen = f"lengths are {min(lengths)} to {max(lengths)}" if len(lengths) else "there are no examples"
            end = "alpha=0, in-place SGD alone" if not zeroth else "alpha=1, MeZO alone"
            raise OptionError(
                f"LengthPartition: a threshold of {threshold} leaves the {side} side empty; {seen}. Choose one between, or use "
                f"LengthPartition.whole(lengths), or {end}."
            )
        return cls(zeroth, first, threshold)

    @classmethod
    def whole(cls, lengths: Sequence[int]) -> LengthPartition:
        """Addax-WA: both parts draw from all examples.

        Raises:
            OptionError: there are none.
        """
        if not len(lengths):
            raise OptionError("LengthPartition: there are no examples.")
        everything = tuple(range(len(lengths)))
        return cls(everything, everything, None)

    @classmethod
    def within(cls, lengths: Sequence[int], budget: int | str, peak: Callable[[int], int]) -> LengthPartition:
        """Split at the greatest length that occurs whose first-order step fits a budget.

        Args:
            lengths: of the examples.
            budget: bytes, or a size such as ``"6GiB"``.
            peak: bytes that a first-order step on a batch of this length needs, growing with the length; see :func:`step_peaks`.
                Called about log₂ of the number of distinct lengths times.

        Raises:
            BudgetError: not even the shortest fits.
            OptionError: all fit, so there is nothing to leave to the zeroth-order part.
        """
        allowed = _bytes(budget)
        distinct = sorted(set(lengths))
        if not distinct:
            raise OptionError("LengthPartition: there are no examples.")
        low, high = 0, len(distinct)  # those below low fit, those from high on do not
        while low < high:
            middle = (low + high) // 2
            if peak(distinct[middle]) <= allowed:
                low = middle + 1
            else:
                high = middle
        if not low:
            raise BudgetError(
                f"a first-order step on the shortest examples ({distinct[0]}) needs {peak(distinct[0])} bytes, more than the "
                f"budget of {allowed}; take a smaller batch, or alpha=1, MeZO alone."
            )
        if low == len(distinct):
            raise OptionError(
                f"first-order steps on all lengths, up to {distinct[-1]}, fit into {allowed} bytes: use alpha=0, in-place SGD "
                "alone, or LengthPartition.whole(lengths)."
            )
        return cls.at(lengths, distinct[low - 1])

    def batches(self, zeroth: int, first: int, seed: int = 0) -> Iterator[tuple[list[int], list[int]]]:
        """Without end: K₀ indices from D₀ and K₁ from D₁, each side shuffled anew when it is used up.

        A size of 0 gives empty lists for its side.
        """
        for name, size in (("zeroth", zeroth), ("first", first)):
            if size < 0 or not isinstance(size, int):
                raise OptionError(f"LengthPartition: a batch of {name}={size!r}; a size is a whole number from 0.")
        return zip(_endless(self.zeroth, zeroth, seed), _endless(self.first, first, seed + 1), strict=True)


def step_peaks(
    model: Callable[..., Any], batch: Callable[[int], Mapping[str, Any]], options: Mapping[str, Any] | None = None
) -> Callable[[int], int]:
    """The simulated peak of a first-order step by length, for :meth:`LengthPartition.within`: a dry run, nothing is trained.

    Args:
        model: called as ``model(**batch(length))``; returns the loss.
        batch: makes the arguments of a batch whose examples have this length.
        options: of the backend, as the model will be compiled.

    The peak is of forward and backward beyond parameters and inputs, with all gradients; updates inside the backward pass need
    less.
    """
    known: dict[int, int] = {}

    def peak(length: int) -> int:
        from lowmem_compile.api import explain

        if length not in known:
            graphs = explain(model, options=options, **batch(length)).graphs
            known[length] = max((g.peak("lowmem") or 0 for g in graphs), default=0)
        return known[length]

    return peak


def _bytes(budget: int | str) -> int:
    """A budget in bytes."""
    if isinstance(budget, int):
        return budget
    size = budget_of(budget).peak
    if size is None:
        raise OptionError(f"LengthPartition: a budget is bytes or a size such as '6GiB', not {budget!r}.")
    return size


def _endless(indices: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    if not size:
        yield from itertools.repeat([])
    generator = random.Random(seed)  # noqa: S311 (no secrets)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += generator.sample(indices, len(indices))
        yield queue[:size]
        del queue[:size]
