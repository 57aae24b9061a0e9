"""The projected gradient of a linear's weight, without the gradient: the definition, in plain PyTorch.

Shapes: x [..., I], dY [..., O], G = dYᵀ x summed over all rows [O, I]; right: A [I, r]; left: L [O, r].
"""

from __future__ import annotations

from torch import Tensor


def projected_gradient_reference(grad: Tensor, x: Tensor, basis: Tensor, left: bool) -> Tensor:
    """G A = dYᵀ (x A) [O, r], or Lᵀ G = (dY L)ᵀ x [r, I], in the dtype of the gradient of the output.

    Args:
        grad: dY.
        x: input of the linear; cast to the dtype of ``grad``, in which autocast ran the linear.
        basis: A, or L if ``left``; cast likewise.
        left: the output side is projected.
    """
    dtype = grad.dtype
    rows, basis = grad.reshape(-1, grad.shape[-1]), basis.to(dtype)
    x = x.to(dtype).reshape(-1, x.shape[-1])
    if left:
        return (rows @ basis).T @ x
    return rows.T @ (x @ basis)
