"""Group codes run by run: the bits of ``Codec.encode``, in the form that Inductor makes one GPU kernel of.

``Codec.encode`` reduces all runs of a row at once and packs them afterwards: two iteration spaces, so two or three kernels, each
of which reads x or the codes again. Here each of the R runs is cut out first:

    cells_k = x[..., kL : (k+1)L]     [..., L/g, g]      k < R
    s_k     = bf16(max |cells_k| / m)  [..., L/g]         q_k = round(cells_k / s_k)
    plane w of 8 bits: R arrays of codes, one behind another;  of w < 8: bytes of 8/w runs each

All of it runs over (rows·L/g, g): one persistent reduction that reads x once and writes each part once, at every width. Two
operations keep it so, identities but for where their results lie:

- ``lowmem::in_memory``: x is written to memory before it is read here, and not computed once more a run;
- ``lowmem::behind``: arrays are written where their concatenation has them, without a kernel that copies.

Numerics class: the bits of ``Codec`` (APPROXIMATE).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowmem_compile.kernels.group_codes.codec import Codec, padded, planes
from lowmem_compile.kernels.group_codes.in_memory import in_memory


@torch.library.custom_op("lowmem::behind", mutates_args=())
def behind(xs: list[Tensor]) -> Tensor:
    """Concatenation along the last dimension but one, of any dtype; compiled, each x is written into its place."""
    return torch.cat(xs, -2)


@behind.register_fake
def _(xs: list[Tensor]) -> Tensor:
    return torch.cat(xs, -2)


def encode_runs(codec: Codec, x: Tensor) -> tuple[Tensor, ...]:
    """What ``codec.encode(x)`` returns for x[..., D] of static D, bit for bit.

    Raises:
        ValueError: the codec has no codes (16 bits), or D is dynamic.
    """
    width = x.shape[-1]
    if codec.bits == 16 or not isinstance(width, int):
        raise ValueError(f"{codec.name} codes of rows of {width} elements have no runs")
    runs, length, group = codec.layout(width)
    step = -(-width // runs)
    lead, dtype = x.shape[:-1], x.dtype
    x = in_memory(x).reshape(-1, width)
    codes, scales = [], []
    for k in range(runs):
        cells = padded(x[..., min(k * step, width) : min((k + 1) * step, width)].to(torch.float32), length)
        cells = cells.reshape(-1, length // group, group)
        inverse, scale = codec.scales_of(cells, dtype)
        inverse = in_memory(inverse)  # inside the kernel: what computes it is not repeated in each plane
        codes.append(codec.codes_of(cells, inverse))
        scales.append(scale.reshape(-1, 1, length // group))
    if codec.bits == 8:
        packed = [codes[0].to(torch.int8)]
    else:
        packed = _packed([code + float(codec.largest) for code in codes], codec.bits, length)
    return tuple(part.reshape(*lead, part.numel() // math.prod(lead)) for part in (*packed, _joined(scales)))


def _packed(codes: list[Tensor], bits: int, length: int) -> list[Tensor]:
    """The planes uint8 [rows, runs·w/8, L] of the codes of all runs, numbers from 0 to 2^bits - 1."""
    made, left = [], bits
    for w in planes(bits):
        left -= w
        top = [torch.floor(c * 2.0**-left) for c in codes] if left else codes
        codes = [c - t * 2.0**left for c, t in zip(codes, top, strict=True)] if left else codes
        byte_runs = len(codes) * w // 8
        plane = []
        for i in range(byte_runs):
            total = top[i]
            for k in range(1, 8 // w):
                total = total + top[k * byte_runs + i] * float(2 ** (w * k))
            plane.append(total.to(torch.uint8).reshape(-1, 1, length))
        made.append(_joined(plane))
    return made


def _joined(parts: list[Tensor]) -> Tensor:
    joined: Tensor = behind(parts) if len(parts) > 1 else parts[0]
    return joined
