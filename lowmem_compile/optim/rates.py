"""The numbers that change from step to step, as inputs of compiled graphs: a schedule recompiles nothing."""

from __future__ import annotations

import torch


class RateTable:
    """The rates of many parameters, [n, 4]: each row is an input of a graph, and all are filled by one copy.

    Attributes:
        rows: one a parameter: lr, η, β₂ₜ and nothing.
    """

    def __init__(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        self.staged = torch.zeros(count, 4, dtype=dtype)
        self.table = torch.zeros(count, 4, dtype=dtype, device=device)
        self.rows = [row.data for row in self.table.unbind()]  # no views in autograd's eyes: they are inputs of their own
        self.values: list[tuple[float, ...]] = [()] * count
        self.stale = False

    def stage(self, index: int, values: tuple[float, ...]) -> None:
        """Put the numbers of a parameter into a row."""
        if self.values[index] != values:
            self.staged[index, : len(values)] = torch.tensor(values, dtype=self.staged.dtype)
            self.values[index], self.stale = values, True

    def fill(self) -> None:
        """Bring the rows up to date."""
        if self.stale:
            self.table.copy_(self.staged)
            self.stale = False
