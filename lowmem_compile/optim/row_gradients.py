"""Projected gradients of parameters that FSDP2 gathered: averaged over the ranks in projected form, and kept by rows.

A compiled graph computes with the whole weight W [O, I] that ``fully_shard`` gathered, and each of the n ranks gets the
projection of its own gradient. When the backward pass has ended,

    right    (1/n) Σ R [O, r], of which a rank keeps its rows [O_k, r]      reduce-scatter: O·r numbers are sent
    left     (1/n) Σ R [r, I], which every rank keeps                       all-reduce: r·I numbers

and ``W.grad`` of the parameter that the optimizer holds is a DTensor laid out as W is, around a
:class:`~lowmem_compile.optim.gradient.ProjectedGradient`. FSDP finds no gradient for W and sends nothing. Gradients go in
buckets, in the order in which the backward pass made them, which is the same on all ranks.

As FSDP does: ``set_gradient_divide_factor`` replaces n; ``set_requires_gradient_sync(False)`` keeps the sums of this rank until a
backward pass with True; ``MixedPrecisionPolicy(reduce_dtype=...)`` is the dtype that is sent.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lowmem_compile._torch import Gathered, at_end_of_backward, backward_pass
from lowmem_compile.optim.buckets import buckets
from lowmem_compile.optim.gradient import ProjectedGradient, add_gradient
from lowmem_compile.optim.sharded import local_shape, ranks_of, rows_of


@dataclass(frozen=True)
class _Sum:
    """What one rank has for one parameter."""

    low: ProjectedGradient
    gathered: Gathered


class _Pass:
    """The projected gradients of one backward pass."""

    def __init__(self) -> None:
        self.sums: dict[Tensor, _Sum] = {}

    def end(self) -> None:
        """Reduce what is to be reduced now, and give it to the parameters."""
        ready: list[tuple[Tensor, _Sum]] = []
        for param, new in self.sums.items():
            total = _plus(_UNREDUCED.pop(param, None), new)
            if new.gathered.reduces:
                ready.append((param, total))
            else:
                _UNREDUCED[param] = total
        for bucket in buckets(ready, _way, _sent_bytes):
            _reduce(bucket)


_PASSES: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()
"""By the number of the backward pass; autograd's callback keeps the entry, and drops it if the pass fails."""
_UNREDUCED: Any = WeakTensorKeyDictionary()
"""Sums that wait for a backward pass that synchronises."""


def add_to_rows(param: Tensor, low: ProjectedGradient, gathered: Gathered) -> None:
    """Take the projected gradient of this rank, in a backward pass; at its end ``param.grad`` has the average.

    Args:
        param: the DTensor that the optimizer holds.
        low: of the whole parameter.
        gathered: what FSDP does with its gradients.
    """
    number = backward_pass()
    current = _PASSES.get(number)
    if current is None:
        current = _PASSES[number] = _Pass()
        at_end_of_backward(current.end)
    current.sums[param] = _plus(current.sums.get(param), _Sum(low, gathered))


def _plus(old: _Sum | None, new: _Sum) -> _Sum:
    if old is None:
        return new
    total = old.low.plus(new.low)
    assert isinstance(total, ProjectedGradient)
    return _Sum(total, new.gathered)


def _way(entry: tuple[Tensor, _Sum]) -> tuple[Any, ...]:
    """Equal for gradients that can be sent together."""
    param, held = entry
    return held.low.side, _sent_dtype(held), param.device, held.gathered.divisor, ranks_of(param).group


def _sent_bytes(entry: tuple[Tensor, _Sum]) -> int:
    return entry[1].low.low.numel() * _sent_dtype(entry[1]).itemsize


def _sent_dtype(held: _Sum) -> torch.dtype:
    return held.gathered.reduce_dtype or held.low.dtype


def _reduce(bucket: list[tuple[Tensor, _Sum]]) -> None:
    """Send one bucket, and add the averages to the gradients of the parameters."""
    first, held = bucket[0]
    ranks, dtype = ranks_of(first), _sent_dtype(held)
    lows = [entry.low.low.to(dtype) for _, entry in bucket]
    if held.low.side == "left":
        flat = torch.cat([low.reshape(-1) for low in lows])
        dist.all_reduce(flat, group=ranks.group)
        shapes = [tuple(low.shape) for low in lows]
    else:
        # A rank's rows are ⌈O/n⌉, the last ones fewer or none; all are sent as ⌈O/n⌉.
        shapes = [(-(-low.shape[0] // ranks.number), low.shape[1]) for low in lows]
        padded = [
            torch.nn.functional.pad(low, (0, 0, 0, ranks.number * rows - low.shape[0]))
            for low, (rows, _) in zip(lows, shapes, strict=True)
        ]
        sent = torch.cat([whole.view(ranks.number, -1) for whole in padded], dim=1)
        flat = sent.new_empty(sent.shape[1])
        dist.reduce_scatter_single(flat, sent.view(-1), group=ranks.group)
    flat /= held.gathered.divisor or ranks.number
    for (param, entry), part, shape in zip(bucket, flat.split([rows * cols for rows, cols in shapes]), shapes, strict=True):
        mean, basis, side = part.view(shape).to(param.dtype), entry.low.basis.to(param.dtype), entry.low.side
        if side == "left":
            average = ProjectedGradient(mean, rows_of(basis, param), side, entry.low.generation, ranks=ranks)
        else:
            average = ProjectedGradient(mean[: local_shape(param)[0]], basis, side, entry.low.generation)
        add_gradient(param, average)
