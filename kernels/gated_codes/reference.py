"""The definition of a gated activation and its gradient, in plain PyTorch.

    forward    y = f(a)·b                                f = SiLU (SwiGLU) or GELU (GeGLU, erf form)
    backward   da = g·b·f'(a),    db = g·f(a)

All arithmetic in float32 (float64 for float64), one rounding to the dtype at the end. Source: Shazeer, "GLU variants improve
transformer" (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "silu": (F.silu, aten.silu_backward),
    "gelu": (F.gelu, aten.gelu_backward),
}
"""The activation and its backward, by name."""


def gated_reference(a: Tensor, b: Tensor, name: str) -> Tensor:
    """y of a[..., D] and b[..., D], in their dtype."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (ACTIVATIONS[name][0](a.to(wide)) * b.to(wide)).to(a.dtype)


def gated_backward_reference(grad: Tensor, a: Tensor, b: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """``(da, db)``, in grad's dtype."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    forward, backward = ACTIVATIONS[name]
    g, a, b = grad.to(wide), a.to(wide), b.to(wide)
    return backward(g * b, a).to(grad.dtype), (g * forward(a)).to(grad.dtype)
