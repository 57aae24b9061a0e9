"""What eager PyTorch would save for the same graph, found by running it once with fake tensors.

``torch.autograd.graph.saved_tensors_hooks`` sees every tensor that autograd packs; distinct storages are counted, without
parameters, buffers and inputs. No memory is allocated and no kernel runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lowmem_compile._torch import FakeTensor, FakeTensorMode
from lowmem_compile.graph import concrete, is_static, module_path, shape_names, source_line
from lowmem_compile.reporting.model import Kind, SavedTensor, TimelinePoint


def eager_memory(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[tuple[SavedTensor, ...], tuple[TimelinePoint, ...]]:
    """Saved tensors and simulated timeline of running a Dynamo graph eagerly, forward and backward."""
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    values = [n.meta.get("example_value", e) for n, e in zip(nodes, example_inputs, strict=True)]
    fake_mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    if fake_mode is None:
        return (), ()
    inputs: list[Any] = []
    for value, given in zip(values, example_inputs, strict=True):
        fresh = value
        if isinstance(value, FakeTensor) and not (value.dim() == 0 and value.device.type == "cpu" and not given.requires_grad):
            # A number that Dynamo made an input (a dropout rate, with dynamic shapes) is kept: its symbol hangs on the object.
            with fake_mode:
                fresh = value.detach().clone() if not _overlapping(value) else value.detach()
            fresh.requires_grad_(bool(getattr(given, "requires_grad", False)))
        inputs.append(fresh)
    run = _Recording(gm, fake_mode)
    with fake_mode, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(run.pack, lambda t: t):
        run.run(*inputs)
    return tuple(run.rows), run.timeline()


class _Recording(fx.Interpreter):
    """Interpreter that knows which node is running when autograd packs a tensor."""

    def __init__(self, gm: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.fake_mode = fake_mode
        self.current: fx.Node | None = None
        self.inputs: set[int] = set()
        self.seen: set[int] = set()
        self.keep: list[torch.Tensor] = []
        self.rows: list[SavedTensor] = []
        self.steps: list[tuple[str, int, int, int]] = []
        self.last_use: dict[fx.Node, fx.Node] = {}
        for node in gm.graph.nodes:
            for source in node.all_input_nodes:
                self.last_use[source] = node

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self.fake_mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        before = len(self.rows)
        result = super().run_node(n)
        if n.op in ("placeholder", "get_attr") and isinstance(result, torch.Tensor):
            self.inputs.add(_storage(result))
        elif isinstance(result, torch.Tensor):
            saved = sum(r.nbytes for r in self.rows[before:])
            size = concrete(result.numel()) * result.element_size()
            self.steps.append((module_path(n) or n.name, saved, size, self.gradients(n)))
        return result

    def gradients(self, node: fx.Node) -> int:
        """Bytes of the parameter gradients that the backward of this node is the first to make."""
        made = [i for i in node.all_input_nodes if i.op == "placeholder" and self.last_use[i] is node]
        values = [self.env[i] for i in made]
        return sum(concrete(v.numel()) * v.element_size() for v in values if isinstance(v, torch.Tensor) and v.requires_grad)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        key = _storage(tensor)
        node = self.current
        if key not in self.inputs and key not in self.seen and node is not None:
            self.seen.add(key)
            self.keep.append(tensor)
            statistic = tensor.dim() > 0 and tensor.shape[-1] == 1
            kind: Kind = "mask" if tensor.dtype == torch.bool else "statistic" if statistic else "activation"
            self.rows.append(
                SavedTensor(
                    name=node.name,
                    op=str(getattr(node.target, "__name__", node.target)),
                    shape=shape_names(tensor),
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    nbytes=_storage_bytes(tensor),
                    module=module_path(node),
                    source=source_line(node),
                    kind=kind if tensor.dtype.is_floating_point or kind == "mask" else "index",
                    decision="exact",
                )
            )
        return tensor

    def timeline(self) -> tuple[TimelinePoint, ...]:
        """Saved bytes and parameter gradients so far, plus the current output (in backward: two gradients of its size)."""
        points: list[TimelinePoint] = []
        total = 0
        for label, saved, out, _ in self.steps:
            total += saved
            points.append(TimelinePoint(label, "forward", total + out))
        for label, saved, out, gradient in reversed(self.steps):
            total += gradient
            points.append(TimelinePoint(label, "backward", total + 2 * out))
            total -= saved
        return tuple(points)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _storage_bytes(tensor: torch.Tensor) -> int:
    return concrete(tensor.untyped_storage().nbytes())


def _overlapping(tensor: torch.Tensor) -> bool:
    return any(is_static(stride, 0) for stride in tensor.stride())
