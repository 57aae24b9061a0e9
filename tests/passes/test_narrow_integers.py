"""narrow_integers: saved integers take the narrowest dtype that their proved bounds allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_compile.bounds import interval_of
from lowmem_compile.passes.narrow_integers import narrowest
from tests.helpers import check_gradients, compile_graphs

NAME = "narrow_integers"


class Routed(nn.Module):
    """The largest k of every row, squared, put back in their places."""

    def __init__(self, width: int = 40, k: int = 8) -> None:
        super().__init__()
        self.k, self.up, self.down = k, nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Any:
        h = self.up(x)
        values, places = h.topk(self.k, -1)
        return self.down(torch.zeros_like(h).scatter(-1, places, values * values))


@pytest.mark.parametrize(("width", "dtype"), [(40, "uint8"), (300, "int16")])
def test_places_of_a_top_k(width: int, dtype: str) -> None:
    model = Routed(width)
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [torch.randn(16, 8, requires_grad=True)])
    assert graphs.rewritten(NAME) == 1
    (kept,) = [t for t in graphs.chosen.saved_tensors() if t.kind == "index"]
    assert kept.dtype == dtype
    assert kept.nbytes == 16 * 8 * (1 if dtype == "uint8" else 2)
    assert kept.decision == f"{dtype} integers"


def test_a_few_integers_decline() -> None:
    model = Routed(k=2)
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [torch.randn(16, 8, requires_grad=True)])
    assert graphs.codes(NAME) == ["LM305"]


def test_returned_integers_decline() -> None:
    class Model(Routed):
        def forward(self, x: Tensor) -> Any:
            values, places = self.up(x).topk(8, -1)
            return self.down(torch.zeros(16, 40).scatter(-1, places, values * values)), places

    graphs = compile_graphs(Model())
    graphs(torch.randn(16, 8))[0].sum().backward()
    assert graphs.codes(NAME) == ["LM302"]


def test_integers_without_a_bound_decline() -> None:
    """Sums of an input may be anything, and nothing is measured."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 80)

        def forward(self, x: Tensor, i: Tensor) -> Any:
            return self.up(x) * (i.sort(0)[0] * i)

    graphs = compile_graphs(Model())
    graphs(torch.randn(16, 8), torch.arange(80)).sum().backward()
    assert set(graphs.codes(NAME)) == {"LM222"}


def bounds(fn: Any, *args: Tensor) -> tuple[int, int] | None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(fn, tracing_mode="fake")(*args).graph
    (result,) = graph.output_node().all_input_nodes
    return interval_of(result)


NUMBERS = torch.arange(12).view(3, 4)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: x > 2, (0, 1)),
        (lambda x: x.argmax(1), (0, 3)),
        (lambda x: x.argmax(), (0, 11)),
        (lambda x: (x > 2).long().cumsum(1), (0, 4)),
        (lambda x: (x > 2).long().cumsum(1) * 5 - 7, (-7, 13)),
        (lambda x: x.clamp(-3, 9), (-3, 9)),
        (lambda x: x.clamp(min=0), None),
        (lambda x: torch.where(x > 2, x.argmax(1, keepdim=True), -100), (-100, 3)),
        (lambda x: torch.cat([x > 1, x > 2]).long(), (0, 1)),
        (lambda x: x + 1, None),
        (lambda x: (x > 2).to(torch.int8) * 100 + 100, None),
        (lambda x: x % 7, (0, 6)),
        (lambda x: x.float().sort(1)[1], (0, 3)),
        (lambda x: x.float().to(torch.int64), None),
    ],
)
def test_bounds(fn: Any, expected: tuple[int, int] | None) -> None:
    assert bounds(fn, NUMBERS) == expected


def test_an_index_is_bounded_by_what_it_indexes() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    table = torch.randn(70000, 2)
    graph = make_fx(lambda t, i: torch.ops.aten.embedding(t, i + 1), tracing_mode="fake")(table, NUMBERS).graph
    (plus,) = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    assert interval_of(plus) == (-70000, 69999)
    assert narrowest(plus) is torch.int32
