"""Codes of several tensors in one launch, and their decoding in one launch.

What a library call writes or reads has no kernel beside it into which Inductor could fuse an encode or a decode: each would be a
launch of its own (two below 8 bits, and x is read again). These kernels take all such tensors of a layer at once: a program finds
its tensor by its number, and works on a tile of that one alone.

Shapes: as in ``encode_triton.py``; each tensor has rows, width and codec of its own. Bytes: each tensor and each of its parts
once, the least there is. Numerics class: the bits of ``Codec.encode`` and ``Codec.decode``; nothing may be contracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from lowmem_compile.gpu_free.specialised import Specialised
from lowmem_compile.kernels.group_codes.codec import Codec, planes
from lowmem_compile.kernels.group_codes.encode_triton import OPTIONS, constants, encode_tile
from lowmem_compile.kernels.group_codes.op import allocate

FIELDS = tl.constexpr(13)
"""Constants a tensor, in one flat tuple: Triton does not index tuples of tuples."""
widths = triton.constexpr_function(planes)


@triton.jit
def encode_many_kernel(
    xs,
    planes_0,
    planes_1,
    planes_2,
    scales,
    rows,
    row_strides,
    strides,
    firsts,  # first program of each tensor, and one past the last
    SPECS: tl.constexpr,
) -> None:
    """Codes of xs[i][rows[i], width]; the constants of tensor i are the i-th FIELDS of SPECS."""
    program = tl.program_id(0)
    # fmt: off
    for i in tl.static_range(len(SPECS) // FIELDS):
        if (program >= firsts[i]) & (program < firsts[i + 1]):
            at: tl.constexpr = FIELDS * i
            encode_tile(program - firsts[i], xs[i], planes_0[i], planes_1[i], planes_2[i], scales[i], scales[i],
                        rows[i], SPECS[at], row_strides[i], strides[i], SPECS[at + 1], SPECS[at + 2], SPECS[at + 3],
                        widths(SPECS[at + 3]), SPECS[at + 4], SPECS[at + 5], SPECS[at + 6], SPECS[at + 7], SPECS[at + 8],
                        SPECS[at + 9], SPECS[at + 10], SPECS[at + 11], SPECS[at + 12], False)
    # fmt: on


@triton.jit
def load_plane(
    total,  # int32 [T, G]: the bits of the planes before
    plane,
    inside,
    row,
    inner,
    LENGTH,
    run: tl.constexpr,
    W: tl.constexpr,
    LEFT: tl.constexpr,
    RUNS: tl.constexpr,
):
    """``total`` and the W bits of the codes of one run, at bit LEFT: the inverse of ``store_plane``."""
    byte_runs: tl.constexpr = RUNS * W // 8
    offset = (row * byte_runs + run % byte_runs) * LENGTH + inner
    byte = tl.load(plane + offset, mask=inside, other=0).to(tl.int32)
    return total | (((byte >> (W * (run // byte_runs))) & ((1 << W) - 1)) << LEFT)


@triton.jit
def decode_tile(
    program,
    out,
    planes_0,
    planes_1,
    planes_2,
    scales,
    rows,
    width,
    run_width,
    LENGTH,
    BITS: tl.constexpr,
    WIDTHS: tl.constexpr,
    RUNS: tl.constexpr,
    GROUP: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """out[rows, width], contiguous: T groups of each run, those of the program-th tile."""
    groups = LENGTH // GROUP
    which = program.to(tl.int64) * T + tl.arange(0, T)[:, None]
    row = which // groups
    place = which % groups
    lane = tl.arange(0, G)[None, :]
    inner = place * GROUP + lane
    valid = row < rows
    inside = valid & (lane < GROUP)
    # fmt: off
    for run in tl.static_range(RUNS):
        if BITS == 8:
            code = tl.load(planes_0 + row * LENGTH + inner, mask=inside, other=0).to(tl.float32)
        else:
            whole = tl.zeros([T, G], tl.int32)
            whole = load_plane(whole, planes_0, inside, row, inner, LENGTH, run, WIDTHS[0], BITS - WIDTHS[0], RUNS)
            if len(WIDTHS) > 1:
                whole = load_plane(whole, planes_1, inside, row, inner, LENGTH, run,
                                   WIDTHS[1], BITS - WIDTHS[0] - WIDTHS[1], RUNS)
            if len(WIDTHS) > 2:
                whole = load_plane(whole, planes_2, inside, row, inner, LENGTH, run, WIDTHS[2], 0, RUNS)
            code = whole.to(tl.float32) - LARGEST
        scale = tl.load(scales + (row * RUNS + run) * groups + place, mask=valid, other=0.0).to(tl.float32)
        value = code * scale
        column = inner + run * run_width
        here = inside & (inner < run_width) & (column < width)
        tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=here)
    # fmt: on


@triton.jit
def decode_many_kernel(outs, planes_0, planes_1, planes_2, scales, rows, firsts, SPECS: tl.constexpr) -> None:
    """outs[i][rows[i], width] from its parts; the constants as in ``encode_many_kernel``."""
    program = tl.program_id(0)
    # fmt: off
    for i in tl.static_range(len(SPECS) // FIELDS):
        if (program >= firsts[i]) & (program < firsts[i + 1]):
            at: tl.constexpr = FIELDS * i
            decode_tile(program - firsts[i], outs[i], planes_0[i], planes_1[i], planes_2[i], scales[i],
                        rows[i], SPECS[at], SPECS[at + 1], SPECS[at + 2], SPECS[at + 3], widths(SPECS[at + 3]),
                        SPECS[at + 4], SPECS[at + 5], SPECS[at + 6], SPECS[at + 7], SPECS[at + 8])
    # fmt: on


def spec(codec: Codec, width: int) -> tuple[Any, ...]:
    """The FIELDS constants of one tensor: width, elements a run without and with padding, then those of ``encode_tile``."""
    runs, length, _ = codec.layout(width)
    given = constants(codec, width)
    del given["STOCHASTIC"], given["WIDTHS"]
    return (width, -(-width // runs), length, *given.values())


def programs(codec: Codec, rows: int, width: int) -> int:
    """Programs that one tensor takes."""
    _, length, group = codec.layout(width)
    tile: int = constants(codec, width)["T"]
    return int(-(-rows * (length // group) // tile))


def encode_many(xs: Sequence[torch.Tensor], codecs: Sequence[Codec]) -> list[torch.Tensor]:
    """The parts of ``codec.encode(x)`` for each of xs[..., D], one after another."""
    parts = [allocate(codec, x) for x, codec in zip(xs, codecs, strict=True)]
    flat = [x.reshape(-1, x.shape[-1]) for x in xs]  # a view wherever the rows lie at one distance
    firsts = _firsts(codecs, flat)
    if firsts[-1]:
        strides = (tuple(x.stride(d) for x in flat) for d in range(2))
        rows = tuple(len(x) for x in flat)
        specs = _specs(codecs, [x.shape[1] for x in flat])
        encode_many_kernel[(firsts[-1],)](tuple(flat), *_pointers(parts), rows, *strides, firsts, specs, **OPTIONS)
    return [part for made in parts for part in made]


def decode_many(
    parts: Sequence[Sequence[torch.Tensor]], codecs: Sequence[Codec], sizes: Sequence[int], dtype: torch.dtype
) -> list[torch.Tensor]:
    """x̃[..., width] in ``dtype`` for each list of parts, contiguous."""
    given = [[p.contiguous() for p in made] for made in parts]
    outs = [made[-1].new_empty((*made[-1].shape[:-1], width), dtype=dtype) for made, width in zip(given, sizes, strict=True)]
    flat = [out.view(-1, out.shape[-1]) for out in outs]
    firsts = _firsts(codecs, flat)
    if firsts[-1]:
        rows = tuple(len(x) for x in flat)
        specs = _specs(codecs, sizes)
        decode_many_kernel[(firsts[-1],)](tuple(flat), *_pointers(given), rows, firsts, specs, **OPTIONS)
    return outs


def specialised(codecs: Sequence[Codec], width: int, dtype: str, *, decode: bool = False) -> Specialised:
    """A kernel as it is compiled ahead of time, for one tensor of each codec in ``dtype``, all of rows of ``width`` elements."""
    many = len(codecs)
    eight = tuple("*i8" if codec.bits == 8 else "*u8" for codec in codecs)
    specs = _specs(codecs, [width] * many)
    types: list[Any] = [(f"*{dtype}",) * many, eight, eight, eight, ("*bf16",) * many]
    counts: tuple[str, ...] = ("i64",) * many
    kernel, constant = decode_many_kernel if decode else encode_many_kernel, {"SPECS": specs}
    types += [counts, ("i32",) * (many + 1)] if decode else [counts, counts, counts, ("i32",) * (many + 1)]
    signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constant)], strict=True))
    aligned = {(i, j): [["tt.divisibility", 16]] for i in range(5) for j in range(many)}
    return Specialised(kernel, signature, constant, aligned, **OPTIONS)


def _specs(codecs: Sequence[Codec], sizes: Sequence[int]) -> tuple[Any, ...]:
    return tuple(field for codec, width in zip(codecs, sizes, strict=True) for field in spec(codec, width))


def _firsts(codecs: Sequence[Codec], flat: Sequence[torch.Tensor]) -> tuple[int, ...]:
    found = [0]
    for codec, x in zip(codecs, flat, strict=True):
        found.append(found[-1] + (programs(codec, *x.shape) if x.numel() else 0))
    return tuple(found)


def _pointers(parts: Sequence[Sequence[torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
    """Three tuples of planes (one that a width lacks is never touched), and the scales."""
    rows = [([*codes, codes[0], codes[0]][:3], scales) for *codes, scales in parts]
    return [*(tuple(codes[k] for codes, _ in rows) for k in range(3)), tuple(scales for _, scales in rows)]
