"""What both renderings say: the headline, and the groups that sites, tensors and modules are shown in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from lowmem_compile.reporting.codes import Reason, explain_code
from lowmem_compile.reporting.model import (
    ACTIONS,
    CONTENDERS,
    KINDS,
    NUMERICS,
    GraphReport,
    Numerics,
    Report,
    SavedTensor,
    Site,
)
from lowmem_compile.reporting.units import format_bytes, format_change, plural

CONTENDER_NAMES: Final = {
    "eager": "eager PyTorch",
    "inductor": "Inductor",
    "one_flag": "Inductor, one flag",
    "lowmem": "lowmem",
}
NUMERICS_NAMES: Final = {
    "exact": "exact",
    "reassociated": "other rounding",
    "approximate": "approximate",
}
NO_MODULE: Final = "(no module)"


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """The sites of one pass that ended the same way for the same reason."""

    pass_name: str
    action: str
    code: str
    meaning: Reason
    sites: tuple[Site, ...]

    @property
    def bytes_before(self) -> int:
        """What the sites kept before, in bytes."""
        return sum(site.bytes_before for site in self.sites)

    @property
    def bytes_after(self) -> int:
        """What the sites keep now, in bytes."""
        return sum(site.bytes_after for site in self.sites)

    @property
    def saved_bytes(self) -> int:
        """What the sites no longer keep, in bytes."""
        return sum(site.saved_bytes for site in self.sites)

    @property
    def outcome(self) -> str:
        """What became of the bytes: "60.0 MiB became 3.75 MiB", or "60.0 MiB freed" where nothing is left."""
        if self.saved_bytes and self.bytes_after:
            return f"{format_bytes(self.bytes_before)} became {format_bytes(self.bytes_after)}"
        if self.saved_bytes:
            return f"{format_bytes(self.saved_bytes)} freed"
        return format_bytes(self.bytes_before) if self.bytes_before else ""

    @property
    def numerics(self) -> Numerics:
        """The loosest numerics class among the sites."""
        return max((site.numerics for site in self.sites), key=NUMERICS.index)

    @property
    def modules(self) -> tuple[tuple[str, int], ...]:
        """The modules of the sites, numbered ones drawn together; see `collapse_modules`."""
        return collapse_modules(site.module for site in self.sites)

    @property
    def reasons(self) -> tuple[tuple[str, int], ...]:
        """The distinct reasons with their counts, the most frequent first."""
        return tuple(Counter(site.reason for site in self.sites if site.reason).most_common())


def headline(report: Report) -> str:
    """Return in one sentence what the report comes to."""
    training = report.training_graphs
    if not report.graphs:
        return "No graph was compiled, so there is nothing to report."
    if not training:
        return "Nothing was compiled for training, so nothing is kept for a backward pass."
    compared = [graph for graph in training if "lowmem" in graph.saved]
    if not compared:
        where = "came from the compile cache and carry" if any(g.from_cache for g in training) else "carry"
        return f"The compiled training graphs {where} no figures."
    over = f"Over {plural(len(compared), 'training graph')}, " if len(compared) > 1 else ""
    lowmem = _total(compared, "lowmem")
    kept = f"{over}lowmem keeps {format_bytes(lowmem)} for the backward pass"
    for rival, name in (("inductor", "Inductor"), ("eager", "eager PyTorch")):
        if all(rival in graph.saved for graph in compared):
            return f"{kept}{_than(lowmem, _total(compared, rival), name)}."
    return f"{kept}."


def _than(lowmem: int, rival: int, name: str) -> str:
    if lowmem == rival:
        return f", the same as {name} would"
    only = "only " if rival < lowmem else ""
    change = format_change(lowmem, rival)
    return f"; {name} would keep {only}{format_bytes(rival)}" + (f" ({change})" if change else "")


def _total(graphs: Iterable[GraphReport], contender: str) -> int:
    return sum(graph.saved_bytes(contender) or 0 for graph in graphs)


def graph_name(graph: GraphReport) -> str:
    """Return what to call a graph: "graph 0" for the identifiers "0" and "graph_0" alike."""
    prefix, _, number = graph.graph_id.rpartition("graph_")
    return f"graph {number if not prefix else graph.graph_id}"


def no_figures_note(graph: GraphReport) -> str:
    """Return why a graph shows nothing, and what to do about it."""
    if graph.from_cache:
        return (
            "This graph came from the compile cache, so it was not looked at again and there are no figures. "
            "To see them, compile once with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1."
        )
    return "Nothing was recorded for this graph."


def inference_note() -> str:
    """Return why a graph without gradients has no savings."""
    return "This graph computes no gradients. Nothing has to wait for a backward pass, so there is nothing for lowmem to save."


def gradients_note(graphs: Iterable[GraphReport]) -> tuple[str, str]:
    """Return how exact the gradients are, in a word or two, and where: ("approximate", "at 5 places")."""
    rewritten = [site for graph in graphs for site in graph.sites if site.action == "rewritten"]
    counts = Counter(site.numerics for site in rewritten)
    if counts["approximate"]:
        return "approximate", f"at {plural(counts['approximate'], 'place')}"
    if counts["reassociated"]:
        return "exact up to rounding", f"at {plural(counts['reassociated'], 'place')}"
    return "exact", "no rewrite changed them"


def peaks_note(graph: GraphReport) -> str:
    """Return where the peaks come from: the generated code, for some contenders, or the graph alone."""
    known = [name for name in CONTENDERS if name in graph.estimated and graph.peak(name) is not None]
    if known:
        figures = ", ".join(f"{CONTENDER_NAMES[n]} {format_bytes(graph.peak(n) or 0)}" for n in known)
        before = ", ".join(format_bytes(graph.estimated[n]) for n in known)
        return f"Peaks by the generated code: {figures} (estimated before: {before}). Other peaks are estimates."
    return f"The generated code was not followed: {graph.not_replayed}. Peaks are estimates." if graph.not_replayed else ""


def measured(graph: GraphReport) -> tuple[str, ...]:
    """Return the contenders with saved tensors or a timeline, in the order they are shown."""
    return tuple(name for name in CONTENDERS if name in graph.saved or graph.timelines.get(name))


def group_sites(graph: GraphReport) -> tuple[SiteGroup, ...]:
    """Return the sites by pass, action and code: passes in their order, then by action, then by bytes."""
    order = list(dict.fromkeys([run.name for run in graph.passes] + [site.pass_name for site in graph.sites]))
    groups: dict[tuple[str, str, str], list[Site]] = {}
    for site in graph.sites:
        groups.setdefault((site.pass_name, site.action, site.code), []).append(site)
    found = [SiteGroup(*key, explain_code(key[2], key[0]), tuple(sites)) for key, sites in groups.items()]
    return tuple(sorted(found, key=lambda g: (order.index(g.pass_name), ACTIONS.index(g.action), -g.bytes_before, g.code)))


@dataclass(frozen=True, slots=True)
class Alike:
    """Saved tensors that differ in nothing but the index of their layer."""

    module: str
    tensors: tuple[SavedTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors)


def largest(tensors: Sequence[SavedTensor], count: int) -> tuple[Alike, ...]:
    """Return the `count` largest groups of alike tensors, most bytes first; equal sizes in graph order."""
    groups: dict[tuple[object, ...], list[SavedTensor]] = {}
    for t in tensors:
        family = tuple(None if _is_index(part) else part for part in t.module.split("."))
        key = (family, t.op, t.shape, t.dtype, t.nbytes, t.source, t.kind, t.decision)
        groups.setdefault(key, []).append(t)
    alike = [Alike(collapse_modules(t.module for t in group)[0][0], tuple(group)) for group in groups.values()]
    return tuple(sorted(alike, key=lambda group: -group.nbytes)[:count])


def bytes_by(tensors: Sequence[SavedTensor], *fields: str) -> dict[tuple[str, ...], int]:
    """Return the bytes by the values of `fields`, most bytes first."""
    totals: Counter[tuple[str, ...]] = Counter()
    for tensor in tensors:
        totals[tuple(str(getattr(tensor, field)) for field in fields)] += tensor.nbytes
    return dict(totals.most_common())


def change_by_kind(graph: GraphReport) -> tuple[tuple[str, int, int], ...]:
    """Return (kind, bytes Inductor keeps, bytes lowmem keeps) where they differ, most bytes gone first.

    The differences add up to that of the totals. Empty where one of the two was not measured.
    """
    if "inductor" not in graph.saved or "lowmem" not in graph.saved:
        return ()
    before, after = (bytes_by(graph.saved[name], "kind") for name in ("inductor", "lowmem"))
    rows = [(kind, before.get((kind,), 0), after.get((kind,), 0)) for kind in KINDS]
    return tuple(sorted((row for row in rows if row[1] != row[2]), key=lambda row: row[2] - row[1]))


def layer_of(module: str) -> str:
    """Return the layer a module belongs to: its path up to the last index that has something below it.

    `encoder.layer.3.attention.self` belongs to `encoder.layer.3`, `layers.1.blocks.0.mlp.2` to
    `layers.1.blocks.0`, `embeddings.LayerNorm` to `embeddings`.
    """
    parts = module.split(".")
    inner = [i for i, part in enumerate(parts[:-1]) if _is_index(part)]
    if inner:
        return ".".join(parts[: inner[-1] + 1])
    return (module if _is_index(parts[-1]) else parts[0]) or NO_MODULE


def group_by_layer(tensors: Sequence[SavedTensor]) -> dict[str, list[SavedTensor]]:
    """Return the tensors by layer, in order of first appearance, largest first within a layer."""
    layers: dict[str, list[SavedTensor]] = {}
    for tensor in tensors:
        layers.setdefault(layer_of(tensor.module), []).append(tensor)
    return {layer: sorted(members, key=lambda t: -t.nbytes) for layer, members in layers.items()}


def collapse_modules(modules: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Draw together modules that differ in an index: six `layer.i.mlp` become (`layer.{0-5}.mlp`, 6).

    Where several indices of a path vary, each is written as `*`.
    """
    families: dict[tuple[str | None, ...], list[str]] = {}
    for module in modules:
        key = tuple(None if _is_index(part) else part for part in module.split("."))
        families.setdefault(key, []).append(module)
    return tuple((_collapse(members), len(members)) for members in families.values())


def _collapse(members: list[str]) -> str:
    columns = list(zip(*(member.split(".") for member in members), strict=True))
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    parts = [column[0] for column in columns]
    for i in varying:
        parts[i] = "*" if len(varying) > 1 else "{" + _ranges(sorted({int(part) for part in columns[i]})) + "}"
    return ".".join(parts) or NO_MODULE


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) < 10


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
