"""The operations behind the rewrites, as functions that Inductor compiles: what its own fusion makes of each.

Where Inductor moves no more bytes than the inputs and outputs have, there is no kernel of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_compile.kernels.activation_codes.tables import step_table
from lowmem_compile.kernels.gated_codes import gated_backward_reference, gated_reference
from lowmem_compile.kernels.group_codes import Codec, codec_named
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
            return F.gelu(h), pack(h, thresholds), poison(h)

        def backward(g: Tensor, p: Tensor, bad: Tensor, levels: tuple[float, ...] = tuple(table.levels)) -> Tensor:
            return apply_levels(g, p, bad, levels)

        made[f"GELU, {bits}-bit step codes"] = Operation(forward, (x,), (STEPS, x, "gelu", table))
        made[f"GELU backward from {bits}-bit step codes"] = Operation(backward, (g, *forward(x)[1:]))
    made["GELU, 8-bit slope codes"] = Operation(_slope, (x,))
    made["GELU backward from 8-bit slope codes"] = Operation(_slope_backward, (g, *_slope(x)[1:]))
    weight = torch.randn(WIDTH)
    made["LayerNorm, x̂ in bf16"] = Operation(lambda x: _norm(x, True), (x,))
    made["RMSNorm, x̂ in bf16"] = Operation(lambda x: _norm(x, False), (x,))
    made["LayerNorm backward from x̂"] = Operation(_norm_backward, (g, *_norm(x, True)))
    made["LayerNorm with affine, x̂ in bf16"] = Operation(_affine, (x, weight, torch.randn(WIDTH)))
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


def _norm(x: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    xhat, rstd = normalize_reference(x, 1, 1e-5, center)
    return xhat.to(DTYPE), rstd


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    xhat, rstd = normalize_reference(x, 1, 1e-5, True)
    return xhat.to(DTYPE), rstd, (xhat * weight + bias).to(DTYPE)


def _norm_backward(g: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    return normalize_backward_reference(g, xhat, rstd, 1, True).to(DTYPE)
