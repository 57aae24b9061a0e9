"""Small tools on FX graphs: splicing traced code, bytes, storages, and where a node comes from in the user's code."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from lowmem_compile._torch import FakeTensor, LazyGraphModule, copy_graph, detect_fake_mode, op_types, optimization_hint

aten = torch.ops.aten

VIEW_OPS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.expand.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.alias.default,
        aten.detach.default,
        aten.as_strided.default,
    }
)
SPLIT_OPS = frozenset(
    {
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.chunk.default,
    }
)
"""Operations that return a list of views."""
INHERITED = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr", "custom", "original_aten")


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor a node computes, or ``None`` if it computes something else."""
    value = node.meta.get("val", node.meta.get("example_value"))
    return value if isinstance(value, torch.Tensor) else None


def tensor_value(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node that is known to compute one; ``AssertionError`` otherwise."""
    value = tensor_of(node)
    if value is None:
        raise AssertionError(f"{node.name} computes no tensor")
    return value


def argument(node: fx.Node, index: int) -> fx.Node:
    """A positional argument that is known to be a node; ``AssertionError`` otherwise."""
    value = node.args[index] if index < len(node.args) else None
    if not isinstance(value, fx.Node):
        raise AssertionError(f"argument {index} of {node.name} is {value!r}, not a node")
    return value


def optional_argument(node: fx.Node, index: int, name: str) -> fx.Node | None:
    """An argument that is a node, given by position or by name, or ``None``; ``AssertionError`` otherwise."""
    value = node.args[index] if index < len(node.args) else node.kwargs.get(name)
    if value is not None and not isinstance(value, fx.Node):
        raise AssertionError(f"argument {name} of {node.name} is {value!r}, not a node")
    return value


def output_values(graph: fx.Graph) -> tuple[Any, ...]:
    """What the graph returns, in order."""
    values = graph.output_node().args[0]
    if not isinstance(values, (tuple, list)):
        raise AssertionError(f"the graph returns {values!r}, not a tuple")
    return tuple(values)


def sizes(value: torch.Tensor) -> tuple[int | torch.SymInt, ...]:
    """The shape of a fake tensor; torch's annotation leaves out that sizes may be symbolic."""
    return tuple(value.shape)


def shape_names(value: torch.Tensor) -> tuple[int | str, ...]:
    """The shape as it is shown: a number for each static size, a formula for each symbolic one."""
    return tuple(size if isinstance(size, int) else str(size) for size in sizes(value))


def is_static(size: int | torch.SymInt, number: int) -> bool:
    """Whether a size, stride or offset is this very number; a symbolic one is not, and no guard is added."""
    return isinstance(size, int) and size == number


def concrete(value: Any) -> int:
    """An ``int`` for a possibly symbolic size (the size hint of the traced call)."""
    return int(optimization_hint(value, fallback=4096)) if isinstance(value, torch.SymInt) else int(value)


def numel(node: fx.Node) -> int:
    """Number of elements, symbolic sizes by their hint."""
    value = tensor_of(node)
    return 0 if value is None else concrete(value.numel())


def nbytes(node: fx.Node) -> int:
    """Bytes of the tensor a node computes, symbolic sizes by their hint."""
    value = tensor_of(node)
    return 0 if value is None else concrete(value.numel()) * value.element_size()


def sympy_numel(value: torch.Tensor) -> sympy.Expr:
    """Number of elements as a formula: symbols stand for dynamic sizes."""
    product: sympy.Expr = sympy.Integer(1)
    for size in sizes(value):
        product *= size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))
    return product


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose storage a chain of views reads."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        below = node.args[0]
        of_list = node.target is operator.getitem and below.target in SPLIT_OPS
        if not of_list and node.target not in VIEW_OPS and node.target not in SPLIT_OPS:
            break
        node = below
    return node


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs in order."""
    return [n for n in graph.nodes if n.op == "placeholder"]


def graph_input(graph: fx.Graph, index: int) -> fx.Node | None:
    """The input of a joint or forward graph that is the index-th of the Dynamo graph, or ``None``."""
    return next((n for n in placeholders(graph) if getattr(n.meta.get("desc"), "idx", None) == index and not is_tangent(n)), None)


def is_tangent(node: fx.Node) -> bool:
    """True for a placeholder that holds a gradient of an output."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def has_backward(graph: fx.Graph) -> bool:
    """True for a joint graph (forward and backward), false for an inference graph."""
    return any(is_tangent(n) for n in placeholders(graph))


def backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on a tangent."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if is_tangent(node) or any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def parameter_only(graph: fx.Graph, static: Iterable[fx.Node]) -> set[fx.Node]:
    """Cheap forward nodes computed from parameters and buffers alone (casts, transposes, folded weights)."""
    ops = op_types()
    inside = set(static)
    cheap: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node in inside or not node.all_input_nodes:
            continue
        if all(i in inside for i in node.all_input_nodes) and (ops.is_recomputable(node) or node.target in VIEW_OPS):
            inside.add(node)
            cheap.add(node)
    return cheap


def splice(
    graph: fx.Graph,
    before: fx.Node,
    fn: Callable[..., Any],
    args: Sequence[fx.Node],
    *,
    like: fx.Node,
    decompositions: dict[Any, Any],
    backward: bool = False,
) -> Any:
    """Trace ``fn`` over the fake tensors of ``args`` and insert the result in front of ``before``.

    Returns the node, or the tuple of nodes, that ``fn`` returned. ``like`` gives the new nodes their origin (stack
    trace, module, sequence number). Sizes must be read from the traced tensors, not from a closure, so that symbolic
    shapes stay symbolic.
    """
    return insert(graph, before, trace(fn, args, decompositions), args, like=like, backward=backward)


def trace(fn: Callable[..., Any], args: Sequence[fx.Node], decompositions: dict[Any, Any]) -> fx.GraphModule:
    """The ATen graph of ``fn`` over the fake tensors of ``args``."""
    values = [a.meta["val"] for a in args]
    with _fake_mode(args), torch.fx.traceback.preserve_node_meta(enable=False):
        traced = make_fx(fn, decomposition_table=decompositions)(*values)
    traced.graph.eliminate_dead_code()
    return traced


def insert(
    graph: fx.Graph,
    before: fx.Node,
    traced: fx.GraphModule,
    args: Sequence[fx.Node],
    *,
    like: fx.Node,
    backward: bool = False,
    again: bool = False,
) -> Any:
    """Insert a traced graph in front of ``before``; ``again`` for one that was inserted before: its values are made anew."""
    env: dict[fx.Node, Any] = {}
    remaining = iter(args)
    result: Any = None
    with graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(remaining)
            elif node.op == "output":
                result = fx.map_arg(node.args[0], lambda n: env[n])
            elif node.op == "get_attr":
                raise AssertionError(f"a tensor constant leaked into the replacement of {like.name}")
            else:
                copy = graph.node_copy(node, lambda n: env[n])
                for key in INHERITED:
                    if key in like.meta:
                        copy.meta[key] = like.meta[key]
                copy.meta["val"] = _value_of(copy, args) if again else node.meta["val"]
                if backward:
                    copy.meta["partitioner_tag"] = "is_backward"
                elif copy.meta.get("partitioner_tag") == "is_backward":
                    del copy.meta["partitioner_tag"]
                env[node] = copy
    return result


def _value_of(node: fx.Node, args: Sequence[fx.Node]) -> Any:
    given, named = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with _fake_mode(args):
        return node.target(*given, **named)  # type: ignore[operator]


def _fake_mode(args: Sequence[fx.Node]) -> Any:
    mode = detect_fake_mode([a.meta["val"] for a in args])
    if mode is None:
        raise AssertionError(f"no fake tensors on {', '.join(a.name for a in args)}")
    return mode


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares parameters and meta values but owns its graph; node names are kept.

    Its Python code is written when it is first run or read: most copies are partitioned, counted and dropped.
    """
    out = LazyGraphModule(gm, copy_graph(gm.graph))
    out.meta.update(gm.meta)
    return out


def forget_mutation_regions(graph: fx.Graph) -> None:
    """Have Inductor number the regions between writes anew: its patterns match within a region only.

    It numbers a graph once, before the partition, and goes by what it finds in the meta of the nodes. Where a pass writes to an
    input since, ``add(a, mm(b, W))`` would become one ``addmm`` behind a write to W that stands between the two.
    """
    for node in graph.nodes:
        node.meta.pop("mutation_region_id", None)


def replace_and_erase(graph: fx.Graph, node: fx.Node, new: Any) -> None:
    """Replace a node, single- or multi-output, by the node or tuple of nodes ``new``, and erase it."""
    if isinstance(new, (tuple, list)):
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise AssertionError(f"{user.name} reads the tuple {node.name} whole")
            index = user.args[1]
            if not isinstance(index, int):
                raise AssertionError(f"{user.name} reads {node.name} at {index!r}")
            part = new[index]
            if part is not None:
                user.replace_all_uses_with(part)
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(new)
    graph.erase_node(node)


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def source_line(node: fx.Node) -> str:
    """``file.py:line`` of the innermost user frame that made this node, or an empty string."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    path, line = frames[-1]
    parts = path.replace("\\", "/").split("/")
    return f"{'/'.join(parts[-2:])}:{line}"


def module_path(node: fx.Node) -> str:
    """Dotted path of the module a node was traced in, such as ``encoder.layer.0.attention``.

    A model whose ``forward`` is wrapped is the wrapper's ``args[0]``; its modules have the same names.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    name = next(reversed(stack.values()))[0]
    if not isinstance(name, str):
        return ""
    name = re.sub(r"\._modules\['([^']+)'\]", r".\1", name)
    name = re.sub(r"getattr\((.*), '([^']+)'\)", r"\1.\2", name)
    name = re.sub(r"L\['args'\]\[0\]\.?|[LG]\['[^']+'\]\.?", "", name)
    name = re.sub(r"\[(\d+)\]", r".\1", name)
    return name.strip(".")


def call_arguments(node: fx.Node) -> list[fx.Node]:
    """Every node among the arguments, in the order in which they are written (repeats kept)."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def decompose(graph: fx.Graph, node: fx.Node, fn: Callable[..., Any], decompositions: dict[Any, Any]) -> None:
    """Replace a node by what ``fn`` (its decomposition, same signature) traces to."""
    inputs = call_arguments(node)

    def with_tensors(*values: Any) -> Any:
        remaining = iter(values)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(remaining))
        return fn(*args, **kwargs)

    backward = node.meta.get("partitioner_tag") == "is_backward"
    new = splice(graph, node, with_tensors, inputs, like=node, decompositions=decompositions, backward=backward)
    replace_and_erase(graph, node, new)


def emit(graph: fx.Graph, target: Any, args: tuple[Any, ...], *, like: fx.Node) -> fx.Node:
    """Add a call to a torch-IR graph, with the fake value it computes; a string is a method name."""
    node = graph.call_method(target, args) if isinstance(target, str) else graph.call_function(target, args)
    values = fx.map_arg(args, lambda n: n.meta["example_value"])
    tensors = [v for v in values if isinstance(v, FakeTensor)]
    mode = tensors[0].fake_mode if tensors else contextlib.nullcontext()
    with mode, torch.no_grad():
        value = getattr(values[0], target)(*values[1:]) if isinstance(target, str) else target(*values)
    node.meta = {**like.meta, "example_value": value}
    return node
