"""A convolution whose windows tile its input is a linear layer on the windows: a patch embedding needs no scratch memory.

    before   y = conv(x[B, C, H, W], K[O, C, p, q], stride=(p, q))               scratch memory of the library's algorithm
    after    P = rows of the windows of x: [B·H/p·W/q, C·p·q];  y = P Kᵀ + b     P: B·C·H·W elements

oneDNN chooses an algorithm for large windows by shape and dtype, and takes what it needs: 104 MB for DINOv2's embedding of four
images in bf16, whose result is 0.8 MB, more than all the model keeps for its backward pass. A matrix product takes nothing. The
gradients are those of the linear layer, through autograd: dK = dyᵀ P. P is a permuted copy of x, which backward copies again.
A remainder of H or W is cut off first, as a convolution leaves it out. One, two or three spatial dimensions.

Bytes at once, not bytes saved for backward: the scratch memory, measured on zeros (:mod:`lowmem_compile.planner.scratch`),
less P.
Not matched: devices other than a CPU, where scratch memory is not known; windows that overlap, leave gaps or have one element;
padding, dilation, groups. Declined: sizes of the windows' input that are dynamic (a dynamic batch is none of them), a convolution
that takes less than 1 MiB, or no more than P.
Numerics class: REASSOCIATED (a sum over the window, in another order).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.graph import concrete, emit, tensor_of, tensor_value
from lowmem_compile.planner.scratch import call_scratch

aten = torch.ops.aten
CONVOLUTIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
"""The functional forms, by spatial dimensions."""
SMALLEST = 1 << 20
"""Bytes of scratch memory that are worth the work."""
DEFAULTS = (None, None, None, 1, 0, 1, 1)
NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Tiling:
    """A convolution of x with K over windows [p, q] that tile x, and how many of them there are along each dimension."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    window: tuple[int, ...]
    count: tuple[Any, ...]


class UnfoldPatches:
    """Compute a convolution over windows that tile its input as a linear layer."""

    name = "unfold_patches"
    stage = Stage.DYNAMO
    numerics = Numerics.REASSOCIATED

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        if ctx.device != "cpu":
            return []
        return [Match(n, found) for n in graph.nodes if (found := tiling(n)) is not None]

    def check(self, match: Match, ctx: Context) -> Decline | None:
        if not ctx.facts.get("training", True):
            return Decline("LM303", "no gradient flows through this layer")
        if not all(isinstance(n, int) for n in match.info.count):
            return Decline("LM203", "the size of the images is dynamic")
        taken, rows = scratch(match, ctx), patch_bytes(match, ctx)
        if taken < SMALLEST:
            return Decline("LM305", f"the convolution takes {taken} bytes beside its result")
        if taken <= rows:
            return Decline("LM306", f"the convolution takes {taken} bytes beside its result, rows of patches {rows}")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:  # noqa: ARG002
        node, tiled = match.node, match.info
        x, (out, channels) = tiled.x, tensor_value(tiled.weight).shape[:2]
        dims = range(len(tiled.window))
        with graph.inserting_before(node):
            for d, (size, count) in enumerate(zip(tiled.window, tiled.count, strict=True)):
                if tensor_value(x).shape[2 + d] != size * count:
                    x = emit(graph, "narrow", (x, 2 + d, 0, size * count), like=node)
            cut = [n for pair in zip(tiled.count, tiled.window, strict=True) for n in pair]
            x = emit(graph, "reshape", (x, (-1, channels, *cut)), like=node)
            x = emit(graph, "permute", (x, (0, *(2 + 2 * d for d in dims), 1, *(3 + 2 * d for d in dims))), like=node)
            x = emit(graph, "reshape", (x, (-1, channels * math.prod(tiled.window))), like=node)
            rows = emit(graph, "reshape", (tiled.weight, (out, -1)), like=node)
            y = emit(graph, F.linear, (x, rows, tiled.bias), like=node)
            y.meta["example_value"] = y.meta["example_value"].to(tensor_value(node).dtype)  # autocast treats both alike
            y = emit(graph, "reshape", (y, (-1, *tiled.count, out)), like=node)
            y = emit(graph, "permute", (y, (0, len(tiled.window) + 1, *(1 + d for d in dims))), like=node)
            y = emit(graph, "contiguous", (y,), like=node)
        node.replace_all_uses_with(y)
        graph.erase_node(node)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:
        """Bytes that forward and backward no longer take at once, of the larger of the two."""
        return sympy.Integer(scratch(match, ctx) - patch_bytes(match, ctx))

    def describe(self, match: Match, ctx: Context) -> str:
        return f"the convolution took {scratch(match, ctx)} bytes beside its result"


def tiling(node: fx.Node) -> Tiling | None:
    """The windows of a convolution that tile its input; ``None`` for any other node."""
    dims = CONVOLUTIONS.get(node.target) if node.op == "call_function" else None
    if dims is None:
        return None
    given: dict[str, Any] = dict(zip(NAMES, DEFAULTS, strict=True)) | dict(zip(NAMES, node.args, strict=False)) | node.kwargs
    x, weight = (tensor_of(n) if isinstance(n := given[name], fx.Node) else None for name in ("input", "weight"))
    if x is None or weight is None or x.dim() != dims + 2 or not all(isinstance(n, int) for n in weight.shape):
        return None
    window = tuple(weight.shape[2:])
    stride, dilation = (_each(given[n], dims) for n in ("stride", "dilation"))
    padding = (0,) * dims if given["padding"] == "valid" else _each(given["padding"], dims)
    plain = given["groups"] == 1 and dilation == (1,) * dims and padding == (0,) * dims
    if not plain or stride != window or math.prod(window) == 1:
        return None
    counts = tuple(n // w for n, w in zip(x.shape[2:], window, strict=True))
    return Tiling(given["input"], given["weight"], given["bias"], window, counts)


def scratch(match: Match, ctx: Context) -> int:
    """Bytes that the forward or the backward call takes beside its results, whichever takes more."""
    node, tiled, dtype = match.node, match.info, computed_in(match.node, ctx)
    x, weight, out = (_laid_out(tensor_value(n), dtype) for n in (tiled.x, tiled.weight, node))
    none, one = [0] * len(tiled.window), [1] * len(tiled.window)
    how = (list(tiled.window), none, one, False, none, 1)
    forward = call_scratch(aten.convolution.default, (x, weight, None, *how))
    if not tensor_value(tiled.weight).requires_grad:
        return forward
    wanted = [tensor_value(tiled.x).requires_grad, True, False]
    return max(forward, call_scratch(aten.convolution_backward.default, (out, x, weight, [0], *how, wanted)))


def patch_bytes(match: Match, ctx: Context) -> int:
    """Bytes of the rows of patches."""
    return concrete(tensor_value(match.info.x).numel()) * computed_in(match.node, ctx).itemsize


def computed_in(node: fx.Node, ctx: Context) -> torch.dtype:
    """The dtype of the convolution: autocast's, or its result's."""
    found: torch.dtype = ctx.facts.get("autocast", {}).get(node) or tensor_value(node).dtype
    return found


def _laid_out(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of these sizes as Inductor lays it out for a convolution: images with the channels last."""
    plain = value.new_empty([concrete(n) for n in value.shape], dtype=dtype)
    return plain.to(memory_format=torch.channels_last) if plain.dim() == 4 else plain


def _each(value: Any, dims: int) -> tuple[Any, ...]:
    """One setting for each dimension, as a convolution takes it."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * dims if len(values) == 1 else values
