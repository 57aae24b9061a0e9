"""The operations behind the rewrites, as functions that Inductor compiles: what its own fusion makes of each.

Where Inductor moves no more bytes than the inputs and outputs have, there is no kernel of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_compile.kernels.activation_codes.tables import step_table
from lowmem_compile.kernels.gated_codes import gated_backward_reference, gated_reference
from lowmem_compile.kernels.group_codes import Codec, codec_named, in_prologue
from lowmem_compile.kernels.normalize import normalize_backward_reference, normalize_reference
from lowmem_compile.passes.approximate_activation import SLOPE_RANGE, apply_levels, pack, pack_slope, poison, unpack_slope

ROWS, WIDTH, DTYPE = 64, 1024, torch.bfloat16
GROUPS = "lowmem_compile.kernels.group_codes.encode_triton:encode"
STEPS = "lowmem_compile.kernels.activation_codes.forward_triton:forward"
GATED = "lowmem_compile.kernels.gated_codes.forward_triton:forward"


@dataclass(frozen=True)
class Operation:
    """One operation on tensors [ROWS, WIDTH] of DTYPE.

    Attributes:
        function: in plain PyTorch, the definition.
        args: tensors that the function takes.
        kernel: ``module:function`` of our kernel and its arguments, if there is one.
    """

    function: Callable[..., Any]
    args: tuple[Tensor, ...]
    kernel: tuple[Any, ...] = ()


def operations() -> dict[str, Operation]:
    """All of them, by what they do."""
    x, g = torch.randn(ROWS, WIDTH).to(DTYPE), torch.randn(ROWS, WIDTH).to(DTYPE)
    made = {}
    for name in ("int8", "int4", "int5"):
        codec = codec_named(name)
        own = name != "int8"
        made[f"encode {name}"] = Operation(codec.encode, (x,), (GROUPS, x, codec) if own else ())
        made[f"decode {name}"] = Operation(_decode(codec), codec.encode(x))
        made[f"SwiGLU, encode {name} of both inputs"] = Operation(
            _gated(codec), (x, g), (GATED, x, g, "silu", codec) if own else ()
        )
        parts = (*codec.encode(x), *codec.encode(g))
        made[f"SwiGLU backward from {name}"] = Operation(_gated_backward(codec), (g, *parts))
    for bits in (2, 4):
        table = step_table("gelu", "derivative", bits)

        def forward(h: Tensor, thresholds: tuple[float, ...] = tuple(table.thresholds)) -> tuple[Tensor, ...]:
            return F.gelu(h), *pack(h, thresholds), poison(h)

        def backward(g: Tensor, p: Tensor, bad: Tensor, levels: tuple[float, ...] = tuple(table.levels)) -> Tensor:
            return apply_levels(g, (p,), bad, levels)

        made[f"GELU, {bits}-bit step codes"] = Operation(forward, (x,), (STEPS, x, "gelu", table))
        made[f"GELU backward from {bits}-bit step codes"] = Operation(backward, (g, *forward(x)[1:]))
    made["GELU, 8-bit slope codes"] = Operation(_slope, (x,))
    made["GELU backward from 8-bit slope codes"] = Operation(_slope_backward, (g, *_slope(x)[1:]))
    weight = torch.randn(WIDTH)
    made["LayerNorm, x̂ in bf16"] = Operation(lambda x: _norm(x, True), (x,))
    made["RMSNorm, x̂ in bf16"] = Operation(lambda x: _norm(x, False), (x,))
    made["LayerNorm backward from x̂"] = Operation(_norm_backward, (g, *_norm(x, True)))
    made["LayerNorm with affine, x̂ in bf16"] = Operation(_affine, (x, weight, torch.randn(WIDTH)))
    moments = torch.randn(ROWS, WIDTH), torch.rand(ROWS, WIDTH)
    made["AdamW on a projected gradient, float32 moments"] = Operation(_adamw, (x, *moments, torch.tensor(3.0)))
    return made


TEMPLATES: Mapping[str, Any] = {
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "TRITON",
    "test_configs.max_mm_configs": 1,
    "benchmark_epilogue_fusion": False,
    "autotune_in_subproc": False,
}
"""Inductor's configuration for one template a matrix product, in place of a choice by measurement."""


def products(rows: int = 64, width: int = 64, rank: int = 16) -> dict[str, Operation]:
    """Matrix products beside which tensors are encoded or decoded: dY, x [rows, width], W [width, width], R [width, rank]."""
    dy, x, w = (torch.randn(n, width).to(DTYPE) for n in (rows, rows, width))
    basis = torch.randn(width, rank).to(DTYPE)
    made = {}
    for name in ("int8", "int4", "int10"):
        codec = codec_named(name)

        def decode(*parts: Tensor, codec: Codec = codec) -> Tensor:
            marked: Tensor = in_prologue(codec.decode(parts, width, DTYPE))
            return marked

        def gradient(dy: Tensor, *parts: Tensor, decode: Callable[..., Tensor] = decode) -> Tensor:
            return dy.t() @ decode(*parts)

        def projected(dy: Tensor, basis: Tensor, *parts: Tensor, decode: Callable[..., Tensor] = decode) -> Tensor:
            return dy.t() @ (decode(*parts) @ basis)

        def forward(x: Tensor, w: Tensor, codec: Codec = codec) -> tuple[Tensor, ...]:
            y = x @ w.t()
            return (y, *codec.encode(y))

        made[f"dYᵀ deq({name})"] = Operation(gradient, (dy, *codec.encode(x)))
        made[f"dYᵀ (deq({name}) R)"] = Operation(projected, (dy, basis, *codec.encode(x)))
        made[f"x Wᵀ, encode {name}"] = Operation(forward, (x, w))
    made["dYᵀ (x R)"] = Operation(lambda dy, x, basis: dy.t() @ (x @ basis), (dy, x, basis))
    made["GELU(x Wᵀ), 8-bit slope codes"] = Operation(lambda x, w: _slope(x @ w.t())[:2], (x, w))
    made["(dY W) · slopes of 8 bits"] = Operation(
        lambda dy, w, codes: ((dy @ w).float() * unpack_slope((codes,), width, *SLOPE_RANGE["gelu"], 8)).to(DTYPE),
        (dy, w, _slope(x)[1]),
    )
    table = step_table("gelu", "derivative", 2)
    thresholds, levels = tuple(table.thresholds), tuple(table.levels)
    made["GELU(x Wᵀ), 2-bit step codes"] = Operation(lambda x, w: (F.gelu(h := x @ w.t()), *pack(h, thresholds)), (x, w))
    made["(dY W) · levels of 2 bits"] = Operation(
        lambda dy, w, codes, bad: apply_levels(dy @ w, (codes,), bad, levels), (dy, w, *pack(x, thresholds), poison(x))
    )
    return made


def _decode(codec: Codec) -> Callable[..., Tensor]:
    return lambda *parts: codec.decode(parts, WIDTH, DTYPE)


def _gated(codec: Codec) -> Callable[..., tuple[Tensor, ...]]:
    return lambda a, b: (gated_reference(a, b, "silu"), *codec.encode(a), *codec.encode(b))


def _gated_backward(codec: Codec) -> Callable[..., tuple[Tensor, Tensor]]:
    def backward(g: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        half = len(parts) // 2
        a, b = (codec.decode(p, WIDTH, torch.float32) for p in (parts[:half], parts[half:]))
        return gated_backward_reference(g, a, b, "silu")

    return backward


def _slope(h: Tensor) -> tuple[Tensor, ...]:
    wide = h.float()
    slope = torch.ops.aten.gelu_backward(torch.ones_like(wide), wide)
    return F.gelu(h), *pack_slope(slope, *SLOPE_RANGE["gelu"], 8), poison(h)


def _slope_backward(g: Tensor, codes: Tensor, bad: Tensor) -> Tensor:
    return (g.float() * unpack_slope((codes,), WIDTH, *SLOPE_RANGE["gelu"], 8) + bad).to(g.dtype)


def _adamw(grad: Tensor, first: Tensor, second: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments and step of AdamW in the projected space (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""
    wide = grad.float()
    first = 0.9 * first + 0.1 * wide
    second = 0.999 * second + 0.001 * wide * wide
    step = first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
    return first, second, step.to(grad.dtype)


def _norm(x: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    xhat, rstd = normalize_reference(x, 1, 1e-5, center)
    return xhat.to(DTYPE), rstd


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    xhat, rstd = normalize_reference(x, 1, 1e-5, True)
    return xhat.to(DTYPE), rstd, (xhat * weight + bias).to(DTYPE)


def _norm_backward(g: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    return normalize_backward_reference(g, xhat, rstd, 1, True).to(DTYPE)
