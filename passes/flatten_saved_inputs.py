"""Inputs of a convolution that the backward pass needs are handed to it as flat views.

    before   forward returns x: bf16[N, C, H, W], an input of the graph;  backward: convolution_backward(dy, x, ...)
    after    forward returns view(x, [N·C·H·W]);  backward: convolution_backward(dy, view(x', [N, C, H, W]), ...)

Inductor gives every 4-dimensional tensor on the way to a convolution the channels-last layout, inputs of the graph too: what the
forward graph returns of such an input is then a copy, which lives until the backward pass beside the input. A flat view has one
dimension, so the input itself is handed over, and the copy is made where a convolution reads it. Whole-graph rule from
``GraphLowering.run_node`` (torch 2.13).

Bytes saved: N·C·H·W·itemsize for each such input (image, weight). They are in no count of the graph, Inductor's neither, since
inputs are left out; the allocator shows them.
Not matched: inputs of dynamic size, inputs that are channels-last already, convolutions of one or three dimensions.
Numerics class: EXACT.
"""

from __future__ import annotations

import math

import sympy
import torch
from torch import fx

from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.crossing import exchange, retire
from lowmem_compile.graph import INHERITED, output_values, sizes, sympy_numel, tensor_of, tensor_value

aten = torch.ops.aten


class FlattenSavedInputs:
    """Keep Inductor from saving channels-last copies of a convolution's inputs."""

    name = "flatten_saved_inputs"
    stage = Stage.SAVED
    numerics = Numerics.EXACT

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        above = above_convolutions(graph)
        returned = output_values(graph)[ctx.facts["num_user_outputs"] :]
        placeholder_of: dict[fx.Node, fx.Node] = ctx.facts["placeholder_of"]
        return [
            Match(n)
            for n in dict.fromkeys(returned)
            if isinstance(n, fx.Node) and n.op == "placeholder" and n in above and n in placeholder_of and is_copied(n)
        ]

    def check(self, match: Match, ctx: Context) -> Decline | None:
        value = tensor_value(match.node)
        if not all(isinstance(s, int) for s in (*sizes(value), *value.stride())):
            return Decline("LM203", "the input has a dynamic size")
        if match.node in ctx.facts["user_outputs"]:
            return Decline("LM302", "the tensor is an output of the graph")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:
        node = match.node
        shape = [int(s) for s in tensor_value(node).shape]
        with graph.inserting_before(graph.output_node()):
            flat = _view(graph, node, [math.prod(shape)])
        (given,) = exchange(graph, ctx, node, [flat])
        old, backward = ctx.facts["placeholder_of"][node], given.graph
        with backward.inserting_before(next(n for n in backward.nodes if n.op != "placeholder")):
            whole = _view(backward, given, shape)
        whole.meta["partitioner_tag"] = "is_backward"
        old.replace_all_uses_with(whole)
        retire(ctx, node)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        value = tensor_value(match.node)
        return sympy_numel(value) * value.element_size()


def above_convolutions(graph: fx.Graph) -> set[fx.Node]:
    """The nodes from which a convolution is reached: those whose layout Inductor changes."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.target == aten.convolution.default or any(u in found for u in node.users):
            found.add(node)
    return found


def is_copied(node: fx.Node) -> bool:
    """Whether Inductor would change the layout: four dimensions, dense, and not channels-last already."""
    value = tensor_of(node)
    if value is None or value.dim() != 4 or not value.is_contiguous():
        return False
    return not value.is_contiguous(memory_format=torch.channels_last)


def _view(graph: fx.Graph, node: fx.Node, shape: list[int]) -> fx.Node:
    new = graph.call_function(aten.view.default, (node, shape))
    new.meta = {k: v for k, v in node.meta.items() if k in INHERITED}
    new.meta["val"] = tensor_value(node).view(shape)
    return new
