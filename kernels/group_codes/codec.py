"""The codecs of saved tensors, in plain PyTorch: traced into the graph, and the definition the tests hold kernels to.

A tensor x[..., D] is cut into R runs of L = ceil(D/R) elements and each run into groups of g (a group never straddles rows):

    encode    s = bf16(max |x| / m) per group,     q = round(x / s)         m = 2^(b-1) - 1
    decode    x̃ = q · s                            |x̃ - x| <= s/2

Codes are stored as q + m in b bits, in planes of 8, 4, 2 and 1 bits (6 = 4 + 2). The plane of w bits holds r = 8/w elements a
byte: element k of R runs lies in bits w·(k // (R/r)) of the bytes of run k % (R/r). R = 8/(narrowest plane), so R = 1 at 8
bits, 2 at 4, 4 at 6 and 10, 8 at odd widths. All loads and stores are contiguous along a run, which is what vector units want.

The scale is rounded to bfloat16 before it divides (upwards for more than 8 bits), so it costs range (at most 2⁻⁷), not accuracy.
No clamp is needed: |x / s| <= m·(1 + 2⁻⁸) rounds to at most m for m <= 127, and for 448 in float8; where the scale is rounded
up, |x / s| <= m.

``fp8`` has the scales of 8 bits with m = 448, and stores x / s itself, as ``float8_e4m3fn`` (4 exponent, 3 mantissa bits):

    encode    s = bf16(max |x| / 448) per group,   q = float8(x / s)
    decode    x̃ = q · s                            |x̃ - x| <= max(2⁻⁴ |x|, 2⁻¹⁰ s)

Its error is a share of each element, that of integer codes a share of the group's largest: integers are closer for most tensors.

NaN and Inf: the group's scale is NaN, and all its elements decode to NaN. Nothing outside the group changes.
Zeros: s = 0, decodes to 0; so does a group whose scale would be subnormal. A decoded value never exceeds the dtype's range:
where m·s would, a smaller s is kept than x was divided by, m·s the largest that fits (an error of 2⁻⁷ of x).
Numerics class: APPROXIMATE.

Errors for a Gaussian row at g = 64, relative root mean square: 0.15 % at 10 bits, 0.6 % at 8, 2.4 % at 6, 5 % at 5, 11 % at 4;
2.6 % for fp8.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_compile.kernels.group_codes.in_memory import in_memory

Size = int | torch.SymInt

WIDTHS = (8, 4, 2, 1)
LANES = 16
"""Elements of float32 that a vector unit of a CPU takes at once, at most."""
FLOAT8 = torch.float8_e4m3fn
SMALLEST_FLOAT8 = 2.0**-9
"""The smallest denormal."""
SMALLEST_SCALE = 2.0**-126
"""The smallest normal number; groups with a smaller scale decode to zero."""


@dataclass(frozen=True)
class Codec:
    """One way to store a saved floating-point tensor.

    Attributes:
        name: as in ``options["codec"]``.
        bits: bits an element, scales not counted; 16 is a cast to bfloat16, without scales.
        floating: codes are ``float8_e4m3fn`` and not integers (8 bits, rounded to nearest).
        group: elements that share a scale, at most (see :func:`group_size`).
        keep_zero: zero decodes to zero and nothing else does; its sign is kept too. For tensors that backward compares
            with zero, such as the output of ReLU.
        stochastic: round to one of the two neighbours with a probability that makes the error zero on average.
            Randomness is PyTorch's, so ``torch.manual_seed`` repeats it.
    """

    name: str
    bits: int
    group: int = 64
    keep_zero: bool = False
    stochastic: bool = False
    floating: bool = False

    @property
    def largest(self) -> int:
        """The largest magnitude of a code."""
        return int(torch.finfo(FLOAT8).max) if self.floating else int(2 ** (self.bits - 1) - 1)

    @property
    def runs(self) -> int:
        """R: the runs of a row whose codes share bytes; 1 at 8 and 16 bits."""
        return 1 if self.bits == 16 else 8 // planes(self.bits)[-1]

    @property
    def error(self) -> float:
        """Estimated relative root mean square error of a decoded tensor, of Gaussian rows.

        step/√12 with step = k σ/m, where k σ is the expected largest magnitude of g elements (2.60 of 64, 2.83 of 128); for 16
        bits and for float8 the rounding of the format. Stochastic rounding: √2 times that.
        """
        if self.floating:
            return float(0.73 * 2**-3 / 12**0.5)
        if self.bits == 16:
            return float(0.73 * 2**-7 / 12**0.5)
        return expected_largest(self.group) / self.largest / 12**0.5 * (2**0.5 if self.stochastic else 1)

    def encode(self, x: Tensor, *, in_loops: bool = False) -> tuple[Tensor, ...]:
        """Codes and scales of x[..., D].

        ``in_loops``: the same, written for Inductor's C++: what there is one of a group is computed once, for many groups at a
        time, and largest magnitudes are taken of whole vectors first.

        Returns:
            One tensor a plane, uint8 [..., R·L·w/8] (int8 or float8 [..., L] at 8 bits), then the scales, bfloat16 [..., R·L/g].
            At 16 bits: x in bfloat16.
        """
        if self.bits == 16:
            return (x.to(torch.bfloat16),)
        width: Size = x.shape[-1]
        runs, length, group = self.layout(width)
        rows = padded(x.to(torch.float32), runs * -(-width // runs) if isinstance(width, int) else width)
        rows = rows.reshape(*rows.shape[:-1], runs, rows.shape[-1] // runs)
        cells = padded(rows, length)
        cells = cells.reshape(*cells.shape[:-1], length // group, group)
        inverse, scale = self.scales_of(cells, x.dtype, in_loops=in_loops)
        code = self.codes_of(cells, in_memory(inverse) if in_loops else inverse)
        lead = x.shape[:-1]
        if self.bits == 8:
            parts = [code.to(FLOAT8 if self.floating else torch.int8).reshape(*lead, length)]
        else:
            code = code + float(self.largest)
            if in_loops and len(planes(self.bits)) > 2:
                code = in_memory(code.to(torch.uint8)).to(torch.float32)  # three planes read it
            packed = pack_codes(code, self.bits)
            apart = in_loops and length > group and group % (2 * LANES)  # else a vector of a run may span two scales
            parts = [(in_memory(p) if apart else p).reshape(*lead, p.shape[-3] * length) for p in packed]
        return (*parts, scale.reshape(*lead, runs * (length // group)))

    def scales_of(self, cells: Tensor, dtype: torch.dtype, *, in_loops: bool = False) -> tuple[Tensor, Tensor]:
        """1/s in float32 (0 where s is 0 or NaN) and s in bfloat16, each [..., 1], of groups of x, float32 [..., g].

        ``dtype``: x's own, whose range decoded values must not leave.
        """
        up = 1.0 if self.bits <= 8 else 1.0 + 2.0**-8  # beyond 8 bits a scale rounded down would overflow the codes
        exact = _largest_magnitude(cells, in_vectors=in_loops) * (up / self.largest)
        wide = rounded_to_bfloat16(exact)
        top = largest_scale(self.largest, torch.finfo(dtype).max)
        usable = (wide >= SMALLEST_SCALE) & (wide < math.inf)
        near = self.bits > 8 and dtype == torch.float16  # the scale that is kept may be two steps below the rounded one
        divisor = torch.where(wide > top, exact, wide) if near else wide
        inverse = torch.where(usable, 1.0 / divisor, 0.0)
        scale = torch.where(usable, wide.clamp(max=top), torch.where(exact < SMALLEST_SCALE, 0.0, math.nan)).to(torch.bfloat16)
        return inverse, scale

    def codes_of(self, cells: Tensor, inverse: Tensor) -> Tensor:
        """Codes of the groups: whole numbers from -m to m (for float8 x / s) in float32 [..., g]; 0 where no scale divides."""
        return torch.where(inverse > 0.0, self._round(cells * inverse, cells), 0.0)

    def decode(self, parts: tuple[Tensor, ...], width: Size, dtype: torch.dtype, *, in_loops: bool = False) -> Tensor:
        """x̃[..., width] in ``dtype``, which x had, from what :meth:`encode` returned.

        ``in_loops``: the same, for Inductor's C++: a view of x̃[..., R, L/g, g], which gets a buffer (unless rows are padded).
        """
        if self.bits == 16:
            return parts[0].to(dtype)
        *codes, scale = parts
        runs, length, group = self.layout(width)
        lead = scale.shape[:-1]
        if self.bits == 8:
            code = codes[0].to(torch.float32).unsqueeze(-2)
        else:
            code = unpack_codes(codes, length, self.bits) - float(self.largest)
        cells = code.reshape(*lead, runs, length // group, group)
        cells = cells * scale.to(torch.float32).reshape(*lead, runs, length // group, 1)
        out = cells.to(dtype)
        out = in_memory(out) if in_loops and runs * length == width else out
        out = out.reshape(*lead, runs, length)
        if isinstance(width, int):
            out = out[..., : -(-width // runs)].reshape(*lead, -(-width // runs) * runs)[..., :width]
        else:
            out = out.squeeze(-2)
        return out

    def nbytes(self, rows: int, width: int) -> int:
        """Bytes of the parts of x[rows, width]."""
        if self.bits == 16:
            return rows * width * 2
        runs, length, group = self.layout(width)
        return int(rows * (runs * length * self.bits // 8 + 2 * runs * (length // group)))

    def layout(self, width: Size) -> tuple[int, Any, Any]:
        """Runs R of a row, elements L a run (a multiple of the group), elements g a group."""
        if not isinstance(width, int):
            return 1, width, width
        runs = self.runs
        length = max(-(-width // runs), 1)
        group = group_size(length, self.group)
        return runs, -(-length // group) * group, group

    def _uniform(self, value: Tensor) -> Tensor:
        """Random numbers in [0, 1), one for each of ``value``."""
        return torch.rand_like(value)

    def _round(self, value: Tensor, x: Tensor) -> Tensor:
        if self.floating:  # the cast to float8 rounds
            if not self.keep_zero:
                return value
            least = torch.where(x > 0, SMALLEST_FLOAT8, torch.where(x < 0, -SMALLEST_FLOAT8, 0.0))
            return torch.where(value.abs() < SMALLEST_FLOAT8, least, value)
        if self.stochastic:
            rounded = torch.floor(value + self._uniform(value)).clamp(-float(self.largest), float(self.largest))
        else:
            rounded = torch.round(value)
        if self.keep_zero:
            rounded = torch.where(rounded == 0, torch.where(x > 0, 1.0, torch.where(x < 0, -1.0, 0.0)), rounded)
        return rounded


def rounded_to_bfloat16(x: Tensor) -> Tensor:
    """Nonnegative float32 rounded to the nearest bfloat16 (ties to even), still as float32; NaN gives no defined number.

    By its bits: Inductor's loops elide a cast to bfloat16 and back, and codes divided by a scale that was not rounded do not fit
    the stored one (0.17 % of error, more than ten bits have).
    """
    bits = x.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


def largest_scale(largest: float, limit: float) -> float:
    """The largest bfloat16 that times m is no more than ``limit``."""
    mantissa, exponent = math.frexp(limit / largest)
    return math.ldexp(math.floor(mantissa * 256) / 256, exponent)


def _largest_magnitude(cells: Tensor, *, in_vectors: bool) -> Tensor:
    """max |x| over the last dimension, which is kept; NaN where there is one."""
    magnitude = cells.abs()
    width: Size = cells.shape[-1]
    if in_vectors and isinstance(width, int) and width % LANES == 0:
        first, *rest = magnitude.split(LANES, dim=-1)
        for part in rest:
            first = torch.maximum(first, part)
        magnitude = first
    return magnitude.amax(-1, keepdim=True)


@functools.cache
def expected_largest(count: int) -> float:
    """Expected largest magnitude of ``count`` Gaussian numbers of variance 1: ∫ 1 - P(|x| < t)^count dt."""
    return 0.01 * sum(1.0 - math.erf(0.01 * i / 2**0.5) ** count for i in range(1000))


def group_size(width: int, group: int) -> int:
    """Elements a scale for rows of ``width`` elements: a divisor of the width between group/2 and group if there is one.

    Otherwise ``group`` (the last group of a row is padded), or the whole row where that is shorter.
    """
    if width <= group:
        return max(width, 1)
    return next((g for g in range(group, group // 2 - 1, -1) if width % g == 0), group)


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes that b bits are stored in, widest first."""
    return tuple(w for w in WIDTHS if bits & w)


def padded(x: Tensor, width: Size) -> Tensor:
    """x with zeros behind its last dimension, up to ``width``."""
    have: Size = x.shape[-1]
    if not isinstance(have, int) or have == width:
        return x
    padded: Tensor = torch.ops.aten.constant_pad_nd(x, [0, width - have])
    return padded


def pack_codes(code: Tensor, bits: int) -> list[Tensor]:
    """uint8 planes [..., R·w/8, L/g, g] of codes [..., R, L/g, g] from 0 to 2^bits - 1, held as float32.

    One conversion to integers a plane. The groups stay apart, so that a loop over one has a single scale.
    """
    packed = []
    rest, left = code, bits
    for w in planes(bits):
        left -= w
        top = torch.floor(rest * 2.0**-left) if left else rest
        rest = rest - top * 2.0**left if left else rest
        packed.append(_pack_plane(top, w))
    return packed


def _pack_plane(code: Tensor, w: int) -> Tensor:
    """uint8 [..., R·w/8, L/g, g] of codes [..., R, L/g, g] from 0 to 2^w - 1."""
    *lead, runs, groups, group = code.shape
    per_byte = 8 // w
    split = code.reshape(*lead, per_byte, runs // per_byte, groups, group)
    total = split[..., 0, :, :, :]
    for k in range(1, per_byte):
        total = total + split[..., k, :, :, :] * float(2 ** (w * k))
    return total.to(torch.uint8)


def unpack_codes(codes: Sequence[Tensor], length: int, bits: int) -> Tensor:
    """The codes, float32 [..., R, L]. In floating point: Inductor's C++ is slow on bytes."""
    runs = 8 // planes(bits)[-1]
    total: Tensor | None = None
    left = bits
    for plane, w in zip(codes, planes(bits), strict=True):
        left -= w
        part = _unpack_plane(plane, w, runs, length) * 2.0**left
        total = part if total is None else total + part
    assert total is not None
    return total


def _unpack_plane(plane: Tensor, w: int, runs: int, length: int) -> Tensor:
    """The digits of a plane, float32 [..., R, L]: digit k of a byte v is ⌊v·2^(−wk)⌋ mod 2^w.

    2^(−wk) is chosen by scalars, once a run; of two digits each is computed instead, which is as much work and no multiplication.
    """
    lead, per_byte = plane.shape[:-1], 8 // w
    value = plane.to(torch.float32).reshape(*lead, 1, runs // per_byte, length)
    which = torch.arange(per_byte, device=plane.device).view(per_byte, 1, 1)
    if per_byte == 1:
        out = value
    elif per_byte == 2:
        above = torch.floor(value * 2.0**-w)
        out = torch.where(which == 0, value - above * 2.0**w, above)
    else:
        scale = torch.where(which == 0, 1.0, 2.0**-w)
        for k in range(2, per_byte):
            scale = torch.where(which == k, 2.0 ** (-w * k), scale)
        shifted = torch.floor(value * scale)
        out = shifted - torch.floor(shifted * 2.0**-w) * 2.0**w
    return out.reshape(*lead, runs, length)


INTEGERS = tuple(Codec(f"int{b}", b) for b in (10, 8, 7, 6, 5, 4, 3))
CODECS: Mapping[str, Codec] = {c.name: c for c in (Codec("bf16", 16), *INTEGERS, Codec("fp8", 8, floating=True))}


def codec_named(name: str, *, group: int = 64, stochastic: bool = False, keep_zero: bool = False) -> Codec:
    """A codec of :data:`CODECS` with these settings.

    Raises:
        ValueError: there is no such codec (the message lists those there are), or it cannot round stochastically.
    """
    if name not in CODECS:
        raise ValueError(f"no codec {name!r}; there are {', '.join(CODECS)}")
    floating = CODECS[name].floating
    if floating and stochastic:
        raise ValueError(f"codec {name!r} rounds to nearest; stochastic rounding is for integer codes")
    return Codec(name, CODECS[name].bits, group, keep_zero, stochastic, floating)
