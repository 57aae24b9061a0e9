"""2- and 4-bit step codes in plain PyTorch: the definition that kernels and graph rewrites are tested against.

    forward   codes = encode(x, table)         uint8, x's shape, one of 0 … 2^b − 1, b = table.bits
              packed = pack(codes, b)          uint8 [Q], Q = ceil(N·b / 8)
              poison = row_poison(x)           float32, one a row
    backward  dx = grad · levels[codes] + poison

Saved: Q + 4·rows bytes in place of x. Numerics class: APPROXIMATE (the forward is untouched).

Planar layout: bits bk … bk + b − 1 of byte i hold the code of element i + k·Q of the flattened, contiguous
tensor: 8/b runs of Q elements share the bytes and every load is contiguous. Codes past the end are 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem_compile.kernels.activation_codes.tables import StepTable

WIDTHS = (2, 4)
"""Bits a code may take: the widths that divide a byte."""


def encode(x: Tensor, table: StepTable) -> Tensor:
    """The code of every element: the number of thresholds strictly below it, compared in float32.

    Args:
        x: real floating-point tensor of any shape. NaN gets code 0, +inf the last code, -inf code 0.
        table: a 2- or 4-bit table.

    Returns:
        uint8, x's shape.

    Raises:
        ValueError: `table` has another width, or `x` is not floating point.
    """
    require_width(table.bits)
    if not x.is_floating_point():
        raise ValueError(f"codes are defined for real floating-point tensors, not for {x.dtype}")
    x32 = x.float()
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for threshold in table.thresholds:
        codes = codes + (x32 > threshold).to(torch.uint8)
    return codes


def row_poison(x: Tensor) -> Tensor:
    """What backward adds to the gradient of each row so that a non-finite input is not lost.

    A row is a run along the last dimension; a 0-dimensional tensor is one row.

    Returns:
        float32, x's shape with the last dimension 1 (a 0-dimensional x gives a 0-dimensional result): 0 where
        the row is finite, NaN where any of its elements is NaN or infinite.
    """
    return (x * 0).sum(dim=-1, keepdim=True, dtype=torch.float32)


def pack(codes: Tensor, bits: int = 2) -> Tensor:
    """Pack codes, 8/bits a byte, in the planar layout.

    Args:
        codes: uint8 of any shape, every element 0 … 2^bits − 1 (not checked), N elements.
        bits: 2 or 4.

    Returns:
        uint8 [ceil(N · bits / 8)].

    Raises:
        ValueError: `codes` is not uint8, or bits is neither 2 nor 4.
    """
    require_width(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, not {codes.dtype}")
    flat = codes.reshape(-1)
    runs, length = 8 // bits, packed_size(flat.numel(), bits)
    planes = torch.nn.functional.pad(flat, (0, length * runs - flat.numel())).view(runs, length)
    packed = planes[0].clone()
    for k in range(1, runs):
        packed |= planes[k] << (bits * k)
    return packed


def unpack(packed: Tensor, shape: Sequence[int], bits: int = 2) -> Tensor:
    """The codes, uint8 of the given shape, that `pack` packed.

    Raises:
        ValueError: `packed` is not uint8 [ceil(N · bits / 8)] for the N elements of `shape`, or bits is neither 2 nor 4.
    """
    require_width(bits)
    size = torch.Size(shape)
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(size.numel(), bits),):
        raise ValueError(
            f"codes of shape {tuple(size)} pack into uint8 [{packed_size(size.numel(), bits)}], "
            f"not {packed.dtype} {list(packed.shape)}"
        )
    planes = torch.stack([packed >> bits * k & (2**bits - 1) for k in range(8 // bits)])
    return planes.reshape(-1)[: size.numel()].view(size)


def packed_size(elements: int, bits: int = 2) -> int:
    """Bytes that the codes of `elements` elements take: ceil(elements · bits / 8)."""
    return (elements * bits + 7) // 8


def backward(grad: Tensor, packed: Tensor, table: StepTable, poison: Tensor) -> Tensor:
    """The gradient of the input: grad · levels[code] + poison.

    Levels are rounded to float32; the product and the sum are computed in float32 (in float64 for a float64
    `grad`), then cast to grad's dtype. A zero may change its sign.

    Args:
        grad: gradient of the output, real floating point, of the input's shape.
        packed: uint8 [ceil(N · table.bits / 8)], from `pack`.
        table: the table the codes were made with.
        poison: float32, grad's shape with the last dimension 1, from `row_poison`.

    Returns:
        A tensor of grad's shape and dtype.

    Raises:
        ValueError: `table` has another width, or a shape or dtype does not fit `grad`.
    """
    require_width(table.bits)
    if not grad.is_floating_point():
        raise ValueError(f"the gradient must be real floating point, not {grad.dtype}")
    row_shape = (*grad.shape[:-1], 1) if grad.dim() else ()
    if poison.dtype != torch.float32 or poison.shape != row_shape:
        raise ValueError(
            f"a gradient of shape {tuple(grad.shape)} needs a poison of float32 {list(row_shape)}, "
            f"not {poison.dtype} {list(poison.shape)}"
        )
    wide = torch.promote_types(grad.dtype, torch.float32)
    levels = torch.tensor(table.levels, dtype=torch.float32, device=grad.device).to(wide)
    codes = unpack(packed, grad.shape, table.bits)
    return (grad.to(wide) * levels[codes.long()] + poison.to(wide)).to(grad.dtype)


def require_width(bits: int) -> None:
    """Refuse codes of bits that this file does not pack.

    Raises:
        ValueError: bits is neither 2 nor 4.
    """
    if bits not in WIDTHS:
        raise ValueError(f"codes take 2 or 4 bits (2-bit and 4-bit tables), not {bits}")
