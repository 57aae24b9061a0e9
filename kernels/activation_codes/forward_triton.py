"""Activation, step codes and poison in one kernel: h is read once (section 5 of the README of this folder).

Inductor needs a second kernel, which reads all of h again: a byte of the planar layout holds codes of elements that lie a
quarter or a half of the tensor apart, and an activation's loop visits them one after another.

Shapes: h, y [N], codes [Q] with Q = ceil(N·bits/8), poison [rows] filled with zeros. A program takes BLOCK bytes.
Numerics class: codes and poison as the reference's bit for bit; y to within roundings of float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from lowmem_compile.gpu_free.specialised import Specialised
from lowmem_compile.kernels.activation_codes.tables import StepTable

OPTIONS: Mapping[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
BLOCK = 512
"""Bytes of codes a program."""


@triton.jit
def log1p(e):  # noqa: D103  e·log(1 + e)/((1 + e) - 1): exact where 1 + e rounds (Kahan)
    u = 1.0 + e
    return tl.where(u == 1.0, e, e * tl.log(u) / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def softplus(x):  # noqa: D103
    return tl.where(x < 0, 0.0, x) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def tanh(x):  # noqa: D103  for x ≥ 0 without cancellation below 1e-3, where mish does not need it
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def not_finite(x):  # noqa: D103
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000


@triton.jit
def activation(x, NAME: tl.constexpr):
    """The activation of float32 x."""
    if NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "silu":
        return x / (1.0 + tl.exp(-x))
    elif NAME == "mish":
        # tanh(log(1 + e)) = (e² + 2e)/(e² + 2e + 2)
        e = tl.exp(tl.where(x > 20.0, 20.0, x))
        ratio = e * (e + 2.0)
        return tl.where(x > 20.0, x, x * (ratio / (ratio + 2.0)))
    elif NAME == "softplus":
        return softplus(x)
    else:
        tl.static_assert(NAME == "log_sigmoid")
        return -softplus(-x)


@triton.jit
def activation_codes_kernel(
    h,
    y,
    codes,
    poison,
    elements,
    length,
    width,
    NAME: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK bytes of codes, and y at all elements that they are of."""
    first = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    element = first
    for k in tl.static_range(8 // BITS):
        here = (first < length) & (element < elements)
        x = tl.load(h + element, mask=here, other=0.0).to(tl.float32)
        tl.store(y + element, activation(x, NAME).to(y.dtype.element_ty), mask=here)
        code = tl.zeros([BLOCK], tl.int32)
        for threshold in tl.static_range(len(THRESHOLDS)):
            code += (x > THRESHOLDS[threshold]).to(tl.int32)
        packed |= tl.where(here, code, 0) << (BITS * k)
        bad |= not_finite(x).to(tl.int32)
        element += length  # 64 bits: length·k need not fit the 32 of length
    tl.store(codes + first, packed.to(tl.uint8), mask=first < length)
    if tl.max(bad, axis=0) > 0:
        again = first
        for _ in tl.static_range(8 // BITS):
            here = (first < length) & (again < elements)
            x = tl.load(h + again, mask=here, other=0.0).to(tl.float32)
            tl.store(poison + again // width, float("nan"), mask=here & not_finite(x))
            again += length


def forward(h: torch.Tensor, name: str, table: StepTable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(y, codes, poison)`` by the kernel: y and poison as h and its rows, codes uint8 [Q]."""
    flat = h.contiguous()
    length = -(-h.numel() * table.bits // 8)
    y = torch.empty_like(flat)
    codes = h.new_empty(length, dtype=torch.uint8)
    poison = h.new_zeros((*h.shape[:-1], 1) if h.dim() else (), dtype=torch.float32)
    if h.numel():
        activation_codes_kernel[(triton.cdiv(length, BLOCK),)](
            flat, y, codes, poison, h.numel(), length, h.shape[-1] if h.dim() else 1, **constants(name, table), **OPTIONS
        )
    return y, codes, poison


def constants(name: str, table: StepTable) -> dict[str, Any]:
    """The constant arguments of the kernel."""
    return {"NAME": name, "THRESHOLDS": tuple(table.thresholds), "BITS": table.bits, "BLOCK": BLOCK}


def specialised(name: str, table: StepTable, dtype: str) -> Specialised:
    """The kernel as it is compiled ahead of time, for h in ``dtype`` (``"bf16"``, ``"fp16"``, ``"fp32"``)."""
    given = constants(name, table)
    types = [f"*{dtype}", f"*{dtype}", "*u8", "*fp32", *["i64"] * 3, *["constexpr"] * len(given)]
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types) if t.startswith("*")}
    names = activation_codes_kernel.arg_names
    return Specialised(activation_codes_kernel, dict(zip(names, types, strict=True)), given, aligned, **OPTIONS)
