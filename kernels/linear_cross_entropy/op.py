"""``lowmem::linear_cross_entropy``: the loss and, in the same sweep over chunks of tokens, its gradients.

For each chunk of rows: logits (matmul in the compute dtype), then one fused kernel that makes the loss and, in place of the
logits, their gradient, in float32 arithmetic, then the two gradient matmuls. Alive at any time: one chunk of logits, in a buffer
that all chunks share, ∂L/∂h, ∂L/∂W. The backward pass only multiplies by the incoming gradient. The fused kernel is generated
by Inductor for the device at hand.

Numerics class: REASSOCIATED (∂L/∂W is summed over chunks in its dtype: relative error 2⁻⁹·√chunks in bf16).
Source: the chunking follows the observation of Cut Cross-Entropy (arXiv 2411.09009) that logits dominate; equations in README.md.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

CHUNK_BYTES = 32 * 2**20
"""Of logits. On a CPU more is no faster, half of it 1.12 times slower (1024 rows, 49152 classes, bf16)."""
MOST_CHUNKS = 16


def chunk_rows(rows: int, vocabulary: int, itemsize: int) -> int:
    """Rows a chunk: about 32 MiB of logits, at most 16 chunks."""
    chunks = max(1, min(MOST_CHUNKS, -(-rows * vocabulary * itemsize // CHUNK_BYTES)))
    return max(1, -(-rows // chunks))


def chunk_gradient(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, label_smoothing: float, z_weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of losses, ∂sum/∂logits in the dtype of the logits) of one chunk [C, V]; ``z_weight``·lse² of every row is added."""
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    lse = torch.logsumexp(wide, 1)
    valid = target != ignore_index
    index = torch.where(valid, target, 0)
    picked = wide.gather(1, index.unsqueeze(1)).squeeze(1)
    loss = (1.0 - label_smoothing) * (lse - picked)
    if label_smoothing:
        loss = loss + label_smoothing * (lse - wide.mean(1))
    columns = torch.arange(logits.shape[1], device=logits.device)
    hit = columns.unsqueeze(0) == index.unsqueeze(1)
    grad = (wide - lse.unsqueeze(1)).exp() - torch.where(hit, 1.0 - label_smoothing, 0.0)
    if label_smoothing:
        grad = grad - label_smoothing / logits.shape[1]
    grad = torch.where(valid.unsqueeze(1), grad, 0.0)
    total = torch.where(valid, loss, 0.0).sum()
    if z_weight is not None:
        weight = z_weight.to(wide.dtype)
        total = total + weight * lse.square().sum()
        grad = grad + (2 * weight * lse).unsqueeze(1) * (wide - lse.unsqueeze(1)).exp()
    return total, grad.to(logits.dtype)


def chunk_loss_(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, label_smoothing: float, z_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of losses of one chunk [C, V], whose logits become ∂sum/∂logits."""
    loss, grad = chunk_gradient(logits, target, ignore_index, label_smoothing, z_weight)
    logits.copy_(grad)
    return loss


@functools.cache
def _fused() -> Any:
    return torch.compile(chunk_loss_, dynamic=True)


_plain = False


@contextlib.contextmanager
def plain_kernel() -> Iterator[None]:
    """Run the chunk's kernel as plain PyTorch: where another compile is under way, and in tests of graphs."""
    global _plain  # noqa: PLW0603
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


@torch.library.custom_op("lowmem::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    want_weight: bool,
    z_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss sum, ∂/∂h, ∂/∂weight, ∂/∂bias); the last two are empty unless ``want_weight``.

    Shapes: h [N, D], weight [V, D], bias [V] or None, target int64 [N]; h, weight and bias of one dtype. With ``z_weight``, a
    floating-point scalar without gradient, z_weight·Σ lse² over all rows is a part of the loss sum (the z-loss of PaLM).
    """
    rows, vocabulary = h.shape[0], weight.shape[0]
    step = chunk_rows(rows, vocabulary, h.element_size())
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=wide, device=h.device)
    grad_h = torch.empty_like(h, memory_format=torch.contiguous_format)
    grad_w = weight.new_empty(weight.shape) if want_weight and rows else weight.new_zeros(weight.shape if want_weight else 0)
    grad_b = torch.zeros(vocabulary, dtype=h.dtype, device=h.device) if want_weight and bias is not None else h.new_empty(0)
    loss_of = chunk_loss_ if _plain or torch.compiler.is_compiling() else _fused()
    logits = h.new_empty(min(step, rows), vocabulary)
    with torch.no_grad():
        for start in range(0, rows, step):
            part = h[start : start + step]
            logits.resize_(part.shape[0], vocabulary)  # of a slice, a view, the kernel would be compiled once more
            if bias is None:
                torch.mm(part, weight.t(), out=logits)
            else:
                torch.addmm(bias, part, weight.t(), out=logits)
            total += loss_of(logits, target[start : start + step], ignore_index, label_smoothing, z_weight)
            torch.mm(logits, weight, out=grad_h[start : start + step])
            if not want_weight:
                continue
            if start:
                grad_w.addmm_(logits.t(), part)
            else:
                torch.mm(logits.t(), part, out=grad_w)
            if bias is not None:
                grad_b += logits.sum(0)
    return total, grad_h, grad_w, grad_b


@linear_cross_entropy.register_fake
def _(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,  # noqa: ARG001
    ignore_index: int,  # noqa: ARG001
    label_smoothing: float,  # noqa: ARG001
    want_weight: bool,
    z_weight: torch.Tensor | None = None,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    return (
        h.new_empty((), dtype=wide),
        h.new_empty(h.shape),
        weight.new_empty(weight.shape) if want_weight else weight.new_empty(0),
        h.new_empty(weight.shape[0]) if want_weight and bias is not None else h.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, grad_h, grad_w, grad_b = output
    ctx.want_weight = inputs[6]
    ctx.has_bias = inputs[2] is not None
    ctx.save_for_backward(grad_h, grad_w, grad_b)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    grad_h, grad_w, grad_b = ctx.saved_tensors
    dh = (grad * grad_h).to(grad_h.dtype)
    dw = (grad * grad_w).to(grad_w.dtype) if ctx.want_weight else None
    db = (grad * grad_b).to(grad_b.dtype) if ctx.want_weight and ctx.has_bias else None
    return dh, dw, db, None, None, None, None, None


linear_cross_entropy.register_autograd(_backward, setup_context=_setup)
