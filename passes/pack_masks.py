"""Boolean tensors that cross from forward to backward take one bit an element instead of one byte.

    before   forward returns mask: b8[N];  backward reads mask
    after    forward returns u8[ceil(N/8)];  backward: mask = unpack(...)

Planar layout: bit k of byte i is element i + k·ceil(N/8). Packed in float32 (exact to 255) with one conversion at the end;
Inductor's C++ is slow in uint8 arithmetic. Bytes saved: N − ceil(N/8). Declined for masks of fewer than 64 elements.
Numerics class: EXACT.
"""

from __future__ import annotations

import operator

import sympy
import torch
from torch import fx

from lowmem_compile._torch import select_decomp_table
from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.graph import numel, splice, storage_root, sympy_numel, tensor_of

aten = torch.ops.aten
SMALLEST = 64


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """u8[ceil(N/8)] of a boolean tensor of N elements, planar."""
    flat = mask.reshape(-1).to(torch.float32)
    eighth = (flat.numel() + 7) // 8
    pad = 8 * eighth - flat.numel()
    if not (isinstance(pad, int) and pad == 0):
        flat = aten.constant_pad_nd(flat, [0, pad])
    planes = flat.view(8, eighth)
    total = planes[0]
    for k in range(1, 8):
        total = total + planes[k] * float(2**k)
    return total.to(torch.int32).to(torch.uint8)


def unpack_bits(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The boolean tensor of the given shape."""
    n = 1
    for s in shape:
        n = n * s
    shift = torch.arange(0, 8, dtype=torch.int32, device=packed.device).view(8, 1)
    bits = (packed.to(torch.int32).view(1, -1) >> shift) & 1
    return (bits.reshape(-1)[:n] != 0).reshape(shape)


class PackMasks:
    """Store saved boolean tensors in one bit an element."""

    name = "pack_masks"
    stage = Stage.SAVED
    numerics = Numerics.EXACT

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        saved: list[fx.Node] = ctx.facts["saved"]
        return [Match(n) for n in saved if (v := tensor_of(n)) is not None and v.dtype == torch.bool and n.graph is graph]

    def check(self, match: Match, ctx: Context) -> Decline | None:
        node = match.node
        if storage_root(node).op == "placeholder" or node in ctx.facts["user_outputs"]:
            return Decline("LM302", "the mask is an input or an output of the graph, which is kept alive anyway")
        if numel(node) < SMALLEST or numel(storage_root(node)) < numel(node):
            return Decline("LM305", "the mask is small")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:
        node = match.node
        decompositions = dict(select_decomp_table())
        output = graph.output_node()
        after = node.next  # right behind its producer: the byte mask dies at once
        while after.op == "placeholder" or after.target is operator.getitem:
            after = after.next
        packed = splice(graph, after, pack_bits, [node], like=node, decompositions=decompositions)
        packed.meta["lowmem_kind"] = "1-bit mask"
        first = ctx.facts["num_user_outputs"]
        values = list(output.args[0])
        index = next(i for i in range(first, len(values)) if values[i] is node)
        values[index] = packed
        output.args = (tuple(values),)
        backward: fx.Graph = ctx.facts["backward"]
        old: fx.Node = ctx.facts["placeholder_of"][node]
        shape = node.meta["val"].shape
        with backward.inserting_before(old):
            new = backward.placeholder(packed.name)
        new.meta = {k: v for k, v in old.meta.items() if k != "val"}
        new.meta["val"] = packed.meta["val"]
        start = next(n for n in backward.nodes if n.op != "placeholder")
        mask = splice(
            backward,
            start,
            lambda p: unpack_bits(p, tuple(shape)),
            [new],
            like=old,
            decompositions=decompositions,
            backward=True,
        )
        old.replace_all_uses_with(mask)
        backward.erase_node(old)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        elements = sympy_numel(match.node.meta["val"])
        return elements - sympy.ceiling(elements / 8)
