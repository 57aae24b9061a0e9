"""``lowmem_compile.explain`` and ``lowmem_compile.report`` on compiled models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowmem_compile
from lowmem_compile.errors import OptionError, ReportError
from lowmem_compile.reporting.model import Report
from tests.helpers import compile_graphs

D, WIDE, ROWS = 16, 64, 12


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, WIDE), nn.GELU(), nn.Linear(WIDE, D).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


def test_explain_is_a_dry_run() -> None:
    model, x = Mlp(), torch.randn(ROWS, D)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = lowmem_compile.explain(model, x)
    assert isinstance(report, Report)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    (graph,) = report.graphs
    assert graph.mode == "training"
    assert set(graph.saved) == set(graph.timelines) == {"eager", "inductor", "one_flag", "lowmem"}
    sizes = {name: sum(t.nbytes for t in rows) for name, rows in graph.saved.items()}
    assert sizes["lowmem"] == ROWS * WIDE * 6 // 8 + 4 * ROWS  # slopes of 6 bits
    assert sizes["eager"] == sizes["inductor"] == ROWS * WIDE * 4
    (site,) = [s for s in graph.sites if s.pass_name == "approximate_activation"]
    assert (site.action, site.code, site.module, site.numerics) == (
        "rewritten",
        "LM100",
        "act",
        "approximate",
    )
    assert "test_report_of_models.py:" in site.source
    assert site.bytes_before - site.bytes_after == ROWS * WIDE * 4 - sizes["lowmem"]
    with pytest.raises(ReportError):
        lowmem_compile.report(model)


def test_explain_takes_options_and_keywords() -> None:
    model, x = Mlp(), torch.randn(ROWS, D)
    report = lowmem_compile.explain(model, x=x, options={"gradients": "exact"})
    assert [s.code for s in report.graphs[0].sites if s.pass_name == "approximate_activation"] == ["LM201"]
    with pytest.raises(OptionError, match="gradients"):
        lowmem_compile.explain(model, x, options={"gradient": "exact"})


def test_the_report_of_a_compiled_model_is_the_explanation() -> None:
    model, x = Mlp(), torch.randn(ROWS, D)
    explained = lowmem_compile.explain(model, x)
    graphs = compile_graphs(model, report=True)
    graphs(x).sum().backward()
    reported = lowmem_compile.report(model)
    assert [g.saved for g in reported.graphs] == [g.saved for g in explained.graphs]
    assert [g.sites for g in reported.graphs] == [g.sites for g in explained.graphs]


def test_each_model_has_its_own_report() -> None:
    first, second, x = Mlp(), Mlp(), torch.randn(ROWS, D)
    for model in (first, second):
        compile_graphs(model, report=True)(x).sum().backward()
    assert len(lowmem_compile.report(first).graphs) == 1
    assert len(lowmem_compile.report().graphs) == 2


def test_an_inference_report_says_so() -> None:
    model, x = Mlp(), torch.randn(ROWS, D)
    with torch.no_grad():
        compile_graphs(model, report=True)(x)
    assert [g.mode for g in lowmem_compile.report(model).graphs] == ["inference"]


def test_a_report_of_what_was_not_compiled_is_refused() -> None:
    with pytest.raises(ReportError, match="Call it once"):
        lowmem_compile.report(Mlp())


def test_without_the_option_no_tensors_are_listed() -> None:
    model = Mlp()
    compile_graphs(model, report=False)(torch.randn(ROWS, D)).sum().backward()
    (graph,) = lowmem_compile.report(model).graphs
    assert graph.saved == {}
    assert [s.code for s in graph.sites] == ["LM100"]


def test_saved_tensors_name_module_and_line() -> None:
    model = Mlp()
    report = lowmem_compile.explain(model, torch.randn(ROWS, D), options={"gradients": "exact"})
    (row,) = report.graphs[0].saved["lowmem"]
    assert (row.shape, row.dtype, row.nbytes, row.module) == ((ROWS, WIDE), "float32", ROWS * WIDE * 4, "up")
    assert "test_report_of_models.py:" in row.source


def test_the_baseline_is_counted_under_the_callers_autocast() -> None:
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    x = torch.randn(32, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        report = lowmem_compile.explain(model, x, options={"strict": True})
    baseline = report.graphs[0].saved["inductor"]
    assert any(t.dtype == "bfloat16" for t in baseline), [t.dtype for t in baseline]
