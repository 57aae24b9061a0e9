"""Gradient of an embedding: sum in float32 only the rows that occur, and add them to another gradient in place.

    before   total = zeros(f32[V, D]); total[i] += rows; dW = bf16(total)                   4·V·D + 2·V·D at once
    after    owner = zeros(i32[V]); owner[i] = 0 … N-1; slot = owner[i]                     one position for each distinct index
             total = zeros(f32[N, D]); total[slot] += rows
             dW = zeros(bf16[V, D]); dW[i] = bf16(total[slot])                              4·N·D + 4·V + 2·V·D

With i: i64[N], rows: bf16[N, D], W: bf16[V, D]. Which position ends up as the owner of an index does not matter; equal indices
then write equal rows. Where the gradient is only added to another one, head: bf16[V, D] (an embedding tied to the head),

    before   dW = head + bf16(total)
    after    dW = head; dW[i] = bf16(f32(head[i]) + total[slot])                            4·N·D + 2·N·D + 4·V
    float32  dW = head; dW[i] += rows                                                       nothing besides

A float32 gradient that is added to no other is made last: dW = zeros(f32[V, D]); dW[i] += rows.

The last step of the first form, and the float32 one, is one operation (``kernels/scatter_rows``): what was read before is freed
when the table is made. In the second, Inductor writes the last step into ``head``, which nothing reads afterwards; where
``head`` is computed for this alone, it is kept in memory, so that the saved tensor it is computed from (the chunked loss's ∂L/∂W,
which is scaled) is read once, and Inductor writes over it. Under autocast ``head`` is a cast of the bf16 gradient of the head:
one f32[V, D] in place of two, zeros for the rows and the sum. dW[v] = Σ rows[n] over i[n] = v, masked as before (padding
index). The gradient is the exact one. Bytes at once, not bytes saved for backward: 4·(V − N)·D − 4·V fewer; of a sum
4·V·D − 6·N·D − 4·V fewer, in float32 all 4·V·D.
Not matched: sums over more than one index, sparse gradients. Declined where the sum takes more than it frees, or rows as much as
the gradient.
Numerics class: REASSOCIATED (of a sum with another gradient, one rounding less).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from lowmem_compile._torch import select_decomp_table
from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.fusing import is_pointwise
from lowmem_compile.graph import (
    argument,
    concrete,
    is_static,
    numel,
    replace_and_erase,
    shape_names,
    splice,
    sympy_numel,
    tensor_of,
    tensor_value,
)
from lowmem_compile.kernels.group_codes import in_memory
from lowmem_compile.kernels.scatter_rows import scatter_rows

aten = torch.ops.aten
CAST = torch.ops.prims.convert_element_type.default
SCATTER = aten._unsafe_masked_index_put_accumulate.default
NARROW = (torch.bfloat16, torch.float16)
SMALLEST = 4096
"""Elements of a gradient that is worth the work."""


@dataclass(frozen=True)
class Place:
    """A scatter-add of rows into zeros and what becomes of it. [V, D]: all; [..., D]: the rows."""

    zeros: fx.Node
    mask: fx.Node
    index: fx.Node
    rows: fx.Node
    result: fx.Node
    """The scatter, or its cast to the weight's dtype."""
    total: fx.Node | None
    """The addition to another gradient, if that is all that reads the result."""
    other: fx.Node | None
    """That other gradient."""

    @property
    def narrow(self) -> bool:
        """Whether the rows are summed in a wider dtype than the weight's."""
        return tensor_value(self.result).dtype in NARROW


class EmbeddingGradient:
    """Sum the gradient of an embedding over the rows that occur."""

    name = "embedding_gradient"
    stage = Stage.BACKWARD
    numerics = Numerics.REASSOCIATED

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:  # noqa: ARG002
        return [Match(n) for n in graph.find_nodes(op="call_function", target=SCATTER) if sums_rows(n)]

    def check(self, match: Match, ctx: Context) -> Decline | None:  # noqa: ARG002
        node = match.node
        place = place_of(node)
        if len(node.users) > 1 or (place.result is not node and any(map(_widens, place.result.users))):
            return Decline("LM206", "the wide sum is read elsewhere")
        if numel(node) < SMALLEST:
            return Decline("LM305", "the gradient is small")
        rows, wide = numel(place.rows), numel(node)
        late = not place.narrow and place.other is None
        narrow_sum = _fewer(wide, rows, concrete(tensor_value(node).shape[0]), tied=place.other is not None)
        if (late and rows >= wide) or (place.narrow and narrow_sum <= 0):
            return Decline("LM306", f"{rows} elements of rows take as much as {wide} of the whole gradient")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:  # noqa: ARG002
        place = place_of(match.node)
        last = place.total or place.result
        inputs = [place.mask, place.index, place.rows, place.zeros, *([place.other] if place.other is not None else [])]
        dtype = tensor_value(place.result).dtype
        own = place.other is not None and is_pointwise(place.other) and len(place.other.users) == 1

        def gradient(
            mask: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, zeros: torch.Tensor, *other: torch.Tensor
        ) -> torch.Tensor:
            where = (mask, index, rows, zeros)
            if not other:
                return sum_rows(*where, dtype) if place.narrow else late_rows(*where)
            return add_rows(*where, in_memory(other[0]) if own else other[0])

        table = {k: v for k, v in select_decomp_table().items() if k is not aten._unsafe_index_put.default}
        new = splice(graph, last, gradient, inputs, like=last, decompositions=table, backward=True)
        replace_and_erase(graph, last, new)
        for node in dict.fromkeys((place.result, match.node, place.zeros)):
            if node is not last and not node.users:
                graph.erase_node(node)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        """Bytes that the backward pass no longer needs at once."""
        place, value = place_of(match.node), tensor_value(match.node)
        wide = sympy_numel(value)
        if not place.narrow:
            return wide * value.element_size() if place.other is not None else sympy.Integer(0)
        return _fewer(wide, sympy_numel(tensor_value(place.rows)), sympy_numel(value[:, 0]), tied=place.other is not None)


def sum_rows(
    mask: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``zeros`` [V, D] plus the rows [..., D] at ``index`` [...], rounded once to ``dtype``."""
    at, sums = row_sums(mask, index, rows, zeros)
    table: torch.Tensor = scatter_rows(sums.to(dtype), at, zeros.shape[0])
    return table


def late_rows(mask: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """``zeros`` [V, D] plus the rows [..., D] at ``index`` [...], in one operation that runs when all it needs is there."""
    at, flat = _flat(mask, index, rows, zeros)
    table: torch.Tensor = scatter_rows(flat.to(zeros.dtype), at, zeros.shape[0], accumulate=True)
    return table


def add_rows(
    mask: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, zeros: torch.Tensor, other: torch.Tensor
) -> torch.Tensor:
    """``other`` [V, D] plus the rows [..., D] at ``index`` [...]: added in the dtype of ``zeros``, rounded once."""
    at, flat = _flat(mask, index, rows, zeros)
    if other.dtype == zeros.dtype:
        return put_rows(other, at, flat, accumulate=True)
    at, sums = _sums(at, flat, zeros)
    return put_rows(other, at, (aten._unsafe_index(other, [at]) + sums).to(other.dtype))


def row_sums(
    mask: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices [N] of rows [..., D], and for each the sum [N, D] of all rows with the same index, as wide as ``zeros``."""
    return _sums(*_flat(mask, index, rows, zeros), zeros)


def _flat(mask: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices [N] and rows [N, D] as ``_unsafe_masked_index_put_accumulate`` takes them: clamped, and zero outside ``mask``."""
    at = index.clamp(-zeros.shape[0], zeros.shape[0] - 1).reshape(-1)
    return at, torch.where(mask, rows, 0).reshape(at.shape[0], zeros.shape[1])


def _sums(at: torch.Tensor, rows: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices, and for each of the N positions the sum of all rows with the same index."""
    positions = torch.arange(at.shape[0], dtype=torch.int32, device=at.device)
    owner = put_rows(zeros.new_zeros(zeros.shape[:1], dtype=torch.int32), at, positions)
    slot = aten._unsafe_index(owner, [at])
    sums = put_rows(torch.zeros_like(rows), slot, rows, accumulate=True)
    return at, aten._unsafe_index(sums, [slot])


def put_rows(base: torch.Tensor, at: torch.Tensor, values: torch.Tensor, *, accumulate: bool = False) -> torch.Tensor:
    """A copy of ``base`` with the rows ``at`` replaced or added to; Inductor writes in place where ``base`` is not read again."""
    result: torch.Tensor = aten._unsafe_index_put(base, [at], values, accumulate)
    return result


def place_of(node: fx.Node) -> Place:
    """What is around a scatter that :meth:`EmbeddingGradient.find` found. Looked up anew: rewriting another may change it."""
    indices = node.args[2]
    if not isinstance(indices, (list, tuple)) or not isinstance(indices[0], fx.Node):
        raise AssertionError(f"{node.name} adds at {indices!r}, not at a tensor")
    cast = next(iter(node.users), None)
    narrow = cast is not None and cast.target == CAST and tensor_value(cast).dtype in NARROW
    result = cast if narrow and cast is not None else node
    return Place(argument(node, 0), argument(node, 1), indices[0], argument(node, 3), result, *_only_added(result))


def _only_added(result: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The addition that alone reads the gradient, and the other gradient, laid out alike."""
    total = next(iter(result.users), None)
    if total is None or len(result.users) != 1 or total.target != aten.add.Tensor or total.kwargs or len(total.args) != 2:
        return None, None
    other = next((a for a in total.args if a is not result), None)
    if not isinstance(other, fx.Node) or _layout(other) is None or _layout(other) != _layout(result):
        return None, None
    return total, other


def _layout(node: fx.Node) -> tuple[object, ...] | None:
    """dtype, sizes and strides, compared as formulas: no guard is added."""
    value = tensor_of(node)
    return None if value is None else (value.dtype, value.device, shape_names(value), tuple(map(str, value.stride())))


def sums_rows(node: fx.Node) -> bool:
    """Whether the scatter adds rows into a floating-point matrix of zeros along its first dimension."""
    zeros, indices, value = argument(node, 0), node.args[2], tensor_of(node)
    if value is None or value.dim() != 2 or not value.dtype.is_floating_point or any(is_static(s, 0) for s in value.shape):
        return False
    one = isinstance(indices, (list, tuple)) and len(indices) == 1 and isinstance(indices[0], fx.Node)
    return one and zeros.target == aten.full.default and zeros.args[1] in (0, 0.0) and isinstance(node.args[3], fx.Node)


def _fewer(wide: Any, rows: Any, count: Any, *, tied: bool) -> Any:
    """Bytes at once that a narrow gradient takes less, in numbers or formulas: elements of [V, D], of [N, D], V."""
    return 4 * wide - (6 if tied else 4) * rows - 4 * count


def _widens(user: fx.Node) -> bool:
    return user.target == CAST and tensor_value(user).dtype not in NARROW
