"""Boolean tensors that cross from forward to backward take one bit an element instead of one byte.

    before   forward returns mask: b8[N];  backward reads mask
    after    forward returns u8[ceil(N/8)];  backward: mask = unpack(...)

Planar layout: bit k of byte i is element i + k·ceil(N/8). Packed in float32 (exact to 255) with one conversion at the end;
Inductor's C++ is slow in uint8 arithmetic. Bytes saved: N − ceil(N/8). Declined for masks of fewer than 64 elements.
Numerics class: EXACT.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from lowmem_compile._torch import select_decomp_table
from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.crossing import behind, exchange, retire
from lowmem_compile.graph import (
    is_static,
    numel,
    placeholders,
    splice,
    storage_root,
    sympy_numel,
    tensor_of,
)

aten = torch.ops.aten
SMALLEST = 64


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """u8[ceil(N/8)] of a boolean tensor of N elements, planar."""
    flat = mask.reshape(-1).to(torch.float32)
    eighth = (flat.numel() + 7) // 8
    pad = 8 * eighth - flat.numel()
    if not is_static(pad, 0):
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
        if sizes_in_backward(node, ctx) is None:
            return Decline("LM203", "the backward graph has no tensor that tells the mask's dynamic size")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:
        node = match.node
        decompositions = dict(select_decomp_table())
        packed = splice(graph, behind(node), pack_bits, [node], like=node, decompositions=decompositions)
        packed.meta["lowmem_kind"] = "1-bit mask"
        (new,) = exchange(graph, ctx, node, [packed])
        backward, old = new.graph, ctx.facts["placeholder_of"][node]
        shape, sources = node.meta["val"].shape, sizes_in_backward(node, ctx)
        if sources is None:
            raise AssertionError(f"the sizes of {node.name} went between check and rewrite")
        dynamic = iter(sources)
        where = [next(dynamic)[1] if isinstance(size, torch.SymInt) else None for size in shape]

        def unpack(packed: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            given = iter(tensors)
            return unpack_bits(packed, tuple(s if d is None else next(given).shape[d] for s, d in zip(shape, where, strict=True)))

        start = next(n for n in backward.nodes if n.op != "placeholder")
        mask = splice(
            backward,
            start,
            unpack,
            [new, *(tensor for tensor, _ in sources)],
            like=old,
            decompositions=decompositions,
            backward=True,
        )
        old.replace_all_uses_with(mask)
        retire(ctx, node)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        elements = sympy_numel(match.node.meta["val"])
        return elements - sympy.ceiling(elements / 8)


def sizes_in_backward(node: fx.Node, ctx: Context) -> list[tuple[fx.Node, int]] | None:
    """For each dynamic dimension of a mask, an input of the backward graph and its dimension of that size.

    ``None`` if a dynamic size is that of no input.
    """
    found: list[tuple[fx.Node, int]] = []
    inputs = [(n, v) for n in placeholders(ctx.facts["backward"]) if (v := tensor_of(n)) is not None and v.dtype != torch.bool]
    for size in node.meta["val"].shape:
        if isinstance(size, torch.SymInt):
            where = next(((n, d) for n, v in inputs for d, s in enumerate(v.shape) if same_size(s, size)), None)
            if where is None:
                return None
            found.append(where)
    return found


def same_size(size: int | torch.SymInt, wanted: torch.SymInt) -> bool:
    """Equal as formulas; no guard is added."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr == wanted.node.expr)
