"""A weight read several times: each matrix product of its gradient is added to the sum as it is made.

    before   P1 = dY1ᵀ X1; …; Pn = dYnᵀ Xn;   dW = P1 + P2 + … + Pn
    after    S = dY1ᵀ X1;  S = S + dY2ᵀ X2 (one ``addmm``);  …;  dW = S

Sums are pointwise work, which Inductor does where the result is read: all in one loop at the end. It makes the products there
too, and holds every dYi and Xi, decoded, until then. A product that takes the sum so far is a call in its place: what it reads
dies, and one S lives. The products may be transposed alike or not.

Bytes at once, not bytes saved for backward: I·O·itemsize for each product, and dYi, Xi until the end. No loop reads the products.
Not matched: products that something else reads, sums of other shapes (broadcast), a scaled sum. Numerics class: REASSOCIATED (in
bfloat16 one rounding less for each product).
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import fx

from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.graph import (
    argument,
    nbytes,
    numel,
    replace_and_erase,
    shape_names,
    splice,
    sympy_numel,
    tensor_of,
    tensor_value,
)

aten = torch.ops.aten
SWAPS = (aten.t.default, aten.permute.default, aten.transpose.int)
SMALLEST = 4096
"""Elements of a gradient that is worth the work."""


@dataclass(frozen=True)
class Sum:
    """One addition: the sum so far, the product, and whether each is read transposed."""

    so_far: fx.Node
    product: fx.Node
    so_far_turned: bool
    product_turned: bool


class AccumulateProducts:
    """Add the products of a shared weight's gradient one by one, each in the call that makes it."""

    name = "accumulate_products"
    stage = Stage.BACKWARD
    numerics = Numerics.REASSOCIATED

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:  # noqa: ARG002
        adds = graph.find_nodes(op="call_function", target=aten.add.Tensor)
        found = [(n, sum_of(n)) for n in adds]
        return [Match(n, s) for n, s in found if s is not None]

    def check(self, match: Match, ctx: Context) -> Decline | None:  # noqa: ARG002
        if numel(match.node) < SMALLEST:
            return Decline("LM305", "the gradient is small")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:  # noqa: ARG002
        node, found = match.node, sum_of(match.node)  # the sum so far may be another one by now
        assert found is not None
        turn_sum = found.so_far_turned != found.product_turned

        def accumulate(so_far: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            total = torch.addmm(so_far.t() if turn_sum else so_far, left, right)
            return total.t() if found.product_turned else total

        left, right = (argument(found.product, i) for i in range(2))
        given = [found.so_far, left, right]
        new = splice(graph, node, accumulate, given, like=node, decompositions={}, backward=True)
        read = node.all_input_nodes
        replace_and_erase(graph, node, new)
        for old in read:
            _erase_unused(graph, old)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        """Bytes that the backward pass no longer needs at once."""
        value = tensor_value(match.node)
        return sympy_numel(value) * value.element_size()

    def describe(self, match: Match, ctx: Context) -> str:  # noqa: ARG002
        return f"{nbytes(match.node)} bytes a product"


def sum_of(node: fx.Node) -> Sum | None:
    """The sum and the product that an addition adds, or ``None``; of two products the one that is made last."""
    if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args) or node.args[0] is node.args[1]:
        return None
    terms, mine = node.all_input_nodes, tensor_of(node)
    kinds = {(shape_names(v), v.dtype) for n in (node, *terms) if (v := tensor_of(n)) is not None}
    if mine is None or mine.dim() != 2 or len(kinds) != 1:
        return None
    ends = [_through_turns(n) for n in terms]
    products = [i for i, (base, _, alone) in enumerate(ends) if alone and base.target is aten.mm.default]
    if not products or not all(_grows(base) for base, _, _ in ends):
        return None
    last = products[0] if len(products) == 1 else int(ends[0][0] < ends[1][0])
    other = ends[1 - last]
    so_far, turned = (other[0], other[1]) if other[2] else (terms[1 - last], False)
    return Sum(so_far, ends[last][0], turned, ends[last][1])


def _grows(base: fx.Node) -> bool:
    """A product, or a sum of products made by this pass or to be made."""
    return base.target in (aten.mm.default, aten.addmm.default, aten.add.Tensor)


def _through_turns(node: fx.Node) -> tuple[fx.Node, bool, bool]:
    """What is read through transpositions; whether an odd number of them; whether nothing else reads it or any of them."""
    turned, alone = False, len(node.users) == 1
    while node.target in SWAPS and (value := tensor_of(node)) is not None and value.dim() == 2:
        turned ^= node.target is aten.t.default or list(node.args[1:]) not in ([[0, 1]], [0, 0], [1, 1])
        node = node.all_input_nodes[0]
        alone &= len(node.users) == 1
    return node, turned, alone


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    if node.op == "call_function" and not node.users:
        below = node.all_input_nodes
        graph.erase_node(node)
        for n in below:
            _erase_unused(graph, n)
