"""``lowmem::gated_codes``: y = f(a)·b, with the codes of a and b that its backward reads in place of them.

On CUDA (or HIP) tensors the forward is one kernel (``forward_triton.py``); elsewhere, and in backward everywhere, plain
PyTorch, which Inductor fuses into one kernel where it is compiled. Numerics class: APPROXIMATE.
"""

from __future__ import annotations

from typing import Any

import torch

from lowmem_compile.kernels.gated_codes.reference import gated_backward_reference, gated_reference
from lowmem_compile.kernels.group_codes.op import allocate, codec_of


@torch.library.custom_op("lowmem::gated_codes", mutates_args=())
def gated_codes(a: torch.Tensor, b: torch.Tensor, name: str, bits: int, group: int) -> list[torch.Tensor]:
    """y, then the parts of a, then the parts of b.

    Args:
        a: the gate, bfloat16, float16 or float32 [..., D].
        b: what is gated, as a.
        name: ``"silu"`` or ``"gelu"``.
        bits: of the codes, 3 to 8, or 10.
        group: elements that share a scale, at most.

    Returns:
        y contiguous, and for each input one tensor a plane and the scales, as ``Codec.encode`` returns them.
    """
    codec = codec_of(bits, group, False, None)
    if a.is_cuda:
        from lowmem_compile.kernels.gated_codes.forward_triton import forward

        return forward(a, b, name, codec)
    parts = [part.contiguous() for x in (a, b) for part in codec.encode(x)]
    return [gated_reference(a, b, name).contiguous(), *parts]


@gated_codes.register_fake
def _(a: torch.Tensor, b: torch.Tensor, name: str, bits: int, group: int) -> list[torch.Tensor]:  # noqa: ARG001
    codec = codec_of(bits, group, False, None)
    return [torch.empty_like(a, memory_format=torch.contiguous_format), *allocate(codec, a), *allocate(codec, b)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    a, _, ctx.name, bits, group = inputs
    ctx.codec, ctx.width = codec_of(bits, group, False, None), a.shape[-1]
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
    grad = grads[0]
    parts = ctx.saved_tensors
    half = len(parts) // 2
    a, b = (ctx.codec.decode(p, ctx.width, torch.float32) for p in (parts[:half], parts[half:]))
    return (*gated_backward_reference(grad, a, b, ctx.name), None, None, None)


gated_codes.register_autograd(_backward, setup_context=_setup)
