"""The kernels that Inductor makes of a graph: which values reach memory, which loops are fused, in which order they run.

A model of Inductor's lowering and scheduler, without code generation. From ``torch/_inductor/ir.py`` and ``scheduler.py``:

1. a pointwise value is computed in the loops of its readers, unless it is returned, read by a call (matmul, attention), read
   from more than 8 buffers, or has several readers and is costly (more than 4 buffers, 30 operations, or an exponential);
2. an addition to a matrix product whose result nothing else reads, and no view in between, becomes one call;
3. loops over equally many elements that share a buffer are fused, those sharing most first, unless that makes a cycle; a sum over
   other dimensions than the last runs in another order, and is fused with its like only;
4. a buffer read only inside the kernel that makes it is never allocated.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lowmem_compile.planner.program import Op

MOST_FUSED = 64
MANY_READS, COSTLY_READS, COSTLY_OPS = 8, 4, 30
HEAVY = frozenset({"exp", "sigmoid", "erf"})
"""Functions that Inductor's CPU backend does not repeat in two loops."""
SWEEPS = 10


@dataclass
class Kernel:
    """One launch: buffers read, buffers made, whether it is a loop, and where it stood in the graph."""

    reads: set[str]
    makes: list[Op]
    loop: bool
    domain: int
    first: int
    last: int
    module: str = ""
    loops: list[tuple[frozenset[str], tuple[str, ...]]] = field(default_factory=list)
    """What each of the loops fused here reads and makes."""
    columns: bool = False
    """A loop that sums over other dimensions than the last."""
    scratch: int = 0
    """Bytes that a call takes beside its results."""
    dead: set[str] = field(default_factory=set)
    """Made and read inside only: never allocated."""

    def may_overwrite(self, name: str) -> list[str]:
        """Inputs that what makes ``name`` may write into: no other loop of this kernel reads them."""
        sources = next((reads for reads, makes in self.loops if name in makes), frozenset())
        return [r for r in sorted(sources) if sum(r in reads for reads, _ in self.loops) == 1]


def kernels_of(ops: Sequence[Op], outputs: frozenset[str]) -> list[Kernel]:
    """The kernels of a graph in the order in which they run."""
    units = realised(with_addmm(ops), outputs)
    fused = _Fusion(units).run()
    makers = {op.name: k for k in fused for op in k.makes}
    readers: dict[str, int] = Counter(name for k in fused for name in k.reads)
    for kernel in fused:
        inside = {op.name for op in kernel.makes} & kernel.reads
        kernel.dead = {name for name in inside if readers[name] == 1 and name not in outputs}
    return _ordered(fused, makers)


def with_addmm(ops: Sequence[Op]) -> list[Op]:
    """Matrix products whose only reader adds them to a tensor of the same size are one call with that addition."""
    by_name = {op.name: op for op in ops}
    readers = Counter(name for op in ops for name in op.reads)
    gone: set[str] = set()
    taken: dict[str, Op] = {}
    for op in ops:
        if op.target != "add" or len(op.reads) != 2:
            continue
        for product, other in (op.reads, op.reads[::-1]):
            mm, addend = by_name[product], by_name[other]
            alike = (mm.nbytes, mm.dtype) == (op.nbytes, op.dtype) == (addend.nbytes, addend.dtype)
            if mm.target == "mm" and readers[product] == 1 and alike and product in op.adds:
                gone.add(product)
                taken[op.name] = replace(op, target="addmm", role="extern", reads=(other, *mm.reads), flops=mm.flops)
                break
    return [taken.get(op.name, op) for op in ops if op.name not in gone]


def realised(ops: Sequence[Op], outputs: frozenset[str]) -> list[Kernel]:
    """One kernel for each value that Inductor's lowering puts into a buffer, in graph order."""
    parts: dict[str, list[Op]] = defaultdict(list)
    readers: dict[str, set[str]] = defaultdict(set)
    for op in ops:
        if op.role == "part":
            parts[op.reads[0]].append(op)
        for name in op.reads:
            readers[name].add(op.name)
    lowering = _Lowering()
    for index, op in enumerate(ops):
        if op.role == "input":
            lowering.buffers.add(op.name)
        elif op.role in ("part", "nothing"):
            continue
        elif op.role == "pointwise":
            lowering.inline(op, index)
            several = len(readers[op.name]) > 1
            if op.name in outputs or lowering.wants_buffer(op, several=several):
                lowering.realise(op.name)
        else:
            if op.role != "reduction":
                for name in op.reads:
                    lowering.realise(name)
            lowering.emit(op, index, parts[op.name] or [op])
    return sorted(lowering.kernels, key=lambda k: k.first)


class _Lowering:
    """Pointwise values that are no buffers yet, and the kernels of those that are."""

    def __init__(self) -> None:
        self.buffers: set[str] = set()
        self.values: dict[str, tuple[Op, int, frozenset[str], frozenset[str], bool]] = {}
        """Of each: operation, place, buffers read, operations done to compute it, whether one of them is heavy."""
        self.kernels: list[Kernel] = []

    def sources(self, op: Op) -> frozenset[str]:
        found: set[str] = set()
        for name in op.reads:
            if name in self.values:
                found |= self.values[name][2]
            elif name in self.buffers:
                found.add(name)
        return frozenset(found)

    def inline(self, op: Op, index: int) -> None:
        below = [self.values[name] for name in op.reads if name in self.values]
        heavy = op.target in HEAVY or any(v[4] for v in below)
        work = frozenset({op.name}.union(*(v[3] for v in below)))
        self.values[op.name] = (op, index, self.sources(op), work, heavy)

    def wants_buffer(self, op: Op, *, several: bool) -> bool:
        _, _, sources, work, heavy = self.values[op.name]
        return len(sources) > MANY_READS or (several and (len(sources) > COSTLY_READS or len(work) > COSTLY_OPS or heavy))

    def realise(self, name: str) -> None:
        if name in self.values:
            op, index, sources, _, _ = self.values.pop(name)
            self.buffers.add(name)
            self.add(sources, [op], True, op, index)

    def emit(self, op: Op, index: int, results: Sequence[Op]) -> None:
        loop = op.role in ("reduction", "scatter")
        self.add(self.sources(op), results, loop, op, index)
        self.buffers.update(r.name for r in results)

    def add(self, reads: frozenset[str], makes: Sequence[Op], loop: bool, op: Op, index: int) -> None:
        one = (reads, tuple(made.name for made in makes))
        kernel = Kernel(set(reads), list(makes), loop, op.domain, index, index, op.module, [one], op.columns, op.scratch)
        self.kernels.append(kernel)


class _Fusion:
    """Fuse loops until nothing changes. Kernels are known by their number in graph order; a fused one keeps the lower."""

    def __init__(self, kernels: list[Kernel]) -> None:
        self.kernels: dict[int, Kernel] = dict(enumerate(kernels))
        self.makers = {op.name: i for i, k in self.kernels.items() for op in k.makes}
        self.sizes = {op.name: op.nbytes for k in kernels for op in k.makes}
        self.readers: dict[str, set[int]] = defaultdict(set)
        for i, kernel in self.kernels.items():
            for name in kernel.reads:
                self.readers[name].add(i)
        self.after: dict[int, set[int]] = {
            i: {j for op in k.makes for j in self.readers[op.name] if j != i} for i, k in self.kernels.items()
        }
        self.below: dict[int, int] = {}
        """For each kernel a bit for every one that needs it, directly or not, and for itself."""
        for i in reversed(self.kernels):
            self.below[i] = 1 << i
            for j in self.after[i]:
                self.below[i] |= self.below[j]

    def run(self) -> list[Kernel]:
        for _ in range(SWEEPS):
            if not self._sweep():
                break
        return list(self.kernels.values())

    def _sweep(self) -> bool:
        shared: Counter[tuple[int, int]] = Counter()
        for name in set(self.readers) | set(self.makers):
            group = set(self.readers[name] | ({self.makers[name]} if name in self.makers else set()))
            loops = sorted(i for i in group if self.kernels[i].loop)
            if len(loops) > 16:  # a buffer that everything reads (positions, a mask) brings nothing together
                continue
            for at, i in enumerate(loops):
                for j in loops[at + 1 :]:
                    shared[i, j] += self.sizes.get(name, 1)
        changed = False
        into: dict[int, int] = {}

        def now(i: int) -> int:
            while i in into:
                i = into[i]
            return i

        for (i, j), _ in shared.most_common():
            a, b = sorted((now(i), now(j)))
            if a != b and self._may_fuse(a, b):
                self._fuse(a, b)
                into[b] = a
                changed = True
        return changed

    def _may_fuse(self, a: int, b: int) -> bool:
        one, two = self.kernels[a], self.kernels[b]
        if one.domain != two.domain or one.columns != two.columns or len(one.loops) + len(two.loops) > MOST_FUSED:
            return False
        return not self._detour(a, b) and not self._detour(b, a)

    def _detour(self, a: int, b: int) -> bool:
        """Whether something that needs ``a`` is needed by ``b``."""
        return any(i != b and self.below[i] >> b & 1 for i in self.after[a])

    def _fuse(self, a: int, b: int) -> None:
        one, two = self.kernels[a], self.kernels.pop(b)
        for name in two.reads:
            self.readers[name].discard(b)
            self.readers[name].add(a)
        for op in two.makes:
            self.makers[op.name] = a
        one.reads |= two.reads
        one.makes += two.makes
        one.first, one.last = min(one.first, two.first), max(one.last, two.last)
        one.loops += two.loops
        self.after[a] = (self.after[a] | self.after.pop(b)) - {a, b}
        for later in self.after.values():
            if b in later:
                later.discard(b)
                later.add(a)
        both = self.below[a] | self.below.pop(b)
        for i, mask in self.below.items():
            if mask >> a & 1 or mask >> b & 1:
                self.below[i] = mask | both


def _ordered(kernels: list[Kernel], makers: dict[str, Kernel]) -> list[Kernel]:
    """Each as early as what it reads allows, else as they stood in the graph."""
    number = {id(k): i for i, k in enumerate(kernels)}
    before = [{number[id(makers[n])] for n in k.reads if n in makers} - {number[id(k)]} for k in kernels]
    after: dict[int, list[int]] = defaultdict(list)
    for i, needed in enumerate(before):
        for j in needed:
            after[j].append(i)
    waiting = [len(needed) for needed in before]
    ready = [(kernels[i].first, i) for i, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    order: list[Kernel] = []
    while ready:
        _, i = heapq.heappop(ready)
        order.append(kernels[i])
        for j in after[i]:
            waiting[j] -= 1
            if not waiting[j]:
                heapq.heappush(ready, (kernels[j].first, j))
    if len(order) != len(kernels):
        raise AssertionError("fusion made a cycle")
    return order
