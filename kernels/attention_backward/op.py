"""``lowmem::attention_backward``: gradients of a fused attention on a CPU from queries, keys and values alone.

PyTorch's kernel reads the output O and the logsumexp L beside them: P = exp(S - L), δ = rowsum(dO∘O). Here P = softmax(S) and
δ = rowsum(P∘dP) are made of the scores that are there anyway, so neither O nor L has to be saved for it, and P and δ fit the Q,
K and V that are read, whatever their error: rows of P sum to one, rows of dS to zero. Where something else in the backward pass
reads O (the gradient of the next linear's weight), O = PV is made again from the same P, a sixth product of that size.

The scores of some heads at a time: S in float32 (Q and K are small beside it), P, dP and dS in the dtype of Q, matrix products
by the library. In bfloat16 that takes a quarter to a half of the time of PyTorch's kernel up to some hundred keys (README).

Numerics class: REASSOCIATED. Written from the definition (the backward pass of softmax(QKᵀ)V, e.g. arXiv:2205.14135, B.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

aten = torch.ops.aten
SCORES = 1 << 19
"""Scores at once: 8 bytes each in bfloat16. Half as many take a tenth longer, twice as many save a twentieth."""


def chunk_of(batch: int, heads: int, queries: int, keys: int) -> tuple[int, int]:
    """(rows of the batch, heads) whose scores are made at once: whole rows where one fits, else some heads of a row."""
    fits = max(SCORES // max(queries * keys, 1), 1)
    return (min(fits // heads, batch), heads) if fits >= heads else (1, fits)


@torch.library.custom_op("lowmem::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, output: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dQ, dK, dV, O) of O = softmax(scale·QKᵀ + M)V, laid out as [B, S, H, D].

    Args:
        grad: dO [B, H, S, E].
        query: Q [B, H, S, D], any strides, floating point; the others in the same dtype.
        key: K [B, H, T, D].
        value: V [B, H, T, E].
        mask: M, floating point, broadcast to [B, H, S, T]; a row of -inf attends to nothing.
        causal: query s reads keys up to s only.
        scale: a number.
        output: whether to make O; where not, it is an empty tensor [0].
    """
    grads = (*(_like(t) for t in (query, key, value)), _output(query, value, output))
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    if grad.numel() == 0 or keys == 0:
        return tuple(g.zero_() for g in grads)  # type: ignore[return-value]
    bias = _bias(mask, causal, queries, keys)
    nothing = None if mask is None else (mask == -torch.inf).all(-1, keepdim=True)
    if nothing is not None and not bool(nothing.any()):
        nothing = None
    rows, some = chunk_of(batch, heads, queries, keys)
    scores = query.new_empty(rows * some, queries, keys, dtype=torch.promote_types(torch.float32, query.dtype))
    shares, slopes = (query.new_empty(scores.shape) for _ in range(2))
    for at in _chunks(batch, heads, rows, some):
        q, k, v, g = (t[at].contiguous().flatten(0, 1) for t in (query, key, value, grad))
        shape, size = query[at].shape[:2], (q.shape[0], queries, keys)
        p, low, dp = (t[: size[0]] for t in (scores, shares, slopes))
        wide = (q.to(p.dtype), k.to(p.dtype).transpose(1, 2))
        if bias is None:
            torch.baddbmm(p, *wide, alpha=scale, beta=0, out=p)
        else:
            torch.baddbmm(_of(bias, at, shape, size).to(p.dtype), *wide, alpha=scale, out=p)
        torch.softmax(p, -1, out=p)
        if nothing is not None:
            p.masked_fill_(_of(nothing, at, shape, (*size[:2], 1)), 0.0)
        low.copy_(p)
        if output:
            grads[3][at] = torch.bmm(low, v).unflatten(0, shape)
        grads[2][at] = torch.bmm(low.transpose(1, 2), g).unflatten(0, shape)
        torch.bmm(g, v.transpose(1, 2), out=dp)
        aten._softmax_backward_data.out(dp, low, -1, dp.dtype, grad_input=dp)
        grads[0][at] = torch.bmm(dp, k).mul_(scale).unflatten(0, shape)
        grads[1][at] = torch.bmm(dp.transpose(1, 2), q).mul_(scale).unflatten(0, shape)
    return grads  # type: ignore[return-value]


@attention_backward.register_fake
def _(
    grad: Tensor,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,  # noqa: ARG001
    causal: bool,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    output: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(query), _like(key), _like(value), _output(query, value, output)


def _output(query: Tensor, value: Tensor, wanted: bool) -> Tensor:
    """An empty tensor for O, laid out as :func:`_like` does, or of no elements."""
    if not wanted:
        return value.new_empty(0)
    return value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)


def _like(t: Tensor) -> Tensor:
    """An empty tensor of these sizes [B, H, S, D] that lies as [B, S, H, D], the order of a linear layer's output."""
    return t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2)


def _bias(mask: Tensor | None, causal: bool, queries: int, keys: int) -> Tensor | None:
    """What is added to the scores, [1 or B, 1 or H, 1 or S, T]."""
    if not causal:
        return None if mask is None else mask[(None,) * (4 - mask.dim())]
    future = torch.full((1, 1, queries, keys), -math.inf).triu_(1)
    return future if mask is None else mask + future


def _of(part: Tensor, at: tuple[slice, ...], shape: torch.Size, size: tuple[int, ...]) -> Tensor:
    """A chunk of what is broadcast to [B, H, S, T], as [heads of the chunk, queries, keys]."""
    part = part[(None,) * (4 - part.dim())]
    mine = part[tuple(a if n > 1 else slice(None) for a, n in zip(at, part.shape, strict=False))]
    return mine.expand(*shape, *size[1:]).reshape(size)


def _chunks(batch: int, heads: int, rows: int, some: int) -> Iterator[tuple[slice, slice]]:
    for b in range(0, batch, rows):
        for h in range(0, heads, some):
            yield slice(b, min(b + rows, batch)), slice(h, min(h + some, heads))
