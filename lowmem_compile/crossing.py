"""Tensors that cross from the forward to the backward graph: exchange one for the parts it is stored in.

For passes of the backward and the saved stage, whose context holds the facts of
:func:`lowmem_compile.partition.backward_context` and :func:`lowmem_compile.partition.saved_context`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from lowmem_compile.contract import Context
from lowmem_compile.graph import graph_input, is_tangent, output_values, placeholders, storage_root, tensor_of


def exchange(graph: fx.Graph, ctx: Context, node: fx.Node, parts: Sequence[fx.Node]) -> list[fx.Node]:
    """Let the forward graph return ``parts`` in place of ``node``; returns their placeholders in the backward graph.

    The placeholder of ``node`` stays until the caller has replaced its uses (:func:`retire`).
    """
    output = graph.output_node()
    first = ctx.facts["num_user_outputs"]
    values = list(output_values(graph))
    index = next(i for i in range(first, len(values)) if values[i] is node)
    values[index : index + 1] = parts
    output.args = (tuple(values),)
    backward: fx.Graph = ctx.facts["backward"]
    old: fx.Node = ctx.facts["placeholder_of"][node]
    made = []
    for part in parts:
        with backward.inserting_before(old):
            new = backward.placeholder(part.name)
        new.target = new.name  # where the name was taken, FX gives another one, and the two must agree
        new.meta = {k: v for k, v in old.meta.items() if k != "val"}
        new.meta["val"] = part.meta["val"]
        made.append(new)
    return made


def carry_input(backward: fx.Graph, ctx: Context, index: int) -> fx.Node:
    """The backward graph's placeholder for the index-th input of the Dynamo graph; made, and saved by the forward, if need be.

    For passes of the backward stage, whose context holds the forward graph.
    """
    forward: fx.Graph = ctx.facts["forward"]
    node = graph_input(forward, index)
    if node is None:
        raise AssertionError(f"the forward graph has no input {index}")
    inputs = placeholders(backward)
    known = next((n for n in inputs if n.target == node.target), None)
    if known is not None:
        return known
    output, values = forward.output_node(), list(output_values(forward))
    # The forward graph returns saved tensors, then sizes; the backward graph takes sizes, saved tensors, then tangents.
    end = ctx.facts["num_user_outputs"]
    while end < len(values) and isinstance(values[end], fx.Node) and tensor_of(values[end]) is not None:
        end += 1
    output.args = ((*values[:end], node, *values[end:]),)
    # Several graphs of a step may change it (a sum over all parameters), which is no error: no check of its version.
    node.meta["saved_tensor_with_no_vc_check"] = True
    with backward.inserting_before(next(n for n in inputs if is_tangent(n))):
        new = backward.placeholder(node.name)
    new.meta = dict(node.meta)
    return new


def retire(ctx: Context, node: fx.Node) -> None:
    """Drop the placeholder of ``node`` from the backward graph; nothing reads it any more."""
    backward: fx.Graph = ctx.facts["backward"]
    backward.erase_node(ctx.facts["placeholder_of"].pop(node))


def behind(node: fx.Node) -> fx.Node:
    """The node before which work on ``node`` goes: right behind its producer, so that the wide tensor dies at once."""
    after = node.next
    while after.op == "placeholder" or after.target is operator.getitem:
        after = after.next
    return after


def first_reader(node: fx.Node) -> fx.Node:
    """The earliest node of its graph that reads ``node``."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    return min(node.users, key=lambda n: order[n])


def view_chain(node: fx.Node) -> list[fx.Node]:
    """The views from the storage of ``node`` to it, the first one first; empty if it is no view."""
    root, chain = storage_root(node), []
    while node is not root:
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return chain[::-1]


def repeatable(chain: Sequence[fx.Node]) -> bool:
    """Whether the views can be repeated on another tensor of the same layout: no argument is computed in the graph."""
    return all(len(n.all_input_nodes) == 1 for n in chain)
