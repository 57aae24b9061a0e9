"""Block-wise 8-bit storage of optimizer state: one code a byte, one float32 scale a block.

A tensor is read as a flat run of values and cut into blocks of B (the last may be shorter):

    encode    s = max |x| of the block,  code = the entry of the map nearest to x / s
    decode    x̃ = map[code] · s

The map is dynamic (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861, section 2): for each decade
10⁻⁶ … 10⁰ a run of evenly spaced values, twice as many in each larger decade, so that small and large values keep about the same
relative precision. Signed maps hold momenta; unsigned ones hold magnitudes and have one bit more.

Two things differ from the usual 8-bit Adam, both because a second moment that rounds to zero makes m/(√v + ε) explode: √v is
stored, not v, and a magnitude above zero never gets the code of zero.

Why an own format: torchao keeps state in tensor subclasses (a state dict would no longer hold plain tensors), needs a C++
compiler and takes only sizes divisible by its block; bitsandbytes is a binary dependency whose Python interface has changed
under its users. What is needed here is these few lines of plain PyTorch, on every device.

Bytes: n + 4·ceil(n/B). After NaN or infinity in a block, all of it decodes to NaN or infinity; other blocks are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

DECADES = 7


@cache
def _levels(signed: bool) -> tuple[float, ...]:
    """The 256 entries of a map, ascending."""
    levels = [0.0, 1.0]
    for decade in range(DECADES):
        count = 2 ** (decade + (0 if signed else 1))
        scale = 10.0 ** (decade - DECADES + 1)
        step = 0.9 / count
        middles = [scale * (0.1 + step * (k + 0.5)) for k in range(count)]
        levels += middles
        if signed:
            levels += [-value for value in middles]
    return tuple(sorted(levels))


_GIVEN: list[tuple[Tensor, Tensor]] = []


@contextmanager
def given_maps(unsigned: Tensor, signed: Tensor) -> Iterator[None]:
    """Take these tensors for the maps: what is traced here has them as inputs and not as constants."""
    _GIVEN.append((unsigned, signed))
    try:
        yield
    finally:
        _GIVEN.pop()


def dynamic_map(*, signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The map's entries in ascending order, float32 [256] (unsigned: 0 to 1; signed: about -1 to 1)."""
    if _GIVEN:
        return _GIVEN[-1][signed]
    return torch.tensor(_levels(signed), dtype=torch.float32, device=device)


def encode(x: Tensor, *, signed: bool, block: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 in the shape of ``x``, and scales, float32 [ceil(numel/block)].

    Args:
        x: floating point, any shape; not negative if ``signed`` is false.
        signed: which map.
        block: values that share a scale.
    """
    flat = x.reshape(-1).to(torch.float32)
    count = -(-flat.numel() // block)
    cells = torch.nn.functional.pad(flat, (0, count * block - flat.numel())).view(count, block)
    scale = cells.abs().amax(1) if count else flat.new_zeros(0)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    levels = dynamic_map(signed=signed, device=x.device)
    code = torch.bucketize(cells * inverse[:, None], (levels[1:] + levels[:-1]) / 2, out_int32=True)
    if not signed:
        code = torch.where(cells > 0, code.clamp(min=1), code)
    return code.to(torch.uint8).view(-1)[: flat.numel()].view(x.shape), scale


def decode(code: Tensor, scale: Tensor, *, signed: bool, block: int) -> Tensor:
    """The float32 values of what :func:`encode` returned, in the shape of ``code``."""
    count = scale.numel()
    cells = torch.nn.functional.pad(code.reshape(-1), (0, count * block - code.numel())).view(count, block)
    values = dynamic_map(signed=signed, device=code.device)[cells.to(torch.int32)] * scale[:, None]
    return values.view(-1)[: code.numel()].view(code.shape)


def encoded_bytes(numel: int, block: int) -> int:
    """Bytes of codes and scales of so many values."""
    return numel + 4 * -(-numel // block)
