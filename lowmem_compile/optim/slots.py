"""The tensors that an optimizer keeps for a parameter: their names, shapes, dtypes and bytes.

A slot is the description; the tensor lies in the optimizer's state dictionary, under the slot's key. State is created, read,
written, counted and checked through slots alone, so that what the report says is what is allocated. An 8-bit slot takes two
entries: the codes under ``key`` and the scales under ``key + "_scale"``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_compile.optim.quantise import decode, encode, encoded_bytes

State = dict[str, Any]


@dataclass(frozen=True)
class Slot:
    """One tensor of a parameter's state.

    Attributes:
        key: its name in the state dictionary.
        shape: its shape.
        dtype: what it is stored in, unless in 8 bits.
        block: values a scale, if stored in 8 bits; 0 if not.
        root: the values are not negative, and 8 bits hold their square root (second moments).
        fill: value it starts from.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int = 0
    root: bool = False
    fill: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes the slot takes."""
        numel = math.prod(self.shape)
        return encoded_bytes(numel, self.block) if self.block else numel * self.dtype.itemsize

    def create(self, state: State, device: torch.device) -> None:
        """Put the starting value into a state dictionary that does not hold the slot yet."""
        if self.key not in state:
            if self.block:
                state[self.key] = torch.empty(self.shape, dtype=torch.uint8, device=device)
                state[self.key + "_scale"] = torch.empty(-(-math.prod(self.shape) // self.block), device=device)
                self.save(state, torch.full(self.shape, self.fill, device=device))
            else:
                state[self.key] = torch.full(self.shape, self.fill, dtype=self.dtype, device=device)

    def load(self, state: State) -> Tensor:
        """The value, in float32 (float64 if stored so). It may be the stored tensor itself: who writes to it saves it."""
        stored: Tensor = state[self.key]
        if not self.block:
            return stored.to(compute_dtype(self.dtype))
        value = decode(stored, state[self.key + "_scale"], signed=not self.root, block=self.block)
        return value.square() if self.root else value

    def save(self, state: State, value: Tensor) -> None:
        """Replace the value; the stored tensor keeps its place in memory."""
        if value is state[self.key]:
            return
        if self.block:
            code, scale = encode(value.sqrt() if self.root else value, signed=not self.root, block=self.block)
            state[self.key].copy_(code)
            state[self.key + "_scale"].copy_(scale)
        else:
            state[self.key].copy_(value)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that state and gradients of this dtype are computed in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moment_slot(key: str, shape: tuple[int, ...], dtype: torch.dtype, group: State, *, root: bool = False) -> Slot:
    """A slot for a moment, stored as the group's ``bits`` say: 8, 32, or the parameter's dtype (``None``).

    Moments of float16 parameters are float32 where they would be float16: squares of gradients underflow there.
    """
    if group["bits"] == 8 and math.prod(shape) >= group["quantise_from"]:
        return Slot(key, shape, dtype, block=group["block_size"], root=root)
    wide = group["bits"] == 32 or dtype == torch.float16
    return Slot(key, shape, compute_dtype(dtype) if wide else dtype, root=root)


def total_bytes(slots: Iterable[Slot]) -> int:
    """Bytes of several slots."""
    return sum(slot.nbytes for slot in slots)
