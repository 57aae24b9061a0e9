"""The base update of a large unprojected parameter, a piece at a time.

Adam's update is elementwise, so it can run over pieces of the flat parameter; float32 copies of gradient, moments and update then
take a few times one piece instead of a few times an embedding. Pieces end at the ends of 8-bit blocks, so results are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from lowmem_compile.optim.moments import apply_update, take_step
from lowmem_compile.optim.slots import Slot, State, compute_dtype

LARGEST = 2**22
"""Elements a piece, at most (rounded down to whole 8-bit blocks)."""


def plain_step(p: Tensor, grad: Tensor, state: State, slots: tuple[Slot, ...], group: dict[str, Any]) -> None:
    """Advance the moments by a whole gradient and change the parameter in place.

    Args:
        p: the parameter.
        grad: its gradient, in its shape.
        state: its state; ``state["step"]`` counts this step already.
        slots: its slots.
        group: its parameter group.
    """
    if group["base"] != "adamw" or p.numel() <= LARGEST or not p.is_contiguous():
        update = take_step(state, slots, grad.to(compute_dtype(p.dtype)), p, group)
        apply_update(p, update.direction, update)
        return
    flat, flat_grad = p.view(-1), grad.reshape(-1)
    for start, stop in _pieces(p.numel(), group["block_size"]):
        part, parts = _part_of(state, slots, start, stop)
        piece = flat[start:stop]
        update = take_step(part, parts, flat_grad[start:stop].to(compute_dtype(p.dtype)), piece, group)
        apply_update(piece, update.direction, update)


def _pieces(numel: int, block: int) -> Iterator[tuple[int, int]]:
    length = max(LARGEST // block, 1) * block
    return ((start, min(start + length, numel)) for start in range(0, numel, length))


def _part_of(state: State, slots: tuple[Slot, ...], start: int, stop: int) -> tuple[State, tuple[Slot, ...]]:
    """Views of the state of elements start to stop, and slots that describe them."""
    part: State = {"step": state["step"]}
    for slot in slots:
        part[slot.key] = state[slot.key].view(-1)[start:stop]
        if slot.block:
            part[slot.key + "_scale"] = state[slot.key + "_scale"][start // slot.block : -(-stop // slot.block)]
    return part, tuple(replace(slot, shape=(stop - start,)) for slot in slots)
