"""accumulate_products: the products of a shared weight's gradient are added one by one, in the calls that make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lowmem_compile.contract import Context
from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.options import Options
from lowmem_compile.passes.accumulate_products import AccumulateProducts
from lowmem_compile.pipeline import Recorder, run_pass
from tests.helpers import Graphs, check_gradients, compile_graphs

NAME = "accumulate_products"
D = 64
aten = torch.ops.aten


class Shared(nn.Module):
    """One linear, read several times."""

    def __init__(self, times: int = 3, wide: int = D) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(wide, wide), times

    def forward(self, x: Tensor) -> Any:
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x


class Turned(Shared):
    """The weight and its transpose, as in a tied autoencoder."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(torch.tanh(self.layer(x)), self.layer.weight.t())


def rows(n: int = 8, wide: int = D) -> Tensor:
    return torch.randn(n, wide, requires_grad=True)


def nodes(graphs: Graphs, target: Any) -> list[fx.Node]:
    return [n for n in graphs.chosen.backward.graph.nodes if n.target == target and n.meta["val"].shape == (D, D)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("times", [2, 3, 12])
def test_a_sum_of_products_is_one_product_after_another(times: int, dtype: torch.dtype) -> None:
    model = Shared(times).to(dtype)
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [rows().detach().to(dtype).requires_grad_()], dtype)
    assert graphs.rewritten(NAME) == times - 1
    assert (len(nodes(graphs, aten.mm.default)), len(nodes(graphs, aten.addmm.default))) == (1, times - 1)
    assert not nodes(graphs, aten.add.Tensor)


def test_a_transposed_product_joins() -> None:
    model = Turned()
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [rows()], torch.float32)
    assert graphs.rewritten(NAME) == 1
    assert not nodes(graphs, aten.add.Tensor)


def test_three_dimensions() -> None:
    model = Shared()
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [torch.randn(2, 5, D, requires_grad=True)], torch.float32)
    assert graphs.rewritten(NAME) == 2


def test_dynamic_rows() -> None:
    model = Shared()
    graphs = compile_graphs(model, dynamic=True)
    for n in (8, 13):
        check_gradients(graphs, model, [rows(n)], torch.float32)
    assert graphs.rewritten(NAME) == 2


def test_a_small_gradient_is_declined() -> None:
    model = Shared(2, wide=16)
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [rows(wide=16)], torch.float32)
    assert graphs.codes(NAME) == ["LM305"]


def graph_of(body: Any, *shapes: tuple[int, ...]) -> fx.GraphModule:
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        return make_fx(body)(*(torch.empty(s) for s in shapes))


SQUARE = ((D, D), (D, D), (D, D), (D, D))


@pytest.mark.parametrize(
    ("body", "shapes"),
    [
        (lambda a, b, c, d: (a @ b).add(c @ d, alpha=2), SQUARE),
        (lambda a, b, c, d: (a @ b) + d, SQUARE),
        (lambda a, b, c, d: (p := a @ b, (q := c @ d) + p, q), SQUARE),
        (lambda a, b: (p := a @ b) + p, SQUARE[:2]),
        (lambda a, b, c, d: a @ b + c @ d, ((1, D), (D, D), (D, D), (D, D))),
        (lambda a, b, c, d: (a @ b).double() + c @ d, SQUARE),
        (lambda a, b, c, d: torch.bmm(a, b) + torch.bmm(c, d), ((1, D, D),) * 4),
    ],
    ids=["scaled", "no product", "read elsewhere", "twice the same", "broadcast", "another dtype", "batched"],
)
def test_near_misses(body: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    found = AccumulateProducts().find(graph_of(body, *shapes).graph, Context(Options(), "cpu", {}))
    assert not found


def test_nothing_is_left_to_do() -> None:
    """A second run finds nothing; products that are read transposed come out transposed."""
    a, b, c, d = (torch.randn(D, D) for _ in range(4))

    def body(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return (a @ b).t() + (c @ d).t() + b @ c

    gm = graph_of(body, *SQUARE)
    ctx = Context(Options(), "cpu", {})
    run_pass(AccumulateProducts(), gm, ctx, Recorder("graph_0"))
    gm.recompile()
    torch.testing.assert_close(gm(a, b, c, d), body(a, b, c, d), rtol=1e-4, atol=1e-3)
    assert len(gm.graph.find_nodes(op="call_function", target=aten.addmm.default)) == 2
    assert not AccumulateProducts().find(gm.graph, ctx)


@pytest.mark.e2e
def test_what_the_products_read_dies_as_the_backward_pass_goes_on() -> None:
    """Inductor makes all products at the end; here the peak does not grow with the square of the layers."""
    torch._dynamo.reset()
    model, x = Shared(8, 256), torch.randn(512, 256)
    peaks = {}
    for name in ("inductor", "lowmem"):
        compiled = torch.compile(model, backend=name)

        def step(compiled: Any = compiled) -> Tensor:
            loss: Tensor = compiled(x).square().mean()
            return loss

        step().backward()
        peaks[name] = peak_bytes(step, lambda _: None).peak
    assert peaks["lowmem"] < 0.8 * peaks["inductor"], peaks
