"""``lowmem::encode_many`` and ``lowmem::decode_many``: group codes of several tensors in one operation.

On CUDA (or HIP) tensors one launch each (``many_triton.py``); elsewhere the definition in plain PyTorch, tensor by tensor. The
pipeline emits them where Inductor would need a launch for each tensor. Not differentiable. Numerics class: the bits of ``Codec``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from lowmem_compile.kernels.group_codes.codec import Codec, planes
from lowmem_compile.kernels.group_codes.op import allocate, codec_of


@torch.library.custom_op("lowmem::encode_many", mutates_args=())
def encode_many(xs: list[torch.Tensor], bits: list[int], groups: list[int], keep_zero: list[bool]) -> list[torch.Tensor]:
    """What ``Codec.encode`` returns for each x[..., D], one after another; to nearest.

    Args:
        xs: bfloat16, float16 or float32, each with at least one dimension, the last of static size.
        bits: 3 to 8, or 10, one a tensor.
        groups: elements that share a scale, at most, one a tensor.
        keep_zero: as in :class:`Codec`, one a tensor.

    Raises:
        ValueError: no integer codec has so many bits.
    """
    codecs = codecs_of(bits, groups, keep_zero)
    if runs_kernels(xs[0]):
        from lowmem_compile.kernels.group_codes import many_triton

        return many_triton.encode_many(xs, codecs)
    return [part.contiguous().clone() for x, codec in zip(xs, codecs, strict=True) for part in codec.encode(x)]


@encode_many.register_fake
def _(xs: list[torch.Tensor], bits: list[int], groups: list[int], keep_zero: list[bool]) -> list[torch.Tensor]:
    codecs = codecs_of(bits, groups, keep_zero)
    return [part for x, codec in zip(xs, codecs, strict=True) for part in allocate(codec, x)]


@torch.library.custom_op("lowmem::decode_many", mutates_args=())
def decode_many(
    parts: list[torch.Tensor], bits: list[int], groups: list[int], widths: list[int], dtype: torch.dtype
) -> list[torch.Tensor]:
    """x̃[..., width] in ``dtype``, contiguous, for each tensor of which ``parts`` holds the planes and the scales.

    Args:
        parts: what :func:`encode_many` returned, in its order.
        bits: as there.
        groups: as there.
        widths: size of the last dimension, one a tensor.
        dtype: of all results.

    Raises:
        ValueError: no integer codec has so many bits.
    """
    codecs = codecs_of(bits, groups, [False] * len(bits))
    split = parts_of(parts, bits)
    if runs_kernels(parts[0]):
        from lowmem_compile.kernels.group_codes import many_triton

        return many_triton.decode_many(split, codecs, widths, dtype)
    each = zip(codecs, split, widths, strict=True)
    return [codec.decode(tuple(own), width, dtype).contiguous() for codec, own, width in each]


@decode_many.register_fake
def _(
    parts: list[torch.Tensor],
    bits: list[int],
    groups: list[int],  # noqa: ARG001
    widths: list[int],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    scales = [own[-1] for own in parts_of(parts, bits)]
    return [s.new_empty((*s.shape[:-1], width), dtype=dtype) for s, width in zip(scales, widths, strict=True)]


def codecs_of(bits: Sequence[int], groups: Sequence[int], keep_zero: Sequence[bool]) -> list[Codec]:
    """The codec of each tensor."""
    return [codec_of(b, g, keep, None) for b, g, keep in zip(bits, groups, keep_zero, strict=True)]


def parts_of(parts: Sequence[torch.Tensor], bits: Sequence[int]) -> list[Sequence[torch.Tensor]]:
    """The planes and the scales of each tensor."""
    found, at = [], 0
    for b in bits:
        count = len(planes(b)) + 1
        found.append(parts[at : at + count])
        at += count
    return found


def runs_kernels(x: torch.Tensor) -> bool:
    """Whether Triton runs kernels on the tensor: on a GPU, and on a CPU where it interprets them."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
