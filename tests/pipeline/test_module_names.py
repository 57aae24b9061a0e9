"""Names of modules in the report are those that the model gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lowmem_compile


def wrapped(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs)

    return wrapper


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Wrapped(Plain):
    """As models of transformers are, whose ``forward`` handles renamed arguments."""

    @wrapped
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def names(model: nn.Module) -> set[str]:
    (graph,) = lowmem_compile.explain(model, torch.randn(128, 64)).training_graphs
    return {tensor.module for tensor in graph.saved["lowmem"]}


def test_a_wrapper_around_forward_leaves_the_names_of_modules() -> None:
    found = names(Plain())
    assert any(name.startswith("layers.0") for name in found)
    assert names(Wrapped()) == found
