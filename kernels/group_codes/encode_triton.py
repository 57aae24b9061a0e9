"""Encode in one kernel: x is read once, codes and scales are written once (section 5 of the README of this folder).

Inductor needs a kernel for the scales and one for each plane, for a byte holds codes of several runs: below 8 bits x is read
two or three times.

Shapes: a program takes T groups at once, at the same place of each of the R runs of a row: a tile [T, R, G], G the group's
size rounded up to a power of two. Numerics class: the bits of ``Codec.encode``; products and sums must not be contracted
(:data:`OPTIONS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from lowmem_compile.gpu_free.specialised import Specialised
from lowmem_compile.kernels.group_codes.codec import SMALLEST_SCALE, Codec, planes
from lowmem_compile.kernels.group_codes.op import allocate

OPTIONS: Mapping[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
"""With a fused multiply-add, x·(1/s) would be rounded once with the rounding to an integer, and ties would differ."""
TILE = 1024
"""Elements a program."""
ROUNDER = 1.5 * 2**23
"""v + ROUNDER − ROUNDER is v rounded to an integer, half to even, for |v| < 2²²."""


@triton.jit
def round_even(v, ROUNDER: tl.constexpr):  # noqa: D103
    return (v + ROUNDER) - ROUNDER


@triton.jit
def store_plane(
    code,  # int32 [T, R, G], of W bits
    plane,
    inside,
    row,
    inner,
    LENGTH,
    W: tl.constexpr,
    RUNS: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
):
    """Write a plane of a tile: run k of the codes lies in bits W·(k div B) and up of byte run k mod B, B = R·W/8."""
    shift = tl.arange(0, 8 // W)[None, :, None, None] * W
    packed = tl.sum(tl.reshape(code, [T, 8 // W, RUNS * W // 8, G]) << shift, axis=1)
    byte_run = tl.arange(0, RUNS * W // 8)[None, :, None]
    tl.store(plane + (row * (RUNS * W // 8) + byte_run) * LENGTH + inner, packed.to(tl.uint8), mask=inside)


@triton.jit
def encode_tile(
    x,  # float32 [T, R, G], zeros where there is no element
    valid,  # bool [T, 1, 1]: the group exists
    row,  # int64 [T, 1, 1]
    place,  # int64 [T, 1, 1]: the group's place in its run
    planes_0,
    planes_1,
    planes_2,
    scales,
    seed,
    LENGTH,
    BITS: tl.constexpr,
    WIDTHS: tl.constexpr,
    RUNS: tl.constexpr,
    GROUP: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    LARGEST: tl.constexpr,
    FACTOR: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROUNDER: tl.constexpr,
    KEEP_ZERO: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Write the codes and scales of a tile."""
    run = tl.arange(0, RUNS)[None, :, None]
    lane = tl.arange(0, G)[None, None, :]
    groups = LENGTH // GROUP
    # The bits of nonnegative floats are ordered as the floats are, and those of NaN lie above infinity's.
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2, keep_dims=True)
    scale = (bits.to(tl.float32, bitcast=True) * FACTOR).to(tl.bfloat16)
    wide = scale.to(tl.float32)
    usable = (wide >= SMALLEST) & (wide < float("inf"))
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, wide, 1.0)), 0.0)
    kept = tl.where(usable, wide, tl.where(wide < SMALLEST, 0.0, float("nan"))).to(tl.bfloat16)
    tl.store(scales + (row * RUNS + run) * groups + place, kept, mask=valid)
    value = x * inverse
    if STOCHASTIC:
        position = (row * RUNS + run) * LENGTH + place * GROUP + lane
        zero = tl.zeros([T, RUNS, G], tl.uint32)
        low = (position & 0xFFFFFFFF).to(tl.uint32)
        high = (position >> 32).to(tl.uint32)
        word, _a, _b, _c = tl.philox(tl.load(seed), low, high, zero, zero)
        code = tl.floor(value + tl.uint_to_uniform_float(word))
        code = tl.minimum(tl.maximum(code, -LARGEST), LARGEST)
    else:
        code = round_even(value, ROUNDER)
    if KEEP_ZERO:
        sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
        code = tl.where(code == 0, sign, code)
    code = tl.where(usable, code, 0.0)
    inside = valid & (lane < GROUP)
    if BITS == 8:
        tl.store(planes_0 + row * LENGTH + place * GROUP + lane, code.to(tl.int8), mask=inside)
    else:
        rest = (code + LARGEST).to(tl.int32)
        left = BITS
        for index in tl.static_range(len(WIDTHS)):
            left -= WIDTHS[index]
            top = rest >> left
            rest = rest - (top << left)
            plane = planes_0 if index == 0 else (planes_1 if index == 1 else planes_2)
            store_plane(top, plane, inside, row, place * GROUP + lane, LENGTH, WIDTHS[index], RUNS, T, G)


@triton.jit
def encode_kernel(
    x,
    planes_0,
    planes_1,
    planes_2,
    scales,
    seed,
    rows,
    width,
    row_stride,
    stride,
    run_width,
    LENGTH,
    BITS: tl.constexpr,
    WIDTHS: tl.constexpr,
    RUNS: tl.constexpr,
    GROUP: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    LARGEST: tl.constexpr,
    FACTOR: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROUNDER: tl.constexpr,
    KEEP_ZERO: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """T groups of each run of x[rows, width]."""
    groups = LENGTH // GROUP
    which = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)[:, None, None]
    row = which // groups
    place = which % groups
    run = tl.arange(0, RUNS)[None, :, None]
    inner = place * GROUP + tl.arange(0, G)[None, None, :]
    column = run * run_width + inner
    valid = row < rows
    here = valid & (tl.arange(0, G)[None, None, :] < GROUP) & (inner < run_width) & (column < width)
    value = tl.load(x + row * row_stride + column * stride, mask=here, other=0.0).to(tl.float32)
    encode_tile(
        value,
        valid,
        row,
        place,
        planes_0,
        planes_1,
        planes_2,
        scales,
        seed,
        LENGTH,
        BITS,
        WIDTHS,
        RUNS,
        GROUP,
        T,
        G,
        LARGEST,
        FACTOR,
        SMALLEST,
        ROUNDER,
        KEEP_ZERO,
        STOCHASTIC,
    )


def constants(codec: Codec, width: int) -> dict[str, Any]:
    """The constant arguments of :func:`encode_kernel` for rows of ``width`` elements."""
    runs, _, group = codec.layout(width)
    power = triton.next_power_of_2(group)
    up = 1.0 if codec.bits <= 8 else 1.0 + 2.0**-8
    return {
        "BITS": codec.bits,
        "WIDTHS": planes(codec.bits),
        "RUNS": runs,
        "GROUP": group,
        "T": max(TILE // (runs * power), 1),
        "G": power,
        "LARGEST": float(codec.largest),
        "FACTOR": up / codec.largest,
        "SMALLEST": SMALLEST_SCALE,
        "ROUNDER": ROUNDER,
        "KEEP_ZERO": codec.keep_zero,
        "STOCHASTIC": codec.stochastic,
    }


def specialised(codec: Codec, width: int, dtype: str) -> Specialised:
    """The kernel as it is compiled ahead of time, for x in ``dtype`` (``"bf16"``, ``"fp16"``, ``"fp32"``)."""
    plane = "*i8" if codec.bits == 8 else "*u8"
    given = constants(codec, width)
    seed = "*i64" if codec.stochastic else "*bf16"
    types = [f"*{dtype}", plane, plane, plane, "*bf16", seed, *["i64"] * 6, *["constexpr"] * len(given)]
    names = encode_kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types) if t.startswith("*")}
    return Specialised(encode_kernel, dict(zip(names, types, strict=True)), given, aligned, **OPTIONS)


def encode(x: torch.Tensor, codec: Codec, seed: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The parts of ``codec.encode(x)``, by the kernel; ``seed`` (int64, one element) for a stochastic codec."""
    parts = allocate(codec, x)
    fill(x, codec, seed, parts)
    return parts


def fill(x: torch.Tensor, codec: Codec, seed: torch.Tensor | None, parts: list[torch.Tensor]) -> None:
    """Launch: write the codes and scales of x into ``parts``."""
    width = x.shape[-1]
    if not x.numel():
        return
    # A view wherever x's rows lie at one distance; the kernel takes any two strides.
    flat = x.reshape(-1, width)
    runs, length, group = codec.layout(width)
    *codes, scales = parts
    three = [*codes, codes[0], codes[0]][:3]  # a plane that a width lacks is never touched
    given = constants(codec, width)
    grid = (triton.cdiv(flat.shape[0] * (length // group), given["T"]),)
    encode_kernel[grid](
        flat,
        *three,
        scales,
        scales if seed is None else seed,
        *flat.shape,
        *flat.stride(),
        -(-width // runs),
        length,
        **given,
        **OPTIONS,
    )
