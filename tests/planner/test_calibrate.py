"""options["calibrate"]: what is measured is what happens, decisions follow it, and nothing else changes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from lowmem_compile.errors import OptionError
from lowmem_compile.options import Options
from lowmem_compile.planner.calibrate import Measured, spread
from lowmem_compile.planner.plan import COSINE, Plan
from tests.helpers import Graphs, compile_graphs, run, run_double
from tests.planner.test_plan import WIDTH, model_of, tokens


class Attention(nn.Module):
    """Attention whose scores are ``sharp`` times as large."""

    def __init__(self, sharp: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.sharp = sharp

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(self.sharp * q, self.sharp * k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out.square().mean()


def compiled(model: nn.Module, x: Tensor, **options: Any) -> Graphs:
    graphs = compile_graphs(model, **{"codec": "auto", "check": "lint", "calibrate": True, **options})
    graphs(x)
    return graphs


def plan_of(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor, **options: Any) -> tuple[Plan, Graphs]:
    """The plan of the only graph."""
    from lowmem_compile import partition

    found: list[Plan] = []
    original = partition.plan_for

    def spy(*args: object) -> Plan | None:
        plan = original(*args)  # type: ignore[arg-type]
        found.extend([plan] if plan is not None else [])
        return plan

    monkeypatch.setattr(partition, "plan_for", spy)
    graphs = compiled(model, x, **options)
    (plan,) = found
    return plan, graphs


def test_the_measured_errors_add_up_to_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_of(), tokens()
    loss = nn.Sequential(model, Square())
    plan, _ = plan_of(monkeypatch, loss, x)
    expected = sum(m.error("int8") ** 2 for m in plan.measured.values()) ** 0.5
    graphs = compile_graphs(loss, codec="int8", check="lint")
    got, want = run(graphs, loss, [x]), run_double(loss, [x])
    names = [n for n in want if "weight" in n or "bias" in n]
    error = torch.cat([(got[n].double() - want[n].double()).flatten() for n in names]).norm()
    real = float(error / torch.cat([want[n].double().flatten() for n in names]).norm())
    assert len(plan.measured) >= 9
    assert 0.6 < expected / real < 1.6, (expected, real)


class Square(nn.Module):
    """A loss."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()


@pytest.mark.parametrize("sharp", [1.0, 12.0])
def test_queries_and_keys_take_the_bits_they_need(monkeypatch: pytest.MonkeyPatch, sharp: float) -> None:
    model, x = Attention(sharp), tokens()
    plan, graphs = plan_of(monkeypatch, model, x)
    worst = max(plan.measured.values(), key=lambda m: m.worst)
    assert all(plan.measured[r].cosine(d) >= COSINE for r, d in plan.decisions.items() if d != "exact" and r in plan.measured)
    if sharp == 1.0:
        assert worst.cosine("int8") >= COSINE
        assert {plan.decisions[r] for r in plan.measured} == {"int8"}
    else:
        assert worst.cosine("int8") < COSINE
        wide = [r for r in plan.measured if plan.decisions[r] != "int8"]
        assert wide
        exact = [r for r in wide if plan.decisions[r] == "exact"]
        assert graphs.codes("encode_saved").count("LM221") == len(exact)


def test_with_a_budget_the_plan_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, graphs = plan_of(monkeypatch, nn.Sequential(model_of(), Square()), tokens(), memory_budget=0.25)
    assert plan.for_budget
    assert plan.measured
    codes = {r: d for r, d in plan.decisions.items() if d not in ("exact", "recompute")}
    assert codes
    assert plan.error == pytest.approx(sum(plan.measured[r].error(d) ** 2 for r, d in codes.items()) ** 0.5)
    assert graphs.chosen.saved_bytes() <= 0.25 * graphs.only.partitions["inductor"].saved_bytes()


def test_nothing_else_changes() -> None:
    """Running statistics and random numbers are those of a step without measurement."""
    states = []
    for calibrate in (False, True):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU(), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH))
        x = torch.randn(512, WIDTH)
        graphs = compile_graphs(model, codec="auto", check="lint", calibrate=calibrate)
        graphs(x).square().mean().backward()
        states.append((model.state_dict(), torch.get_rng_state()))
    for name, value in states[0][0].items():
        assert torch.equal(value, states[1][0][name]), name
    assert torch.equal(states[0][1], states[1][1])


class Swapped(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 256), nn.Linear(256, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y.add_(1)
        x.mul_(2)
        out: Tensor = self.second(F.gelu(self.first(x))) * y
        return out


def test_what_cannot_be_measured_says_so() -> None:
    """Two inputs that share memory and are written to become one input of AOTAutograd's graph."""
    base = torch.randn(256, WIDTH)
    graphs = compile_graphs(Swapped(), codec="auto", check="lint", calibrate=True, strict=False)
    with pytest.warns(RuntimeWarning, match="options\\['calibrate'\\]: not measured"):
        graphs(base[:128], base[64:192])
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match="not measured"):
        compile_graphs(Swapped(), codec="auto", check="lint", calibrate=True)(base[:128], base[64:192])


def test_without_it_nothing_is_measured() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Options.from_dict({"calibrate": True, "memory_budget": 0.3})
    for other in ({"codec": "int8"}, {"codec": "none"}, {"gradients": "exact"}):
        with pytest.raises(OptionError, match="calibrate"):
            Options.from_dict({"calibrate": True, **other})


def test_many_tensors_are_sampled() -> None:
    classes = ["a"] * 60 + ["b"] * 3 + ["c"] * 40
    chosen = spread(classes, 48)
    assert len(chosen) <= 50
    assert {0, 59, 60, 62, 63, 102} <= chosen
    assert spread(classes, 200) == set(range(103))


def test_cosine_of_an_error() -> None:
    found = Measured({"int8": 0.01}, gain=2.0, worst=3.0)
    assert found.error("int8") == pytest.approx(0.02)
    assert found.cosine("int8") == pytest.approx(1 - 0.03**2 / 2)
