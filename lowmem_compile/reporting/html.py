"""The report as one self-contained HTML page: no network, no other file, readable without JavaScript."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lowmem_compile.reporting import charts, summary, units
from lowmem_compile.reporting.curve import budget_curve
from lowmem_compile.reporting.model import CONTENDERS, KINDS, GraphReport, Report
from lowmem_compile.reporting.summary import SiteGroup

KIND_NOTES = {
    "activation": "what a layer computed on the way forward",
    "statistic": "mean and spread of a norm, log-sum of a softmax",
    "mask": "which elements a dropout or a comparison let through",
    "weight copy": "a cast or transposed copy of a parameter",
    "index": "positions, token ids",
    "rng": "the state of the random generator",
}
GLOSSARY = {
    "Saved tensor": (
        "A result of the forward pass that stays in memory because the backward pass needs it to compute a "
        "gradient. For most models in training, saved tensors are the largest part of the memory."
    ),
    "Peak": (
        "The most bytes alive at any moment of a step. It decides whether a step fits into memory, and it is "
        "usually reached where the forward pass ends and the backward pass begins."
    ),
    "Recompute": (
        "To compute a value a second time in the backward pass, from something smaller that is kept "
        "anyway, in place of keeping it. It costs time and frees memory."
    ),
    "Exact, other rounding, approximate": (
        "How a rewrite treats gradients. Exact: the same bits. Other rounding: the same mathematics in "
        "another order, so the last digits differ. Approximate: a gradient that is close but not the same. "
        "The forward result is never approximated."
    ),
}


def render_html(report: Report, *, title: str = "lowmem report") -> str:
    """Return the report as one HTML document that loads nothing.

    Names from the model are escaped, characters in them that do not print are spelt out, and the page's
    content policy lets the browser run only the page's own script.
    """
    pages = environment()
    script = pages.get_template("report.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return pages.get_template("report.html.j2").render(
        title=title,
        script=Markup(script),  # noqa: S704 - our own file, without variables
        script_hash=digest,
        report=report,
        headline=summary.headline(report),
        graphs=[_graph_view(graph, number) for number, graph in enumerate(report.graphs)],
        glossary=GLOSSARY,
    )


def write_html(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write `render_html(report)` to `path` as UTF-8, replacing a file that is there, and return the path."""
    target = Path(path)
    target.write_text(render_html(report), encoding="utf-8")
    return target


@cache
def environment() -> Environment:
    """The templates of the pages, with the filters that they use."""
    pages = Environment(
        loader=PackageLoader("lowmem_compile.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    pages.filters.update(
        bytes=units.format_bytes,
        exact=units.exact_bytes,
        shape=units.format_shape,
        seconds=units.format_seconds,
        kind_class=charts.kind_class,
        breakable=_breakable,
        short_source=_short_source,
    )
    pages.globals.update(
        change=units.format_change,
        plural=units.plural,
        names=summary.CONTENDER_NAMES,
        numerics=summary.NUMERICS_NAMES,
        no_module=summary.NO_MODULE,
        inference_note=summary.inference_note(),
    )
    return pages


def _finalize(value: Any) -> Any:
    """Spell out what does not print in every string that enters the page, save in finished markup."""
    return units.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _breakable(name: str) -> Markup:
    """Return a dotted or slashed name that a browser may break after its separators."""
    return Markup(re.sub(r"([./_:])(?=[^./_:])", r"\1<wbr>", str(escape(units.visible(name)))))  # noqa: S704


def _short_source(source: str) -> str:
    """Return "modeling_bert.py:155" for a source with folders."""
    return re.split(r"[/\\]", source)[-1] or source


def _graph_view(graph: GraphReport, number: int) -> dict[str, Any]:
    """Return what the template needs of one graph beyond the graph itself."""
    groups = summary.group_sites(graph)
    rewritten = [group for group in groups if group.action == "rewritten"]
    shown = summary.measured(graph)
    kept = graph.saved.get("lowmem", ())
    present = {tensor.kind for tensors in graph.saved.values() for tensor in tensors}
    return {
        "graph": graph,
        "anchor": f"graph-{number}",
        "name": summary.graph_name(graph),
        "note": "" if graph.has_figures else summary.no_figures_note(graph),
        "bars": charts.saved_bars(graph),
        "timeline": charts.memory_timeline(graph),
        "peaks": summary.peaks_note(graph),
        "curve": budget_curve(graph),
        "legend": [(kind, KIND_NOTES[kind]) for kind in KINDS if kind in present],
        "contenders": [(name, graph.saved_bytes(name), graph.peak_point(name)) for name in shown],
        "kept": list(summary.bytes_by(kept, "kind", "decision").items()),
        "changes": summary.change_by_kind(graph),
        "gone": sorted((g for g in rewritten if g.saved_bytes > 0), key=lambda g: -g.saved_bytes),
        "prepared": [group for group in rewritten if group.saved_bytes <= 0],
        "left": sorted((g for g in groups if g.action != "rewritten"), key=_weight),
        "layers": _layers(graph),
        "tensors": [(name, summary.group_by_layer(graph.saved[name])) for name in _DETAIL_ORDER if graph.saved.get(name)],
        "groups": groups,
        "gradients": summary.gradients_note([graph]),
    }


_DETAIL_ORDER = ("lowmem", "inductor", "one_flag", "eager")


def _weight(group: SiteGroup) -> tuple[bool, int, int]:
    """Sort key of places left alone: failures first, then by bytes, then by number."""
    return group.action != "failed", -group.bytes_before, -len(group.sites)


def _layers(graph: GraphReport) -> list[tuple[str, dict[str, int]]]:
    """Return for each layer the bytes each contender keeps there, layers in the order of the model."""
    totals: dict[str, dict[str, int]] = {}
    for name in CONTENDERS:
        for layer, tensors in summary.group_by_layer(graph.saved.get(name, ())).items():
            totals.setdefault(layer, {})[name] = sum(tensor.nbytes for tensor in tensors)
    return list(totals.items())
