"""Recognise LayerNorm and RMSNorm, as library calls or written by hand, and make them ``lowmem::normalize`` + affine.

    before   F.layer_norm(x, (D,), γ, β, ε)
    after    xhat, r = lowmem.normalize(x, 1, ε, True);  y = (xhat * γ + β).to(x.dtype)
    before   h = x.to(f32); h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + ε);  y = γ * h.to(dtype)     (Llama, Qwen3, T5)
             h = x.float(); h = h * rsqrt(mean(h²) + ε);  y = (h * (1 + γ.float())).type_as(x)                 (Gemma)
    after    xhat, r = lowmem.normalize(x, 1, ε, False); the affine and the casts stay as the model wrote them

The normalised value is found by value, not by spelling: a product (or quotient) with an rsqrt or sqrt below it is evaluated on
random rows and compared with both norms; ε is one of the numbers written in the cone.
The op has a backward of its own that reads its output (see ``kernels/normalize``); ``norm_from_output`` decides later what is
saved. The rewrite is made only where x is wider than the dtype in which the following linears read the norm (autocast): with
equal dtypes nothing can be won, and the site is declined (LM301).
Numerics class: REASSOCIATED.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from lowmem_compile.cone import (
    cone,
    erase_unused,
    evaluate,
    is_cast,
    is_elementwise,
    is_reduction,
    leaf_of,
    scalars,
    sources,
    strip_casts,
)
from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.graph import numel, sizes, tensor_of
from lowmem_compile.kernels.normalize import normalize, normalize_reference
from lowmem_compile.passes.fold_norm_affine import wanted as folding_is_wanted

TOLERANCE = 1e-9
MULTIPLY = {operator.mul, torch.mul}
DIVIDE = {operator.truediv, torch.div}
LINEARS = (F.linear, torch._C._nn.linear)


@dataclass(frozen=True)
class Norm:
    """One norm: its input, rows, and what the library call (if it is one) carries."""

    x: fx.Node
    ndim: int
    eps: float
    center: bool
    nodes: tuple[fx.Node, ...] = ()
    """What computes it by hand; empty for a library call."""
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    library: bool = False


class RecogniseNorm:
    """Replace norms by ``lowmem::normalize``."""

    name = "recognise_norm"
    stage = Stage.DYNAMO
    numerics = Numerics.REASSOCIATED

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:  # noqa: ARG002
        found = []
        for node in graph.nodes:
            norm = library_norm(node) or handwritten_norm(node)
            if norm is not None:
                found.append(Match(node, norm))
        return found

    def check(self, match: Match, ctx: Context) -> Decline | None:
        norm: Norm = match.info
        if not ctx.facts.get("training", True):
            return Decline("LM303", "no gradient flows through this norm")
        x, y = tensor_of(norm.x), tensor_of(match.node)
        if x is None or y is None or not x.dtype.is_floating_point:
            return Decline("LM203", "the input of the norm is not a floating-point tensor")
        if norm.library and y.dtype != x.dtype and not ctx.facts.get("autocast", {}).get(match.node):
            return Decline("LM205", "the norm changes the dtype of its input")
        dtypes = reading_dtypes(match.node, ctx)
        if dtypes and folding_is_wanted(ctx):
            return None
        if not dtypes:
            return Decline("LM304", "no linear reads the output of this norm")
        widest = max(d.itemsize for d in dtypes)
        if x.dtype.itemsize <= widest:
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
            return Decline(
                "LM301",
                f"the input is kept in {str(x.dtype).removeprefix('torch.')} and read by linears in {names}: "
                "recomputing the norm from its input is as small, and exact",
            )
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:  # noqa: ARG002
        norm: Norm = match.info
        root = match.node
        x = leaf_of(norm.nodes) if norm.nodes else input_of(root)
        y = root.meta["example_value"]
        made: list[tuple[fx.Node, torch.dtype]] = []

        def call(target: Callable[..., Any], *args: Any, dtype: torch.dtype) -> fx.Node:
            node = graph.call_function(target, args)
            made.append((node, dtype))
            return node

        wide = torch.float64 if x.meta["example_value"].dtype == torch.float64 else torch.float32
        with graph.inserting_before(root):
            both = graph.call_function(normalize._opoverload, (x, norm.ndim, norm.eps, norm.center))
            value = y.to(wide)
            both.meta = {**root.meta, "example_value": (value, value[(..., *([slice(0, 1)] * norm.ndim))])}
            out = call(operator.getitem, both, 0, dtype=wide)
            if norm.weight is not None:
                out = call(torch.mul, out, norm.weight, dtype=wide)
            if norm.bias is not None:
                out = call(torch.add, out, norm.bias, dtype=wide)
            if y.dtype != wide:
                out = graph.call_method("to", (out, y.dtype))
                made.append((out, y.dtype))
        for node, dtype in made:
            node.meta = {**root.meta, "example_value": y.to(dtype)}
        root.replace_all_uses_with(out)
        erase_unused(root)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        return sympy.Integer(0)  # the recognition frees nothing by itself; norm_from_output does


def library_norm(node: fx.Node) -> Norm | None:
    """A call of ``F.layer_norm`` or ``F.rms_norm`` (and their ``torch.`` twins)."""
    if node.op != "call_function" or node.target not in (F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm):
        return None
    center = node.target in (F.layer_norm, torch.layer_norm)
    names = ("input", "normalized_shape", "weight", "bias", "eps") if center else ("input", "normalized_shape", "weight", "eps")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x = given["input"]
    value = tensor_of(x) if isinstance(x, fx.Node) else None
    if value is None:
        return None
    eps = given.get("eps", 1e-5 if center else None)
    eps = torch.finfo(value.dtype).eps if eps is None else eps
    rows = given["normalized_shape"]
    if isinstance(rows, fx.Node):  # x.shape[-1:]
        rows = rows.meta.get("example_value")
    if isinstance(eps, fx.Node) or not isinstance(rows, (tuple, list)):
        return None
    affine = (given.get("weight"), given.get("bias"))
    return Norm(x, len(rows), float(eps), center, (), *affine, library=True)


def input_of(node: fx.Node) -> fx.Node:
    """The tensor that a library call normalises."""
    x = node.args[0] if node.args else node.kwargs["input"]
    if not isinstance(x, fx.Node):
        raise AssertionError(f"{node.name} normalises {x!r}")
    return x


def handwritten_norm(root: fx.Node) -> Norm | None:
    """A product or quotient that computes x̂ of one tensor over its last dimension."""
    if root.op != "call_function" or root.target not in MULTIPLY | DIVIDE or len(root.all_input_nodes) != 2:
        return None
    first, second = root.args[0], root.args[1]
    if root.target in MULTIPLY and isinstance(first, fx.Node) and _is_scale(first):
        first, second = second, first
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node) and _is_scale(second)):
        return None
    for leaf in _inputs(first):
        value = tensor_of(leaf)
        nodes = cone(root, leaf, reductions=True)
        if value is None or nodes is None or value.dim() < 1 or not any(is_reduction(n) for n in nodes):
            continue
        size = sizes(value)[-1]
        if not isinstance(size, int) or size < 2:
            continue
        shape = (*([2] * (value.dim() - 2)), 3, size) if value.dim() > 1 else (size,)
        sample = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.01 + 0.003
        try:
            got = evaluate(nodes, leaf, sample)
        except (RuntimeError, TypeError, ValueError):  # a cone that cannot run on sample rows is not a norm
            continue
        if not isinstance(got, torch.Tensor) or got.shape != sample.shape:
            continue
        for eps in {e for e in scalars(nodes) if 0 < e < 0.1} | {0.0}:
            for center in (False, True):
                if torch.allclose(got, normalize_reference(sample, 1, eps, center)[0], 0, TOLERANCE):
                    return Norm(leaf, 1, eps, center, tuple(nodes))
    return None


def reading_dtypes(root: fx.Node, ctx: Context) -> set[torch.dtype]:
    """The dtypes in which linears and matmuls read a norm's output, through affine, casts, dropout and views."""
    autocast: dict[fx.Node, torch.dtype] = ctx.facts.get("autocast", {})
    size = numel(root)
    seen: set[fx.Node] = set()
    found: set[torch.dtype] = set()
    work = [root]
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        value = tensor_of(node)
        for user in node.users:
            out = tensor_of(user)
            if value is None or out is None:
                continue
            if user.op == "call_function" and user.target in (*LINEARS, torch.matmul, operator.matmul, F.conv1d, torch.addmm):
                found.add(autocast.get(user, value.dtype) if value.dtype != torch.float64 else value.dtype)
            elif node in sources(user) and numel(user) == size and sum(numel(i) * 4 > size for i in sources(user)) == 1:
                work.append(user)
    return found


def _is_scale(node: fx.Node) -> bool:
    """rsqrt(...), 1/sqrt(...), sqrt(...) or (...)**-0.5, possibly below casts."""
    node = strip_casts(node)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name in ("rsqrt", "sqrt", "reciprocal"):
        return True
    if name == "pow" and len(node.args) == 2 and isinstance(node.args[1], float):
        return math.isclose(abs(node.args[1]), 0.5)
    return name == "truediv" and isinstance(node.args[1], fx.Node) and _is_scale(node.args[1])


def _inputs(first: fx.Node) -> list[fx.Node]:
    """Candidates for x, nearest first: the factor itself, below casts, and below a subtraction of the mean."""
    found: list[fx.Node] = []
    node: fx.Node = first
    for _ in range(8):
        found.append(node)
        subtraction = is_elementwise(node) and getattr(node.target, "__name__", node.target) == "sub"
        if not (is_cast(node) or subtraction) or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return found[::-1]
