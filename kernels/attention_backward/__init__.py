"""Backward pass of a fused attention on a CPU from its inputs alone."""

from lowmem_compile.kernels.attention_backward.op import attention_backward, chunk_of

__all__ = ["attention_backward", "chunk_of"]
