"""The launches of a generated graph and the bytes each must move, from shapes alone: no interpreter, so any size.

*Moved* is Inductor's own count: each buffer that a launch reads or writes, once. A *loop* is a Triton kernel, ours included; the
rest are library calls (matrix products, attention). The *least* that the loops of a graph can move, given its library calls: what
a library call made or the graph was given and a loop reads, once; what a loop makes and a library call reads or the graph
returns, once. All else could stay in registers if one kernel did all the work between two library calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

BANDWIDTH = 3.35e12
"""Bytes a second of an H100 SXM's memory."""
LIBRARY = ("mm", "addmm", "bmm", "baddbmm", "attention", "convolution")
"""Parts of names of operations that eager PyTorch gives to a library."""


@dataclass(frozen=True)
class Step:
    """One launch.

    Attributes:
        name: what it computes.
        loop: a Triton kernel, not a library call.
        reads: bytes of each buffer it reads.
        writes: bytes of each buffer it writes.
        returned: those it writes that the graph returns.
    """

    name: str
    loop: bool
    reads: Mapping[str, int]
    writes: Mapping[str, int]
    returned: frozenset[str] = frozenset()

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


def steps_of(lowering: Any) -> tuple[Step, ...]:
    """The launches of a graph that Inductor has scheduled."""
    returned = frozenset(lowering.get_output_names())
    found = []
    for node in lowering.scheduler.nodes:
        reads, writes = _accesses(node)
        if not reads and not writes:
            continue
        target = str(getattr(node.node, "op_overload", None) or getattr(node.node, "python_kernel_name", None) or "")
        own = target.startswith("lowmem.") and "_many" in target
        name = target if node.is_extern() else node.get_name()
        found.append(Step(name, own or not node.is_extern(), reads, writes, returned & writes.keys()))
    return tuple(found)


def _accesses(node: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that a launch reads and writes, by buffer; of a launch that several kernels share, those of its parts."""
    reads: dict[str, int] = {}
    writes: dict[str, int] = {}
    for part in node.snodes if node.is_foreach() else [node]:
        given = part.get_read_write_buffer_accesses(include_reads=True, include_writes=False)
        reads |= {name: size for name, size in given.items() if name not in part.get_buffer_names()}
        writes |= part.get_read_write_buffer_accesses(include_reads=False, include_writes=True)
    return reads, writes


def moved(steps: Sequence[Step], *, loops: bool = True) -> int:
    """Bytes that the loops, or the library calls, read and write."""
    return sum(step.moved for step in steps if step.loop is loops)


def least(steps: Sequence[Step]) -> int:
    """The least that the loops can move (see the docstring of this file)."""
    by_loop = {name for step in steps if step.loop for name in step.writes}
    by_library = {name for step in steps if not step.loop for name in step.reads}
    read: dict[str, int] = {}
    written: dict[str, int] = {}
    for step in steps:
        if step.loop:
            read |= {n: b for n, b in step.reads.items() if n not in by_loop}
            written |= {n: b for n, b in step.writes.items() if n in by_library or n in step.returned}
    return sum(read.values()) + sum(written.values())


class Eager(TorchDispatchMode):
    """Counts what eager PyTorch launches: each operation reads its inputs and writes its results, views excepted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = _sizes((args, kwargs))
        made = _sizes(result)
        name = str(func.overloadpacket).removeprefix("aten.")
        if not func.is_view and not name.startswith(("prim.", "_unsafe_view", "empty", "detach", "new_empty")):
            library = any(part in name for part in LIBRARY)
            self.steps.append(Step(name, not library, given, made))
        return result


def _sizes(value: Any) -> dict[str, int]:
    tensors = [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
    return {str(id(t)): t.numel() * t.element_size() for t in tensors}


def eager(model: nn.Module, x: torch.Tensor) -> list[Step]:
    """The launches of a training step of eager PyTorch; the model and x may be fake."""
    counted = Eager()
    with counted:
        loss_of(model(x)).backward()
    return counted.steps


def loss_of(y: torch.Tensor) -> torch.Tensor:
    """A scalar that every output takes part in."""
    return y.float().square().mean()
