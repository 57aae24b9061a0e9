"""Gradients, steps and methods that the tests of the optimizers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_compile.optim import APOLLO, COAP, Fira, Flora, GaLore, LowRankOptimizer

Make = Callable[..., LowRankOptimizer]

METHODS: dict[str, tuple[type[LowRankOptimizer], dict[str, Any]]] = {
    "COAP": (COAP, {"rank": 4, "update_interval": 2, "reproject_factor": 2}),
    "COAP restored": (COAP, {"rank": 4, "update_interval": 2, "reproject_factor": 2, "restore_state": True}),
    "COAP Adafactor": (COAP, {"rank": 4, "update_interval": 2, "reproject_factor": 2, "base": "adafactor"}),
    "GaLore": (GaLore, {"rank": 4, "update_interval": 3}),
    "GaLore Adafactor": (GaLore, {"rank": 4, "update_interval": 3, "base": "adafactor"}),
    "GaLore randomised": (GaLore, {"rank": 4, "update_interval": 3, "svd": "randomised"}),
    "Fira": (Fira, {"rank": 4, "update_interval": 3}),
    "Flora": (Flora, {"rank": 4, "update_interval": 3}),
    "Flora SGD": (Flora, {"rank": 4, "update_interval": 3, "base": "sgd"}),
    "APOLLO": (APOLLO, {"rank": 4, "update_interval": 3}),
    "APOLLO-Mini": (APOLLO, {"mini": True, "update_interval": 3}),
}


def build(name: str, params: Any, **options: Any) -> LowRankOptimizer:
    """The method with small settings, changed by these options."""
    kind, settings = METHODS[name]
    make: Make = kind
    return make(params, **{**settings, **options})


def gradients(shape: Sequence[int], count: int, *, seed: int = 0) -> list[Tensor]:
    """Gradients with a few strong directions that change slowly, and noise."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], math.prod(shape[1:])
    strong = [torch.randn(rows, 6, generator=generator) @ torch.randn(6, columns, generator=generator) for _ in range(2)]
    noise = torch.randn(count, rows, columns, generator=generator)
    return [(0.3 * strong[t % 2] + 0.3 * noise[t]).reshape(*shape) for t in range(count)]


def weight(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter((0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(9))).to(dtype))


def feed(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]) -> None:
    """One step for each entry of ``grads``, which holds one gradient a parameter."""
    for step in grads:
        for p, G in zip(params, step, strict=True):
            p.grad = G.to(p.dtype).clone()
        optimizer.step()


def run(optimizer: torch.optim.Optimizer, W: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """The weights after these gradients."""
    feed(optimizer, [W], [[G] for G in grads])
    return W.detach().clone()
