"""``lowmem::encode_groups``: the codes and scales of a tensor in one operation.

On a CUDA (or HIP) tensor one kernel (``encode_triton.py``); elsewhere the definition in plain PyTorch. Not differentiable:
its results are integers, and scales that belong to them.
"""

from __future__ import annotations

import dataclasses

import torch

from lowmem_compile.kernels.group_codes.codec import CODECS, Codec, planes
from lowmem_compile.kernels.group_codes.counter import CounterCodec


@torch.library.custom_op("lowmem::encode_groups", mutates_args=())
def encode_groups(x: torch.Tensor, bits: int, group: int, keep_zero: bool, seed: torch.Tensor | None) -> list[torch.Tensor]:
    """What ``Codec.encode`` returns for x[..., D], with groups of at most ``group`` elements.

    Args:
        x: bfloat16, float16 or float32, at least one dimension.
        bits: 3 to 8, or 10.
        group: as in :class:`Codec`.
        keep_zero: as in :class:`Codec`.
        seed: int64, one element: rounding is stochastic, with the random numbers of ``counter.py``; ``None``: to nearest.

    Returns:
        One tensor a plane, then the scales.
    """
    codec = codec_of(bits, group, keep_zero, seed)
    if x.is_cuda:
        from lowmem_compile.kernels.group_codes.encode_triton import encode

        return encode(x, codec, seed)
    definition = codec if seed is None else CounterCodec(**dataclasses.asdict(codec), seed=seed)
    return [part.contiguous() for part in definition.encode(x)]


@encode_groups.register_fake
def _(x: torch.Tensor, bits: int, group: int, keep_zero: bool, seed: torch.Tensor | None) -> list[torch.Tensor]:
    return allocate(codec_of(bits, group, keep_zero, seed), x)


def codec_of(bits: int, group: int, keep_zero: bool, seed: torch.Tensor | None) -> Codec:
    """The codec of an operation's arguments.

    Raises:
        ValueError: no integer codec has so many bits.
    """
    name = f"int{bits}"
    if name not in CODECS:
        raise ValueError(f"no integer codec has {bits} bits; there are {', '.join(n for n in CODECS if n.startswith('int'))}")
    return Codec(name, bits, group, keep_zero, stochastic=seed is not None)


def allocate(codec: Codec, x: torch.Tensor) -> list[torch.Tensor]:
    """Uninitialised parts for the codes of x[..., D]: one tensor a plane, then the scales.

    Raises:
        ValueError: D is symbolic; the layout is that of a number.
    """
    if not isinstance(x.shape[-1], int):
        raise ValueError("group codes in one kernel need a last dimension of static size")
    runs, length, group = codec.layout(x.shape[-1])
    lead = x.shape[:-1]
    kind = torch.int8 if codec.bits == 8 else torch.uint8
    parts = [x.new_empty((*lead, runs * length * w // 8), dtype=kind) for w in planes(codec.bits)]
    return [*parts, x.new_empty((*lead, runs * (length // group)), dtype=torch.bfloat16)]
