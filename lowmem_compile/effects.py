"""Side effects in a Dynamo graph: writes in place, and changes of grad mode or autocast.

A pass of the Dynamo stage that moves a computation, or lets a reader take another value, asks here first. The answers are
conservative: a write through anything that may be a view counts.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

from torch import fx

MAY_ALIAS = frozenset(
    {
        "alias",
        "as_strided",
        "chunk",
        "contiguous",
        "detach",
        "diagonal",
        "expand",
        "expand_as",
        "flatten",
        "float",
        "getitem",
        "half",
        "bfloat16",
        "movedim",
        "mT",
        "narrow",
        "permute",
        "ravel",
        "reshape",
        "reshape_as",
        "select",
        "split",
        "split_with_sizes",
        "squeeze",
        "swapaxes",
        "swapdims",
        "T",
        "t",
        "tensor_split",
        "to",
        "transpose",
        "type",
        "type_as",
        "unbind",
        "unflatten",
        "unfold",
        "unsqueeze",
        "view",
        "view_as",
    }
)
IN_PLACE_OPERATORS = frozenset(
    {
        operator.setitem,
        operator.iadd,
        operator.isub,
        operator.imul,
        operator.itruediv,
        operator.ifloordiv,
        operator.ipow,
        operator.imatmul,
        operator.iand,
        operator.ior,
        operator.ixor,
    }
)
STATE = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode")


def name_of(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def writes_to(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call changes in place."""
    if not node.op.startswith("call_"):
        return []
    changed = [v for v in (node.kwargs.get("out"),) if isinstance(v, fx.Node)]
    name = name_of(node)
    in_place = node.target in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    if (in_place or node.kwargs.get("inplace") is True) and node.args and isinstance(node.args[0], fx.Node):
        changed.append(node.args[0])
    return changed


def aliases(node: fx.Node) -> set[fx.Node]:
    """The node and everything that may share its storage: what it is a view of, and what is a view of that."""
    root = node
    while root.op.startswith("call_") and name_of(root) in MAY_ALIAS and isinstance(root.args[0], fx.Node):
        root = root.args[0]
    found, work = {root}, [root]
    while work:
        for user in work.pop().users:
            if user not in found and user.op.startswith("call_") and name_of(user) in MAY_ALIAS:
                found.add(user)
                work.append(user)
    return found


def is_written(node: fx.Node) -> bool:
    """Whether anything in the graph may change the value of ``node`` in place."""
    return any(a in writes_to(user) for a in aliases(node) for user in a.users)


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes after ``first`` and before ``last``."""
    node = first.next
    while node is not last and node.op != "output":
        yield node
        node = node.next


def may_read_together(first: fx.Node, last: fx.Node, read: Iterable[fx.Node]) -> str:
    """Why ``read`` must not be read at ``last`` for ``first``, or the other way round; empty if it may.

    Grad mode and autocast must be the same at both, and none of the values may be written in place.
    """
    state = next((n for n in between(first, last) if name_of(n) in STATE), None)
    if state is not None:
        return "grad mode or autocast changes in between"
    written = next((n for n in read if is_written(n)), None)
    return "" if written is None else f"{written.name} is changed in place"
