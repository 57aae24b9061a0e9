"""Operations on p + scale·z that never hold a large perturbed parameter whole: what the zeroth-order forward pass runs.

    lowmem::perturbed           p + scale·z                                       any small parameter, or one of another operation
    lowmem::perturbed_linear    x (W + scale·z)ᵀ + b, over chunks of the rows of W
    lowmem::perturbed_embedding W[i] + scale·z[i]: rows are perturbed after the lookup

``seed`` (int64) and ``scale`` (float64) are 0-dimensional tensors on the CPU, so another seed or sign does not recompile. The
perturbed parameter is rounded to its dtype before it is used, as if it had been written: what is computed is the model at
p + scale·z. There is no gradient; p itself is only read, so it needs no restoring.

Scratch memory of a linear: a chunk of W in float32 and in its dtype, of a 48th of the output's bytes, or of one block
(:mod:`lowmem_compile.optim.addax.noise`) if that is more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_compile.optim.addax.noise import block_rows, draw, perturbed_rows, rows_of, spans
from lowmem_compile.optim.slots import compute_dtype

SHARE = 48
"""A chunk takes at most this part of the output of a linear."""
runs = 0
"""How many of these operations ran in this process: an evaluation that runs none did not see the perturbation."""


def _noted(seed: Tensor, scale: Tensor) -> tuple[int, float]:
    global runs  # noqa: PLW0603
    runs += 1
    return int(seed), float(scale)


@torch.library.custom_op("lowmem::perturbed", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def perturbed(p: Tensor, seed: Tensor, scale: Tensor, ordinal: int) -> Tensor:
    """p + scale·z, in the shape and dtype of p."""
    s, c = _noted(seed, scale)
    out = torch.empty_like(p, memory_format=torch.contiguous_format)
    source, rows = rows_of(p), rows_of(out)
    for a, b in spans(source):
        rows[a:b] = perturbed_rows(source, a, b, s, c, ordinal)
    return out


@perturbed.register_fake
def _(p: Tensor, seed: Tensor, scale: Tensor, ordinal: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(p, memory_format=torch.contiguous_format)


@torch.library.custom_op("lowmem::perturbed_linear", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def perturbed_linear(x: Tensor, W: Tensor, bias: Tensor | None, seed: Tensor, scale: Tensor, ordinal: int) -> Tensor:
    """x (W + scale·z)ᵀ + bias, in the dtype of x.

    Args:
        x: [..., I], floating point.
        W: [O, I], of any floating dtype.
        bias: [O], as it is to be added, or none.
        seed: of z.
        scale: ε or -ε.
        ordinal: the place of W.
    """
    s, c = _noted(seed, scale)
    flat = x.reshape(-1, x.shape[-1])
    out = x.new_empty(flat.shape[0], W.shape[0])
    per_element = compute_dtype(W.dtype).itemsize + (W.dtype.itemsize if W.dtype != compute_dtype(W.dtype) else 0)
    elements = out.numel() * out.itemsize // SHARE // per_element
    for a, b in spans(W, elements):
        chunk = perturbed_rows(W, a, b, s, c, ordinal).to(x.dtype)
        torch.mm(flat, chunk.T, out=out[:, a:b])
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], W.shape[0])


@perturbed_linear.register_fake
def _(x: Tensor, W: Tensor, bias: Tensor | None, seed: Tensor, scale: Tensor, ordinal: int) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], W.shape[0]))


@torch.library.custom_op("lowmem::perturbed_embedding", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def perturbed_embedding(index: Tensor, W: Tensor, seed: Tensor, scale: Tensor, ordinal: int) -> Tensor:
    """Rows of W + scale·z at ``index`` [...]: [..., D] in the dtype of W."""
    s, c = _noted(seed, scale)
    out = F.embedding(index, W)
    rows, at, R = out.view(-1, W.shape[1]), index.reshape(-1), block_rows(W)
    order = torch.argsort(at // R, stable=True)
    blocks, counts = torch.unique_consecutive((at // R)[order], return_counts=True)
    for block, where in zip(blocks.tolist(), order.split(counts.tolist()), strict=True):
        start = block * R
        z = draw(W, s, ordinal, start, min(start + R, W.shape[0])).to(compute_dtype(W.dtype))
        rows[where] = z[at[where] - start].mul_(c).add_(rows[where]).to(W.dtype)
    return out


@perturbed_embedding.register_fake
def _(index: Tensor, W: Tensor, seed: Tensor, scale: Tensor, ordinal: int) -> Tensor:  # noqa: ARG001
    return W.new_empty((*index.shape, W.shape[1]))
