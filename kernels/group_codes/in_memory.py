"""``lowmem::in_memory``: a mark that its input gets a buffer of its own, in the shape it has here.

Codes of 10 bits, or of fewer than 8, lie in runs. Inductor computes what library calls read in the shape that they read, where
the run of an element is a quotient and its place a remainder: its C++ then goes element by element. In the shape of the codes,
[runs, groups, elements], the innermost loop is contiguous and vectorised; what follows is views. In a kernel of many loops what
is marked is computed once, and not in each of them. Numerics class: EXACT, the identity, lowered to nothing
(:func:`lowmem_compile._torch.keep_in_memory`).
"""

from __future__ import annotations

import torch


@torch.library.custom_op("lowmem::in_memory", mutates_args=())
def in_memory(x: torch.Tensor) -> torch.Tensor:
    """A copy of x, of any shape and dtype, with its strides; compiled, x itself."""
    return x.clone()


@in_memory.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)
