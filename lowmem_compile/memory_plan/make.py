"""The plan: traces, depth, weights and optimizer state, and the search for what fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lowmem_compile.memory_plan.cards import GIB, card_bytes
from lowmem_compile.memory_plan.depth import CHECKED, TRACED, Deviation, IrregularError, Stack, deepened, deviation
from lowmem_compile.memory_plan.fixed import Fixed, OptimizerSpec, fixed_bytes, in_dtype
from lowmem_compile.memory_plan.result import Contender, Largest, MemoryPlan
from lowmem_compile.memory_plan.search import LARGEST, Line, first_guess, largest_size, line_of
from lowmem_compile.memory_plan.subject import PLAIN, Adaptation, Subject, stack_of, subject_of
from lowmem_compile.memory_plan.trace import Run, Setting, Trace, trace
from lowmem_compile.planner.timeline import thinned
from lowmem_compile.reporting.summary import bytes_by, group_by_layer
from lowmem_compile.reporting.units import format_bytes, plural

Say = Callable[[str], None]
SEQUENCE_STEP = 64
"""Sequences are searched in steps of so many tokens."""


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        model: see :mod:`lowmem_compile.memory_plan.subject`.
        batch: rows; the model's usual batch if ``None``.
        sequence: tokens a row; the model's usual length if ``None``.
        setting: precision, budgets, options.
        optimizer: the optimizer.
        card: name or size of a card; the largest batch and sequence are searched for it.
        reserve: bytes of the card that are not for tensors.
        exact: trace all layers.
        adaptation: LoRA or LoQT.
    """

    model: str
    batch: int | None = None
    sequence: int | None = None
    setting: Setting = field(default_factory=Setting)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    card: str | None = None
    reserve: int = GIB
    exact: bool = False
    adaptation: Adaptation = PLAIN


def plan_memory(request: Request, say: Say = lambda _: None) -> MemoryPlan:
    """The memory plan of a training step; ``say`` is told what is being done.

    Raises:
        OptionError: an unknown model, card, optimizer or option.
        LowMemError: the model cannot be made, or its step cannot be traced.
    """
    start = time.perf_counter()
    room = card_bytes(request.card) if request.card is not None else None
    subject = subject_of(request.model, request.adaptation)
    batch, sequence = request.batch or subject.batch, request.sequence or subject.sequence
    say("counting weights and optimizer state")
    whole = in_dtype(subject.make(None, batch, sequence).model, request.setting.precision)
    name = stack_of(whole, subject.depth) if subject.depth is not None else None
    fixed = fixed_bytes(whole, name, request.optimizer)
    tracer = _Tracer(subject, request, _stack(whole, name), say)
    runs = tracer.runs(batch, sequence)
    offs = tracer.offs(batch, sequence)
    contenders = {n: _contender(n, run, fixed, tracer.repeats, offs.get(n)) for n, run in runs.items()}
    if room is not None:
        free = room - request.reserve - fixed.weights - fixed.state
        fits = _Fits(tracer, fixed, free, batch, sequence)
        batches = fits.batches()
        sequences = fits.sequences(subject.longest)
        contenders = {
            n: replace(c, largest_batch=batches.get(n), longest_sequence=sequences.get(n)) for n, c in contenders.items()
        }
    return MemoryPlan(
        model=request.model,
        title=", ".join(filter(None, (subject.title, str(request.adaptation)))),
        parameters=fixed.parameters,
        trained=fixed.trained,
        layers=subject.depth,
        batch=batch,
        sequence=sequence,
        precision=request.setting.precision,
        optimizer=str(request.optimizer),
        weights=fixed.weights,
        gradients=fixed.gradients,
        optimizer_state=fixed.state,
        adamw_state=fixed.adamw,
        scratch=fixed.scratch,
        card=request.card,
        card_bytes=room,
        reserve=request.reserve,
        contenders=tuple(contenders.values()),
        refused=tracer.refused,
        notes=tuple(_notes(request, tracer)),
        traces=tuple(tracer.log),
        seconds=time.perf_counter() - start,
        versions={"torch": torch.__version__},
    )


def _stack(model: nn.Module, name: str | None) -> Stack | None:
    if name is None:
        return None
    layer = model.get_submodule(name)[0]  # type: ignore[index]
    return Stack(name, sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad))


class _Tracer:
    """Runs of the whole model at any batch and sequence, from traces of a few layers or of all."""

    def __init__(self, subject: Subject, request: Request, stack: Stack | None, say: Say) -> None:
        self.subject, self.setting, self.say = subject, request.setting, say
        deep = subject.depth is not None and subject.depth > CHECKED
        self.stack = stack if deep and not request.exact else None
        self.missing_stack = deep and stack is None and not request.exact
        self.irregular = ""
        self.log: list[str] = []
        self.refused: dict[str, str] = {}
        self.graphs = 1
        self._traces: dict[tuple[int | None, int, int | None], Trace] = {}
        self._runs: dict[tuple[int, int | None], dict[str, Run]] = {}

    @property
    def repeats(self) -> bool:
        """Whether layers are repeated, not all traced."""
        return self.stack is not None

    def runs(self, batch: int, sequence: int | None) -> dict[str, Run]:
        """Every contender's run of the whole model."""
        key = (batch, sequence)
        if key not in self._runs:
            self._runs[key] = self._whole(batch, sequence)
        return self._runs[key]

    def _whole(self, batch: int, sequence: int | None) -> dict[str, Run]:
        if self.stack is not None:
            assert self.subject.depth is not None
            try:
                return _deep(self._trace(TRACED, batch, sequence).runs, self.stack, self.subject.depth)
            except IrregularError as error:
                self.irregular, self.stack = str(error), None
        return dict(self._trace(None, batch, sequence).runs)

    def offs(self, batch: int, sequence: int | None) -> dict[str, Deviation]:
        """What repetition to four layers is off by, for every contender without a budget."""
        if self.stack is None:
            return {}
        few = self._trace(TRACED, batch, sequence).runs
        more = self._trace(CHECKED, batch, sequence, budgets=False).runs
        return {n: deviation(deepened(few[n], self.stack, CHECKED), run) for n, run in more.items()}

    def _trace(self, layers: int | None, batch: int, sequence: int | None, *, budgets: bool = True) -> Trace:
        key = (layers, batch, sequence)
        if key not in self._traces:
            size = f"batch {batch}" + (f", sequence {sequence}" if sequence is not None else "")
            what = f"{plural(layers, 'layer') if layers is not None else 'all layers'}, {size}"
            self.say(f"tracing {what}")
            setting = replace(self.setting, part=layers is not None, budgets=self.setting.budgets if budgets else ())
            found = trace(self.subject.make(layers, batch, sequence), setting)
            self.log.append(f"{what}: {found.seconds:.0f} s")
            self.refused.update(found.refused)
            self.graphs = max(self.graphs, found.graphs)
            self._traces[key] = found
        return self._traces[key]


def _deep(runs: Mapping[str, Run], stack: Stack, depth: int) -> dict[str, Run]:
    """Deepen all; a budget is a share, so what it keeps follows what Inductor keeps."""
    found: dict[str, Run] = {}
    few = runs["inductor"].saved_bytes
    whole = deepened(runs["inductor"], stack, depth).saved_bytes
    for name, run in runs.items():
        layer = None
        if run.error is not None and depth > TRACED and few:
            layer = max((run.saved_bytes * whole // few - run.saved_bytes) // (depth - TRACED), 0)
        found[name] = deepened(run, stack, depth, layer_bytes=layer)
    return found


def _contender(name: str, run: Run, fixed: Fixed, repeats: bool, off: Deviation | None) -> Contender:
    return Contender(
        name=name,
        saved=run.saved_bytes,
        peak=run.peak,
        total=fixed.weights + fixed.state + round(_need(run.peak, fixed, run)),
        traced=not repeats,
        saved_off=None if off is None else off.saved,
        peak_off=None if off is None else off.peak,
        error=run.error,
        by_kind={key[0]: size for key, size in bytes_by(run.saved, "kind").items()},
        by_layer={layer: sum(t.nbytes for t in rows) for layer, rows in group_by_layer(run.saved).items()},
        tensors=run.saved,
        timeline=(*thinned(run.forward), *thinned(run.backward)),
    )


def _need(peak: float, fixed: Fixed, run: Run) -> float:
    """Bytes beyond weights and optimizer state: this peak of the pass, or that of the optimizer's step where one follows it."""
    return max(peak, fixed.gradients + fixed.scratch) if run.gradients_stay else peak


@dataclass(frozen=True)
class _Fits:
    """Searches for what fits into ``free`` bytes beside weights and optimizer state."""

    tracer: _Tracer
    fixed: Fixed
    free: int
    batch: int
    sequence: int | None

    def batches(self) -> dict[str, Largest]:
        """The largest batch of every contender, at the plan's sequence."""
        return self._search(range(1, LARGEST), self.batch, lambda size: self.tracer.runs(size, self.sequence), None)

    def sequences(self, longest: int | None) -> dict[str, Largest]:
        """The longest sequence of every contender, at the plan's batch; empty for models without sequences."""
        if self.sequence is None:
            return {}
        steps = range(SEQUENCE_STEP, (longest or LARGEST) + 1, SEQUENCE_STEP)
        if not steps:
            return {}
        return self._search(steps, self.sequence, lambda size: self.tracer.runs(self.batch, size), longest)

    def _search(self, steps: range, at: int, runs: Callable[[int], dict[str, Run]], limit: int | None) -> dict[str, Largest]:
        here = runs(at)
        if _need(0, self.fixed, here["lowmem"]) > self.free:
            return dict.fromkeys(here, Largest(0, "estimated"))
        other = self._second(steps, at, here)
        if other == at:
            return {n: Largest(at if self._need_of(run) <= self.free else 0, "traced") for n, run in here.items()}
        there = runs(other)
        lines = {n: line_of(here[n], at, there[n], other) for n in here.keys() & there.keys()}
        answer = self._largest(lines["lowmem"], steps, here["lowmem"])
        if answer not in (0, at, other):
            checked = runs(answer)
            nearest = {n: line_of(here[n], at, checked[n], answer) for n in here.keys() & checked.keys()}
            lines = {n: line if self._largest(line, steps, here[n]) <= answer else lines[n] for n, line in nearest.items()}
        found = {n: self._largest(lines[n], steps, run) for n, run in here.items() if n in lines}
        return {n: Largest(size, self._how(n, size, runs, {at, other, answer}, limit)) for n, size in found.items()}

    def _second(self, steps: range, at: int, here: Mapping[str, Run]) -> int:
        """Where to trace next: about where lowmem's forward pass alone would fill the card."""
        forward = max((p.live_bytes for p in here["lowmem"].forward), default=0)
        guess = first_guess(forward, 0, at, self.free)
        if self._need_of(here["lowmem"]) > self.free:
            guess = min(guess, at // 2)
        return max(min(steps[-1], guess // steps.step * steps.step), steps[0])

    def _need_of(self, run: Run) -> float:
        return _need(run.peak, self.fixed, run)

    def _largest(self, line: Line, steps: range, like: Run) -> int:
        return largest_size(lambda size: _need(line.peak(size), self.fixed, like), self.free, steps)

    def _how(self, name: str, size: int, runs: Callable[[int], dict[str, Run]], seen: set[int], limit: int | None) -> str:
        if limit is not None and size + SEQUENCE_STEP > limit:
            return "limit"
        return "traced" if size in seen and size and self._need_of(runs(size)[name]) <= self.free else "estimated"


def _notes(request: Request, tracer: _Tracer) -> list[str]:
    gpu = request.setting.device == "cuda"
    where = "one launch a kernel, as on a GPU" if gpu else "Inductor's calls on a CPU"
    attention = ": fused attention is the CPU's, which keeps output and logsumexp as a GPU's does" if gpu else ""
    notes = [
        f"Graphs are traced for a CPU{attention}. Buffers: {where}.",
        "Not counted: fragmentation, library workspaces, the driver's context"
        + (f"; {format_bytes(request.reserve)} of the card are set aside for them." if request.card else "."),
        "Eager's peak is coarse: saved bytes and gradients, and two gradients of each operation's output.",
    ]
    if tracer.stack is not None:
        notes.insert(
            0,
            f"{TRACED} layers of {tracer.stack.name} were traced and the middle one repeated; checked on {CHECKED} layers. "
            "Budgets are planned on the traced layers and scaled. --exact traces all.",
        )
    if tracer.irregular:
        notes.append(f"All layers were traced: {tracer.irregular}.")
    if tracer.missing_stack:
        notes.append("All layers were traced: the model has no single list of layers alike.")
    if tracer.graphs > 1:
        notes.append(f"The step is {tracer.graphs} graphs (graph breaks); what one keeps lies under the peak of the next.")
    if request.setting.fused_backward:
        notes.append(
            "--fused-backward: lowmem's gradients go as soon as the step inside the backward pass has read them; that step's "
            "scratch memory is not counted. Eager's and Inductor's gradients stay to the end of the pass."
        )
    if request.adaptation.loqt is not None:
        notes.append("LoQT's first merge, and loading the model, take the whole weights once.")
    if not request.setting.loss_only:
        notes.append(
            "The model is compiled whole, so all that it returns stays alive (logits); --loss-only compiles the loss alone."
        )
    return notes
