"""Update a parameter inside the backward graph, as soon as its gradient is there and nothing reads the old value any more.

    before   dX = dY W;  dW = dYᵀ X;  return dW                         every gradient of the graph alive at the end
    after    dX = dY W;  dW = dYᵀ X;  copy_(W, W - rate·dW);  return None

With W: f[O, I], X: f[N, I], dY: f[N, O], rate: f64[]. Any rule of :data:`lowmem_compile.in_backward.RULES` takes the place of
W - rate·dW; its tensors are inputs of the graph. The update stands behind the gradient, in which all uses of W in this graph are
summed (tied weights), and behind the last operation that reads W or a view of it, so exact dX. Inductor writes the result into W.

An embedding's gradient that is a sum of rows, under a rule that leaves rows without a gradient alone:

    before   dW = zeros(f[V, D]);  dW[i] += rows;  return dW                                        V·D
    after    total = sums of equal rows: f32[N, D];  copy_(W, W with W[i] = W[i] - rate·total)      N·D, in place

Bytes at once, not bytes saved for backward: the gradient, of which only the largest remains.
Not matched: parameters that the step has no rule for. Where the pass is off, the gradient is returned and the same rule runs
after the backward graph.
Numerics class: REASSOCIATED (of bf16 and fp16 embeddings, one rounding less).
Source: in-place SGD as in LOMO (arXiv:2306.09782) and Addax (arXiv:2410.06441); here inside the graph, for any rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from lowmem_compile._torch import select_decomp_table
from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.crossing import carry_input
from lowmem_compile.graph import graph_input, numel, output_values, splice, storage_root, sympy_numel, tensor_value
from lowmem_compile.in_backward import RULES, Planned, Rule
from lowmem_compile.passes.embedding_gradient import CAST, SCATTER, put_rows, row_sums, sums_rows

aten = torch.ops.aten


@dataclass(frozen=True)
class Place:
    """A gradient that the graph returns, where it returns it, and what is planned for it."""

    position: int
    planned: Planned


class UpdateInBackward:
    """Run the rule of each parameter in the backward graph."""

    name = "update_in_backward"
    stage = Stage.BACKWARD
    numerics = Numerics.REASSOCIATED

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        planned = {p.source: p for p in ctx.facts.get("updates", ())}
        if not planned:
            return []
        found = []
        for position, (node, desc) in enumerate(zip(output_values(graph), graph.output_node().meta["desc"], strict=True)):
            index = getattr(getattr(desc, "grad_of", None), "idx", None)
            if index in planned and isinstance(node, fx.Node):
                found.append(Match(node, Place(position, planned[index])))
        return found

    def check(self, match: Match, ctx: Context) -> Decline | None:
        parameter = graph_input(ctx.facts["forward"], match.info.planned.parameter)
        if parameter is None:
            raise AssertionError(f"the forward graph has no input for the gradient {match.node.name}")
        if any(n.target == aten.copy_.default and n.args[0] is parameter for n in parameter.users):
            return Decline("LM214", "the forward pass writes to the parameter in place")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:
        gradient, place = match.node, match.info
        rule = RULES[place.planned.rule]
        parameter, count, *tensors = (
            carry_input(graph, ctx, index) for index in (place.planned.parameter, place.planned.count, *place.planned.tensors)
        )
        values = list(output_values(graph))
        values[place.position] = None
        graph.output_node().args = (tuple(values),)
        before = behind_last(graph, gradient, parameter)
        scatter = scattered_rows(gradient, parameter) if rule.rows else None
        if scatter is None:
            inputs = [parameter, gradient, *tensors]
            results = splice(
                graph, before, rule.apply, inputs, like=gradient, decompositions=dict(select_decomp_table()), backward=True
            )
        else:
            results = (update_rows(graph, before, scatter, rule, parameter, tensors),)
            drop(graph, gradient)
        for old, new in zip([parameter, *tensors[: rule.states]], results, strict=True):
            write(graph, before, old, new)
        count_update(graph, count, place.planned.unit)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        """Bytes of the gradient, which no longer lives until the end."""
        value = tensor_value(match.node)
        return sympy_numel(value) * value.element_size()


def behind_last(graph: fx.Graph, gradient: fx.Node, parameter: fx.Node) -> fx.Node:
    """The node in front of which the update goes: behind the gradient and all that reads the parameter."""
    last = gradient
    reached = False
    for node in graph.nodes:
        reached = reached or node is gradient
        if reached and node.op != "output" and any(storage_root(i) is parameter for i in node.all_input_nodes):
            last = node
    after = last.next
    while after.op == "placeholder":
        after = after.next
    return after


def scattered_rows(gradient: fx.Node, parameter: fx.Node) -> fx.Node | None:
    """The sum of rows that is the gradient of an embedding, if nothing else reads it and it has fewer rows than the table."""
    scatter = gradient.args[0] if gradient.target == CAST else gradient
    if not isinstance(scatter, fx.Node) or scatter.target != SCATTER or not sums_rows(scatter):
        return None
    alone = not gradient.users and (scatter is gradient or len(scatter.users) == 1)
    rows = scatter.args[3]
    return scatter if alone and isinstance(rows, fx.Node) and numel(rows) < numel(parameter) else None


def update_rows(
    graph: fx.Graph, before: fx.Node, scatter: fx.Node, rule: Rule, parameter: fx.Node, tensors: list[fx.Node]
) -> fx.Node:
    """The parameter with the rule applied to the rows that have a gradient; Inductor writes them in place."""
    zeros, mask, indices, rows = scatter.args

    def changed(
        p: torch.Tensor, mask: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, zeros: torch.Tensor, *tensors: torch.Tensor
    ) -> torch.Tensor:
        at, sums = row_sums(mask, index, rows, zeros)
        (new,) = rule.apply(aten._unsafe_index(p, [at]), sums, *tensors)
        return put_rows(p, at, new)

    table = {k: v for k, v in select_decomp_table().items() if k is not aten._unsafe_index_put.default}
    inputs: list[Any] = [parameter, mask, indices[0], rows, zeros, *tensors]  # type: ignore[index]
    new: fx.Node = splice(graph, before, changed, inputs, like=scatter, decompositions=table, backward=True)
    return new


def drop(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing reads, and then those that only it read."""
    if node.users or node.op == "placeholder":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for below in inputs:
        drop(graph, below)


def write(graph: fx.Graph, before: fx.Node, old: fx.Node, new: fx.Node) -> None:
    """``old.copy_(new)``, for an input of the graph."""
    with graph.inserting_before(before):
        node = graph.call_function(aten.copy_.default, (old, new))
    node.meta = {"val": old.meta["val"], "partitioner_tag": "is_backward"}


def count_update(graph: fx.Graph, count: fx.Node, unit: int) -> None:
    """One more update: the graph adds the sum of their units to ``count`` once."""
    for node in count.users:
        if node.target == aten.add.Tensor:
            number = node.args[1]
            if not isinstance(number, int):
                raise AssertionError(f"{node.format_node()} does not count")
            node.args = (count, number + unit)
            return
    with graph.inserting_before(graph.output_node()):
        total = graph.call_function(aten.add.Tensor, (count, unit))
    total.meta = {"val": count.meta["val"], "partitioner_tag": "is_backward"}
    write(graph, graph.output_node(), count, total)
