"""Kernels that share a launch: what lowmem adds to a graph should cost no launch of its own on a GPU.

    before   ... encode(q) · encode(k) · encode(v) · encode(o) ... gelu ...        five launches
    after    ... one launch: encode(q), encode(k), encode(v), encode(o), gelu ...

Inductor fuses kernels that read the same data. An encode of what a library call wrote, and a decode of what one reads, share
nothing with any kernel. But Inductor can also put independent kernels into one launch (its foreach, or combo, kernels: each
program works for one of them). This pass, run on Inductor's schedule after its own fusion, chooses which:

- *guests*: kernels of the encodes and decodes that passes marked (``SHARED`` in a node's meta), and kernels that only make
  results of the graph and move less than 64 KiB;
- *hosts*: kernels that compute element by element, or take the largest of a group. No kernel that adds: the order of a sum is
  that of its launch's configuration, and results shall not depend on who shares a launch.

A guest moves to its host: one that makes results of the graph to a later one, one that reads inputs of it to an earlier one. It
moves only if the largest number of live bytes, by the schedule's own buffers, rises by less than a 64th. Guests that find no
host share a launch among themselves on the same condition. Numerics class: EXACT, nothing is computed otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lowmem_compile._torch import CustomSchedulerPass, scheduling

SHARED = "lowmem_shares_launch"
"""Key in the meta of a graph's nodes: they may share a launch."""
TINY = 1 << 16
"""Bytes; a kernel that moves fewer is mostly launch."""
MOST = 8
"""Kernels a launch."""
BUFFERS = 200
"""Tensors a launch: a kernel's arguments are limited."""
NEAR = 4
"""Hosts that are tried for a guest."""
SLACK = 64
"""The part of the largest number of live bytes by which it may rise: codes of a few tensors beside the tensors themselves."""
SAFE = frozenset({"max", "min", "any"})
"""Reductions that give the same bits in every order."""


class ShareLaunches(CustomSchedulerPass):
    """The hook: Inductor calls it with its fused nodes. ``key`` identifies everything it depends on."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __deepcopy__(self, memo: Any) -> ShareLaunches:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.key,)  # what Inductor's cache keys pickle

    def __call__(self, nodes: list[Any]) -> list[Any]:
        if not nodes or not any(is_marked(n) for n in nodes):
            return nodes
        scheduler = nodes[0].scheduler
        scheduler.merge_loops()  # as it would be next: the number of dimensions of a kernel depends on it
        units = with_joins([unit_of(n) for n in nodes])
        private = {name for u in units if isinstance(u.node, scheduling().MixOrder) for name in u.writes}
        for unit in units:
            if private & unit.reads:  # Inductor computes these sums in two kernels, and excepts what reads them too
                unit.may_host = unit.may_move = False
        return rebuilt(shared(units, *inputs_and_outputs()), scheduler)

    def uuid(self) -> str:
        return self.key


@dataclass(eq=False)
class Unit:
    """One node of the schedule.

    Attributes:
        node: Inductor's.
        reads: names of the buffers it reads.
        writes: bytes of the buffers it makes, by name; views and lists have none.
        may_host: whether it may share a launch.
        may_move: whether it is a guest.
        joins: nodes that run nothing and name what this one completes, a buffer that several kernels write parts of.
    """

    node: Any
    reads: frozenset[str]
    writes: dict[str, int]
    may_host: bool = False
    may_move: bool = False
    joins: list[Any] = field(default_factory=list)

    @property
    def buffers(self) -> int:
        return len(self.reads) + len(self.writes)


@dataclass
class Schedule:
    """Groups of units in order, each one launch, and the bytes that live while each runs.

    Attributes:
        groups: in the order in which they run.
        inputs: bytes of the inputs of the graph that are freed after their last reader.
        outputs: names of what the graph returns.
        limit: the largest number of live bytes that is allowed.
    """

    groups: list[list[Unit]]
    inputs: dict[str, int]
    outputs: frozenset[str]
    limit: int = field(init=False)

    def __post_init__(self) -> None:
        before = peak(self.groups, self.inputs, self.outputs)
        self.limit = before + before // SLACK

    def moved(self, members: Sequence[Unit], to: list[Unit]) -> bool:
        """Put the members into the launch ``to``; ``False``, and nothing changes, where that is not allowed."""
        united = [*members, *to]
        if len(united) > MOST or sum(u.buffers for u in united) > BUFFERS:
            return False
        left = ([u for u in g if u not in members] if g is not to else united for g in self.groups)
        tried = [g for g in left if g]
        if not is_ordered(tried) or peak(tried, self.inputs, self.outputs) > self.limit:
            return False
        self.groups[:] = tried
        return True

    def group_of(self, unit: Unit) -> list[Unit]:
        return next(g for g in self.groups if unit in g)


def shared(units: Sequence[Unit], inputs: dict[str, int], outputs: frozenset[str]) -> list[list[Unit]]:
    """The units in groups that share a launch, in an order in which they can run."""
    schedule = Schedule([[u] for u in units], inputs, outputs)
    place = {u: i for i, u in enumerate(units)}
    read = {name for u in units for name in u.reads}
    late = [u for u in units if u.may_move and not read & u.writes.keys()]
    early = [u for u in reversed(units) if u.may_move and u not in late]
    hosts = [u for u in units if u.may_host and not u.may_move]
    for behind, guests in ((True, late), (False, early)):
        for guest in guests:
            there = (
                [h for h in hosts if place[h] > place[guest]] if behind else [h for h in hosts[::-1] if place[h] < place[guest]]
            )
            any(schedule.moved([guest], schedule.group_of(h)) for h in there[:NEAR])
        alone = [u for u in guests if len(schedule.group_of(u)) == 1]
        for guest, following in itertools.pairwise(alone):
            schedule.moved(schedule.group_of(guest), schedule.group_of(following))
    return schedule.groups


def with_joins(units: Sequence[Unit]) -> list[Unit]:
    """The units without those that run nothing and only join buffers: these stay behind the last that writes a part."""
    found: list[Unit] = []
    for unit in units:
        writer = next((u for u in reversed(found) if u.writes.keys() & unit.reads), None)
        if not isinstance(unit.node, scheduling().Nothing) or writer is None:
            found.append(unit)
            continue
        writer.joins.append(unit.node)
        writer.reads |= unit.reads - writer.writes.keys()
        writer.writes |= unit.writes
    return found


def is_ordered(groups: Sequence[Sequence[Unit]]) -> bool:
    """Whether every group reads only what groups before it, or nobody, made."""
    made_at = {name: i for i, group in enumerate(groups) for unit in group for name in unit.writes}
    return all(made_at.get(name, -1) < i for i, group in enumerate(groups) for unit in group for name in unit.reads)


def peak(groups: Sequence[Sequence[Unit]], inputs: dict[str, int], outputs: frozenset[str]) -> int:
    """The largest number of bytes that live while one of the groups runs."""
    last: dict[str, int] = {}
    for i, group in enumerate(groups):
        for unit in group:
            last |= dict.fromkeys((*unit.reads, *unit.writes), i)
    sizes = {**inputs, **{name: size for g in groups for unit in g for name, size in unit.writes.items()}}
    freed = [0] * len(groups)
    for name, i in last.items():
        if name not in outputs:
            freed[i] += sizes.get(name, 0)
    live = sum(inputs.values())
    most = live
    for i, group in enumerate(groups):
        live += sum(size for unit in group for size in unit.writes.values())
        most = max(most, live)
        live -= freed[i]
    return most


def rebuilt(groups: Sequence[Sequence[Unit]], scheduler: Any) -> list[Any]:
    """Inductor's nodes of the groups."""
    foreach = scheduling().Foreach
    made = []
    for group in groups:
        nodes, joins = [u.node for u in group], [n for u in group for n in u.joins]
        if len(nodes) == 1:
            made += [*nodes, *joins]
            continue
        together = foreach(scheduler, nodes, use_custom_partition_algo=False, enable_autotune=True, per_subkernel_blocks=True)
        scheduler.name_to_fused_node.update({n.get_name(): together for n in together.get_nodes()})
        made += [together, *joins]
    scheduler.prune_redundant_deps(made)
    return made


def is_marked(node: Any) -> bool:
    """Whether all that the node computes was marked by a pass."""
    if type(node) not in (scheduling().Single, scheduling().Fused):
        return False
    return all(any(SHARED in origin.meta for origin in part.node.get_origins()) for part in node.get_nodes())


def unit_of(node: Any) -> Unit:
    """What the pass knows of a node of Inductor's schedule."""
    real: dict[str, str] = node.scheduler.mutation_real_name
    reads = frozenset(real.get(dep.name, dep.name) for dep in (*node.read_writes.reads, *node.unmet_dependencies))
    writes = {buffer.get_name(): nbytes(buffer.node) for buffer in node.get_outputs()}
    unit = Unit(node, reads - writes.keys(), writes)
    unit.may_host = is_combinable(node)
    moved = sum(writes.values()) + sum(read_bytes(name) for name in unit.reads)
    outputs = set(scheduling().graph().get_output_names())
    unit.may_move = unit.may_host and (is_marked(node) or (moved < TINY and writes.keys() <= outputs))
    return unit


def is_combinable(node: Any) -> bool:
    """A Triton kernel over one dimension that changes nothing in place and adds nothing up."""
    private = scheduling()
    if type(node) not in (private.Single, private.Fused) or node.is_template():
        return False
    if not node.is_gpu() or node.has_side_effects() or any(buffer.get_mutations() for buffer in node.get_outputs()):
        return False
    for part in node.get_nodes():
        data = part.node.data if isinstance(part.node, private.ComputedBuffer) else None
        if isinstance(data, private.Reduction):
            if data.reduction_type not in SAFE:
                return False
        elif not isinstance(data, private.Pointwise) or isinstance(data, private.Scatter):
            return False
    return dimensions(node) == {"x", "r0_"}


def dimensions(node: Any) -> set[str]:
    """The dimensions of the kernel that Inductor will make of a node, as a part of a shared launch."""
    private, nodes = scheduling(), node.get_nodes()
    _, (numel, reduced) = max(nodes, key=lambda n: int(n.is_reduction())).group
    if any(size.free_symbols for size in (numel, reduced)):
        return set()
    backend = node.scheduler.get_backend(node.get_device())
    backend = getattr(backend, "_triton_scheduling", backend)  # CUDA's also writes templates in C++
    schedule = backend.generate_node_schedule(nodes, numel, reduced)
    features = private.Features(schedule, numel, reduced, coalesce_analysis=node.get_coalesce_analysis())
    tiling, _ = backend.get_tiling_and_scores(schedule, numel, reduced, features.coalesce_analysis)
    return set(tiling)


def inputs_and_outputs() -> tuple[dict[str, int], frozenset[str]]:
    """Bytes of the inputs that the graph in code generation frees (those of a backward graph but parameters), and its outputs."""
    graph = scheduling().graph()
    freed = [n for n in graph.graph_inputs if graph.is_backward and not n.startswith(("primals", "tangents"))]
    return {name: read_bytes(name) for name in freed}, frozenset(graph.get_output_names())


def read_bytes(name: str) -> int:
    """Bytes of a buffer or an input of the graph; 0 for what is no tensor."""
    buffer = scheduling().graph().try_get_buffer(name)
    return 0 if buffer is None else nbytes(buffer)


def nbytes(buffer: Any) -> int:
    """Bytes of a buffer's own memory; 0 for a view, and for what has no static size."""
    layout = buffer.maybe_get_layout() if hasattr(buffer, "maybe_get_layout") else None
    if layout is None or type(layout).__name__ not in ("FixedLayout", "FlexibleLayout"):
        return 0
    size = layout.storage_size()
    return int(size) * layout.dtype.itemsize if getattr(size, "is_number", True) else 0
