"""A bias or a norm's weight that is read several times: the sums of its gradient are added one by one.

    before   db = Σ dY1 + Σ dY2 + … + Σ dYn          one loop reads all dYi (with Σ dYi·x̂i also all x̂i)
    after    s = Σ dY1;  s = s + Σ dY2;  …;  db = s    each addition a call

Inductor fuses the sums with the additions that read them. That loop holds every dYi until the last is there, and with them the
products of the weights' gradients wait, and what those read: a layer that is read n times held n layers' activations, decoded.
Behind an addition that is no loop each sum is made where its dYi is.

Bytes at once, not bytes saved for backward: n − 1 tensors of the size that is summed. n − 1 small calls.
Not matched: sums of other terms. Declined: what is summed is small, or of fewer than 8 rows. Numerics class: EXACT.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.graph import (
    VIEW_OPS,
    concrete,
    nbytes,
    replace_and_erase,
    shape_names,
    splice,
    sympy_numel,
    tensor_of,
    tensor_value,
)
from lowmem_compile.kernels.add_parts import add_parts

aten = torch.ops.aten
SUMS = (aten.sum.dim_IntList, aten.sum.default)
CAST = torch.ops.prims.convert_element_type.default
SMALLEST = 4096
"""Elements that are summed."""
ROWS = 8


class AccumulateSums:
    """Add the sums of a shared vector's gradient one by one."""

    name = "accumulate_sums"
    stage = Stage.BACKWARD
    numerics = Numerics.EXACT

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:  # noqa: ARG002
        adds = graph.find_nodes(op="call_function", target=aten.add.Tensor)
        return [Match(n, tuple(summed)) for n in adds if len(summed := what_is_summed(n)) > 1]

    def check(self, match: Match, ctx: Context) -> Decline | None:  # noqa: ARG002
        least = min((tensor_value(n) for n in match.info), key=lambda v: concrete(v.numel()))
        here = concrete(tensor_value(match.node).numel())
        if concrete(least.numel()) < max(SMALLEST, ROWS * here):
            return Decline("LM305", "what is summed is small")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:  # noqa: ARG002
        node = match.node
        terms = node.all_input_nodes
        new = splice(graph, node, add_parts, terms, like=node, decompositions={}, backward=True)
        replace_and_erase(graph, node, new)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        """Bytes that the backward pass no longer holds at once for this term."""
        value = tensor_value(match.info[-1])
        return sympy_numel(value) * value.element_size()

    def describe(self, match: Match, ctx: Context) -> str:  # noqa: ARG002
        return f"{nbytes(match.info[-1])} bytes a term"


def what_is_summed(node: fx.Node) -> list[fx.Node]:
    """What the terms of an addition are sums of, all of them; nothing where a term is no sum, or is read elsewhere."""
    terms, mine = node.all_input_nodes, tensor_of(node)
    kinds = {(shape_names(v), v.dtype) for n in (node, *terms) if (v := tensor_of(n)) is not None}
    if mine is None or len(kinds) != 1 or len(node.args) != 2 or node.kwargs or len(terms) != 2:
        return []
    found: list[fx.Node] = []
    for term in terms:
        base = term
        while base.target in VIEW_OPS or base.target is CAST:
            base = base.all_input_nodes[0]
        if base.target is aten.add.Tensor:
            below = what_is_summed(base)
        else:
            below = [base.all_input_nodes[0]] if base.target in SUMS else []
        if not below or len(term.users) > 1:
            return []
        found += below
    return found
