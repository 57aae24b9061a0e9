"""accumulate_sums: the sums of a shared vector's gradient are added one by one, each where what it reads is at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from lowmem_compile.contract import Context
from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.kernels.add_parts import add_parts
from lowmem_compile.options import Options
from lowmem_compile.passes.accumulate_sums import AccumulateSums
from lowmem_compile.pipeline import Recorder, run_pass
from tests.helpers import check_gradients, compile_graphs

NAME = "accumulate_sums"
D = 64
aten = torch.ops.aten


class Shared(nn.Module):
    """One linear, or one norm and linear, read several times."""

    def __init__(self, times: int = 3, wide: int = D, normed: bool = False) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(wide, wide), times
        self.norm = nn.LayerNorm(wide) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        for _ in range(self.times):
            x = torch.tanh(self.layer(self.norm(x)))
        return x


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (128, D)), requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("times", [2, 3, 12])
def test_fires_once_a_term_and_matches_float64(times: int, dtype: torch.dtype) -> None:
    model = Shared(times).to(dtype)
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [rows().detach().to(dtype).requires_grad_()], dtype)
    assert graphs.rewritten(NAME) == times - 1
    assert (
        len(graphs.chosen.backward.graph.find_nodes(op="call_function", target=torch.ops.lowmem.add_parts.default)) == times - 1
    )


def test_the_weights_of_a_norm() -> None:
    model = Shared(3, normed=True)
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [rows(2, 64, D)], torch.float32)
    assert graphs.rewritten(NAME) >= 2 * 2


def test_dynamic_rows() -> None:
    model = Shared()
    graphs = compile_graphs(model, dynamic=True)
    for n in (128, 77):
        check_gradients(graphs, model, [rows(n, D)], torch.float32)
    assert graphs.rewritten(NAME) == 2


def test_a_few_rows_are_declined() -> None:
    model = Shared(2)
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [rows(7, D)], torch.float32)
    assert graphs.codes(NAME) == ["LM305"]


def graph_of(body: Any, *shapes: tuple[int, ...]) -> fx.GraphModule:
    with FakeTensorMode():
        return make_fx(body)(*(torch.empty(s) for s in shapes))


@pytest.mark.parametrize(
    "body",
    [
        lambda a, b: a.sum(0) + b[0],
        lambda a, b: a.sum(0).add(b.sum(0), alpha=2),
        lambda a, b: (p := a.sum(0), p + b.sum(0)),
        lambda a, b: (p := a.sum(0)) + p,
        lambda a, b: a.sum(0) + b.sum(0, keepdim=True),
        lambda a, b: a.sum(0) + b.sum(0).double(),
        lambda a, b: a.sum(0) + 1.0,
    ],
    ids=["no sum", "scaled", "read elsewhere", "twice the same", "broadcast", "another dtype", "a number"],
)
def test_near_misses(body: Any) -> None:
    assert not AccumulateSums().find(graph_of(body, (512, D), (512, D)).graph, Context(options=Options(), device="cpu", facts={}))


def test_nothing_is_left_to_do() -> None:
    gm = graph_of(lambda a, b, c: (a.sum(0) + b.sum(0)).view(1, D) + c.sum(0, keepdim=True), *((512, D),) * 3)
    ctx = Context(options=Options(), device="cpu", facts={})
    run_pass(AccumulateSums(), gm, ctx, Recorder("graph_0"))
    gm.recompile()
    given = [torch.randn(512, D) for _ in range(3)]
    torch.testing.assert_close(gm(*given), sum(x.sum(0, keepdim=True) for x in given))
    assert not gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert not AccumulateSums().find(gm.graph, ctx)


def test_the_operation() -> None:
    torch.library.opcheck(torch.ops.lowmem.add_parts, (torch.randn(5), torch.randn(5)))
    torch.library.opcheck(torch.ops.lowmem.add_parts, (torch.randn(4, 3).t(), torch.randn(3, 4)))
    assert torch.equal(add_parts(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.e2e
def test_a_layer_that_is_read_often_does_not_hold_all_its_activations() -> None:
    torch._dynamo.reset()
    model, x = Shared(8, 256), torch.randn(512, 256)
    peaks = {}
    choices: dict[str, Any] = {"with": {}, "without": {"disable": [NAME]}}
    for name, options in choices.items():
        compiled = torch.compile(model, backend="lowmem", options=options)

        def step(compiled: Any = compiled) -> Tensor:
            loss: Tensor = F.mse_loss(compiled(x), x)
            return loss

        step().backward()
        model.zero_grad()
        peaks[name] = peak_bytes(step).peak
    assert peaks["with"] < 0.6 * peaks["without"], peaks
