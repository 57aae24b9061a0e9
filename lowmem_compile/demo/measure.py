"""How much memory a training step needs, measured the same way for eager code and for every compile backend.

Saved bytes come from autograd itself, peak bytes from the allocator. Neither asks a backend what it believes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

_BACKWARD_MARK = "lowmem::backward"


@dataclass(frozen=True)
class SavedStorage:
    """One storage that autograd keeps for the backward pass, and the first tensor seen in it."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    is_output: bool


@dataclass(frozen=True)
class SavedBytes:
    """What a forward pass keeps for its backward pass: distinct storages, largest first."""

    storages: tuple[SavedStorage, ...]

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return sum(s.nbytes for s in self.storages)

    @property
    def intermediate(self) -> int:
        """Bytes of those that are no output of the measured function: what a backend can count."""
        return sum(s.nbytes for s in self.storages if not s.is_output)


@dataclass(frozen=True)
class PeakBytes:
    """What the CPU allocator held during a step, above what was allocated before it, in bytes.

    ``peak`` is the maximum; ``after_forward`` what was held when the backward pass began; ``end`` what stayed
    (gradients and loss). Parameters, inputs and optimizer state exist before the step and are not in it.
    """

    peak: int
    after_forward: int
    end: int


def saved_bytes(
    forward: Callable[[], Any],
    *,
    exclude: Iterable[Tensor],
    outputs: Callable[[Any], Iterable[Tensor]] | None = None,
) -> SavedBytes:
    """Run ``forward`` once and count the distinct storages that its autograd graph holds.

    Works for eager code and for any AOTAutograd-based backend: a compiled graph is one ``autograd.Function``,
    whose saved tensors pass through ``saved_tensors_hooks`` like all others. Tensors that a Function keeps on
    its context without ``save_for_backward`` are found by walking the graph. A storage counts in full even if
    only a view of it is kept, because it is kept in full. What non-reentrant checkpointing drops is not
    counted, what it keeps is.

    Args:
        forward: returns the loss, or a tuple whose first entry is the loss. Compile (call it once) before
            measuring.
        exclude: tensors whose storages exist anyway: parameters, buffers, inputs.
        outputs: picks, from what ``forward`` returns, the tensors to mark as outputs.
    """
    seen: dict[int, tuple[Tensor, int]] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                # The tensor is kept until the end, so that its address is not given to another.
                seen.setdefault(storage.data_ptr(), (tensor, storage.nbytes()))
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    loss = result[0] if isinstance(result, tuple) else result
    for tensor in _kept_on_contexts(loss):
        note(tensor)
    outside = {t.untyped_storage().data_ptr() for t in exclude}
    made = {t.untyped_storage().data_ptr() for t in (outputs(result) if outputs else ())}
    storages = [
        SavedStorage(tuple(t.shape), str(t.dtype).removeprefix("torch."), nbytes, pointer in made)
        for pointer, (t, nbytes) in seen.items()
        if pointer not in outside
    ]
    return SavedBytes(tuple(sorted(storages, key=lambda s: -s.nbytes)))


def resident_tensors(model: nn.Module, batch: Iterable[Tensor]) -> list[Tensor]:
    """Parameters, buffers and inputs: what :func:`saved_bytes` should leave out."""
    return [*model.parameters(), *model.buffers(), *batch]


def peak_bytes(forward: Callable[[], Tensor], backward: Callable[[Tensor], Any] = torch.Tensor.backward) -> PeakBytes:
    """Run one step under the profiler and add up every allocation and release of the CPU allocator.

    ``forward`` returns the loss. Compile (call it once) and clear the gradients before measuring; releases of
    blocks older than the step are not seen. Scratch memory that oneDNN or a generated kernel takes outside
    PyTorch's allocator is not seen either, for no variant.
    """
    gc.collect()
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _without_profiler_noise():
        profiler.start()
    try:
        loss = forward()
        with torch.profiler.record_function(_BACKWARD_MARK):
            pass
        backward(loss)
    finally:
        with _without_profiler_noise():
            profiler.stop()
    assert profiler.profiler is not None
    recorded: Any = profiler.profiler.kineto_results
    events = recorded.events()
    middle = next(e.start_ns() for e in events if e.name() == _BACKWARD_MARK)
    return _running_total([(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"], middle)


def _running_total(events: list[tuple[int, int]], middle: int) -> PeakBytes:
    """Peak, value at ``middle`` and end of the sum of (time, bytes) events; equal times keep their order."""
    total = peak = after_forward = 0
    for time, nbytes in sorted(events, key=lambda event: event[0]):
        total += nbytes
        peak = max(peak, total)
        if time <= middle:
            after_forward = total
    return PeakBytes(peak, after_forward, total)


def _kept_on_contexts(loss: Tensor) -> Iterator[Tensor]:
    """Tensors in attributes of the Python autograd contexts behind ``loss``."""
    todo: list[Node | None] = [loss.grad_fn]
    visited: set[Node] = set()
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        todo.extend(parent for parent, _ in node.next_functions)
        for value in getattr(node, "__dict__", {}).values():
            yield from _tensors_in(value)


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


@contextlib.contextmanager
def _without_profiler_noise() -> Iterator[None]:
    """Drop the profiler's own "USDT" lines, written straight to file descriptor 2; pass the rest on."""
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(original, 2)
            os.close(original)
            captured.seek(0)
            for line in captured.read().splitlines(keepends=True):
                if not line.startswith(b"USDT:"):
                    os.write(2, line)
