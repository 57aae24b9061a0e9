"""A memory plan as data: frozen dataclasses of strings and numbers, written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowmem_compile.reporting._json import JsonRecord
from lowmem_compile.reporting.model import SavedTensor, TimelinePoint

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Largest(JsonRecord):
    """The largest batch, or the longest sequence, that fits a card.

    `size` is 0 where nothing fits. `how` says how it was found: "traced" (a trace of that size fits), "estimated" (between or
    beyond traces), "limit" (the model allows no more).
    """

    size: int
    how: str


@dataclass(frozen=True, slots=True)
class Contender(JsonRecord):
    """What a training step takes in one way of running it. All sizes in bytes.

    `peak` is the highest number of bytes alive beyond parameters, buffers, inputs and optimizer state; gradients are in it.
    `total` is what the training takes: weights, optimizer state, and the larger of `peak` and gradients with the optimizer's
    scratch memory. `saved_off` and `peak_off` are the prediction less the trace, where depth was extrapolated and checked.
    `error` is the estimated relative error of the gradient where a budget was planned.
    """

    name: str
    saved: int
    peak: int
    total: int
    traced: bool
    saved_off: int | None
    peak_off: int | None
    error: float | None
    by_kind: Mapping[str, int]
    by_layer: Mapping[str, int]
    tensors: tuple[SavedTensor, ...]
    timeline: tuple[TimelinePoint, ...]
    largest_batch: Largest | None = None
    longest_sequence: Largest | None = None


@dataclass(frozen=True, slots=True)
class MemoryPlan(JsonRecord):
    """A plan. `weights`, `gradients`, `optimizer_state`, `scratch`, `card_bytes` and `reserve` are bytes."""

    model: str
    title: str
    parameters: int
    trained: int
    layers: int | None
    batch: int
    sequence: int | None
    precision: str
    optimizer: str
    weights: int
    gradients: int
    optimizer_state: int
    adamw_state: int
    scratch: int
    card: str | None
    card_bytes: int | None
    reserve: int
    contenders: tuple[Contender, ...]
    refused: Mapping[str, str]
    notes: tuple[str, ...]
    traces: tuple[str, ...]
    seconds: float
    versions: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def contender(self, name: str) -> Contender:
        """The contender of that name."""
        return next(c for c in self.contenders if c.name == name)
