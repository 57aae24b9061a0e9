"""Memory of a step by the code that Inductor generated: its wrappers are run, without kernels and without memory.

A wrapper is the Python function that allocates buffers, calls kernels and libraries, and frees. Here it runs as it is, on fake
tensors: kernels are stubs, library calls compute shapes alone. What is alive is then known at each call, whatever Inductor
decided on fusion, order, reuse or writing in place. Counted is what the allocator would be asked for beyond parameters, buffers
and inputs:

- buffers and results of library calls, for as long as the wrapper holds them; saved tensors into the backward pass;
- a library call's scratch memory, as long as it runs (:mod:`lowmem_compile.planner.scratch`);
- what the forward pass returns to the user, until the backward pass has ended, and the gradients that the backward pass is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.utils._pytree import tree_leaves

from lowmem_compile._torch import FakeTensorMode, TorchDispatchMode, extern_kernels, storage_key, stub_kernels
from lowmem_compile.errors import ScheduleError
from lowmem_compile.planner.scratch import call_scratch
from lowmem_compile.reporting.model import Phase, TimelinePoint

BLOCK = "_lowmem_block"
"""Attribute of a fake tensor that holds its block of memory."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a graph is given; ``tangent``: a gradient, made for the call and freed when it was last read."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    tangent: bool = False


@dataclass(frozen=True)
class Code:
    """The generated wrapper of one graph.

    Attributes:
        source: Python.
        inputs: what it is called with, in order: tensors and sizes.
        constants: tensors that the source names and does not define.
    """

    source: str
    inputs: tuple[TensorSpec | int | float | None, ...]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)


def replay(forward: Code | None, backward: Code | None, user_outputs: int | None = None) -> tuple[TimelinePoint, ...]:
    """The bytes alive at each call of a step, forward then backward.

    Args:
        forward: its wrapper; ``None`` where that is not Python.
        backward: likewise.
        user_outputs: how many of the forward's results are the user's; the tensors behind them go to the backward. Without, as
            many go there as it takes.

    Raises:
        ScheduleError: a wrapper does something that cannot be followed.
    """
    if forward is None or backward is None:
        raise ScheduleError("Inductor generated a wrapper that is not Python (cpp_wrapper?)")
    ledger = _Ledger()
    with FakeTensorMode(), _Watch(ledger), torch.no_grad():
        results = _call(forward, ledger, None)
        ledger.end()
        if user_outputs is None:
            user_outputs = len(results) - sum(not (isinstance(i, TensorSpec) and i.tangent) for i in backward.inputs)
        kept = results[:user_outputs]
        saved = [r for r in results[user_outputs:] if isinstance(r, torch.Tensor)][::-1]
        del results
        ledger.begin("backward")
        gradients = _call(backward, ledger, saved)
        if saved:
            raise ScheduleError(f"the backward graph takes {len(saved)} saved tensors fewer than the forward graph returns")
        ledger.end()
        del gradients, kept
    return tuple(ledger.points)


class _Ledger:
    """Bytes alive, and a point for each call."""

    def __init__(self) -> None:
        self.live = 0
        self.phase: Phase = "forward"
        self.points: list[TimelinePoint] = []

    def begin(self, phase: Phase) -> None:
        self.phase = phase
        self.point(f"start of {phase}")

    def end(self) -> None:
        self.point(f"end of {self.phase}")

    def point(self, label: str, scratch: int = 0) -> None:
        self.points.append(TimelinePoint(label, self.phase, self.live + scratch))


class _Block:
    """A piece of memory: alive as long as a tensor refers to it."""

    __slots__ = ("ledger", "size")

    def __init__(self, ledger: _Ledger, size: int) -> None:
        self.ledger, self.size = ledger, size
        ledger.live += size

    def __del__(self) -> None:
        self.ledger.live -= self.size


class _Watch(TorchDispatchMode):
    """Gives the results of operations their blocks: that of an argument for a view of it, a new one for all others."""

    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_key(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        made = False
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or hasattr(tensor, BLOCK):
                continue
            source = given.get(storage_key(tensor))
            made |= source is None
            setattr(tensor, BLOCK, _Block(self.ledger, nbytes(tensor)) if source is None else getattr(source, BLOCK, None))
            given.setdefault(storage_key(tensor), tensor)
        if made and func is not torch.ops.aten.empty_strided.default:
            self.ledger.point(func._schema.name.split("::")[-1], call_scratch(func, args, kwargs))
        return result


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of the whole storage."""
    return tensor.untyped_storage().nbytes()


class _Kernel:
    """Stands in for a generated kernel."""

    name = "kernel"

    def __init__(self, ledger: _Ledger) -> None:
        self.ledger = ledger

    def __call__(self, *_args: Any, **_kwargs: Any) -> None:
        self.ledger.point(self.name)

    run = __call__


class _Compiler:
    """Stands in for Inductor's ``AsyncCompile`` while the source of a wrapper is read: nothing is compiled."""

    def __init__(self, ledger: _Ledger) -> None:
        self.ledger = ledger

    def __getattr__(self, _kind: str) -> Callable[..., _Kernel]:
        return lambda *_args, **_kwargs: _Kernel(self.ledger)

    def wait(self, scope: dict[str, Any]) -> None:
        for name, value in scope.items():
            if isinstance(value, _Kernel):
                value.name = name


class _Extern:
    """Stands in for Inductor's ``extern_kernels``: with ``out`` a library call allocates nothing but its scratch memory."""

    def __init__(self, ledger: _Ledger) -> None:
        self.ledger = ledger

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "out" not in kwargs:
                return getattr(extern_kernels(), name)(*args, **kwargs)
            self.ledger.point(name)
            return kwargs["out"]

        return call


def _call(code: Code, ledger: _Ledger, saved: list[torch.Tensor] | None) -> list[Any]:
    """Run a wrapper; its results. ``saved``: what the forward kept, the first one last; taken from the list."""
    scope: dict[str, Any] = {"__name__": "lowmem_replayed"}
    try:
        with stub_kernels(lambda: _Compiler(ledger)):
            exec(compile(code.source, "<generated wrapper>", "exec"), scope)  # noqa: S102 (what Inductor itself would run)
        scope.update(_stand_ins(scope, ledger))
        scope.update(code.constants)
        call = cast("Callable[[list[Any]], Any]", scope["call"])
        given = [_given(spec, saved) for spec in code.inputs]
        return list(call(given))
    except Exception as error:
        raise ScheduleError(f"the generated wrapper could not be followed: {type(error).__name__}: {error}") from error


def _stand_ins(scope: Mapping[str, Any], ledger: _Ledger) -> dict[str, Any]:
    """What a wrapper calls to get and check memory, on fake tensors."""
    found: dict[str, Any] = {
        "assert_size_stride": lambda *_: None,
        "assert_alignment": lambda *_: None,
        "reinterpret_tensor": _view,
        "extern_kernels": _Extern(ledger),
    }
    for name in scope:
        if name.startswith("empty_strided_"):
            found[name] = _allocator(name.split("_")[2])
    return found


def _allocator(device: str) -> Callable[..., torch.Tensor]:
    def allocate(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    return allocate


def _view(tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> torch.Tensor:
    return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


def _given(spec: TensorSpec | float | None, saved: list[torch.Tensor] | None) -> Any:
    if not isinstance(spec, TensorSpec):
        return spec
    if not spec.tangent and saved is not None:
        if not saved:
            raise ScheduleError("the backward graph takes more saved tensors than the forward graph returns")
        return saved.pop()
    tensor = torch.empty_strided(spec.size, spec.stride, dtype=spec.dtype, device=spec.device)
    if not spec.tangent:  # it is there anyway
        setattr(tensor, BLOCK, None)
    return tensor
