"""The graphs lowmem compiled in this process, and what is known of each: the source of :func:`lowmem_compile.report`.

When Inductor's caches answer, none of our passes run; the report of the compile that filled the cache is then read from a
JSON file beside Inductor's cache, keyed by the graph and everything that decides the result.
"""

from __future__ import annotations

import hashlib
import logging
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from lowmem_compile._torch import compiled_frame, functorch_config, inductor_cache_dir
from lowmem_compile.errors import ScheduleError
from lowmem_compile.options import Options
from lowmem_compile.pipeline import Recorder
from lowmem_compile.planner.replay import Code, replay
from lowmem_compile.planner.timeline import peak, shortened, simulate
from lowmem_compile.reporting.model import CONTENDERS, GraphReport, Phase, SavedTensor, TimelinePoint
from lowmem_compile.tapped_inputs import with_inputs

log = logging.getLogger(__name__)


@dataclass
class Entry:
    """One compiled graph."""

    graph_id: str
    key: str
    options: Options
    recorder: Recorder
    training: bool
    parameters: list[weakref.ref[torch.Tensor]]
    frames: set[tuple[str, str]]
    eager: tuple[tuple[SavedTensor, ...], tuple[TimelinePoint, ...]] = ((), ())
    graph_report: GraphReport | None = None
    chosen: str = ""
    baseline: Callable[[], dict[str, Any]] | None = None
    """Counts what Inductor would save for the graph as Dynamo captured it, when passes changed it before AOTAutograd."""
    counted: dict[str, Any] | None = None
    codes: dict[Phase, Code | None] = field(default_factory=dict)
    """What Inductor generated, until both graphs are there."""
    user_outputs: int = 0
    frame: str = ""

    def partitioned(self, candidates: Any) -> None:
        """Called by the partitioner: keep the report, and write it beside the cache."""
        self.chosen, self.user_outputs = candidates.chosen, candidates.compiled.num_user_outputs
        if not self.options.report:
            return
        partitions = dict(candidates.partitions)
        partitions["lowmem"] = candidates.compiled
        partitions.update({n: p for n, p in (self.baseline_partitions() or {}).items() if n in CONTENDERS})
        saved = {name: p.saved_tensors() for name, p in partitions.items()}
        kept = candidates.before_codecs.saved_tensors() if candidates.tapped else ()
        timelines = {name: simulate(p) for name, p in partitions.items()}
        estimated = {name: peak(timelines[name]) for name in candidates.schedules}
        timelines.update({name: shortened(points) for name, points in candidates.schedules.items()})
        if self.eager[0]:
            saved["eager"], timelines["eager"] = self.eager
        dump = self.recorder.dump_dir
        self.graph_report = GraphReport(
            graph_id=self.graph_id,
            mode="training",
            sites=with_inputs(self.recorder.sites, candidates.tapped, saved["inductor"], kept),
            saved=saved,
            timelines=timelines,
            passes=tuple(self.recorder.runs),
            dump_dir=None if dump is None else str(dump),
            from_cache=False,
            frame=self.frame,
            planned=candidates.planned,
            curve=candidates.curve,
            estimated=estimated,
            not_replayed=candidates.not_replayed,
        )
        self.write()

    def generated(self, phase: Phase, code: Code | None) -> None:
        """Called when Inductor has generated the code of a graph: with both, the report's timeline is that of the code."""
        self.codes[phase] = code
        if self.graph_report is None or len(self.codes) < 2:
            return
        forward, backward = self.codes["forward"], self.codes["backward"]
        self.codes = {}
        try:
            points = replay(forward, backward, self.user_outputs)
        except ScheduleError as error:
            log.warning("%s: the report's peak stays an estimate: %s", self.graph_id, error)
            self.graph_report = replace(self.graph_report, not_replayed=str(error))
            self.write()
            return
        estimate = peak(self.graph_report.timelines["lowmem"])
        self.graph_report = replace(
            self.graph_report,
            timelines={**self.graph_report.timelines, "lowmem": shortened(points)},
            estimated={**self.graph_report.estimated, "lowmem": self.graph_report.estimated.get("lowmem", estimate)},
        )
        log.info("peak of %s: %d bytes by the generated code, %d estimated", self.graph_id, peak(points), estimate)
        self.write()

    def write(self) -> None:
        """Hand the report to structured tracing, and write it beside the dumps and Inductor's cache."""
        assert self.graph_report is not None
        dump = self.recorder.dump_dir
        text = self.graph_report.to_json()
        self.recorder.trace("lowmem_report", lambda: text)
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)
            (dump / "report.json").write_text(text, encoding="utf-8")
        path = self.sidecar()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def baseline_partitions(self) -> dict[str, Any] | None:
        """What Inductor would save for the graph as captured, counted once; ``None`` where that is the graph at hand."""
        if self.baseline is not None:
            self.counted, self.baseline = self.baseline(), None
        return self.counted

    def report(self) -> GraphReport:
        """The report of this graph; from the file beside the cache if the compile was a cache hit."""
        if self.graph_report is None and self.training and self.sidecar().exists():
            loaded = GraphReport.from_json(self.sidecar().read_text(encoding="utf-8"))
            self.graph_report = replace(loaded, graph_id=self.graph_id, frame=self.frame, from_cache=True)
        if self.graph_report is None:
            return GraphReport(
                graph_id=self.graph_id,
                mode="training" if self.training else "inference",
                sites=tuple(self.recorder.sites),
                passes=tuple(self.recorder.runs),
                from_cache=self.training and self.options.report and not self.chosen,
            )
        return self.graph_report

    def sidecar(self) -> Path:
        """The JSON file of this graph's report."""
        return inductor_cache_dir() / "lowmem" / f"{self.key}.json"

    def belongs_to(self, tensors: set[int], frames: set[tuple[str, str]]) -> bool:
        """Whether this graph reads one of the tensors or was traced from one of the frames."""
        mine = {id(t) for r in self.parameters if (t := r()) is not None}
        return bool(mine & tensors) or bool(self.frames & frames)


ENTRIES: list[Entry] = []


def register(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, identity: str) -> Entry:
    """A new entry for the graph that is about to be compiled."""
    from lowmem_compile.backend import dump_folder

    tensors = [t for t in example_inputs if isinstance(t, torch.Tensor)]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    folder = dump_folder(options)
    graph_id = f"graph_{len(ENTRIES)}"
    entry = Entry(
        graph_id=graph_id,
        key=graph_key(gm, tensors, identity),
        options=options,
        recorder=Recorder(graph_id, None if folder is None else folder / graph_id),
        training=training,
        parameters=[weakref.ref(t) for t in tensors if isinstance(t, torch.nn.Parameter)],
        frames=frames_of(gm.graph),
        frame=compiled_frame(),
    )
    if training and options.report:
        from lowmem_compile.planner.eager import eager_memory

        entry.eager = eager_memory(gm, example_inputs)
    ENTRIES.append(entry)
    return entry


def forget(entry: Entry) -> None:
    """Drop the entry of a graph whose compile did not come to its end."""
    ENTRIES[:] = [e for e in ENTRIES if e is not entry]


def graph_key(gm: fx.GraphModule, tensors: Sequence[torch.Tensor], identity: str) -> str:
    """Hash of the graph, its inputs, the ambient state and our identity."""
    inputs = [(tuple(map(str, t.shape)), str(t.dtype), t.requires_grad, str(t.device)) for t in tensors]
    state = (
        torch.is_autocast_enabled("cpu"),
        str(torch.get_autocast_dtype("cpu")),
        torch.is_autocast_enabled("cuda"),
        str(torch.get_autocast_dtype("cuda")),
        functorch_config.activation_memory_budget,
    )
    return hashlib.sha256(repr((gm.code, inputs, state, identity)).encode()).hexdigest()


_FRAME = re.compile(r'File "([^"]+)", line \d+, in (\S+)')


def frames_of(graph: fx.Graph) -> set[tuple[str, str]]:
    """(file, function) of every user frame in the graph."""
    found: set[tuple[str, str]] = set()
    for node in graph.nodes:
        found.update(_FRAME.findall(node.meta.get("stack_trace") or ""))
    return found


def reset() -> None:
    """Forget everything; called by ``torch._dynamo.reset()``."""
    ENTRIES.clear()
