"""The definition of the normalisation ops, in plain PyTorch.

Shapes: x is [..., D1, ..., Dk], the last ``ndim`` = k dimensions form a row. All arithmetic in float32 (float64 for
float64 input). Source: Ba et al. 2016 (LayerNorm), Zhang & Sennrich 2019 (RMSNorm); the backward from the output is
equation (16) ff. of LowMemoryBP (ICML 2024), re-derived in the README of this folder.
"""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalize_reference(x: torch.Tensor, ndim: int, eps: float, center: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``(xhat, rstd)``: xhat = (x - mean)·rstd (LayerNorm) or x·rstd (RMSNorm, ``center=False``).

    ``xhat`` has the shape of x, ``rstd`` the same with the row dimensions of size 1; both in the compute dtype.
    """
    dims = list(range(-ndim, 0))
    x = x.to(compute_dtype(x.dtype))
    if center:
        var, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
        rstd = torch.rsqrt(var + eps)
        return (x - mean) * rstd, rstd
    rstd = torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + eps)
    return x * rstd, rstd


def normalize_backward_reference(
    grad: torch.Tensor, xhat: torch.Tensor, rstd: torch.Tensor, ndim: int, center: bool
) -> torch.Tensor:
    """dx = rstd·(g - mean(g) - xhat·mean(g·xhat)); without the mean(g) term for ``center=False``."""
    dims = list(range(-ndim, 0))
    grad = grad.to(rstd.dtype)
    xhat = xhat.to(rstd.dtype)
    inner = grad - xhat * (grad * xhat).mean(dims, keepdim=True)
    if center:
        inner = inner - grad.mean(dims, keepdim=True)
    return rstd * inner
