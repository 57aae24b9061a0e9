"""Large parameters a piece at a time, so that float32 copies take a few times one piece and not a few times an embedding.

Adam's update of an unprojected parameter is elementwise, so it runs over pieces of the flat parameter; pieces end at the ends of
8-bit blocks, so results are the same. For a projected matrix, up(N) is added to W in place, or in blocks of rows if W is of
another dtype, and down goes over blocks of rows: neither the whole gradient in float32 nor the whole update is made (methods
that need the whole gradient, refreshes and Flora's base update aside).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowmem_compile.optim.moments import Rates, Update, apply_update, decays, take_step
from lowmem_compile.optim.projector import Factors, Side, down, up
from lowmem_compile.optim.slots import Slot, State, compute_dtype

LARGEST = 2**22
"""Elements a piece, at most (rounded down to whole 8-bit blocks)."""


def plain_step(
    p: Tensor, grad: Tensor, state: State, slots: tuple[Slot, ...], group: dict[str, Any], rates: Rates | None = None
) -> None:
    """Advance the moments by a whole gradient and change the parameter in place.

    Args:
        p: the parameter.
        grad: its gradient, in its shape.
        state: its state; ``state["step"]`` counts this step already.
        slots: its slots.
        group: its parameter group.
        rates: given in a traced step, which has all in one piece: code generation needs no float32 copies.
    """
    if group["base"] != "adamw" or rates is not None or p.numel() <= LARGEST or not p.is_contiguous():
        update = take_step(state, slots, grad.to(compute_dtype(p.dtype)), p, group, rates)
        apply_update(p, update.direction, update)
        return
    flat, flat_grad = p.view(-1), grad.reshape(-1)
    for start, stop in _pieces(p.numel(), group["block_size"]):
        part, parts = _part_of(state, slots, start, stop)
        piece = flat[start:stop]
        update = take_step(part, parts, flat_grad[start:stop].to(compute_dtype(p.dtype)), piece, group)
        apply_update(piece, update.direction, update)


def project(grad: Tensor, factors: Factors, side: Side) -> Tensor:
    """The projected gradient, in the factors' dtype, of a gradient in any dtype."""
    wide = factors[0].dtype
    if grad.dtype == wide or side not in ("right", "left") or grad.numel() <= LARGEST:
        return down(grad.to(wide), factors, side)
    blocks = _row_blocks(grad)
    if side == "right":
        return torch.cat([grad[rows].to(wide) @ factors[0] for rows in blocks])
    low = grad.new_zeros(factors[0].shape[1], grad.shape[1], dtype=wide)
    for rows in blocks:
        low += factors[0][rows].T @ grad[rows].to(wide)
    return low


def apply_projected(W: Tensor, N: Tensor, factors: Factors, side: Side, update: Update) -> None:
    """Change W in place by up(N), as ``update`` says; a traced one, whose size is a tensor, in one piece."""
    if side in ("right", "left") and W.dtype == N.dtype and not isinstance(update.size, Tensor):
        if decays(update) and update.decay_first:
            W.sub_(W * update.decay)
        left, right = (N, factors[0].T) if side == "right" else (factors[0], N)
        W.addmm_(left, right, alpha=-update.size)
        if decays(update) and not update.decay_first:
            W.sub_(W * update.decay)
        return
    if side not in ("right", "left") or isinstance(update.size, Tensor) or W.numel() <= LARGEST:
        apply_update(W, up(N, factors, side), update)
        return
    for rows in _row_blocks(W):
        if side == "right":
            apply_update(W[rows], N[rows] @ factors[0].T, update)
        else:
            apply_update(W[rows], factors[0][rows] @ N, update)


def _row_blocks(matrix: Tensor) -> list[slice]:
    """Slices of rows that hold LARGEST elements at most, one row at least."""
    count = max(LARGEST // matrix.shape[1], 1)
    return [slice(start, start + count) for start in range(0, matrix.shape[0], count)]


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
