"""A plan as one self-contained HTML page, in the look of the report."""

from __future__ import annotations

import os
from pathlib import Path

from lowmem_compile.memory_plan.result import MemoryPlan
from lowmem_compile.memory_plan.text import heading, layer_rows, off_of, size_of, title_of
from lowmem_compile.reporting import charts
from lowmem_compile.reporting.html import KIND_NOTES, environment
from lowmem_compile.reporting.model import CONTENDERS, KINDS, GraphReport
from lowmem_compile.reporting.summary import largest

MOST_TENSORS = 40


def render_plan(plan: MemoryPlan) -> str:
    """The page: sizes that do not change, a line a contender, bars, timelines, kinds, layers, the largest tensors."""
    drawn = [c for c in plan.contenders if c.name in CONTENDERS]
    graph = GraphReport(
        graph_id="plan",
        mode="training",
        saved={c.name: c.tensors for c in drawn},
        timelines={c.name: c.timeline for c in drawn},
    )
    present = {tensor.kind for c in drawn for tensor in c.tensors}
    return environment().get_template("plan.html.j2").render(
        plan=plan,
        heading=heading(plan),
        names={c.name: title_of(c.name) for c in plan.contenders},
        fits={c.name: (size_of(c.largest_batch), size_of(c.longest_sequence)) for c in plan.contenders},
        offs={c.name: off_of(c) for c in plan.contenders},
        bars=charts.saved_bars(graph),
        timeline=charts.memory_timeline(graph),
        legend=[(kind, KIND_NOTES[kind]) for kind in KINDS if kind in present],
        kinds=[kind for kind in KINDS if any(c.by_kind.get(kind) for c in plan.contenders)],
        layers=layer_rows(plan),
        tensors={c.name: largest(c.tensors, MOST_TENSORS) for c in plan.contenders if c.name != "eager"},
    )  # fmt: skip


def write_plan(plan: MemoryPlan, path: str | os.PathLike[str]) -> Path:
    """Write the page to ``path`` as UTF-8, replacing a file that is there, and return the path."""
    target = Path(path)
    target.write_text(render_plan(plan), encoding="utf-8")
    return target
