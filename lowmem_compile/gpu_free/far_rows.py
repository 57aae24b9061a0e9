"""Runs in the interpreting process: tensors of more than 2³¹ elements are not sent between processes."""

from __future__ import annotations

import torch

from lowmem_compile.kernels.group_codes import codec_named
from lowmem_compile.kernels.group_codes import encode_triton as kernel
from lowmem_compile.kernels.group_codes.op import allocate


def encode_far_rows(bits: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parts of three rows that lie 2³⁰ elements apart (lazily committed memory), and of the same rows side by side."""
    codec, near = codec_named(f"int{bits}"), torch.randn(3, 64).to(torch.bfloat16)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((3, 64), (2**30, 1))
    far.copy_(near)
    parts = allocate(codec, near)
    runs, length, group = codec.layout(64)
    *codes, scales = parts
    given = kernel.constants(codec, 64)
    # The executor would copy the whole storage; called here, the function gets the pointers themselves.
    arguments = (*[*codes, codes[0], codes[0]][:3], scales, scales, 3, 64, 2**30, 1, -(-64 // runs), length)
    interpret(kernel.encode_kernel, -(-3 * (length // group) // given["T"]), far, *arguments, **given)
    return parts, kernel.encode(near, codec)


def interpret(function: object, programs: int, *args: object, **constants: object) -> None:
    """A launch without the executor's copies of the arguments' storages."""
    from unittest.mock import patch

    from triton.runtime import interpreter

    with (
        patch.object(interpreter.GridExecutor, "_init_args_hst", lambda _self, args, kwargs: (args, kwargs)),
        patch.object(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None),
    ):
        function[(programs,)](*args, **constants)  # type: ignore[index]
