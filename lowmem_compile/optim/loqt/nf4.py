"""NF4, the 4-bit NormalFloat of QLoRA, as plain tensors: two codes a byte, one scale a block.

A tensor is read as a flat run of n values and cut into blocks of B (the last may be shorter):

    encode    s = max |x| of the block,  code = the level nearest to x / s
    decode    x̃ = level[code] · s

The 16 levels are quantiles of a standard normal distribution divided by the largest, with an exact zero (Dettmers et al.,
arXiv:2305.14314, section 3 and appendix E): Φ⁻¹ at 8 points from δ down to ½ for the positive half and at 7 for the negative one,
δ = ½(1 - 1/32 + 1 - 1/30). The paper prints them; tests hold them to this formula.

Double quantisation (the same paper): the scales less their mean are held in 8 bits, one float32 for 256 of them. The map is the
dynamic one of :mod:`lowmem_compile.optim.quantise`.

Layout: the last block is filled up with zeros; with h = B·ceil(n/B)/2, byte i holds value i in its low four bits and value i + h
in its high four. Decoding uses only operations that a partition may recompute (no concatenation, no padding).

Bytes, b = ceil(n/B): b·B/2 + 4·b; with double quantisation b·B/2 + b + 4·ceil(b/256) + 4. With B = 64 that is 4.5 or 4.127 bits a
value.

Why an own format: codes and scales lie in ordinary buffers, so a state dict holds plain tensors, and decoding is plain
operations that the partition recomputes in the backward pass and Inductor fuses. bitsandbytes' decoding is one opaque operation,
whose result (the whole weight) a compiled graph would keep until the backward pass; torchao 0.18 has NF4 as a tensor subclass in
a private module. Levels and decoded values are bitsandbytes' (tested).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_compile.errors import OptionError
from lowmem_compile.optim.quantise import dynamic_map
from lowmem_compile.optim.quantise import encode as encode_bytes

SCALES = 256
"""Scales that share a float32 under double quantisation."""
PIECE = 2**22
"""Values encoded at a time, so that the temporaries of encoding do not grow with the matrix."""
Stored = Mapping[str, Tensor]
# fmt: off
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""The levels as appendix E of the paper prints them, ascending."""


@dataclass(frozen=True)
class NF4:
    """How a tensor of a shape is stored.

    Attributes:
        shape: of the tensor.
        block: values that share a scale.
        double: the scales are in 8 bits.
    """

    shape: tuple[int, ...]
    block: int = 64
    double: bool = False

    @property
    def numel(self) -> int:
        """Values."""
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """Scales."""
        return -(-self.numel // self.block)

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each stored tensor."""
        codes = {"codes": ((self.blocks * self.block // 2,), torch.uint8)}
        if not self.double:
            return {**codes, "scale": ((self.blocks,), torch.float32)}
        return {
            **codes,
            "scale": ((self.blocks,), torch.uint8),
            "scale_scale": ((-(-self.blocks // SCALES),), torch.float32),
            "scale_mean": ((), torch.float32),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.parts().values())

    def tables(self, device: torch.device) -> dict[str, Tensor]:
        """The constants that :meth:`decode` reads; the same for all tensors."""
        table = {
            "levels": torch.tensor(LEVELS, device=device),
            "shifts": torch.tensor([[0], [4]], dtype=torch.int32, device=device),
        }
        return {**table, "scale_levels": dynamic_map(signed=True, device=device)} if self.double else table

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """The stored tensors of ``x``, which has this shape and any floating dtype.

        Infinity or NaN in a block makes all of the block NaN when decoded.
        """
        flat = x.detach().reshape(-1)
        step = max(PIECE // self.block, 1) * self.block
        done = [self._encode_piece(flat[start : start + step]) for start in range(0, self.numel, step)]
        code = torch.cat([codes for codes, _ in done])
        scale = torch.cat([scales for _, scales in done])
        low, high = code.view(2, -1)
        stored = {"codes": low | (high << 4), "scale": scale}
        if self.double:
            mean = scale.mean()
            stored["scale"], stored["scale_scale"] = encode_bytes(scale - mean, signed=True, block=SCALES)
            stored["scale_mean"] = mean
        return stored

    def _encode_piece(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, uint8 [b·B], and scales, float32 [b], of a run of b blocks, the last filled up."""
        blocks = -(-flat.numel() // self.block)
        wide = flat.to(torch.float32)
        cells = torch.nn.functional.pad(wide, (0, blocks * self.block - flat.numel())).view(blocks, self.block)
        scale = cells.abs().amax(1)
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        table = torch.tensor(LEVELS, device=flat.device)
        code = torch.bucketize(cells * inverse[:, None], (table[1:] + table[:-1]) / 2, out_int32=True)
        return code.to(torch.uint8).view(-1), scale

    def decode(self, stored: Stored, tables: Stored, dtype: torch.dtype) -> Tensor:
        """The tensor, in this shape and ``dtype``; computed in float32."""
        code = (stored["codes"].to(torch.int32) >> tables["shifts"]) & 15
        scale = stored["scale"]
        if self.double:
            shared = stored["scale_scale"][:, None].expand(-1, SCALES).reshape(-1)[: self.blocks]
            scale = tables["scale_levels"][scale.to(torch.int32)] * shared + stored["scale_mean"]
        cells = tables["levels"][code.view(self.blocks, self.block)] * scale[:, None]
        return cells.view(-1)[: self.numel].view(self.shape).to(dtype)


@dataclass(frozen=True)
class Plain:
    """A tensor stored as it is, in the interface of :class:`NF4`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the one stored tensor."""
        return {"plain": (self.shape, self.dtype)}

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def tables(self, device: torch.device) -> dict[str, Tensor]:  # noqa: ARG002
        """None."""
        return {}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """The tensor in the storage's dtype."""
        return {"plain": x.detach().to(self.dtype)}

    def decode(self, stored: Stored, tables: Stored, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """The tensor in ``dtype``."""
        return stored["plain"].to(dtype)


Format = NF4 | Plain


def check_block(block: object) -> None:
    """Refuse a block size that the format has not.

    Raises:
        OptionError: not a power of two from 16 to 4096.
    """
    if isinstance(block, bool) or not isinstance(block, int) or not 16 <= block <= 4096 or block & (block - 1):
        raise OptionError(
            f"block={block!r}: NF4 takes a power of two from 16 to 4096 values a scale (64 is the published size; two codes share"
            " a byte, so an odd block cannot be stored)."
        )
