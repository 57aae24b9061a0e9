"""Stochastic rounding whose random numbers are a function of seed and position: the same on every device and in any order.

    u(seed, i) = Philox4x32-10(key = seed, counter = (i mod 2³², i div 2³², 0, 0))[0], as a float32 in [0, 1)

i is the position in the padded cells [rows, R, L] of the README of this folder. Source: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011), section 4.3; the map to [0, 1) is that of ``triton.language.rand``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_compile.kernels.group_codes.codec import Codec

LOW = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
TO_UNIT = 4.6566127342e-10
"""The largest float32 f for which (2³¹ − 1)·f rounds below 1."""


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """Random numbers in [0, 1).

    Args:
        seed: int64, one element.
        position: int64 of any shape, not negative.

    Returns:
        float32, of the shape of ``position``.
    """
    counter = [position & LOW, (position >> 32) & LOW, torch.zeros_like(position), torch.zeros_like(position)]
    key = [seed & LOW, (seed >> 32) & LOW]
    for _ in range(ROUNDS):
        (high_0, low_0), (high_1, low_1) = _product(counter[0], MULTIPLIERS[0]), _product(counter[2], MULTIPLIERS[1])
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
        key = [(k + increment) & LOW for k, increment in zip(key, INCREMENTS, strict=True)]
    word = counter[0]
    signed = torch.where(word >= 2**31, word - 2**32, word)
    return torch.where(signed < 0, -signed - 1, signed).to(torch.float32) * TO_UNIT


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of the product of 32-bit numbers, without overflow of int64."""
    low = (a & 0xFFFF) * b
    middle = (a >> 16) * b + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


@dataclass(frozen=True)
class CounterCodec(Codec):
    """A stochastic codec with counter-based randomness.

    Attributes:
        seed: int64, one element.
    """

    seed: Any = None

    def _uniform(self, value: Tensor) -> Tensor:
        position = torch.arange(value.numel(), device=value.device).view(value.shape)
        return uniform(self.seed.to(value.device), position)
