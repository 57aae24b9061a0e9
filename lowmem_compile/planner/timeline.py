"""Simulated memory of a partition: bytes alive at each kernel of its forward and backward graph.

Counted: everything beyond parameters, buffers and inputs. The kernels and their order are those of
:mod:`lowmem_compile.planner.kernels`. From Inductor's wrapper:

- a buffer lives from the kernel that makes it to the last one that reads it; saved tensors live from forward into backward;
  gradients stay;
- a loop writes into an input of the same size that dies with it and that no other loop of the kernel reads;
- on a CPU, loops that follow one another are one call: all of their buffers exist before it and go after it;
- a library call's scratch memory lives as long as the call (:mod:`lowmem_compile.planner.scratch`);
- a buffer that dies is kept for a later one of the same size, where that does not raise the peak that Inductor expects, which is
  what is alive kernel by kernel, loops of one call too (:mod:`lowmem_compile.peak_estimate`).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lowmem_compile.planner.kernels import Kernel, kernels_of
from lowmem_compile.planner.program import Op, Program, program_of
from lowmem_compile.reporting.model import PHASES, TimelinePoint
from lowmem_compile.saved import Partition

MOST_POINTS = 300


def simulate(partition: Partition) -> tuple[TimelinePoint, ...]:
    """Forward then backward, at most ``MOST_POINTS`` points (peaks are kept)."""
    return timeline(program_of(partition))


def timeline(program: Program) -> tuple[TimelinePoint, ...]:
    """The same for a program."""
    forward, backward = kernel_points(program)
    return (*thinned(forward), *thinned(backward))


def shortened(points: Sequence[TimelinePoint]) -> tuple[TimelinePoint, ...]:
    """Both phases of a timeline :func:`thinned`; the last point of each, what stays, is kept."""
    found: list[TimelinePoint] = []
    for phase in PHASES:
        mine = [p for p in points if p.phase == phase]
        found += [*thinned(mine[:-1]), *mine[-1:]]
    return tuple(found)


def kernel_points(
    program: Program, device: str = "cpu", *, hold: bool = True, gradients_stay: bool = True
) -> tuple[list[TimelinePoint], list[TimelinePoint]]:
    """The forward and the backward pass with a point for each kernel.

    Args:
        program: what is simulated.
        device: ``"cpu"``, where loops that follow one another are one call, or ``"cuda"``, where each kernel is a launch.
        hold: keep dead buffers for later ones, as Inductor does where that does not raise the peak that it expects. Without,
            what is alive in one layer depends on that layer alone.
        gradients_stay: to the end of the backward pass. Otherwise each goes with the kernel that makes it or reads it last, as
            where the optimizer's step is a part of the graph; that step's scratch memory is not counted.
    """
    forward_kernels = kernels_of(program.forward, program.forward_outputs)
    backward_kernels = kernels_of(program.backward, program.backward_outputs)
    start = {c.inputs: (c.nbytes, c.dtype) for c in program.crossings}
    way = _Way(grouped=device == "cpu", hold=hold)
    forward = _run(forward_kernels, {}, program.forward_outputs, "forward", way)
    stay = program.backward_outputs if gradients_stay else frozenset[str]()
    return forward, _run(backward_kernels, start, stay, "backward", way)


def peak(points: Sequence[TimelinePoint]) -> int:
    """The highest point."""
    return max((p.live_bytes for p in points), default=0)


@dataclass(frozen=True)
class _Way:
    """``grouped``: loops that follow one another are one call; ``hold``: dead buffers wait for later ones."""

    grouped: bool
    hold: bool


@dataclass
class _Span:
    """A buffer: made by kernel ``start``, gone after kernel ``end``."""

    size: int
    dtype: str
    start: int
    end: int


def _run(
    kernels: Sequence[Kernel],
    start: Mapping[tuple[str, ...], tuple[int, str]],
    outputs: frozenset[str],
    phase: str,
    way: _Way,
) -> list[TimelinePoint]:
    owner = {name: names[0] for names in start for name in names}
    first = {names[0]: size for names, size in start.items()}
    spans, given = _spans(kernels, first, owner, outputs, way)
    live = _total(len(kernels), (*spans, *given))
    if way.hold:
        each = _spans(kernels, first, owner, outputs, replace(way, grouped=False))
        expected = _with_scratch(_total(len(kernels), [s for group in each for s in group]), kernels)
        _hold_for_reuse(live, spans, expected)
    live = _with_scratch(live, kernels)
    points = [TimelinePoint(f"start of {phase}", phase, sum(s.size for s in given))] if given else []  # type: ignore[arg-type]
    points += [TimelinePoint(k.module or k.makes[0].target, phase, m) for k, m in zip(kernels, live, strict=True)]  # type: ignore[arg-type]
    last = len(kernels) - 1
    stays = sum(s.size for s in (*spans, *given) if s.end > last)
    return [*points, TimelinePoint(f"end of {phase}", phase, stays)]  # type: ignore[arg-type]


def _spans(
    kernels: Sequence[Kernel],
    start: Mapping[str, tuple[int, str]],
    owner: Mapping[str, str],
    outputs: frozenset[str],
    way: _Way,
) -> tuple[list[_Span], list[_Span]]:
    """Buffers that the kernels make, and those given at the start."""
    last: dict[str, int] = {}
    for i, kernel in enumerate(kernels):
        for name in kernel.reads:
            last[owner.get(name, name)] = i
    call_end = _call_ends(kernels) if way.grouped else list(range(len(kernels)))
    forever = len(kernels)
    alive = {n: _Span(size, dtype, 0, call_end[last[n]] if n in last else -1) for n, (size, dtype) in start.items()}
    for name in alive.keys() & outputs:
        alive[name].end = forever
    given = list(alive.values())
    made: list[_Span] = []
    for i, kernel in enumerate(kernels):
        dying = {n for r in kernel.reads if (n := owner.get(r, r)) in alive and last[n] == i and n not in outputs}
        for op in kernel.makes:
            if op.name in kernel.dead or not op.nbytes:
                continue
            end = forever if op.name in outputs else call_end[last.get(op.name, i)]
            candidates = [owner.get(n, n) for n in kernel.may_overwrite(op.name)] if kernel.loop else []
            taken = next((n for n in candidates if n in dying and _alike(alive[n], op)), None)
            if taken is None:
                alive[op.name] = _Span(op.nbytes, op.dtype, i, end)
                made.append(alive[op.name])
            else:
                dying.discard(taken)
                alive[op.name] = alive.pop(taken)
                alive[op.name].end = end
    return made, given


def _alike(span: _Span, op: Op) -> bool:
    return (span.size, span.dtype) == (op.nbytes, op.dtype)


def _call_ends(kernels: Sequence[Kernel]) -> list[int]:
    """For each kernel the last one of its call."""
    ends = list(range(len(kernels)))
    for i in reversed(range(len(kernels) - 1)):
        if kernels[i].loop and kernels[i + 1].loop:
            ends[i] = ends[i + 1]
    return ends


def _total(kernels: int, spans: Sequence[_Span]) -> list[int]:
    """Bytes alive during each kernel."""
    change = [0] * (kernels + 1)
    for span in spans:
        if span.end >= span.start:
            change[span.start] += span.size
            change[min(span.end + 1, kernels)] -= span.size
    return list(itertools.accumulate(change))[:kernels]


def _with_scratch(live: Sequence[int], kernels: Sequence[Kernel]) -> list[int]:
    return [m + k.scratch for m, k in zip(live, kernels, strict=True)]


def _add(live: list[int], first: int, last: int, size: int) -> None:
    for i in range(first, min(last + 1, len(live))):
        live[i] += size


def _hold_for_reuse(live: list[int], spans: Sequence[_Span], expected: list[int]) -> None:
    """Keep dead buffers for later ones of their size, as Inductor's wrapper does, going by the memory that it expects."""
    highest = max(expected, default=0)
    pool: dict[tuple[int, str], list[int]] = defaultdict(list)
    ending: dict[int, list[_Span]] = defaultdict(list)
    starting: dict[int, list[_Span]] = defaultdict(list)
    for span in spans:
        ending[span.end].append(span)
        starting[span.start].append(span)
    for i in range(len(live)):
        for span in starting[i]:
            free = pool[span.size, span.dtype]
            if free and (free[-1] + 1 == i or span.size + max(expected[free[-1] + 1 : i]) <= highest):
                first = free.pop() + 1
                for memory in (live, expected):
                    _add(memory, first, i - 1, span.size)
        for span in ending[i]:
            pool[span.size, span.dtype].append(i)


def thinned(points: Sequence[TimelinePoint]) -> list[TimelinePoint]:
    """The points of one phase, the highest of each few where there are many."""
    if len(points) <= MOST_POINTS // 2:
        return list(points)
    step = -(-len(points) // (MOST_POINTS // 2))
    return [max(points[i : i + step], key=lambda p: p.live_bytes) for i in range(0, len(points), step)]
