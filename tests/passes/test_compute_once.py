"""compute_once: small results of costly functions lie in memory, on a CPU, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowmem_compile.passes.compute_once import REPEATS, ComputeOnce
from tests.helpers import check_gradients, compile_graphs, targets

NAME = "compute_once"
MARK = "in_memory.default"
S, D = 8, 16


class Rotary(nn.Module):
    """A linear, turned by angles that depend on the position alone; ``heads`` rows share an angle."""

    def __init__(self, heads: int, function: str = "cos") -> None:
        super().__init__()
        self.linear = nn.Linear(D, heads * D)
        self.heads, self.function = heads, function

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2], dtype=torch.float32).unsqueeze(-1) * torch.linspace(0.01, 0.1, D)
        turned = self.linear(x).unflatten(-1, (self.heads, D)).transpose(-2, -3)
        made: Tensor = (turned * getattr(torch, self.function)(angles)).sin()
        return made


@pytest.mark.parametrize("function", ["cos", "exp", "sigmoid"])
def test_forward_and_backward_keep_the_table(function: str) -> None:
    model = Rotary(4, function)
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [torch.randn(S, D, requires_grad=True)])
    assert graphs.rewritten(NAME) == 2
    for graph in (graphs.chosen.forward.graph, graphs.chosen.backward.graph):
        assert targets(graph).count(MARK) == 1


def test_a_result_that_is_read_as_often_as_it_has_elements_does_not_match() -> None:
    for heads in (1, REPEATS - 1):
        graphs = compile_graphs(Rotary(heads))
        graphs(torch.randn(S, D)).sum().backward()
        assert graphs.rewritten(NAME) == 0


def test_cheap_functions_do_not_match() -> None:
    graphs = compile_graphs(Rotary(4, "square"))
    graphs(torch.randn(S, D)).sum().backward()
    assert graphs.rewritten(NAME) == 0


def test_dynamic_positions() -> None:
    model = Rotary(4)
    graphs = compile_graphs(model, dynamic=True)
    check_gradients(graphs, model, [torch.randn(S, D, requires_grad=True)])
    assert graphs.rewritten(NAME) == 2


def test_idempotent() -> None:
    graphs = compile_graphs(Rotary(4))
    graphs(torch.randn(S, D)).sum().backward()
    for graph in (graphs.chosen.forward.graph, graphs.chosen.backward.graph):
        assert not [n for n in graph.nodes if ComputeOnce.would_keep(n)]


@pytest.mark.e2e
def test_the_forward_result_is_inductors() -> None:
    model, x = Rotary(4), torch.randn(S, D)
    assert torch.equal(torch.compile(model, backend="lowmem")(x), torch.compile(model, backend="inductor")(x))
