"""Encodes and decodes that need launches of their own share one launch with their neighbours.

    before   p = encode_many([q]); ... r = encode_many([k]); ... s = encode_many([v])          three launches
    after    p, r, s = encode_many([q, k, v])                                                  one

Forward: an encode waits for the next ones until the tensors that are held for it, and that nothing else will read, have more
bytes than the largest of them has three times. So the queries, keys and values of a layer, dead behind the attention, wait for
the attention's output, and an input of a norm for the attention of the next layer. Backward: decodes that one operation reads
(the attention's) are made together, in front of the first of their readers.

Bytes saved: 0. Fewer launches, each of the least bytes; x is held a little longer in the forward pass, and never to its end.
Not matched: what Inductor fuses with other work, and devices other than a GPU, where there are no launches.
Numerics class: EXACT.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import fx

from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.graph import VIEW_OPS, nbytes, storage_root

ENCODE, DECODE = torch.ops.lowmem.encode_many.default, torch.ops.lowmem.decode_many.default
MOST = 16
"""Tensors a launch."""
HELD = 3
"""Tensors, each as large as the largest that waits, that may be held for a launch and nothing else."""


@dataclass(frozen=True)
class Together:
    """Operations to be made one, in the order of their tensors, and the node before which it goes."""

    kind: Literal["encode", "decode"]
    nodes: tuple[fx.Node, ...]
    before: fx.Node


class LaunchTogether:
    """Merge encodes, and decodes, that are launches of their own."""

    name = "launch_together"
    stage = Stage.SAVED
    numerics = Numerics.EXACT

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        found = [*waiting(graph), *read_together(ctx.facts["backward"])]
        return [Match(together.nodes[0], together) for together in found]

    def check(self, match: Match, ctx: Context) -> Decline | None:  # noqa: ARG002
        if len(match.info.nodes) == 1:
            return Decline("LM310", f"no other {match.info.kind} is near it")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:  # noqa: ARG002
        together: Together = match.info
        first, owner = together.nodes[0], together.before.graph
        dtype = first.args[4:]
        lists: list[list[Any]] = [[value for node in together.nodes for value in node.args[i]] for i in range(4)]  # type: ignore[union-attr]
        with owner.inserting_before(together.before):
            merged = owner.call_function(ENCODE if together.kind == "encode" else DECODE, (*lists, *dtype))
        merged.meta = {**first.meta, "val": [value for node in together.nodes for value in node.meta["val"]]}
        if "eager_input_vals" in merged.meta:  # the layouts that Inductor gives an operation's inputs
            merged.meta["eager_input_vals"] = fx.map_arg((merged.args, merged.kwargs), lambda n: n.meta["val"])
        offset, last = 0, merged
        for node in together.nodes:
            for part in sorted(node.users, key=lambda n: n.args[1]):  # type: ignore[arg-type, return-value]
                part.args = (merged, offset + part.args[1])  # type: ignore[operator]
                if together.kind == "encode":
                    last.append(part)
                    last = part
            offset += len(node.meta["val"])
            owner.erase_node(node)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        return sympy.Integer(0)

    def describe(self, match: Match, ctx: Context) -> str:  # noqa: ARG002
        return f"{len(match.info.nodes)} tensors in one launch"


def waiting(graph: fx.Graph) -> list[Together]:
    """The encodes of a forward graph, grouped as the docstring of this file says."""
    encodes = [n for n in graph.nodes if n.target is ENCODE and _parts_go_out(n)]
    if not encodes:
        return []
    order = {n: i for i, n in enumerate(graph.nodes)}
    codes = _made_of_codes(encodes)
    born = {e: order[_tensor(e)] for e in encodes}
    dies = {e: _last_use(storage_root(_tensor(e)), order, codes) for e in encodes}
    todo, pending, found = sorted(encodes, key=lambda e: born[e]), [], []
    for node in graph.nodes:
        if node.op == "placeholder" or node.target is operator.getitem or node.target in VIEW_OPS or node in codes:
            continue
        while todo and born[todo[0]] < order[node]:
            pending.append(todo.pop(0))
        held = sum(nbytes(storage_root(_tensor(e))) for e in pending if dies[e] < order[node])
        most = max((nbytes(_tensor(e)) for e in pending), default=0)
        if pending and (held > HELD * most or node.op == "output" or len(pending) == MOST):
            found.append(Together("encode", tuple(pending), node))
            pending = []
    return found


def read_together(graph: fx.Graph) -> list[Together]:
    """The decodes of a backward graph, grouped by operations that read several of them."""
    decodes = [n for n in graph.nodes if n.target is DECODE]
    order = {n: i for i, n in enumerate(graph.nodes)} if decodes else {}
    readers = {d: _readers(d) for d in decodes}
    groups: list[list[fx.Node]] = []
    for decode in decodes:
        near = [g for g in groups if len(g) < MOST and _alike(g[0], decode) and any(readers[g_] & readers[decode] for g_ in g)]
        merged = [decode]
        for group in near:
            if len(group) + len(merged) <= MOST:
                groups.remove(group)
                merged = [*group, *merged]
        groups.append(merged)
    found = []
    for group in groups:
        nodes = sorted(group, key=lambda n: order[n])
        found.append(Together("decode", tuple(nodes), nodes[0]))
    return found


def _alike(one: fx.Node, other: fx.Node) -> bool:
    return one.args[4] == other.args[4]


def _tensor(encode: fx.Node) -> fx.Node:
    """What is encoded."""
    (x,) = argument_list(encode)
    return x


def argument_list(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operation on lists takes."""
    given = node.args[0]
    if not isinstance(given, (list, tuple)):
        raise AssertionError(f"{node.name} takes no list")
    return [n for n in given if isinstance(n, fx.Node)]


def _parts_go_out(encode: fx.Node) -> bool:
    """Whether the forward graph only returns the codes, so that they may be made later."""
    return all(user.op == "output" for part in encode.users for user in part.users)


def _made_of_codes(encodes: list[fx.Node]) -> set[fx.Node]:
    """The encodes and their results."""
    return {*encodes, *(part for e in encodes for part in e.users)}


def _last_use(root: fx.Node, order: dict[fx.Node, int], codes: set[fx.Node]) -> int:
    """The position of the last reader of a storage but for encodes; beyond the graph where the graph returns it."""
    last = order[root]
    for user in root.users:
        if user in codes:
            continue
        if user.op == "output":
            return len(order)
        view = user.target in VIEW_OPS or user.target is operator.getitem
        last = max(last, _last_use(user, order, codes) if view else order[user])
    return last


def _readers(node: fx.Node) -> frozenset[fx.Node]:
    """What reads the decoded tensors: views, copies and the parts of lists are followed."""
    found: set[fx.Node] = set()
    for user in node.users:
        if user.target in VIEW_OPS or user.target in (operator.getitem, torch.ops.aten.clone.default):
            found |= _readers(user)
        else:
            found.add(user)
    return frozenset(found)
