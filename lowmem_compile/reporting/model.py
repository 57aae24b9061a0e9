"""The report's data: what was kept for the backward pass, where, and what each pass did about it.

Everything here is a frozen dataclass of strings, integers and floats. It needs neither torch nor a graph, so
a report can be written by one process and read by another. Bytes are plain integers; shapes are tuples whose
symbolic sizes are strings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lowmem_compile.reporting._json import JsonRecord, plain

Kind = Literal["activation", "statistic", "mask", "weight copy", "index", "rng"]
Action = Literal["rewritten", "declined", "failed"]
Numerics = Literal["exact", "reassociated", "approximate"]
Phase = Literal["forward", "backward"]
Mode = Literal["training", "inference"]
Contender = Literal["eager", "inductor", "one_flag", "lowmem"]

KINDS: tuple[Kind, ...] = get_args(Kind)
ACTIONS: tuple[Action, ...] = get_args(Action)
NUMERICS: tuple[Numerics, ...] = get_args(Numerics)
CONTENDERS: tuple[Contender, ...] = get_args(Contender)
PHASES: tuple[Phase, ...] = get_args(Phase)
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class SavedTensor(JsonRecord):
    """One storage kept alive from the forward to the backward pass; parameters and buffers are not listed.

    `nbytes` is the size of the storage, with hints in place of symbolic sizes. A storage kept through several
    views is listed once. `decision` says in words how it is kept: "exact", "2-bit codes", "1-bit mask", ...
    `source` is "file.py:line" or empty; `module` is the dotted path of the module, or empty.
    """

    name: str
    op: str
    shape: tuple[int | str, ...]
    dtype: str
    nbytes: int
    module: str
    source: str
    kind: Kind
    decision: str

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _natural("nbytes", self.nbytes)


@dataclass(frozen=True, slots=True)
class Site(JsonRecord):
    """One place a pass looked at, and what came of it.

    `code` is a stable identifier explained in `lowmem_compile.reporting.codes`; `reason` says it
    of this place. `bytes_before` and `bytes_after` are what the place keeps for the backward pass, both zero
    where that is not known.
    """

    pass_name: str
    module: str
    source: str
    action: Action
    code: str
    reason: str
    numerics: Numerics
    bytes_before: int
    bytes_after: int

    def __post_init__(self) -> None:
        _one_of("action", self.action, ACTIONS)
        _one_of("numerics", self.numerics, NUMERICS)
        _natural("bytes_before", self.bytes_before)
        _natural("bytes_after", self.bytes_after)

    @property
    def saved_bytes(self) -> int:
        """Bytes this place no longer keeps; zero unless it was rewritten."""
        return self.bytes_before - self.bytes_after if self.action == "rewritten" else 0


@dataclass(frozen=True, slots=True)
class TimelinePoint(JsonRecord):
    """Bytes alive while the op `label` runs; parameters, buffers, inputs and optimizer state not counted."""

    label: str
    phase: Phase
    live_bytes: int

    def __post_init__(self) -> None:
        _one_of("phase", self.phase, get_args(Phase))
        _natural("live_bytes", self.live_bytes)


@dataclass(frozen=True, slots=True)
class PlannedTensor(JsonRecord):
    """What the planner does with one tensor that crosses from forward to backward.

    `choice` is "exact", a codec or "recompute". `error` is the relative error of the tensor, `gradient_error` what it adds to
    that of the gradient (errors add as squares). `time` is the estimated extra time as a share of the step.
    """

    name: str
    module: str
    source: str
    shape: tuple[int | str, ...]
    dtype: str
    kind: Kind
    choice: str
    bytes_before: int
    bytes_after: int
    error: float
    gradient_error: float
    time: float

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _natural("bytes_before", self.bytes_before)
        _natural("bytes_after", self.bytes_after)


@dataclass(frozen=True, slots=True)
class CurvePoint(JsonRecord):
    """One partition of a graph on the curve of bytes, error and time.

    `contender` is "lowmem" (with `memory_budget`) or "inductor" (with `activation_memory_budget`), `budget` the share that was
    asked for, None for the default. `error` is the estimated relative error of the gradient, `time` the estimated extra time as a
    share of Inductor's step, by one model for both.
    """

    contender: Contender
    budget: float | None
    saved: int
    peak: int
    error: float
    time: float

    def __post_init__(self) -> None:
        _one_of("contender", self.contender, CONTENDERS)
        _natural("saved", self.saved)
        _natural("peak", self.peak)


@dataclass(frozen=True, slots=True)
class PassRun(JsonRecord):
    """One run of one pass over one graph. `seconds` is wall time; `ops_*` count the graph's calls."""

    name: str
    stage: str
    numerics: Numerics
    seconds: float
    matched: int
    rewritten: int
    declined: int
    ops_before: int
    ops_after: int

    def __post_init__(self) -> None:
        _one_of("numerics", self.numerics, NUMERICS)
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ValueError(f"seconds={self.seconds!r}: expected a finite number that is not negative")
        for name in ("matched", "rewritten", "declined", "ops_before", "ops_after"):
            _natural(name, getattr(self, name))


@dataclass(frozen=True, slots=True)
class GraphReport(JsonRecord):
    """All that is known of one compiled graph.

    The keys of `saved` and `timelines` are contenders: "eager", "inductor", "one_flag" (Inductor with
    `ban_recompute_materialized_backward=False`) and "lowmem". A contender that was not measured is absent. A
    timeline is in the order of execution, the forward pass before the backward pass. `planned` is filled where a budget
    was given or the curve was asked for, `curve` where it was asked for.

    The timeline of a contender in `estimated` is that of the code Inductor generated for it; the value there is the peak in bytes
    that was estimated from the graph before. Other timelines are such estimates. `not_replayed` says why the generated code of
    this compile could not be followed, and is empty otherwise. Graphs with the same `frame` are variants of one another, compiled
    for other inputs or settings.
    """

    graph_id: str
    mode: Mode
    sites: tuple[Site, ...] = ()
    saved: Mapping[str, tuple[SavedTensor, ...]] = field(default_factory=dict)
    timelines: Mapping[str, tuple[TimelinePoint, ...]] = field(default_factory=dict)
    passes: tuple[PassRun, ...] = ()
    dump_dir: str | None = None
    from_cache: bool = False
    planned: tuple[PlannedTensor, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    estimated: Mapping[str, int] = field(default_factory=dict)
    not_replayed: str = ""
    frame: str = ""

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, get_args(Mode))
        for key in (*self.saved, *self.timelines, *self.estimated):
            _one_of("contender", key, CONTENDERS)
        for key, points in self.timelines.items():
            phases = [point.phase for point in points]
            if phases != sorted(phases, key=get_args(Phase).index):
                raise ValueError(f"timelines[{key!r}]: a forward point comes after a backward point")

    def saved_bytes(self, contender: str) -> int | None:
        """Bytes `contender` keeps for the backward pass, or None where that was not measured."""
        _one_of("contender", contender, CONTENDERS)
        tensors = self.saved.get(contender)
        return None if tensors is None else sum(tensor.nbytes for tensor in tensors)

    def peak_point(self, contender: str) -> TimelinePoint | None:
        """The first point at which `contender` has the most bytes alive, or None without a timeline."""
        _one_of("contender", contender, CONTENDERS)
        return max(self.timelines.get(contender, ()), key=lambda point: point.live_bytes, default=None)

    def peak(self, contender: str) -> int | None:
        """The most bytes `contender` has alive at once, or None without a timeline."""
        point = self.peak_point(contender)
        return None if point is None else point.live_bytes

    def count(self, action: Action) -> int:
        """How many sites ended in `action`."""
        _one_of("action", action, ACTIONS)
        return sum(site.action == action for site in self.sites)

    @property
    def has_figures(self) -> bool:
        """Whether anything was measured or looked at; false for a bare result out of a cache."""
        return bool(self.saved or self.timelines or self.sites or self.passes)


@dataclass(frozen=True, slots=True)
class Report(JsonRecord):
    """What the backend did since it was asked to keep a report: one entry per compiled graph.

    Values in `options` and `versions` that JSON cannot hold are kept as their `str`. `schema` counts the
    incompatible changes of this format.
    """

    graphs: tuple[GraphReport, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema={self.schema!r}: this version reads reports of schema {SCHEMA} only")
        object.__setattr__(self, "options", plain(self.options))
        object.__setattr__(self, "versions", plain(self.versions))

    @property
    def training_graphs(self) -> tuple[GraphReport, ...]:
        """The graphs that have a backward pass."""
        return tuple(graph for graph in self.graphs if graph.mode == "training")

    def saved_bytes(self, contender: str) -> int | None:
        """Bytes kept for the backward pass, summed over the graphs that measured it; None without any.

        The sum is what is alive at once where all graphs run in one step. Recompiled variants of one graph
        are alternatives: their sum is an upper bound.
        """
        figures = [graph.saved_bytes(contender) for graph in self.training_graphs]
        known = [figure for figure in figures if figure is not None]
        return sum(known) if known else None

    def step_peak(self, contender: str) -> int | None:
        """The most bytes `contender` has alive at once in a step that runs all training graphs; None where one has no timeline.

        The graphs run forward in their order, and backward in reverse. While one runs, those before it keep what they saved,
        and those whose backward pass has ended keep their gradients. Of the recompiled variants of a graph the one of the highest
        peak counts. A graph that runs several times in a step counts once.
        """
        frames: dict[str, GraphReport] = {}
        for graph in self.training_graphs:
            if not graph.timelines.get(contender):
                return None
            name = graph.frame or graph.graph_id
            if name not in frames or (graph.peak(contender) or 0) > (frames[name].peak(contender) or 0):
                frames[name] = graph
        timelines = [graph.timelines[contender] for graph in frames.values()]
        if not timelines:
            return None
        phases = [{phase: [p.live_bytes for p in t if p.phase == phase] for phase in PHASES} for t in timelines]
        kept = [phase["forward"][-1] if phase["forward"] else 0 for phase in phases]
        left = [phase["backward"][-1] if phase["backward"] else 0 for phase in phases]
        highest = 0
        for i, phase in enumerate(phases):
            forward = sum(kept[:i]) + max(phase["forward"], default=0)
            backward = sum(kept[:i]) + sum(left[i + 1 :]) + max(phase["backward"], default=0)
            highest = max(highest, forward, backward)
        return highest

    def count(self, action: Action) -> int:
        """How many sites of all graphs ended in `action`."""
        return sum(graph.count(action) for graph in self.graphs)


def _one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {list(allowed)}")


def _natural(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name}={value!r}: expected a number that is not negative")
