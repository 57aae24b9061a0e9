"""A gated activation and the codes of its two inputs in one kernel: a and b are read once, everything is written once.

Shapes: as in ``kernels/group_codes/encode_triton.py``; a program takes R tiles [T, G] of a and of b. Numerics class: codes
bit for bit those of ``Codec.encode``; y to within roundings of float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lowmem_compile.gpu_free.specialised import Specialised
from lowmem_compile.kernels.activation_codes.forward_triton import activation
from lowmem_compile.kernels.group_codes.codec import Codec
from lowmem_compile.kernels.group_codes.encode_triton import (
    OPTIONS,
    constants,
    encode_run,
    largest_number,
    store_codes,
    top_scale,
)
from lowmem_compile.kernels.group_codes.op import allocate


@triton.jit
def gated_codes_kernel(
    a,
    b,
    y,
    a_0,
    a_1,
    a_2,
    a_scales,
    b_0,
    b_1,
    b_2,
    b_scales,
    rows,
    width,
    run_width,
    LENGTH,
    NAME: tl.constexpr,
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
    """T groups of each run of a[rows, width] and b[rows, width], both contiguous."""
    groups = LENGTH // GROUP
    which = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)[:, None]
    row = which // groups
    place = which % groups
    lane = tl.arange(0, G)[None, :]
    inner = place * GROUP + lane
    valid = row < rows
    inside = valid & (lane < GROUP)
    top: tl.constexpr = top_scale(LARGEST, largest_number(a.dtype.element_ty))
    a_codes = ()
    b_codes = ()
    # fmt: off
    for run in tl.static_range(RUNS):
        column = inner + run * run_width
        here = inside & (inner < run_width) & (column < width)
        where = row * width + column
        gate = tl.load(a + where, mask=here, other=0.0).to(tl.float32)
        value = tl.load(b + where, mask=here, other=0.0).to(tl.float32)
        tl.store(y + where, (activation(gate, NAME) * value).to(y.dtype.element_ty), mask=here)
        a_code = encode_run(gate, run, valid, row, place, a_scales, a_scales, LENGTH, RUNS, GROUP, G,
                            LARGEST, FACTOR, SMALLEST, ROUNDER, KEEP_ZERO, STOCHASTIC, top)
        b_code = encode_run(value, run, valid, row, place, b_scales, b_scales, LENGTH, RUNS, GROUP, G,
                            LARGEST, FACTOR, SMALLEST, ROUNDER, KEEP_ZERO, STOCHASTIC, top)
        a_codes = a_codes + (a_code,)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no unpacking)
        b_codes = b_codes + (b_code,)  # type: ignore[assignment]  # noqa: RUF005
    # fmt: on
    store_codes(a_codes, inside, row, inner, a_0, a_1, a_2, LENGTH, BITS, WIDTHS, RUNS, LARGEST)
    store_codes(b_codes, inside, row, inner, b_0, b_1, b_2, LENGTH, BITS, WIDTHS, RUNS, LARGEST)


def forward(a: torch.Tensor, b: torch.Tensor, name: str, codec: Codec) -> list[torch.Tensor]:
    """y, the parts of a, the parts of b, by the kernel."""
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty_like(a)
    parts = [allocate(codec, x) for x in (a, b)]
    if a.numel():
        width = a.shape[-1]
        runs, length, group = codec.layout(width)
        rows = a.numel() // width
        given = constants(codec, width)
        # Four pointers an input: three planes (one that a width lacks is never touched), then the scales.
        pointers = [p for *codes, scales in parts for p in (*[*codes, codes[0], codes[0]][:3], scales)]
        grid = (triton.cdiv(rows * (length // group), given["T"]),)
        gated_codes_kernel[grid](a, b, y, *pointers, rows, width, -(-width // runs), length, NAME=name, **given, **OPTIONS)
    return [y, *parts[0], *parts[1]]


def specialised(name: str, codec: Codec, width: int, dtype: str) -> Specialised:
    """The kernel as it is compiled ahead of time, for inputs in ``dtype`` (``"bf16"``, ``"fp16"``, ``"fp32"``)."""
    plane = "*i8" if codec.bits == 8 else "*u8"
    given = {"NAME": name, **constants(codec, width)}
    types = [*[f"*{dtype}"] * 3, *[plane, plane, plane, "*bf16"] * 2, *["i64"] * 4, *["constexpr"] * len(given)]
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types) if t.startswith("*")}
    names = gated_codes_kernel.arg_names
    return Specialised(gated_codes_kernel, dict(zip(names, types, strict=True)), given, aligned, **OPTIONS)
