"""``lowmem::step_activation``: an activation whose backward reads step codes in place of its input.

On a CUDA (or HIP) tensor the forward is one kernel (``forward_triton.py``); elsewhere, and in backward everywhere, plain
PyTorch, which Inductor fuses into one kernel where it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from lowmem_compile.kernels.activation_codes import reference
from lowmem_compile.kernels.activation_codes.tables import StepTable, step_table

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "log_sigmoid": F.logsigmoid,
}
"""The activations that have step tables, as PyTorch computes them."""


@torch.library.custom_op("lowmem::step_activation", mutates_args=())
def step_activation(h: torch.Tensor, name: str, kind: str, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(y, codes, poison)`` of the activation called ``name`` under the table ``step_table(name, kind, bits)``.

    Args:
        h: bfloat16, float16 or float32, of any shape.
        name: one of :data:`ACTIVATIONS`.
        kind: ``"derivative"`` or ``"primitive"``.
        bits: 2 or 4.

    Returns:
        y as h, contiguous; codes uint8 [ceil(N·bits/8)]; poison float32, h's shape with the last dimension 1.

    Raises:
        ValueError: no such table, or one of other than 2 or 4 bits.
    """
    reference.require_width(bits)
    table = step_table(name, kind, bits)
    if h.is_cuda:
        from lowmem_compile.kernels.activation_codes.forward_triton import forward

        return forward(h, name, table)
    y = ACTIVATIONS[name](h).contiguous()
    return y, reference.pack(reference.encode(h, table), bits), reference.row_poison(h)


@step_activation.register_fake
def _(h: torch.Tensor, name: str, kind: str, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # noqa: ARG001
    y = torch.empty_like(h, memory_format=torch.contiguous_format)
    codes = h.new_empty((h.numel() * bits + 7) // 8, dtype=torch.uint8)
    return y, codes, h.new_empty((*h.shape[:-1], 1) if h.dim() else (), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, name, kind, bits = inputs
    ctx.table = step_table(name, kind, bits)
    _, codes, poison = output
    ctx.mark_non_differentiable(codes, poison)
    ctx.save_for_backward(codes, poison)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None, None]:
    codes, poison = ctx.saved_tensors
    table: StepTable = ctx.table
    return reference.backward(grad, codes, table, poison), None, None, None


step_activation.register_autograd(_backward, setup_context=_setup)
