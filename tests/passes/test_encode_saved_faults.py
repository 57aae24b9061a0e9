"""encode_saved: non-finite values, randomness, checkpoints, masks, and passes that fail."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowmem_compile import partition
from lowmem_compile.contract import Context, Match
from lowmem_compile.kernels.group_codes import CODECS
from lowmem_compile.options import Options
from lowmem_compile.passes.encode_saved import EncodeSaved
from lowmem_compile.pipeline import Recorder
from tests.helpers import assert_same, check_gradients, compile_graphs, run, run_double
from tests.passes.encoding import (
    NAME,
    ROWS,
    Block,
    Function,
    check,
    distances,
    held,
    rows,
)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("function", [F.gelu, F.relu, torch.tanh], ids=["gelu", "relu", "tanh"])
@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_a_non_finite_input_reaches_the_gradients_as_without_codes(name: str, function: Function, bad: float) -> None:
    model, x = Block(function), rows().detach()
    x[3, 5] = bad
    x.requires_grad_()
    graphs = compile_graphs(model, codec=name)
    got, want = run(graphs, model, [x]), run(compile_graphs(model), model, [x])
    assert graphs.rewritten(NAME) == 1
    for k in want:
        assert not got[k][~want[k].isfinite()].isfinite().any(), k
    others = torch.arange(ROWS) != 3
    assert got["input 0"][others].isfinite().all()


def test_stochastic_rounding_follows_the_seed() -> None:
    model, x = Block(), rows()
    graphs = compile_graphs(model, codec="int4", rounding="stochastic")
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(run(graphs, model, [x]))
    assert_same(results[0], results[1], 0)
    assert not torch.equal(results[0]["up.weight"], results[2]["up.weight"])
    assert torch.equal(results[0]["output 0"], results[2]["output 0"])


def test_stochastic_rounding_is_right_on_average() -> None:
    """For a gradient that is linear in what is saved, the mean over many draws comes closer than one draw."""
    model, x = Block(torch.tanh), rows()
    want = run_double(model, [x])["down.weight"]
    graphs = compile_graphs(model, codec="int3", rounding="stochastic")
    draws = [run(graphs, model, [x])["down.weight"].double() for _ in range(100)]
    one, mean = ((t - want).norm().item() for t in (draws[0], torch.stack(draws).mean(0)))
    assert mean < one / 5


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_inside_a_checkpoint(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(torch.tanh), Block()

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.second, checkpoint(self.first, x, use_reentrant=False), use_reentrant=False)

    model = Model()
    graphs = compile_graphs(model, codec=name)
    check(graphs, model, [rows()], 2 * CODECS[name].error)
    assert held(graphs, model, [rows()]) >= graphs.chosen.saved_bytes()


def test_beside_dropout_and_masks() -> None:
    """The mask that the forward pass drew is the one that the backward pass applies."""

    class Model(Block):
        def forward(self, x: Tensor) -> Any:
            return self.down(F.dropout(torch.tanh(self.up(x)), 0.5, self.training))

    model, x = Model(), rows()
    graphs = compile_graphs(model, codec="int8", gradients="approximate")
    results = []
    for g in (graphs, compile_graphs(model)):
        torch.manual_seed(3)
        results.append(run(g, model, [x]))
    assert graphs.rewritten(NAME) >= 1
    assert max(distances(*results).values()) <= 0.02


@pytest.mark.parametrize("name", ["bf16", "int8", "int3"])
def test_idempotent(name: str) -> None:
    model, x = Block(), rows()
    graphs = compile_graphs(model, codec=name)
    run(graphs, model, [x])
    again, recorder = copy.copy(graphs.chosen), Recorder()
    before = str(again.forward.graph), str(again.backward.graph)
    partition.run_saved_stage(again, Context(Options(codec="int8", strict=True), facts={}), recorder)
    assert not [s for s in recorder.sites if s.pass_name == NAME and s.action == "rewritten"]
    assert (str(again.forward.graph), str(again.backward.graph)) == before


@pytest.mark.parametrize("late", [False, True], ids=["before", "after the rewrite"])
def test_a_failure_leaves_both_graphs_as_they_were(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    original = EncodeSaved.rewrite

    def broken(self: EncodeSaved, graph: fx.Graph, match: Match, ctx: Context) -> None:
        if late:
            original(self, graph, match, ctx)
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(EncodeSaved, "rewrite", broken)
    model = Block()
    graphs = compile_graphs(model, codec="int8", strict=False)
    with pytest.warns(RuntimeWarning, match=NAME):
        check_gradients(graphs, model, [rows()])
    assert graphs.codes(NAME) == ["LM900"]
