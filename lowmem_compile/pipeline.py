"""The pipeline: one literal list of passes, and the runner that knows none of them by name."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import fx

from lowmem_compile._torch import GraphTransformObserver, copy_graph, trace_structured, tracing_is_on
from lowmem_compile.contract import Context, Decline, DescribingPass, JointPass, Match, Pass, Rewrite, Stage
from lowmem_compile.errors import PassError
from lowmem_compile.graph import module_path, nbytes, source_line
from lowmem_compile.passes.accumulate_sums import AccumulateSums
from lowmem_compile.passes.approximate_activation import ApproximateActivation
from lowmem_compile.passes.attention_backward import AttentionBackward
from lowmem_compile.passes.chunk_loss import ChunkLoss
from lowmem_compile.passes.compute_once import ComputeOnce
from lowmem_compile.passes.embedding_gradient import EmbeddingGradient
from lowmem_compile.passes.encode_saved import EncodeSaved
from lowmem_compile.passes.flatten_saved_inputs import FlattenSavedInputs
from lowmem_compile.passes.fold_layer_scale import FoldLayerScale
from lowmem_compile.passes.fold_norm_affine import FoldNormAffine
from lowmem_compile.passes.launch_together import LaunchTogether
from lowmem_compile.passes.narrow_integers import NarrowIntegers
from lowmem_compile.passes.norm_from_output import NormFromOutput
from lowmem_compile.passes.pack_masks import PackMasks
from lowmem_compile.passes.projection_taps import ProjectionTaps
from lowmem_compile.passes.recognise_activation import RecogniseActivation
from lowmem_compile.passes.recognise_norm import RecogniseNorm
from lowmem_compile.passes.recompute_saved import RecomputeSaved
from lowmem_compile.passes.unfold_patches import UnfoldPatches
from lowmem_compile.passes.update_in_backward import UpdateInBackward
from lowmem_compile.reporting.model import PassRun, Site

log = logging.getLogger(__name__)

PASSES: tuple[Pass, ...] = (
    RecogniseActivation(),
    RecogniseNorm(),
    FoldNormAffine(),  # reads the op that recognise_norm makes
    FoldLayerScale(),
    UnfoldPatches(),
    ChunkLoss(),
    ProjectionTaps(),  # last of its stage: a head that the chunked loss takes is not tapped
    AttentionBackward(),
    NormFromOutput(),  # before the activations: its clones of forward nodes must not contain their codes
    ApproximateActivation(),
    AccumulateSums(),  # before update_in_backward: what it updates with is the whole sum
    UpdateInBackward(),  # before embedding_gradient: an embedding's update needs no gradient of the embedding's size
    EmbeddingGradient(),
    RecomputeSaved(),  # before the codecs: what it reads may be kept as codes
    PackMasks(),
    NarrowIntegers(),
    EncodeSaved(),
    ComputeOnce(),  # what codecs read more often
    LaunchTogether(),  # what encode_saved made
    FlattenSavedInputs(),  # last: recompute_saved may hand over inputs
)


SUBSYSTEM = {
    Stage.DYNAMO: "pre_grad_passes",
    Stage.JOINT: "joint_graph_passes",
    Stage.BACKWARD: "joint_graph_passes",
    Stage.SAVED: "joint_graph_passes",
}
"""What Inductor's bisector calls the stage."""


def pass_names() -> list[str]:
    """Names of all passes, in the order in which they run."""
    return [p.name for p in PASSES]


def passes_of(stage: Stage) -> list[Pass]:
    """The passes of one stage, in order."""
    return [p for p in PASSES if p.stage is stage]


@dataclass
class Recorder:
    """What happened to one graph: sites, passes, dumped files. Filled while the graph is compiled."""

    graph_id: str = "graph"
    dump_dir: Path | None = None
    sites: list[Site] = field(default_factory=list)
    runs: list[PassRun] = field(default_factory=list)
    dumped: int = 0
    failures: list[str] = field(default_factory=list)
    """Names of the passes that failed."""
    pending: list[tuple[str, str]] | None = None
    """Dumps held back until a trial is adopted; ``None`` writes at once."""

    def adopt(self, trial: Recorder) -> None:
        """Take over what a trial run recorded, and write its dumps."""
        self.sites += trial.sites
        self.runs += trial.runs
        for label, text in trial.pending or ():
            self._write(label, lambda text=text: text)  # type: ignore[misc]

    def dump(self, label: str, gm: fx.GraphModule, note: str = "") -> None:
        """Write a numbered graph as readable Python, and hand it to structured tracing; ``note`` becomes its first line."""
        head = f"# {note}\n" if note else ""

        def text() -> str:
            return head + str(gm.print_readable(print_output=False, include_stride=True, include_device=True))

        if self.pending is None:
            self._write(label, text)
        elif self.dump_dir is not None or tracing_is_on():
            self.pending.append((label, text()))

    def _write(self, label: str, text: Callable[[], str]) -> None:
        name = f"{self.dumped:02d}_{label}"
        self.dumped += 1
        self.trace(f"lowmem_{self.graph_id}_{name}", text)
        if self.dump_dir is not None:
            self.dump_dir.mkdir(parents=True, exist_ok=True)
            (self.dump_dir / f"{name}.py").write_text(text(), encoding="utf-8")

    @staticmethod
    def trace(name: str, text: Callable[[], str]) -> None:
        """An artifact of structured tracing (``TORCH_TRACE``, tlparse); free when tracing is off."""
        trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def run_stage(stage: Stage, gm: fx.GraphModule, ctx: Context, recorder: Recorder | None) -> list[Rewrite]:
    """Run the passes of a stage over ``gm`` in place; returns the rewritten matches.

    A pass that throws leaves the graph as it was before that pass: one warning names the pass and the dump
    (``strict=True`` raises :class:`PassError`).
    """
    rewritten: list[Rewrite] = []
    for p in passes_of(stage):
        if p.name in ctx.options.disable:
            continue
        rewritten += run_pass(p, gm, ctx, recorder)
    return rewritten


def run_pass(p: Pass, gm: fx.GraphModule, ctx: Context, recorder: Recorder | None) -> list[Rewrite]:
    """Run one pass under Inductor's observer (timing, off switch, bisecting), with checks and dumps."""
    start = time.perf_counter()
    backup: fx.Graph | None = None
    before, silent = op_counts(gm.graph), without_value(gm.graph)
    sites: list[Site] = []
    done: list[Rewrite] = []
    matches: list[Match] = []

    def body(graph: fx.Graph) -> None:
        nonlocal backup
        matches.extend(p.find(graph, ctx))
        for match in matches:
            decline = p.check(match, ctx)
            if decline is None and match.node.name in ctx.skip:
                decline = Decline("LM300", "the partitioner would not keep fewer bytes with this rewrite")
            if decline is not None:
                sites.append(site_of(p, match, ctx, decline))
                continue
            if backup is None:
                backup = copy_graph(graph)
            sites.append(site_of(p, match, ctx, None))
            done.append(rewrite_of(p, match, ctx))
            p.rewrite(graph, match, ctx)
        if done:
            check_graph(gm, ctx.options.check, silent)

    try:
        GraphTransformObserver(gm, f"lowmem_{p.name}", SUBSYSTEM[p.stage]).apply_graph_pass(body)
    except Exception as error:
        where = (
            recorder.dump_dir
            if recorder is not None and recorder.dump_dir is not None
            else "set options['dump'] to keep the graphs"
        )
        message = (
            f"lowmem: pass {p.name!r} failed and was left out of this graph ({type(error).__name__}: {error}). "
            f"Graphs: {where}. Turn it off with options={{'disable': ['{p.name}']}}; options={{'strict': True}} raises."
        )
        if ctx.options.strict:
            raise PassError(message) from error
        if backup is not None:
            gm.graph = backup
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        log.warning(message, exc_info=True)
        sites = [
            replace(site_of(p, m, ctx, Decline("LM900", f"{type(error).__name__}: {error}")), action="failed") for m in matches
        ]
        done = []
        if recorder is not None:
            recorder.failures.append(p.name)
    if done:
        gm.recompile()
    if recorder is not None:
        recorder.sites += sites
        after = op_counts(gm.graph)
        recorder.runs.append(
            PassRun(
                name=p.name,
                stage=p.stage.value,
                numerics=p.numerics.value,
                seconds=time.perf_counter() - start,
                matched=len(matches),
                rewritten=len(done),
                declined=len(matches) - len(done),
                ops_before=sum(before.values()),
                ops_after=sum(after.values()),
            )
        )
        log.info("%s: %d matched, %d rewritten; %s", p.name, len(matches), len(done), op_difference(before, after))
        if done:
            recorder.dump(f"after_{p.name}", gm, f"{len(done)} rewritten; {op_difference(before, after)}")
    return done


def site_of(p: Pass, match: Match, ctx: Context, decline: Decline | None) -> Site:
    """The report's line for a match."""
    node = match.node
    before, after = site_bytes(p, match, ctx) if decline is None else (0, 0)
    return Site(
        pass_name=p.name,
        module=module_path(node),
        source=source_line(node),
        action="rewritten" if decline is None else "declined",
        code="LM100" if decline is None else decline.code,
        reason=describe_site(p, match, ctx) if decline is None else decline.reason,
        numerics=p.numerics.value,
        bytes_before=before,
        bytes_after=after,
    )


def describe_site(p: Pass, match: Match, ctx: Context) -> str:
    """What a pass says of a place that it rewrites; most say nothing."""
    return p.describe(match, ctx) if isinstance(p, DescribingPass) else ""


def site_bytes(p: Pass, match: Match, ctx: Context) -> tuple[int, int]:
    """What a place keeps for the backward pass before and after its rewrite (symbolic sizes: 0, 0)."""
    saved = p.bytes_saved(match, ctx)
    if not saved.is_number or saved <= 0:
        return 0, 0
    displaced = p.displaced(match) if isinstance(p, JointPass) else [match.node]
    before = max([nbytes(n) for n in displaced] + [int(saved)])
    return before, before - int(saved)


def rewrite_of(p: Pass, match: Match, ctx: Context) -> Rewrite:
    """What the partition has to know of a match, taken down before the rewrite changes the graph."""
    if not isinstance(p, JointPass):
        return Rewrite(p.name, match.node.name)
    displaced = frozenset(n.name for n in p.displaced(match))
    before, after = site_bytes(p, match, ctx)
    return Rewrite(p.name, match.node.name, displaced, p.site_class(match), before - after)


def without_value(graph: fx.Graph) -> frozenset[str]:
    """Computed nodes that do not say what they compute, as AOTAutograd's for the state of random numbers."""
    return frozenset(
        n.name
        for n in graph.nodes
        if n.op == "call_function"
        and not n.meta.keys() & {"val", "example_value"}
        and not getattr(n.target, "__module__", "").startswith(("torch.amp", "torch._C", "torch.autograd", "_operator"))
    )


def check_graph(gm: fx.GraphModule, level: str, silent: frozenset[str]) -> None:
    """Lint the graph and see that every computed node says what it computes; ``full`` also re-runs it with fake tensors.

    ``silent``: the nodes that did not before the pass.
    """
    if level == "off":
        return
    gm.graph.lint()
    lost = without_value(gm.graph) - silent
    if lost:
        raise AssertionError(f"no value: {', '.join(sorted(lost))}; a pass lost it")
    if level == "full":
        from lowmem_compile.verify import verify_values

        verify_values(gm)


def op_counts(graph: fx.Graph) -> Counter[str]:
    """How often each operation occurs."""
    return Counter(str(n.target) for n in graph.nodes if n.op.startswith("call_"))


def op_difference(before: Counter[str], after: Counter[str]) -> str:
    """One line: operations that came and went."""
    diff = {k: after[k] - before[k] for k in sorted({*before, *after}) if after[k] != before[k]}
    return ", ".join(f"{k} {v:+d}" for k, v in diff.items()) or "no change"
