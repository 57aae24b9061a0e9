"""Encode in one kernel: x is read once, codes and scales are written once (section 5 of the README of this folder).

Inductor needs a kernel for the scales and one for each plane, for a byte holds codes of several runs: below 8 bits x is read
two or three times.

Shapes: a program takes T groups at once, at the same place of each of the R runs of a row: R tiles [T, G], G the group's size
rounded up to a power of two. Bytes are put together in registers: one tile [T, R, G], reshaped to bytes, went through shared
memory and was 3 to 10 times slower on an H100. Numerics class: the bits of ``Codec.encode``; products and sums must not be
contracted (:data:`OPTIONS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from lowmem_compile.gpu_free.specialised import Specialised
from lowmem_compile.kernels.group_codes.codec import SMALLEST_SCALE, Codec, largest_scale, planes
from lowmem_compile.kernels.group_codes.op import allocate

OPTIONS: Mapping[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
"""With a fused multiply-add, x·(1/s) would be rounded once with the rounding to an integer, and ties would differ."""
TILE = 1024
"""Elements a program takes of each run of up to four, half as many of eight: the codes of all runs are in registers at once."""
ROUNDER = 1.5 * 2**23
"""v + ROUNDER − ROUNDER is v rounded to an integer, half to even, for |v| < 2²²."""


@triton.jit
def round_even(v, ROUNDER: tl.constexpr):  # noqa: D103
    return (v + ROUNDER) - ROUNDER


@triton.jit
def store_plane(
    codes,  # RUNS of int32 [T, G]
    plane,
    inside,
    row,
    inner,
    LENGTH,
    W: tl.constexpr,
    LEFT: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Write W bits of each code, from bit LEFT: run k into bits W·(k div B) and up of byte run k mod B, B = R·W/8."""
    for byte_run in tl.static_range(RUNS * W // 8):
        packed = (codes[byte_run] >> LEFT) & ((1 << W) - 1)
        for k in tl.static_range(1, 8 // W):
            packed |= ((codes[byte_run + k * (RUNS * W // 8)] >> LEFT) & ((1 << W) - 1)) << (W * k)
        tl.store(plane + (row * (RUNS * W // 8) + byte_run) * LENGTH + inner, packed.to(tl.uint8), mask=inside)


top_scale = triton.constexpr_function(largest_scale)


@triton.constexpr_function
def largest_number(dtype: tl.dtype) -> float:
    """The largest finite number of a floating-point type."""
    return {"fp16": 65504.0, "bf16": 255 * 2.0**120, "fp32": (2**24 - 1) * 2.0**104}[dtype.name]


@triton.jit
def encode_run(
    x,  # float32 [T, G], zeros where there is no element
    run: tl.constexpr,
    valid,  # bool [T, 1]: the group exists
    row,  # int64 [T, 1]
    place,  # int64 [T, 1]: the group's place in its run
    scales,
    seed,
    LENGTH,
    RUNS: tl.constexpr,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    LARGEST: tl.constexpr,
    FACTOR: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROUNDER: tl.constexpr,
    KEEP_ZERO: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TOP: tl.constexpr,
):
    """Write the scales of a run's groups; its codes, float32 [T, G]."""
    lane = tl.arange(0, G)[None, :]
    groups = LENGTH // GROUP
    # The bits of nonnegative floats are ordered as the floats are, and those of NaN lie above infinity's.
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    exact = bits.to(tl.float32, bitcast=True) * FACTOR
    wide = exact.to(tl.bfloat16).to(tl.float32)
    usable = (wide >= SMALLEST) & (wide < float("inf"))
    divisor = tl.where((LARGEST > 127) & (TOP < 65504) & (wide > TOP), exact, wide)
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, divisor, 1.0)), 0.0)
    kept = tl.where(usable, tl.minimum(wide, TOP), tl.where(wide < SMALLEST, 0.0, float("nan"))).to(tl.bfloat16)
    tl.store(scales + (row * RUNS + run) * groups + place, kept, mask=valid)
    value = x * inverse
    if STOCHASTIC:
        position = (row * RUNS + run) * LENGTH + place * GROUP + lane
        zero = position.to(tl.uint32) * 0
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
    return tl.where(usable, code, 0.0)


@triton.jit
def store_codes(
    codes,  # RUNS of float32 [T, G]
    inside,  # bool [T, G]
    row,
    inner,  # int64 [T, G]: places in a run
    planes_0,
    planes_1,
    planes_2,
    LENGTH,
    BITS: tl.constexpr,
    WIDTHS: tl.constexpr,
    RUNS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Write the planes of a tile."""
    if BITS == 8:
        tl.store(planes_0 + row * LENGTH + inner, codes[0].to(tl.int8), mask=inside)
    else:
        whole = ()
        for run in tl.static_range(RUNS):
            whole = whole + ((codes[run] + LARGEST).to(tl.int32),)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no unpacking)
        store_plane(whole, planes_0, inside, row, inner, LENGTH, WIDTHS[0], BITS - WIDTHS[0], RUNS)
        if len(WIDTHS) > 1:
            store_plane(whole, planes_1, inside, row, inner, LENGTH, WIDTHS[1], BITS - WIDTHS[0] - WIDTHS[1], RUNS)
        if len(WIDTHS) > 2:
            store_plane(whole, planes_2, inside, row, inner, LENGTH, WIDTHS[2], 0, RUNS)


@triton.jit
def encode_tile(
    program,
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
    """T groups of each run of x[rows, width], those of the program-th tile."""
    groups = LENGTH // GROUP
    which = program.to(tl.int64) * T + tl.arange(0, T)[:, None]
    row = which // groups
    place = which % groups
    lane = tl.arange(0, G)[None, :]
    inner = place * GROUP + lane
    valid = row < rows
    inside = valid & (lane < GROUP)
    codes = ()
    top: tl.constexpr = top_scale(LARGEST, largest_number(x.dtype.element_ty))
    # fmt: off
    for run in tl.static_range(RUNS):
        column = inner + run * run_width
        here = inside & (inner < run_width) & (column < width)
        value = tl.load(x + row * row_stride + column * stride, mask=here, other=0.0).to(tl.float32)
        code = encode_run(value, run, valid, row, place, scales, seed, LENGTH, RUNS, GROUP, G,
                          LARGEST, FACTOR, SMALLEST, ROUNDER, KEEP_ZERO, STOCHASTIC, top)
        codes = codes + (code,)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no unpacking)
    # fmt: on
    store_codes(codes, inside, row, inner, planes_0, planes_1, planes_2, LENGTH, BITS, WIDTHS, RUNS, LARGEST)


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
    """Codes of one tensor, x[rows, width]."""
    # fmt: off
    encode_tile(tl.program_id(0), x, planes_0, planes_1, planes_2, scales, seed, rows, width, row_stride, stride, run_width,
                LENGTH, BITS, WIDTHS, RUNS, GROUP, T, G, LARGEST, FACTOR, SMALLEST, ROUNDER, KEEP_ZERO, STOCHASTIC)
    # fmt: on


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
        "T": max(TILE // (power if runs < 8 else 2 * power), 1),
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
