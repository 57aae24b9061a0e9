"""Saved tensors that the backward pass reads as a norm's input, and in no other way.

With γ frozen, a norm's backward reads its input x through x̂ = (x − mean)·rstd, or x·rstd, alone:

    dx = rstd·(γ∘dy − mean(γ∘dy) − x̂·mean(γ∘dy∘x̂))

x̂ enters by its product with a gradient, summed over a row, and by its product with that sum. The term it makes is one direction
of D in dx, so an error of relative size e in x is one of about e/√D there: measured Σ s² over all such tensors of a model
(``planner/choices.py``) is 0.05 to 0.22, where it is 1 to 4 over the others.
"""

from __future__ import annotations

import heapq

import torch
from torch import fx

from lowmem_compile.fusing import reduces_rows
from lowmem_compile.graph import VIEW_OPS, is_static, numel, sizes, tensor_of

aten = torch.ops.aten
LINEAR = VIEW_OPS | {
    aten.clone.default,
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.neg.default,
}
"""What x̂ is made by, of x and its statistics, and dx of x̂."""


def only_normalised(placeholder: fx.Node) -> bool:
    """Whether the backward graph reads its input as the input of a norm whose γ is frozen, and does nothing else with it."""
    size, scaled = numel(placeholder), {placeholder}
    products, sums = set[fx.Node](), set[fx.Node]()
    is_norm, work, seen = False, list(placeholder.users), set(placeholder.users)
    heapq.heapify(work)
    while work:
        node = heapq.heappop(work)
        inputs = node.all_input_nodes
        others = [i for i in inputs if i not in scaled]
        a_row_each = all(i in sums or _is_of_rows(i) for i in others)
        if any(i in products for i in inputs):
            summed = reduces_rows(node)
            if len(others) < len(inputs) or not (summed or _is_linear(node)):
                return False
            (sums if summed else products).add(node)
        elif len(others) == len(inputs):
            if not a_row_each:
                continue  # a term of dx: of a sum and a gradient
            sums.add(node)
        elif reduces_rows(node):
            continue  # a statistic
        elif not _is_linear(node) or numel(node) != size:
            return False
        elif not a_row_each:
            products.add(node)
        elif any(i in sums for i in others):
            is_norm = True
            continue  # the term of dx: x̂ and a sum
        else:
            scaled.add(node)
        for user in node.users:
            if user not in seen:
                seen.add(user)
                heapq.heappush(work, user)
    return is_norm


def _is_linear(node: fx.Node) -> bool:
    return node.target in LINEAR or (node.target is aten.pow.Tensor_Scalar and node.args[1] in (1, 1.0))


def _is_of_rows(node: fx.Node) -> bool:
    """A value for each row: its last dimension is 1."""
    value = tensor_of(node)
    return value is not None and value.dim() > 0 and is_static(sizes(value)[-1], 1)
