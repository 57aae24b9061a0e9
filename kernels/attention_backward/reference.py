"""The definition, written with whole matrices of scores."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_backward_reference(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of O = softmax(scale·QKᵀ + M)V and O itself, in the dtype of the arguments: give it float64 to judge others by.

    Shapes as in :func:`.op.attention_backward`. A row of M that is -inf throughout attends to nothing: P = 0.
    """
    scores = scale * (query @ key.transpose(-2, -1))
    if mask is not None:
        scores = scores + mask
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    p = torch.softmax(scores, -1).masked_fill(nothing, 0.0)
    dp = grad @ value.transpose(-2, -1)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return scale * (ds @ key), scale * (ds.transpose(-2, -1) @ query), p.transpose(-2, -1) @ grad, p @ value
