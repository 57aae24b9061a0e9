"""The code that Inductor generates for a partition, and the memory of a step by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lowmem_compile._torch import compile_fx_inner, compiled_source, generated_source
from lowmem_compile.generation import cheaper
from lowmem_compile.graph import concrete, copy_module, is_tangent, placeholders
from lowmem_compile.peak_estimate import better_peak_estimate
from lowmem_compile.planner.replay import Code, TensorSpec, replay
from lowmem_compile.reporting.model import Phase, TimelinePoint
from lowmem_compile.saved import Partition
from lowmem_compile.whole_loops import whole_loops


def specs_of(graph: fx.Graph) -> tuple[TensorSpec | int | float | None, ...]:
    """What a graph is called with: its placeholders' tensors and sizes, symbolic ones by their hint."""
    return tuple(_spec(n.meta.get("val"), tangent=is_tangent(n)) for n in placeholders(graph))


def _spec(value: Any, *, tangent: bool) -> TensorSpec | int | float | None:
    if isinstance(value, torch.Tensor):
        size, stride = tuple(map(concrete, value.size())), tuple(map(concrete, value.stride()))
        return TensorSpec(size, stride, value.dtype, value.device, tangent)
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return concrete(value)
    return value if isinstance(value, float) else None


def followed(observe: Callable[[Phase, Code | None], None]) -> Callable[..., Any]:
    """Inductor's compile of one ATen graph; of training graphs ``observe`` is told the code, ``None`` where it is not Python."""

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        specs = specs_of(gm.graph)  # before Inductor changes the graph
        result = compile_fx_inner(gm, example_inputs, **kwargs)
        if not kwargs.get("is_inference"):
            found = compiled_source(result)
            observe(
                "backward" if kwargs.get("is_backward") else "forward", None if found is None else Code(found[0], specs, found[1])
            )
        return result

    return inner


def generated_timeline(partition: Partition, patches: Mapping[str, Any]) -> tuple[TimelinePoint, ...]:
    """The timeline of a step by the code that Inductor generates for a partition. Kernels are not compiled.

    Args:
        partition: forward and backward graph; not changed.
        patches: Inductor's configuration, on top of what is active.

    Raises:
        ScheduleError: a wrapper could not be followed.
    """
    codes = []
    for graph, backward in ((partition.forward, False), (partition.backward, True)):
        with cheaper(), whole_loops(), better_peak_estimate():
            source, constants = generated_source(copy_module(graph), patches, is_backward=backward)
        codes.append(Code(source, specs_of(graph.graph), constants))
    return replay(codes[0], codes[1], partition.num_user_outputs)
