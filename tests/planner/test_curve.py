"""The report of a plan: a row a tensor, and lowmem's curve beside Inductor's."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lowmem_compile import explain
from lowmem_compile.reporting import Report, render_html
from lowmem_compile.reporting.curve import budget_curve
from lowmem_compile.reporting.model import CurvePoint

WIDTH = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


@pytest.fixture(scope="module")
def report() -> Report:
    model = nn.Sequential(Block(), Block())
    return explain(model, torch.randn(8, 64, WIDTH, requires_grad=True), curve=True)


def test_rows_add_up_to_what_is_kept(report: Report) -> None:
    (graph,) = report.graphs
    assert graph.planned
    assert sum(row.bytes_after for row in graph.planned) == graph.saved_bytes("lowmem")
    coded = [row for row in graph.planned if row.choice == "int8"]
    assert coded
    assert all(0.004 < row.error < 0.01 and row.bytes_after < 0.3 * row.bytes_before for row in coded)
    default = next(p for p in graph.curve if p.contender == "lowmem" and p.budget is None)
    assert default.error == pytest.approx(sum(row.gradient_error**2 for row in graph.planned) ** 0.5)


def test_the_curve(report: Report) -> None:
    (graph,) = report.graphs
    inductor = [p for p in graph.curve if p.contender == "inductor"]
    lowmem = [p for p in graph.curve if p.contender == "lowmem" and p.budget is not None]
    default = next(p for p in inductor if p.budget is None)
    assert default.saved == graph.saved_bytes("inductor")
    assert default.time == 0
    assert min(p.saved for p in inductor) < default.saved
    assert max(p.time for p in inductor) > 0  # it recomputes
    assert all(p.error == 0 for p in inductor)
    assert len(lowmem) >= 3
    assert all(p.saved <= p.budget * default.saved for p in lowmem if p.budget is not None)
    assert [p.saved for p in lowmem] == sorted((p.saved for p in lowmem), reverse=True)
    assert all(0 <= p.error < 0.2 for p in lowmem)


def test_the_page_shows_both_and_json_keeps_them(report: Report) -> None:
    again = Report.from_json(report.to_json())
    assert again.graphs[0].curve == report.graphs[0].curve
    assert again.graphs[0].planned == report.graphs[0].planned
    page = render_html(report)
    assert "The plan" in page
    assert page.count('class="rung who-lowmem"') == sum(p.contender == "lowmem" for p in report.graphs[0].curve)
    assert page.count('class="rung who-inductor"') == sum(p.contender == "inductor" for p in report.graphs[0].curve)


def test_no_curve_unless_asked_for() -> None:
    graph = explain(nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.randn(4, 8)).graphs[0]
    assert not graph.curve
    assert not graph.planned
    assert "The plan" not in render_html(Report((graph,)))


def test_points_in_one_place_share_a_label(report: Report) -> None:
    def point(budget: float | None, saved: int, time: float) -> CurvePoint:
        return CurvePoint("lowmem", budget, saved, saved, 0.0, time)

    curve = (point(0.5, 1000, 0.1), point(None, 400, 0.3), point(0.25, 398, 0.3), point(0.1, 100, 0.6))
    drawing = budget_curve(replace(report.graphs[0], curve=curve))
    labels = re.findall(r'<g class="rung who-lowmem">.*?<text[^>]*>([^<]*)</text>', drawing)
    assert labels == ["lowmem 0.5", "default, 0.25", "", "0.1"]
