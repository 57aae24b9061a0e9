"""The report as plain ASCII-framed text for a terminal or a log."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby

from lowmem_compile.reporting.model import ACTIONS, GraphReport, Report
from lowmem_compile.reporting.summary import (
    CONTENDER_NAMES,
    NUMERICS_NAMES,
    SiteGroup,
    change_by_kind,
    gradients_note,
    graph_name,
    group_sites,
    headline,
    inference_note,
    largest,
    measured,
    no_figures_note,
    peaks_note,
)
from lowmem_compile.reporting.units import (
    format_bytes,
    format_change,
    format_seconds,
    format_shape,
    plural,
    visible,
)


def render_text(report: Report, *, width: int = 100, top: int = 10) -> str:
    """Return the report as text, without colour and with no newline at the end.

    Sentences are wrapped at `width` columns; table rows are never cut. `top` is how many rows of the
    largest saved tensors to list for each graph; tensors alike in all layers are one row. Characters in names
    that do not print are spelt out.
    """
    lines = [headline(report)]
    if report.training_graphs and any(graph.sites for graph in report.graphs):
        lines.append(f"Gradients: {', '.join(gradients_note(report.graphs))}.")
    for graph in report.graphs:
        lines += ["", *_graph(graph, width, top)]
    return "\n".join(visible(line).rstrip() for line in lines)


def _graph(graph: GraphReport, width: int, top: int) -> list[str]:
    title = f"{graph_name(graph)} ({graph.mode}{', from the compile cache' if graph.from_cache else ''})"
    lines = [title, "-" * len(title)]
    if graph.mode == "inference":
        lines += _wrap(inference_note(), width, "  ")
    elif not graph.has_figures:
        lines += _wrap(no_figures_note(graph), width, "  ")
    note = peaks_note(graph)
    lines += (
        _comparison(graph)
        + (["", *_wrap(note, width, "  ")] if note else [])
        + _sites(graph, width)
        + _tensors(graph, top)
        + _passes(graph)
    )
    if graph.dump_dir is not None:
        lines += ["", f"  Graph dumps: {graph.dump_dir}"]
    return lines


def _comparison(graph: GraphReport) -> list[str]:
    rows = []
    for name in measured(graph):
        kept, peak = graph.saved_bytes(name), graph.peak(name)
        against = _against(kept, graph.saved_bytes("inductor"), name)
        against += _against(peak, graph.peak("inductor"), name)
        rows.append([CONTENDER_NAMES[name], *against])
    if not rows:
        return []
    changes = [
        f"{kind} {'-' if after < before else '+'}{format_bytes(abs(after - before))}"
        for kind, before, after in change_by_kind(graph)
    ]
    head = ["", "kept for backward", "vs Inductor", "simulated peak", "vs Inductor"]
    lines = ["", *_table([head, *rows], right=(1, 2, 3, 4))]
    return [*lines, "", f"  lowmem against Inductor, by kind: {', '.join(changes)}"] if changes else lines


def _against(value: int | None, base: int | None, name: str) -> list[str]:
    if value is None:
        return ["not measured", ""]
    change = "" if base is None or name == "inductor" else format_change(value, base)
    return [format_bytes(value), change]


def _sites(graph: GraphReport, width: int) -> list[str]:
    if not graph.sites:
        return ["", "  Sites: none; no pass found anything to rewrite."] if graph.passes else []
    counts = ", ".join(f"{graph.count(action)} {action}" for action in ACTIONS if graph.count(action))
    lines = ["", f"  Sites: {counts}"]
    for name, groups in groupby(group_sites(graph), key=lambda group: group.pass_name):
        lines += ["", f"  {name}"]
        for group in groups:
            lines += _site_group(group, width)
    return lines


def _site_group(group: SiteGroup, width: int) -> list[str]:
    rewritten = group.action == "rewritten"
    notes = [group.outcome] if group.outcome else []
    if rewritten:
        notes.append(f"gradients {NUMERICS_NAMES[group.numerics]}")
    title = f"{group.code} {group.meaning.title}" + (f" ({', '.join(notes)})" if notes else "")
    lines = [f"    {len(group.sites):>4} {group.action:<9} {title}"]
    indent = " " * 19
    modules = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in group.modules)
    lines += _wrap(f"at {modules}", width, indent)
    if not rewritten:
        for reason, count in group.reasons[:3]:
            lines += _wrap(f"why: {reason}" + (f" ({count} sites)" if count > 1 else ""), width, indent)
        if len(group.reasons) > 3:
            lines.append(f"{indent}and {plural(len(group.reasons) - 3, 'other reason')}")
        if group.meaning.way_out:
            lines += _wrap(f"way out: {group.meaning.way_out}", width, indent)
    return lines


def _tensors(graph: GraphReport, top: int) -> list[str]:
    tensors = graph.saved.get("lowmem", ())
    shown = largest(tensors, top)
    if not shown:
        return []
    rows = [["bytes", "tensors", "kind", "kept as", "dtype", "shape", "module", "source"]]
    for alike in shown:
        one = alike.tensors[0]
        row = [format_bytes(alike.nbytes), str(len(alike.tensors)), one.kind, one.decision, one.dtype]
        row += [format_shape(one.shape), alike.module, one.source or "(no source line)"]
        rows.append(row)
    count = sum(len(alike.tensors) for alike in shown)
    title = f"  Largest tensors lowmem keeps for the backward pass ({count} of {len(tensors)})"
    return ["", title, *_table(rows, right=(0, 1))]


def _passes(graph: GraphReport) -> list[str]:
    if not graph.passes:
        return []
    total = sum(run.seconds for run in graph.passes)
    slowest = max(graph.passes, key=lambda run: run.seconds)
    line = f"  Passes: {len(graph.passes)} in {format_seconds(total)}"
    return ["", f"{line}, the slowest {slowest.name} in {format_seconds(slowest.seconds)}"]


def _table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    cells = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  " + "  ".join(f"{cell:{'>' if i in right else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in cells
    ]


def _wrap(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        visible(text),
        max(width, len(indent) + 30),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
