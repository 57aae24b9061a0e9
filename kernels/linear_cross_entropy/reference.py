"""The definition of linear + cross-entropy with gradients, in plain PyTorch, whole logits at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_cross_entropy_reference(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_weight: float = 0.0,
) -> torch.Tensor:
    """Sum of the cross-entropies of ``h @ weight.T + bias`` over the rows whose target is not ``ignore_index``.

    And ``z_weight`` times the sum of logsumexp² over all rows.

    Shapes: h [N, D], weight [V, D], bias [V] or None, target int64 [N]; result float32 (float64 for float64) scalar.
    """
    logits = F.linear(h, weight, bias)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = F.cross_entropy(logits.to(wide), target, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing)
    return loss + z_weight * logits.to(wide).logsumexp(1).square().sum()
