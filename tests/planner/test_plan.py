"""Plans for a budget: kept, executed as planned, correct gradients, monotone peaks, and an error where there is none."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from lowmem_compile.planner.timeline import peak, simulate
from tests.helpers import TOLERANCE, Graphs, assert_same, compile_graphs, run, run_double

WIDTH, HEADS, DEPTH = 64, 4, 3


class Layer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + F.dropout(self.out(mixed), self.dropout, training=self.dropout > 0)
        out: Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return out


def model_of(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(dropout) for _ in range(DEPTH)), nn.Linear(WIDTH, 8))


def tokens(rows: int = 8) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, 64, WIDTH, requires_grad=True)


def share(graphs: Graphs) -> float:
    return graphs.chosen.saved_bytes() / graphs.only.partitions["inductor"].saved_bytes()


def compiled(budget: float | str, x: Tensor, codec: str = "auto", model: nn.Module | None = None) -> tuple[Graphs, nn.Module]:
    model = model or model_of()
    graphs = compile_graphs(model, memory_budget=budget, codec=codec, check="lint")
    graphs(x).sum().backward()
    return graphs, model


@pytest.mark.parametrize("budget", [0.4, 0.2, 0.1])
def test_a_share_is_kept(budget: float) -> None:
    graphs, model = compiled(budget, tokens())
    assert share(graphs) <= budget
    assert share(graphs) > 0.4 * budget  # no more is given up than asked for
    got, want = run(graphs, model, [tokens()]), run_double(model, [tokens()])
    error = torch.cat([(got[n].double() - want[n].double()).flatten() for n in want]).norm()
    whole = torch.cat([want[n].double().flatten() for n in want]).norm()
    assert error <= {0.4: 0.01, 0.2: 0.03, 0.1: 0.15}[budget] * whole


@pytest.mark.parametrize("budget", [0.45, 0.4])
def test_recomputation_alone_is_exact(budget: float) -> None:
    """codec="none": what is given up is computed again, matrix products included."""
    graphs, model = compiled(budget, tokens(), codec="none")
    assert share(graphs) <= budget
    assert graphs.rewritten("recompute_saved") >= DEPTH
    assert not graphs.rewritten("encode_saved")
    assert_same(run(graphs, model, [tokens()]), run_double(model, [tokens()]), TOLERANCE[torch.float32])


def test_what_is_exact_stays_exact() -> None:
    graphs, model = compiled(0.9, tokens())
    assert_same(run(graphs, model, [tokens()]), run_double(model, [tokens()]), TOLERANCE[torch.float32])
    assert set(graphs.codes("encode_saved")) <= {"LM216", "LM212"}


def test_the_mask_of_a_dropout_is_not_drawn_again() -> None:
    """The same seed gives the same gradient with and without a plan: randomness is not repeated."""
    x, model = tokens(), model_of(0.3)
    gradients = []
    for budget in (0.45, None):
        graphs = compile_graphs(model, codec="none", check="lint", memory_budget=budget)
        torch.manual_seed(3)
        model.zero_grad()
        graphs(x).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert bool(graphs.rewritten("recompute_saved")) == (budget is not None)
    assert_same(gradients[0], gradients[1], TOLERANCE[torch.float32])


def test_an_impossible_share_says_what_the_least_is() -> None:
    model, x = model_of(), tokens()
    with pytest.raises(BackendCompilerFailed, match="memory_budget") as failure:
        compile_graphs(model, memory_budget=0.001, codec="auto", check="lint")(x)
    found = re.search(r"([0-9.]+) of Inductor's", str(failure.value))
    assert found is not None
    least = float(found[1])
    assert 0.001 < least < 0.1
    graphs, _ = compiled(least + 0.002, x)
    assert share(graphs) <= least + 0.002
    with pytest.raises(BackendCompilerFailed, match="memory_budget"):
        compile_graphs(model_of(), memory_budget=least - 0.002, codec="auto", check="lint")(x)


def test_the_peak_is_monotone_and_a_peak_is_kept() -> None:
    x = tokens(16)
    peaks = []
    for budget in (1.0, 0.5, 0.3, 0.15):
        graphs, _ = compiled(budget, x)
        peaks.append(peak(simulate(graphs.chosen)))
    assert all(low <= 1.05 * high for high, low in itertools.pairwise(peaks)), peaks
    assert peaks[-1] < 0.8 * peaks[0]
    wanted = (peaks[0] + peaks[-1]) // 2
    graphs, _ = compiled(f"{wanted / 1024}KiB", x)
    assert peak(simulate(graphs.chosen)) <= 1.05 * wanted
    with pytest.raises(BackendCompilerFailed, match="asks for a peak of"):
        compiled("10KiB", x)


def test_a_small_graph_has_no_budget() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    graphs = compile_graphs(model, memory_budget=0.01, codec="auto")
    assert_same(run(graphs, model, [x]), run_double(model, [x]), TOLERANCE[torch.float32])
    assert not graphs.sites("recompute_saved")


def test_dynamic_sizes() -> None:
    model = model_of()
    graphs = compile_graphs(model, dynamic=True, memory_budget=0.7, codec="auto", check="lint")
    for rows in (8, 12):
        got, want = run(graphs, model, [tokens(rows)], mark=0), run_double(model, [tokens(rows)])
        assert_same(got, want, 0.05)


class Patches(nn.Module):
    """A patch embedding before the layers, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Conv2d(3, WIDTH, 4, 4), model_of()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(self.embed(x).flatten(2).transpose(1, 2))
        return out


def test_a_convolution_is_not_run_again() -> None:
    """Its scratch memory is not known: recomputed at the end of the backward pass it can be the peak of the step."""
    model, x = Patches(), torch.randn(8, 3, 32, 32)
    graphs = compile_graphs(model, memory_budget=0.08, codec="auto", check="lint")
    graphs(x).sum().backward()
    assert graphs.rewritten("recompute_saved")
    again = [n for n in graphs.chosen.backward.graph.nodes if n.target is torch.ops.aten.convolution.default]
    assert not again
