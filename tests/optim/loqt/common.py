"""A small model with linears of both sides, its loss, and runs of it, for the tests of LoQT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem_compile
from lowmem_compile.optim.loqt import LoQT

N, D, H, R = 40, 64, 192, 8


class Mixer(nn.Module):
    """Linears with P on the right (square, up) and on the left (down), a norm and a bias between them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        made: dict[str, Any] = {"dtype": dtype}
        self.first, self.norm = nn.Linear(D, D, bias=False, **made), nn.LayerNorm(D, **made)
        self.up, self.down = nn.Linear(D, H, **made), nn.Linear(H, D, **made)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(self.norm(self.first(x)))))
        return out


def batch(number: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs and targets [N, D]; a linear map with noise."""
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.randn(N, D, generator=generator)
    true = torch.randn(D, D, generator=torch.Generator().manual_seed(3)) / D**0.5
    return x.to(dtype), (x @ true + 0.1 * torch.randn(N, D, generator=generator)).to(dtype)


def loss_of(model: Callable[..., Tensor], number: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x, target = batch(number, dtype)
    return F.mse_loss(model(x).float(), target.float())


def under_loqt(*, seed: int = 0, dtype: torch.dtype = torch.float32, merge: bool = True, **options: Any) -> tuple[Mixer, LoQT]:
    """The model from a seed, converted, and merged once unless told otherwise."""
    torch.manual_seed(seed)
    model = Mixer(dtype)
    training = lowmem_compile.loqt(model, **{"rank": R, **options})
    if merge:
        training.merge(lambda: loss_of(model, dtype=dtype))
    return model, training


def train(model: Callable[..., Tensor], training: LoQT, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Losses of some steps, merges included, one batch a step."""
    losses = []
    for number in steps:
        training.before_step(lambda n=number: loss_of(model, n))  # type: ignore[misc]
        loss = loss_of(model, number)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
