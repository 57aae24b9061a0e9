"""From a trace of three layers to the whole model.

Layers alike make graphs alike: the middle of three layers is repeated. With s bytes saved and g bytes of gradients a layer, a
point of the k-th copy (k = 0 ... N - 3) lies

    forward     k·s                    above the middle layer's
    backward    (N - 3 - k)·s + k·g    above it: the layers below still hold what they saved, those above have left gradients

and everything behind the layers (N - 3)·s, or (N - 3)·g in backward, above where it was. Exact where Inductor treats all middle
layers alike; whether it does is checked on a trace of four layers (:func:`deviation`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowmem_compile.memory_plan.trace import Run
from lowmem_compile.reporting.model import SavedTensor, TimelinePoint

TRACED = 3
CHECKED = 4


@dataclass(frozen=True)
class Stack:
    """The list of layers alike.

    Attributes:
        name: dotted path in the model, such as ``"model.layers"``.
        gradients: bytes of the gradients of one layer.
    """

    name: str
    gradients: int

    def layer(self, module: str) -> int | None:
        """The layer that a module belongs to, or ``None``."""
        match = re.match(rf"{re.escape(self.name)}\.(\d+)(\.|$)", module)
        return int(match[1]) if match else None

    def moved(self, module: str, by: int) -> str:
        """The name of the same module ``by`` layers on."""
        layer = self.layer(module)
        return module if layer is None else f"{self.name}.{layer + by}{module[len(f'{self.name}.{layer}') :]}"


class IrregularError(Exception):
    """The traced layers do not follow one another in order, so nothing can be repeated."""


def deepened(run: Run, stack: Stack, depth: int, *, layer_bytes: int | None = None) -> Run:
    """The run of a model of ``depth`` layers (3 or more), from that of one with three.

    Args:
        run: of three layers.
        stack: the layers.
        depth: layers of the whole model.
        layer_bytes: bytes saved by each layer that is added; those of the middle layer if not given.

    Raises:
        IrregularError: the kernels of the layers cannot be told apart.
    """
    more = depth - TRACED
    gradients = stack.gradients if run.gradients_stay else 0
    middle = [t for t in run.saved if stack.layer(t.module) == 1]
    step = sum(t.nbytes for t in middle)
    if layer_bytes is not None and step:
        middle = [replace(t, nbytes=round(t.nbytes * layer_bytes / step)) for t in middle]
        step = sum(t.nbytes for t in middle)
    saved = _rows(run.saved, middle, stack, more)
    head, layer, tail = _parts(run.forward, stack, (0, 1, 2))
    forward = list(head)
    for k in range(more + 1):
        forward += [_point(p, stack, k, k * step) for p in layer]
    forward += [_point(p, stack, more, more * step) for p in tail]
    head, layer, tail = _parts(run.backward, stack, (2, 1, 0))
    backward = [_point(p, stack, more, more * step) for p in head]
    for k in range(more + 1):
        backward += [_point(p, stack, more - k, (more - k) * step + k * gradients) for p in layer]
    backward += [_point(p, stack, 0, more * gradients) for p in tail]
    return replace(run, saved=tuple(saved), forward=tuple(forward), backward=tuple(backward))


def _rows(rows: Sequence[SavedTensor], middle: Sequence[SavedTensor], stack: Stack, more: int) -> list[SavedTensor]:
    found: list[SavedTensor] = []
    added = False
    for row in rows:
        layer = stack.layer(row.module)
        if layer == 2 and not added:
            found += [replace(t, module=stack.moved(t.module, k)) for k in range(1, more + 1) for t in middle]
            added = True
        found.append(replace(row, module=stack.moved(row.module, more)) if layer == 2 else row)
    if not added and middle:
        raise IrregularError("the last layer saves nothing")
    return found


def _parts(points: Sequence[TimelinePoint], stack: Stack, order: Sequence[int]) -> tuple[Sequence[TimelinePoint], ...]:
    """What lies before the first kernel of layer ``order[1]``, from there to that of layer ``order[2]``, and the rest.

    A layer begins at its first kernel behind the middle of the layer before: single kernels may run far from the others.
    """
    layers = [stack.layer(p.label) for p in points]
    places = {layer: [i for i, of in enumerate(layers) if of == layer] for layer in order}
    try:
        cuts = [
            next(i for i in places[layer] if i > places[before][len(places[before]) // 2])
            for before, layer in itertools.pairwise(order)
        ]
    except (StopIteration, IndexError):
        raise IrregularError(f"the layers of {stack.name} have no kernels of their own, or do not run in order") from None
    start, end = cuts
    if start >= end:
        raise IrregularError(f"the layers of {stack.name} do not run in order")
    return points[:start], points[start:end], points[end:]


def _point(point: TimelinePoint, stack: Stack, layers: int, nbytes: int) -> TimelinePoint:
    return replace(point, label=stack.moved(point.label, layers), live_bytes=max(point.live_bytes + nbytes, 0))


@dataclass(frozen=True)
class Deviation:
    """A prediction less what a trace found, in bytes: of what is saved, and of the peak."""

    saved: int
    peak: int


def deviation(predicted: Run, traced: Run) -> Deviation:
    """How far a prediction is from a trace.

    What does not repeat from layer to layer (a residual stream that Inductor writes to memory only in every second layer) is off
    by as many bytes at any depth.
    """
    return Deviation(predicted.saved_bytes - traced.saved_bytes, predicted.peak - traced.peak)
