"""Inductor's loop bodies, run without what they compute twice.

A loop body is a graph of scalar operations that Inductor runs for each kernel it writes. A value that three operations read is
there three times, with all that leads to it, and the writer finds by the text of each that it is written already. Here an
operation that has been run on the same values is not run again:

    before   a = load(x); b = mul(a, 2); c = load(x); d = mul(c, 2); e = add(b, d)
    run      a = load(x); b = mul(a, 2);                             e = add(b, b)

The same text is written. Loads of what the body stores too, and operations not in :data:`PURE`, are run each time; so is
everything where no C++ is written, for other analyses count operations. Nor is there a progress bar, a log line and a traceback
for each operation, as the interpreter of ``torch.fx`` has: they are a third of the time of most bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

PURE = frozenset(
    {
        "abs",
        "add",
        "bitwise_and",
        "bitwise_left_shift",
        "bitwise_or",
        "bitwise_right_shift",
        "constant",
        "eq",
        "exp",
        "floor",
        "ge",
        "gt",
        "le",
        "logical_and",
        "logical_not",
        "logical_or",
        "lt",
        "maximum",
        "minimum",
        "mul",
        "ne",
        "neg",
        "reciprocal",
        "round",
        "sub",
        "to_dtype",
        "to_dtype_bitcast",
        "truediv",
        "where",
    }
)
"""Operations whose text depends on their arguments alone."""
STORES = frozenset({"store", "store_reduction"})


def run_body(interpreter: Any, operations: Any, dtype_of: Callable[[fx.Node], Any] | None) -> Any:
    """Run the graph of a loop body with a handler of operations; ``dtype_of``: repeats are left out, of nodes of one dtype."""
    env: dict[fx.Node, Any] = {}
    interpreter.env = env
    nodes = interpreter.graph.nodes
    stored = {n.args[1] for n in nodes if n.target in STORES}
    done: dict[Any, Any] = {}
    for node in nodes:
        if node.op == "placeholder":
            env[node] = operations
            continue
        key = None if dtype_of is None else key_of(node, env, stored)
        if key is not None and dtype_of is not None:
            key = (*key, dtype_of(node))
            if key in done:
                env[node] = done[key]
                continue
        interpreter.current_node = node
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        if node.op == "output":
            return args[0]
        env[node] = run_node(interpreter, node, args, kwargs)
        if key is not None:
            done[key] = env[node]
    return None


def run_node(interpreter: Any, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """One node with the values of its arguments."""
    if node.op == "call_method":
        handler, *rest = args
        return getattr(handler, str(node.target))(*rest, **kwargs)
    if node.op == "call_module":
        return interpreter.fetch_attr(node.target)(*args, **kwargs)
    return getattr(interpreter, node.op)(node.target, args, kwargs)


def key_of(node: fx.Node, env: dict[fx.Node, Any], stored: set[Any]) -> tuple[Any, ...] | None:
    """Equal for nodes that compute the same from the same values; ``None`` for one that is to be run in any case."""
    if node.op == "call_module":
        repeats = node.target == "get_index"
    else:
        repeats = node.op == "call_method" and (node.target in PURE or (node.target == "load" and node.args[1] not in stored))
    if not repeats or node.kwargs:
        return None
    return (node.target, *(id(env[a]) if isinstance(a, fx.Node) else (type(a), repr(a)) for a in node.args))


def lighter(run: Callable[..., Any], private: Any) -> Callable[..., Any]:
    """The running of a loop body: as described above, or by ``run`` where values are given beforehand."""

    def ran(interpreter: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1:
            return run(interpreter, *args, **kwargs)
        writes = isinstance(private.kernel(), private.cpp.CppKernel)
        with private.interpreting(interpreter):
            return run_body(interpreter, args[0], private.dtype_of if writes else None)

    return ran
