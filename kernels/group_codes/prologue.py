"""``lowmem::in_prologue``: a mark that its input is to be computed inside the matrix product that reads it.

With ``max-autotune`` Inductor has matrix products of its own, Triton templates, beside the library's, and can compute an input of
one as it loads its tiles: dYᵀ·deq(codes) in one kernel, x̃ never in memory. By its rule it does so for nothing that is computed in
float32, as every decode is; marked by this operation, the fused template is one of the autotuner's choices. Numerics class:
EXACT, the identity; lowered to nothing (:func:`lowmem_compile._torch.offer_prologue`).
"""

from __future__ import annotations

import torch


@torch.library.custom_op("lowmem::in_prologue", mutates_args=())
def in_prologue(x: torch.Tensor) -> torch.Tensor:
    """A copy of x, of any shape and dtype, with its strides; compiled, x itself."""
    return x.clone()


@in_prologue.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)
