"""The one door to private torch: every name of ``torch._inductor``, ``torch._functorch``, ``torch._dynamo`` that lowmem uses.

Nothing else in the package imports a private torch module (tested). Checked with torch 2.13; names that differ
in 2.14 get a shim here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import unittest.mock
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch._functorch.config as functorch_config
import torch._functorch.partitioners as _partitioners
import torch._inductor.config as inductor_config
from torch import fx
from torch._dynamo.utils import counters as dynamo_counters
from torch._functorch.partitioners import (
    MinCutOptions,
    NodeInfo,
    default_partition,
    min_cut_rematerialization_partition,
    solve_min_cut,
)
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn, CustomSchedulerPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._logging._internal import trace_structured
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.fx.passes.graph_transform_observer import GraphTransformObserver
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "MIXED_READS",
    "CustomPartitionerFn",
    "CustomSchedulerPass",
    "FakeTensor",
    "FakeTensorMode",
    "Gathered",
    "GraphTransformObserver",
    "HigherOrderOperator",
    "LazyGraphModule",
    "MinCutOptions",
    "NodeInfo",
    "OpOverload",
    "StableDecompositions",
    "TorchDispatchMode",
    "cache_dir",
    "code_generation",
    "compile_fx",
    "compile_fx_inner",
    "default_partition",
    "detect_fake_mode",
    "dynamo_counters",
    "dynamo_explain",
    "functorch_config",
    "gathered_by_fsdp",
    "inductor_config",
    "join_in_place",
    "keep_in_memory",
    "keep_inputs_whole",
    "list_mode_options",
    "min_cut_rematerialization_partition",
    "mixed_reads_limit",
    "offer_prologue",
    "op_types",
    "optimization_hint",
    "saved_values_chooser",
    "scheduling",
    "select_decomp_table",
    "solve_min_cut",
    "trace_structured",
    "unset_fake_temporarily",
    "uses_templates",
]


def list_mode_options(mode: str) -> dict[str, Any]:
    """Inductor's config patches for a ``mode=`` string; ``KeyError`` for an unknown mode."""
    from torch._inductor import list_mode_options as modes

    table = cast("Mapping[str, dict[str, Any]]", modes())
    return dict(table[mode])


def mode_names() -> list[str]:
    """The ``mode=`` strings that Inductor knows."""
    from torch._inductor import list_mode_options as modes

    return sorted(modes())


@functools.cache
def op_types() -> Any:
    """The partitioner's op lists (recomputable, fusible, view, random, compute intensive)."""
    return _partitioners.get_default_op_list()


@contextlib.contextmanager
def saved_values_chooser(choose: Callable[[fx.Graph, NodeInfo, float], list[fx.Node]]) -> Iterator[None]:
    """Let ``choose(joint_graph, node_info, memory_budget)`` decide what min-cut saves, in this context only."""

    def patched(joint_graph: fx.Graph, node_info: NodeInfo, memory_budget: float = 1) -> list[fx.Node]:
        return choose(joint_graph, node_info, memory_budget)

    with unittest.mock.patch.object(_partitioners, "choose_saved_values_set", patched):
        yield


stock_choose_saved_values: Callable[..., list[fx.Node]] = _partitioners.choose_saved_values_set


def with_required_forward(info: NodeInfo, graph: fx.Graph, extra: Sequence[fx.Node]) -> NodeInfo:
    """``info`` with ``extra`` nodes counted as required by the forward (so that bans and tags bind them)."""
    if not extra:
        return info
    from torch.utils._ordered_set import OrderedSet

    required = OrderedSet([*info._required_fw_nodes, *extra])
    order = {n: i for i, n in enumerate(n for n in graph.nodes if n in required)}
    return dataclasses.replace(info, _required_fw_nodes=required, fw_order=order)


class StableDecompositions(dict[Any, Any]):
    """A decomposition table that pickles to a short key, so that Inductor's FX-graph cache stays usable.

    A plain dict holds pybind objects that cannot be pickled: every graph would bypass the cache.
    """

    def __init__(self, table: Mapping[Any, Any], key: str) -> None:
        super().__init__(table)
        self.key = key

    def __reduce_ex__(self, _protocol: Any) -> tuple[type[str], tuple[str]]:
        return str, (self.key,)


def dynamo_explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``torch._dynamo.explain``."""
    return torch._dynamo.explain(fn)(*args, **kwargs)


def inductor_cache_dir() -> Path:
    """The folder of Inductor's on-disk caches."""
    return Path(cache_dir())


def source_name(node: fx.Node) -> str:
    """The name Dynamo gives the origin of a placeholder, such as ``L['self']._parameters['weight']``."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        grapharg = node.meta.get("grapharg")
        source = getattr(grapharg, "source", None)
    if source is None:
        return str(node.target)
    name = source.name
    return str(name() if callable(name) else name)


def dry_run(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
    observe: Callable[..., None] | None = None,
    *,
    curve: bool = False,
    schedule: bool = False,
) -> None:
    """Compile ``model`` with lowmem up to code generation, run the graphs as captured, and throw the result away.

    ``observe`` is called with the entry and the candidates of every training graph; ``curve`` and ``schedule`` as for the
    backend. The inputs may be fake tensors.
    """
    from lowmem_compile.backend import lowmem

    def capture(gm: fx.GraphModule, _inputs: list[Any], **_: Any) -> Callable[..., Any]:
        return gm.forward

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return lowmem(gm, example_inputs, options=options, inner_compile=capture, observe=observe, curve=curve, schedule=schedule)

    torch._dynamo.reset_code_caches()
    with torch.enable_grad():
        torch.compile(model, backend=backend)(*inputs, **kwargs)


def keep_inputs_whole(*ops: Any) -> None:
    """Let Inductor write a tensor to memory as soon as it is made if one of these operations reads it.

    What is fused with work behind it reads the tensor then, and does not compute it once more.
    """
    from torch._inductor.lowering import add_needs_realized_inputs

    for op in ops:
        add_needs_realized_inputs(op)


@functools.cache
def offer_prologue(op: OpOverload) -> None:
    """Lower an identity to its input, which Inductor may then compute inside the one matrix-product template that reads it.

    That is what Inductor does for ``invoke_quant``; its rule against prologues in float32 is not asked.
    """
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V

    def lower(x: Any) -> Any:
        x.realize()
        base = x
        while not isinstance(base, ir.StorageBox):
            base = base.data
        if isinstance(base.data, ir.ComputedBuffer):
            V.graph.invoke_quant_ops.add(base.data.get_operation_name())
        return x

    register_lowering(op, type_promotion_kind=None)(lower)


MIXED_READS = "triton.mix_order_reduction_max_reads"


def mixed_reads_limit() -> int:
    """How many tensors a kernel that sums rows and columns may read; 0 where Inductor has no such limit."""
    return int(getattr(inductor_config.triton, MIXED_READS.partition(".")[2], 0))


@functools.cache
def keep_in_memory(op: OpOverload) -> None:
    """Lower an identity to its input, which Inductor then writes to memory before anything behind it reads it.

    The order of its dimensions in memory is that of the traced tensor, unless something read it before: left open, the first view
    of it would decide, and the library call that asks for the traced order would get a copy. On a CPU a view is turned into sizes
    and strides of what lies in memory: views of views leave divisions in the indices, by which loops are not vectorised.
    """
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V

    def lower(x: Any) -> Any:
        x.realize()
        strides = V.graph.current_node.meta["val"].stride()
        whole = isinstance(x.data, ir.StorageBox)  # not a view, whose buffer has an order of its own
        if whole and isinstance(x.get_layout(), ir.FlexibleLayout) and all(isinstance(s, int) for s in strides):
            ir.as_storage_and_layout(x, freeze=True, stride_order=ir.get_stride_order(strides))
        if isinstance(x.data, ir.BaseView) and not isinstance(x.data, ir.ReinterpretView) and x.get_device().type == "cpu":
            with contextlib.suppress(NotImplementedError):  # a view that has no strides stays as it is
                return ir.TensorBox(ir.ExternKernel.convert_to_reinterpret_view(x.data))
        return x

    register_lowering(op, type_promotion_kind=None)(lower)


@functools.cache
def join_in_place(op: OpOverload) -> None:
    """Lower a concatenation of a list along the last dimension but one: each part is written into its place, and never copied."""
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering

    def lower(xs: Any) -> Any:
        with inductor_config.patch(comprehensive_padding=False):  # rows of the result lie densely behind one another
            return ir.TensorBox(ir.ConcatKernel.create(xs, len(xs[0].get_size()) - 2))

    register_lowering(op, type_promotion_kind=None)(lower)


def uses_templates() -> bool:
    """Whether Inductor's autotuner chooses among Triton templates for matrix products in the compile in progress."""
    return bool(inductor_config.max_autotune or inductor_config.max_autotune_gemm) and bool(inductor_config.prologue_fusion)


def own_inductor(observe: Callable[[], None] | None = None) -> Callable[..., Any]:
    """A new backend object that compiles with Inductor; ``observe`` is called when it compiles a graph, backward too."""

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        if observe is not None:
            observe()
        return compile_fx_inner(gm, example_inputs, **kwargs)

    def own(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        return compile_fx(gm, example_inputs, inner_compile=inner)

    return own


def many_variants() -> contextlib.AbstractContextManager[Any]:
    """Let one model be compiled by many backends, without Dynamo's falling back to eager at its recompile limit."""
    config: Any = torch._dynamo.config
    patch: contextlib.AbstractContextManager[Any] = config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    return patch


@contextlib.contextmanager
def without_graph_caches() -> Iterator[None]:
    """Compile every graph anew. Compiled C++ is still taken from the disk, unlike with ``force_disable_caches``."""
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A deep copy that keeps node names and the attributes Dynamo puts on placeholders."""
    import copy
    import warnings

    with warnings.catch_warnings():  # copying a leaf of an input's structure warns of a rename inside PyTorch
        warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated", category=FutureWarning)
        new = copy.deepcopy(graph)
    for old_node, new_node in zip(graph.nodes, new.nodes, strict=True):
        if hasattr(old_node, "_dynamo_source"):
            new_node._dynamo_source = old_node._dynamo_source
    return new


def copy_dynamo_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph module that AOTAutograd accepts like the original."""
    new = fx.GraphModule(gm, copy_graph(gm.graph))
    new.meta.update(gm.meta)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        new._param_name_to_source = dict(sources)  # type: ignore[assignment]
    return new


def mark_source_unknown(node: fx.Node) -> None:
    """Tell AOTAutograd that a placeholder we added to a Dynamo graph comes from nowhere in the user's program."""
    node._dynamo_source = None


def static_fakes(tensor: torch.Tensor, others: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Fakes of a tensor with no dynamic size: in the mode of the graph's values, and in the mode of the compile in progress.

    Dynamo compiles with another fake mode than it traced with. ``AssertionError`` if the others are not fake.
    """
    traced = next((t.fake_mode for t in others if isinstance(t, FakeTensor)), None)
    compiling = detect_fake_mode(list(others))
    if traced is None or compiling is None:
        raise AssertionError("the inputs of the graph have no fake tensors")
    value = traced.from_tensor(tensor, static_shapes=True)
    return value, value if compiling is traced else compiling.from_tensor(tensor, static_shapes=True)


@contextlib.contextmanager
def own_tracing_context(example_inputs: Sequence[Any]) -> Iterator[None]:
    """A tracing context of its own (some of its fields may be set only once a compile), with the caller's fake mode."""
    from torch._guards import TracingContext, tracing

    current = TracingContext.try_get()
    mode = current.fake_mode if current is not None else detect_fake_mode(list(example_inputs))
    fresh = TracingContext(mode)
    if current is not None:
        for name in ("module_context", "guards_context", "global_context"):
            if hasattr(current, name):
                setattr(fresh, name, getattr(current, name))
    with tracing(fresh):
        yield


def at_end_of_backward(run: Callable[[], None]) -> None:
    """Call ``run`` when the backward pass that is running has ended."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(run)


def backward_pass() -> int:
    """A number for the backward pass that is running; -1 outside of one."""
    number: int = torch._C._current_graph_task_id()
    return number


class Gathered:
    """A whole parameter that FSDP2 gathered for a forward pass, and what FSDP would do with its gradient.

    The model computes with it; the optimizer holds :attr:`sharded` in its place.
    """

    def __init__(self, param: Any, group: Any) -> None:
        self._param, self._group = weakref.ref(param), weakref.ref(group)

    @property
    def sharded(self) -> torch.Tensor | None:
        """The parameter that holds the rows of this rank; ``None`` if the module is gone."""
        param = self._param()
        return None if param is None else param.sharded_param

    @property
    def reduces(self) -> bool:
        """Whether a backward pass reduces gradients (``set_requires_gradient_sync``)."""
        group = self._group()
        return group is None or bool(group.reduce_grads)

    @property
    def divisor(self) -> float | None:
        """What ``set_gradient_divide_factor`` set; ``None``: the number of ranks."""
        group = self._group()
        return None if group is None else cast("float | None", group.gradient_divide_factor)

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        """The dtype that gradients are sent in; ``None``: their own."""
        param = self._param()
        return None if param is None else cast("torch.dtype | None", param.reduce_dtype)


_GATHERED: Any = WeakTensorKeyDictionary()


def gathered_by_fsdp(param: torch.Tensor) -> Gathered | None:
    """What is known of a parameter that FSDP2 (``fully_shard``) gathered; ``None`` for any other."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    if param not in _GATHERED:
        _GATHERED[param] = next((Gathered(p, group) for p, group in _fsdp_parameters() if p._unsharded_param is param), None)
    return cast("Gathered | None", _GATHERED[param])


def _fsdp_parameters() -> Iterator[tuple[Any, Any]]:
    """All parameters that FSDP2 has gathered at least once, each with its group."""
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    for reference in list(_module_state_mapping.values()):
        state = reference()
        for group in getattr(state, "_fsdp_param_groups", ()) if isinstance(state, FSDPState) else ():
            yield from ((p, group) for p in group.fsdp_params if hasattr(p, "_unsharded_param"))


def rows_like(param: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A DTensor laid out as ``param`` is, that holds ``rows`` on this rank; the tensor is taken as it is, whatever its class."""
    from torch.distributed.tensor import DTensor

    spec: Any = param._spec  # type: ignore[attr-defined]
    return DTensor(rows, spec, requires_grad=False)  # type: ignore[call-arg, no-any-return, unused-ignore]


def compiled_backward(outputs: Any) -> Any:
    """The autograd node that runs a compiled backward graph, from what its forward graph returned; ``None`` if there is none."""
    from torch.utils._pytree import tree_leaves

    nodes: list[Any] = [t.grad_fn for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop(0)
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CompiledFunctionBackward":
            return node
        seen.add(node)
        nodes += [below for below, _ in node.next_functions]
    if seen:
        raise AssertionError(f"no compiled backward graph among {sorted({type(node).__name__ for node in seen})}")
    return None


def narrow_products(dtype: torch.dtype) -> Literal["none", "vectors", "tiles"]:
    """Instructions with which this processor multiplies matrices of a 16-bit dtype: none, those of vectors or of tiles (AMX)."""
    if not torch.backends.mkldnn.is_available():
        return "none"
    if dtype == torch.float16:
        return "tiles" if torch.ops.mkldnn._is_mkldnn_fp16_supported() else "none"
    if dtype == torch.bfloat16 and getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return "tiles"
    return "vectors" if dtype == torch.bfloat16 and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else "none"


def profiler_is_on() -> bool:
    """Whether a profiler of PyTorch's runs; a second one could not."""
    return bool(torch.autograd.profiler._is_profiler_enabled)


def tracing_is_on() -> bool:
    """Whether structured tracing (``TORCH_TRACE``) writes anywhere."""
    from torch._logging._internal import trace_log

    return bool(trace_log.handlers)


@functools.cache
def code_generation() -> types.SimpleNamespace:
    """The modules of code generation for a GPU that :mod:`lowmem_compile.gpu_free` stubs or calls; imported on demand."""
    import torch._dynamo.device_interface
    import torch._inductor.async_compile
    import torch._inductor.compile_fx
    import torch._inductor.graph
    import torch._inductor.runtime.hints
    import torch._inductor.runtime.triton_helpers
    import torch._inductor.runtime.triton_heuristics
    import torch.utils._triton
    from torch._guards import TracingContext, tracing

    return types.SimpleNamespace(
        AsyncCompile=torch._inductor.async_compile.AsyncCompile,
        TracingContext=TracingContext,
        compile_fx=torch._inductor.compile_fx,
        device_interface=torch._dynamo.device_interface,
        graph=torch._inductor.graph,
        hints=torch._inductor.runtime.hints,
        tracing=tracing,
        triton=torch.utils._triton,
        triton_helpers=torch._inductor.runtime.triton_helpers,
        triton_heuristics=torch._inductor.runtime.triton_heuristics,
    )


def writes_code_as_known() -> bool:
    """Whether this torch writes code as 2.13 does, whose parts :func:`code_writing` names; otherwise they are left alone."""
    return torch.__version__.startswith("2.13.")


@functools.cache
def code_writing() -> types.SimpleNamespace:
    """The parts of Inductor's code generation that :mod:`lowmem_compile.generation` makes cheaper; imported on demand."""
    import torch._inductor.codegen.cpp
    import torch._inductor.dtype_propagation
    import torch._inductor.scheduler
    import torch._inductor.sizevars
    import torch.utils._sympy.value_ranges
    from torch._inductor.codegen.common import OptimizationContext
    from torch._inductor.loop_body import InterpreterShim
    from torch._inductor.virtualized import V

    def dtype_of(node: fx.Node) -> Any:
        found = node.meta.get(OptimizationContext.key)
        return None if found is None else found.dtype

    return types.SimpleNamespace(
        Interpreter=InterpreterShim,
        ResultTypes=torch._inductor.dtype_propagation.DtypePropagationOpsHandler,
        SchedulerNode=torch._inductor.scheduler.SchedulerNode,
        ValueRanges=torch.utils._sympy.value_ranges.ValueRanges,
        cpp=torch._inductor.codegen.cpp,
        dtype_of=dtype_of,
        interpreting=V.set_interpreter_handler,
        kernel=lambda: V.kernel,
        sizevars=torch._inductor.sizevars,
    )


@functools.cache
def loop_splitting() -> types.SimpleNamespace:
    """What splits loops in Inductor's C++, for :mod:`lowmem_compile.whole_loops`; imported on demand."""
    from torch._inductor.codegen.cpp import CppScheduling
    from torch.utils._sympy.functions import FloorDiv

    return types.SimpleNamespace(CppScheduling=CppScheduling, FloorDiv=FloorDiv)


@functools.cache
def inductor_peaks() -> types.SimpleNamespace:
    """What estimates a schedule's peak in Inductor, for :mod:`lowmem_compile.peak_estimate`; imported on demand.

    Of the graph that is being generated: ``lives(nodes, freeable, outputs)``, the buffers and inputs with their bytes, first and
    last step; ``never_made()``, names of buffers that stay inside a kernel; ``overwritten_by()``, the buffer that takes the place
    of another, by name, as far as that is decided. ``there``: whether this version has such an estimate.
    """
    from torch._inductor import memory
    from torch._inductor.virtualized import V

    wanted = ("estimate_peak_memory", "compute_memory_timeline", "peak_memory_from_buf_info_list", "BufferInfo")
    there = all(hasattr(memory, name) for name in (*wanted, "assign_memory_planning_info_for_scheduler_buffers"))

    def lives(nodes: Any, freeable: Any, outputs: Any) -> list[Any]:
        memory.assign_memory_planning_info_for_scheduler_buffers(nodes, V.graph.scheduler.name_to_buf)
        found: list[Any] = memory.compute_memory_timeline(nodes, freeable, outputs)[0]
        inputs = {name: bytes_of(V.graph.graph_inputs[name]) for name in freeable}
        for life in found:
            size = inputs.get(life.buffer.get_name())
            if size is not None:
                life.size_alloc = life.size_free = size
        return found

    def bytes_of(value: Any) -> int | None:
        layout = value.maybe_get_layout() if hasattr(value, "maybe_get_layout") else None
        if layout is None:
            return None
        elements: int = V.graph.sizevars.optimization_hint(layout.storage_size(), fallback=0)
        return elements * int(layout.dtype.itemsize)

    return types.SimpleNamespace(
        there=there,
        memory=memory,
        lives=lives,
        never_made=lambda: V.graph.removed_buffers,
        overwritten_by=lambda: {old: new for new, old in getattr(V.graph.wrapper_code, "reuses", {}).items()},
    )


def compiled_frame() -> str:
    """What Dynamo calls the Python frame it compiles at the moment; variants of a frame have the same name. Empty outside."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return "" if current is None or current.frame_id is None else f"frame {current.frame_id}"


def compiled_source(compiled: Any) -> tuple[str, Mapping[str, torch.Tensor]] | None:
    """The generated wrapper of what ``compile_fx_inner`` returned, and the constants it names; ``None`` if it is not Python."""
    source = getattr(compiled, "source_code", None)
    if not isinstance(source, str) or inductor_config.cpp_wrapper:
        return None
    return source, _tensors(getattr(compiled, "constants", None))


def generated_source(
    gm: fx.GraphModule, patches: Mapping[str, Any], *, is_backward: bool
) -> tuple[str, Mapping[str, torch.Tensor]]:
    """The wrapper that Inductor generates for an ATen graph, and the constants it names. Nothing is compiled or loaded.

    Args:
        gm: the graph; Inductor changes it.
        patches: configuration on top of what is active.
        is_backward: whether it is a backward graph.
    """
    private = code_generation()
    inputs = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    found: list[tuple[str, Mapping[str, torch.Tensor]]] = []

    def keep(lowering: Any) -> types.SimpleNamespace:
        code = lowering.codegen()[0]
        found.append((getattr(code, "value", code), _tensors(lowering.constants)))
        lowering.cache_key, lowering.cache_path, lowering.cache_linemap = "generated", "/dev/null", []
        return types.SimpleNamespace(call=None, __file__="/dev/null", key="generated")

    own = private.TracingContext(detect_fake_mode(inputs))  # some fields may be set only once a compile
    own.output_strides = []
    stop = unittest.mock.patch.object(private.graph.GraphLowering, "compile_to_module", keep)
    settings = {"compile_threads": 1, "force_disable_caches": True, "cpp_wrapper": False, "triton.cudagraphs": False, **patches}
    with stop, private.tracing(own), inductor_config.patch(settings):
        compile_fx_inner(gm, inputs, is_backward=is_backward)
    return found[0]


def _tensors(constants: Mapping[str, Any] | None) -> dict[str, torch.Tensor]:
    return {name: value for name, value in (constants or {}).items() if isinstance(value, torch.Tensor)}


@contextlib.contextmanager
def stub_kernels(make: Callable[[], Any]) -> Iterator[None]:
    """Let a generated wrapper that is executed in here take its kernels from ``make()`` in place of Inductor's compiler."""
    import torch._inductor.async_compile as module

    with unittest.mock.patch.object(module, "AsyncCompile", make):
        yield


def extern_kernels() -> Any:
    """The namespace from which generated wrappers take library calls."""
    from torch._inductor.select_algorithm import extern_kernels as namespace

    return namespace


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share a storage, while one of them is alive; fake ones too."""
    return int(tensor.untyped_storage()._cdata)


@functools.cache
def scheduling() -> types.SimpleNamespace:
    """The classes of Inductor's scheduler that :mod:`lowmem_compile.launches` needs; imported on demand."""
    import torch._inductor.ir
    import torch._inductor.scheduler
    from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
    from torch._inductor.virtualized import V

    scheduler = torch._inductor.scheduler
    return types.SimpleNamespace(
        ComputedBuffer=torch._inductor.ir.ComputedBuffer,
        Features=SIMDKernelFeatures,
        Foreach=scheduler.ForeachKernelSchedulerNode,
        Fused=scheduler.FusedSchedulerNode,
        MixOrder=getattr(scheduler, "FusedMixOrderReductions", ()),
        Nothing=scheduler.NopKernelSchedulerNode,
        Pointwise=torch._inductor.ir.Pointwise,
        Reduction=torch._inductor.ir.Reduction,
        Scatter=torch._inductor.ir.Scatter,
        Single=scheduler.SchedulerNode,
        graph=lambda: V.graph,
    )
