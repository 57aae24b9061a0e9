"""Integer tensors that cross from forward to backward take no wider a dtype than their proved bounds need.

    before   forward returns i: i64[...];  backward reads i
    after    forward returns n: i8[...] = narrow(i);  backward: i = widen(n), where i is first read

A bound is proved from the graph alone (:mod:`lowmem_compile.bounds`): places from a top-k or an arg max, positions, comparisons,
sums and products of those, and whatever the forward graph has used as an index. Nothing is measured: where no bound is proved the
tensor keeps its dtype.

Bytes saved: N·(itemsize − w), w the bytes of the narrowest of uint8, int8, int16 and int32 that holds both bounds.
Numerics class: EXACT.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from lowmem_compile.bounds import fits, interval_of
from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.crossing import behind, exchange, first_reader, retire
from lowmem_compile.graph import INHERITED, numel, storage_root, sympy_numel, tensor_of, tensor_value

prims = torch.ops.prims
NARROW = (torch.uint8, torch.int8, torch.int16, torch.int32)
"""From the narrowest; what Inductor's loops load and store on every device."""
WIDE = (torch.int64, torch.int32, torch.int16)
SMALLEST = 64


class NarrowIntegers:
    """Store saved integers in the narrowest dtype that holds them."""

    name = "narrow_integers"
    stage = Stage.SAVED
    numerics = Numerics.EXACT

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        saved: list[fx.Node] = ctx.facts["saved"]
        placeholder_of: dict[fx.Node, fx.Node] = ctx.facts["placeholder_of"]
        return [
            Match(n)
            for n in dict.fromkeys(saved)
            if n.graph is graph
            and n in placeholder_of
            and storage_root(n).op != "placeholder"
            and (v := tensor_of(n)) is not None
            and v.dtype in WIDE
            and "lowmem_kind" not in n.meta
        ]

    def check(self, match: Match, ctx: Context) -> Decline | None:
        node, root = match.node, storage_root(match.node)
        if root in {storage_root(n) for n in ctx.facts["user_outputs"]}:
            return Decline("LM302", "the tensor is an output of the graph, which is kept alive anyway")
        if numel(node) < SMALLEST:
            return Decline("LM305", "the tensor is small")
        if numel(node) != numel(root) or sum(storage_root(n) is root for n in ctx.facts["saved"]) > 1:
            return Decline("LM203", "the backward pass reads several views, or a part, of one storage")
        if not ctx.facts["placeholder_of"][node].users:
            return Decline("LM303", "the backward pass does not read it")
        bounds = interval_of(node)
        if bounds is None:
            return Decline("LM222", "the graph does not prove how large its integers can be")
        if narrowest(node) is None:
            return Decline("LM306", f"integers from {bounds[0]} to {bounds[1]} need the dtype that they have")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:
        node, dtype = match.node, narrowest(match.node)
        assert dtype is not None
        narrow = _cast(graph, behind(node), node, dtype)
        narrow.meta["lowmem_kind"] = f"{str(dtype).removeprefix('torch.')} integers"
        old = ctx.facts["placeholder_of"][node]
        (given,) = exchange(graph, ctx, node, [narrow])
        wide = _cast(given.graph, first_reader(old), given, tensor_value(node).dtype)
        wide.meta["partitioner_tag"] = "is_backward"
        old.replace_all_uses_with(wide)
        retire(ctx, node)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        dtype = narrowest(match.node)
        value = tensor_value(match.node)
        return sympy_numel(value) * (value.element_size() - (dtype or value.dtype).itemsize)


def narrowest(node: fx.Node) -> torch.dtype | None:
    """The narrowest dtype for the proved bounds of a tensor, or ``None`` if it is none narrower than its own."""
    bounds = interval_of(node)
    if bounds is None:
        return None
    found = next((d for d in NARROW if fits(bounds, d)), None)
    return found if found is not None and found.itemsize < tensor_value(node).element_size() else None


def _cast(graph: fx.Graph, before: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    with graph.inserting_before(before):
        new = graph.call_function(prims.convert_element_type.default, (node, dtype))
    new.meta = {k: v for k, v in node.meta.items() if k in INHERITED}
    new.meta["val"] = prims.convert_element_type(tensor_value(node), dtype)
    return new
