"""Inductor's Triton code of a model for a GPU that is not there.

The model is traced and partitioned on the CPU. Where Inductor would compile the forward and the backward graph, both are
moved to a fake ``cuda:0`` and lowered for the stub; the generated wrapper's source is kept and, if a worker is given, run by
it on the CPU tensors of the call. Operations that PyTorch chooses by device before partitioning (flash attention) are
therefore the CPU's.
"""

from __future__ import annotations

import functools
import re
import types
import unittest.mock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from lowmem_compile._torch import (
    FakeTensor,
    FakeTensorMode,
    code_generation,
    compile_fx,
    compile_fx_inner,
    copy_graph,
    detect_fake_mode,
    inductor_config,
)
from lowmem_compile.gpu_free.steps import Step, steps_of
from lowmem_compile.gpu_free.stub import stub_device

DEVICE = torch.device("cuda", 0)
KERNEL = re.compile(r"async_compile\.triton\('([^']+)', '''(.*?)''', device_str='cuda'", re.DOTALL)
EXTERN = re.compile(r"(?:extern_kernels\.(\w+)|torch\.ops\.(\w+\.\w+)\.\w+)\(")
CALL = re.compile(r"^\s+(?:(\w+)\.run|\w+ = torch\.ops\.(\w+\.\w+)\.\w+)\(", re.MULTILINE)
OWN = {"lowmem.encode_many": "encode_many_kernel", "lowmem.decode_many": "decode_many_kernel"}
"""Our operations that launch one Triton function each."""


class Runs(Protocol):
    """Something that runs the source of a wrapper on CPU tensors."""

    def run(self, source: str, args: Sequence[Any]) -> list[Any]: ...


@dataclass(frozen=True)
class Code:
    """The generated code of one graph.

    Attributes:
        kind: ``"forward"``, ``"backward"`` or ``"inference"``.
        source: Inductor's wrapper, Python.
        steps: its launches, with the bytes that each moves as Inductor counts them from shapes.
    """

    kind: str
    source: str
    steps: tuple[Step, ...] = ()

    @property
    def kernels(self) -> dict[str, str]:
        """The source of each Triton kernel by name; kernels of one source are one."""
        return dict(KERNEL.findall(self.source))

    @property
    def launches(self) -> list[str]:
        """The Triton kernels in the order in which one call launches them, repeats included; ours by the function's name."""
        called = [a or OWN.get(b, "") for a, b in CALL.findall(self.source)]
        return [name for name in called if name in self.kernels or name in OWN.values()]

    @property
    def extern(self) -> list[str]:
        """The library calls of the wrapper, in order."""
        found = [a or b for a, b in EXTERN.findall(self.source)]
        return [name for name in found if name != "inductor._reinterpret_tensor" and name not in OWN]


@dataclass
class Generated:
    """A compiled callable and the code that was generated for it so far (the backward's at the first backward pass)."""

    call: Callable[..., Any]
    codes: list[Code] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def code(self, kind: str) -> Code:
        """The only code of a kind."""
        found = [c for c in self.codes if c.kind == kind]
        if len(found) != 1:
            raise ValueError(f"{len(found)} {kind} graphs were compiled, not one")
        return found[0]


def generate(
    model: Callable[..., Any], worker: Runs | None = None, *, backend: str = "lowmem", options: Mapping[str, Any] | None = None
) -> Generated:
    """``model`` compiled for the stub with ``backend`` (``"lowmem"`` or ``"inductor"``).

    Calling the result runs the generated code with ``worker`` on CPU tensors, forward and backward. Without a worker the
    graphs run as they were captured, operation by operation: the code is generated all the same.
    """
    from lowmem_compile.backend import lowmem

    generated = Generated(model)
    inner: Any = functools.partial(_inner, generated.codes, worker)

    def call_backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        if worker is not None and any(isinstance(i, FakeTensor) for i in example_inputs):
            raise ValueError("fake tensors have no data that a worker could run on")
        with inductor_config.patch(compile_threads=1, force_disable_caches=True):
            if backend == "lowmem":
                given = {"report": False, "strict": True, **(options or {})}
                return lowmem(gm, example_inputs, options=given, inner_compile=inner, device=DEVICE.type)
            return compile_fx(gm, example_inputs, inner_compile=inner, config_patches=dict(options or {}))

    generated.call = torch.compile(model, backend=call_backend)
    return generated


def _inner(
    codes: list[Code], worker: Runs | None, gm: fx.GraphModule, _example_inputs: Sequence[Any], **kwargs: Any
) -> Callable[..., Any]:
    kind = "backward" if kwargs.get("is_backward") else ("inference" if kwargs.get("is_inference") else "forward")
    source, steps = wrapper_source(gm, **kwargs)
    codes.append(Code(kind, source, steps))

    def run(args: list[Any]) -> Any:
        given = list(args)
        args.clear()
        return gm.forward(*given) if worker is None else worker.run(source, given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def wrapper_source(gm: fx.GraphModule, **kwargs: Any) -> tuple[str, tuple[Step, ...]]:
    """The wrapper that Inductor generates for an ATen graph traced on the CPU, as if its tensors were on the stub."""
    private = code_generation()
    kept = {k: v for k, v in kwargs.items() if k not in ("cudagraphs", "boxed_forward_device_index")}
    moved, inputs = on_stub(gm)
    found: list[tuple[str, tuple[Step, ...]]] = []

    def keep(lowering: Any) -> types.SimpleNamespace:
        code = lowering.codegen()[0]
        found.append((getattr(code, "value", code), steps_of(lowering)))
        lowering.cache_key, lowering.cache_path, lowering.cache_linemap = "stub", "/dev/null", []
        return types.SimpleNamespace(call=None, __file__="/dev/null", key="stub")

    outer = private.TracingContext.try_get()
    own = private.TracingContext(detect_fake_mode(inputs))  # some fields may be set only once a compile
    own.output_strides = []
    stop = unittest.mock.patch.object(private.graph.GraphLowering, "compile_to_module", keep)
    with stub_device(), stop, private.tracing(own), inductor_config.patch(compile_threads=1, force_disable_caches=True):
        compile_fx_inner(moved, inputs, **kept)
    if outer is not None and outer.output_strides is not None:
        outer.output_strides.extend(own.output_strides)  # the backward is compiled for the layouts that the forward chose
    ((source, steps),) = found
    return source, steps


def on_stub(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of the graph on fake ``cuda:0``, and fake inputs for it."""
    values = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    mode = detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)]) or FakeTensorMode()
    moved = fx.GraphModule(gm, copy_graph(gm.graph))

    def device(value: Any) -> Any:
        return DEVICE if isinstance(value, torch.device) and value.type == "cpu" else value

    def tensor(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=DEVICE)

    with mode:
        inputs = [tensor(v) for v in values]
        given = iter(inputs)
        for node in moved.graph.nodes:
            node.args = fx.node.map_aggregate(node.args, device)
            node.kwargs = fx.node.map_aggregate(node.kwargs, device)
            if node.op == "placeholder":
                node.meta["val"] = next(given)
            elif "val" in node.meta:
                node.meta["val"] = fx.node.map_aggregate(node.meta["val"], tensor)
    return moved, inputs
