"""Recognition by value: evaluate the part of a torch-IR graph between one tensor and a node, in float64.

Models write the same function in many ways (``x * 0.5 * (1 + erf(x / sqrt(2)))``, ``0.5 * x * (1 + ...)``, method or
function, with or without casts). Instead of one pattern a spelling, a cone of elementwise and row-wise operations is run on
sample points and compared with the known function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

CASTS = {"to", "float", "double", "half", "bfloat16", "type", "type_as"}
ELEMENTWISE_METHODS = {
    "add", "sub", "mul", "div", "pow", "square", "sqrt", "rsqrt", "reciprocal", "neg", "exp", "erf", "tanh", "sigmoid",
    "__add__", "__mul__", "__sub__", "__truediv__", "__pow__", "__rsub__", "__rmul__", "__radd__",
}  # fmt: skip
ELEMENTWISE_FUNCTIONS: frozenset[Any] = frozenset(
    {
        operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg,
        torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.square, torch.sqrt, torch.rsqrt,
        torch.reciprocal, torch.neg, torch.exp, torch.erf, torch.tanh, torch.sigmoid, F.sigmoid, F.tanh, F.silu,
        torch.special.erf,
    }
)  # fmt: skip
WRITERS: frozenset[Any] = frozenset(
    {
        operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
        operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.setitem,
    }
)  # fmt: skip
REDUCTION_METHODS = {"mean", "var", "sum"}
REDUCTION_FUNCTIONS: frozenset[Any] = frozenset({torch.mean, torch.var, torch.sum})


def is_cast(node: fx.Node) -> bool:
    """A change of dtype that keeps the values."""
    return node.op == "call_method" and node.target in CASTS


def is_elementwise(node: fx.Node) -> bool:
    """An elementwise operation that :func:`evaluate` can run."""
    if node.op == "call_method":
        return node.target in ELEMENTWISE_METHODS or node.target in CASTS
    return node.op == "call_function" and node.target in ELEMENTWISE_FUNCTIONS


def is_reduction(node: fx.Node) -> bool:
    """A mean, sum or variance."""
    if node.op == "call_method":
        return node.target in REDUCTION_METHODS
    return node.op == "call_function" and node.target in REDUCTION_FUNCTIONS


def strip_casts(node: fx.Node) -> fx.Node:
    """The node below a chain of casts."""
    while is_cast(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def sources(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values a node reads: all of them, but only the first of a cast (``x.type_as(other)``)."""
    return node.all_input_nodes[:1] if is_cast(node) else node.all_input_nodes


def writes(node: fx.Node) -> bool:
    """Whether the operation changes a tensor in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.target in WRITERS or (name.endswith("_") and not name.endswith("__")):
        return True
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    return name in ("relu", "dropout", "leaky_relu", "silu", "mish", "hardtanh") and node.args[-1:] == (True,)


def cone(root: fx.Node, leaf: fx.Node, *, reductions: bool = False) -> list[fx.Node] | None:
    """The nodes between ``leaf`` and ``root`` in graph order.

    ``None`` if the cone has another tensor leaf, or if anything is changed in place while it is computed.
    """
    inside: set[fx.Node] = set()
    work = [root]
    while work:
        node = work.pop()
        if node is leaf or node in inside:
            continue
        if not (is_elementwise(node) or (reductions and is_reduction(node))):
            return None
        inside.add(node)
        work.extend(sources(node))
        if not node.all_input_nodes or len(inside) > 64:
            return None
    if not inside:
        return []
    first = next(n for n in root.graph.nodes if n in inside)
    node = root
    while node is not first:
        node = node.prev
        if writes(node):
            return None
    return [n for n in root.graph.nodes if n in inside]


def leaf_of(nodes: Iterable[fx.Node]) -> fx.Node:
    """The tensor that a cone reads now: rewriting another match may have replaced the node it was found with."""
    inside = set(nodes)
    return next(i for n in inside for i in n.all_input_nodes if i not in inside)


def evaluate(nodes: list[fx.Node], leaf: fx.Node, value: torch.Tensor) -> Any:
    """Run the cone with ``leaf`` = ``value`` (float64); casts are identities.

    A tensor, unless the cone computes something else.
    """
    env: dict[fx.Node, Any] = {leaf: value}

    def load(item: Any) -> Any:
        return fx.map_arg(item, lambda n: env[n])

    for node in nodes:
        if is_cast(node):
            env[node] = env[node.args[0]] if isinstance(node.args[0], fx.Node) else value
            continue
        args, kwargs = load(node.args), {k: v for k, v in load(node.kwargs).items() if k not in ("out", "dtype")}
        if node.op == "call_method":
            env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            target: Callable[..., Any] = node.target  # type: ignore[assignment]
            env[node] = target(*args, **kwargs)
    return env[nodes[-1]] if nodes else value


def scalars(nodes: list[fx.Node]) -> list[float]:
    """The Python numbers written in the cone."""
    found: list[float] = []
    for node in nodes:
        items = (*node.args, *node.kwargs.values())
        found.extend(float(i) for i in items if isinstance(i, (int, float)) and not isinstance(i, bool))
    return found


def erase_unused(root: fx.Node) -> None:
    """Erase ``root`` and the pure nodes below it that nothing reads any more.

    A general dead-code elimination would be wrong on torch IR: ``x.add_(y)`` looks unused to it.
    """
    work = [root]
    while work:
        node = work.pop()
        if node.users or not (node is root or is_elementwise(node) or is_reduction(node)):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        work.extend(i for i in inputs if i not in work)
