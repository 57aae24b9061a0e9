"""Fold a norm's affine into the linears that read it, so that they and the norm's backward share one tensor.

    before   y = xhat·γ + β;                 z = linear(y, W, b)              dW = dZᵀ y        saves y (and what the norm needs)
    after    W' = W·diag(γ);  b' = b + W β;  z = linear(xhat, W', b')         dW' = dZᵀ xhat    saves xhat alone

Gradients stay exact, through autograd on the two small expressions, with G' = dZᵀ xhat and d = column sums of dZ:
    dW = G'·diag(γ) + d βᵀ        dγ = Σ_consumers column-sums(W ∘ G')        dβ = Σ_consumers Wᵀ d
W, γ and β stay the parameters; W' and b' exist in the graph only, are recomputed in backward and never saved, and no state_dict
shows them. They are made in every step, also where W, b, γ and β are all frozen: Dynamo runs one graph for several modules, and
a write to ``.data`` leaves no trace, so a copy made outside the step could be another module's, or stale. It costs 1/N of the
product it feeds. Tied weights are safe: W itself is not touched. Consumers that are not linears (the residual of a post-norm
model) keep reading y.

``options["fold_norm_affine"]``: ``"auto"`` folds only where it saves bytes. While the backward pass may recompute pointwise
operations (``options["recompute"] == "pointwise"``) y is rebuilt from xhat for nothing, so folding saves no byte and is declined
(LM307); under Inductor's own recompute rule it saves one y a norm. ``"always"`` folds wherever it is legal.
Declined: no linear reads y (LM304), only dropout does (LM209), a value changes between the two (LM214), the gradients of the
weights are projected (LM219).
Numerics class: REASSOCIATED. Source: LowMemoryBP (ICML 2024), affine merging; with b' = b + W β (the unscaled W).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from lowmem_compile.cone import is_cast
from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.effects import may_read_together
from lowmem_compile.graph import argument, emit, optional_argument, sympy_numel, tensor_of, tensor_value
from lowmem_compile.kernels.normalize import normalize
from lowmem_compile.tapping import TapInput, is_tapped

LINEARS = (F.linear, torch._C._nn.linear)
MULTIPLY = (torch.mul, operator.mul)
ADD = (torch.add, operator.add)


@dataclass(frozen=True)
class Affine:
    """The affine of one norm and who reads it."""

    xhat: fx.Node
    output: fx.Node
    scale: fx.Node | None
    shift: fx.Node | None
    linears: tuple[fx.Node, ...]
    dropout: bool
    effect: str = ""
    """Why linears that read the output cannot read xhat instead, if there are such."""
    tapped: bool = False
    """Linears read the output whose weights' gradients are projected."""


class FoldNormAffine:
    """Fold γ and β into the following linears."""

    name = "fold_norm_affine"
    stage = Stage.DYNAMO
    numerics = Numerics.REASSOCIATED

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        found = []
        for node in graph.nodes:
            if node.op == "call_function" and node.target is normalize._opoverload:
                xhat = next((u for u in node.users if u.target is operator.getitem and u.args[1] == 0), None)
                if xhat is not None:
                    found.append(Match(node, affine_of(xhat, ctx.facts.get("taps", {}))))
        return found

    def check(self, match: Match, ctx: Context) -> Decline | None:
        affine: Affine = match.info
        if ctx.options.fold_norm_affine == "never":
            return Decline("LM200", "options['fold_norm_affine'] is 'never'")
        if affine.scale is None and affine.shift is None:
            return Decline("LM210", "the norm has no affine")
        if not affine.linears:
            if affine.dropout:
                return Decline("LM209", "a dropout stands between the norm and the linear")
            if affine.effect:
                return Decline("LM214", affine.effect)
            if affine.tapped:
                return Decline("LM219", "the gradient of the affine would need the whole gradient of the weight")
            return Decline("LM304", "no linear reads the output of this norm")
        if not wanted(ctx):
            return Decline("LM307", "the backward pass rebuilds the affine from xhat; folding saves no bytes")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:
        # anew: folding another norm may have replaced the nodes of this one
        affine = affine_of(match.info.xhat, ctx.facts.get("taps", {}))
        for linear in affine.linears:
            self._fold(graph, affine, linear)
        node: fx.Node = affine.output
        while node is not affine.xhat and not node.users:
            below = next(i for i in node.all_input_nodes if i is affine.xhat or _reaches(i, affine.xhat))
            graph.erase_node(node)
            node = below

    def _fold(self, graph: fx.Graph, affine: Affine, linear: fx.Node) -> None:
        weight, bias = argument(linear, 1), optional_argument(linear, 2, "bias")
        w, b, x = weight, bias, affine.xhat
        own = tensor_value(weight).dtype
        wide = torch.float64 if own == torch.float64 else torch.float32

        def cast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
            return node if tensor_value(node).dtype == dtype else emit(graph, "to", (node, dtype), like=linear)

        with graph.inserting_before(linear):
            x = cast(x, tensor_value(affine.output).dtype)
            if affine.scale is not None:
                w = cast(emit(graph, torch.mul, (weight, affine.scale), like=linear), own)
            if affine.shift is not None:
                b = emit(graph, "sum", (emit(graph, torch.mul, (cast(weight, wide), affine.shift), like=linear), -1), like=linear)
                if bias is not None:
                    b = emit(graph, torch.add, (b, bias), like=linear)
                b = cast(b, own)
            new = emit(graph, linear.target, (x, w, b), like=linear)
        linear.replace_all_uses_with(new)
        graph.erase_node(linear)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:
        value = match.info.output.meta["example_value"]
        return sympy_numel(value) * value.element_size() if ctx.options.recompute == "inductor" else sympy.Integer(0)


def wanted(ctx: Context) -> bool:
    """Whether the options ask for folding, or it saves bytes under them."""
    fold_option = ctx.options.fold_norm_affine
    return fold_option == "always" or (fold_option == "auto" and ctx.options.recompute == "inductor")


def affine_of(xhat: fx.Node, taps: Mapping[str, TapInput]) -> Affine:
    """Follow the chain cast · multiply by a vector · add a vector from xhat, and see who reads its end."""
    scale: fx.Node | None = None
    shift: fx.Node | None = None
    node = xhat
    while len(node.users) == 1:
        user = next(iter(node.users))
        other = _vector(user, node)
        if is_cast(user):
            node = user
        elif user.target in MULTIPLY and other is not None and scale is None and shift is None:
            scale, node = other, user
        elif user.target in ADD and other is not None and shift is None:
            shift, node = other, user
        else:
            break
    linears = tuple(u for u in node.users if u.op == "call_function" and u.target in LINEARS and u.args[:1] == (node,))
    linears = tuple(u for u in linears if len(u.args) >= 2 and u.args[1] is not node)
    tapped = any(is_tapped(u, taps) for u in linears)
    linears = tuple(u for u in linears if not is_tapped(u, taps))
    dropout = any(getattr(u.target, "__name__", "") == "dropout" for u in node.users)
    values = [n for n in (node, scale, shift) if n is not None]
    effects = {u: may_read_together(xhat, u, values) for u in linears}
    allowed = tuple(u for u in linears if not effects[u])
    return Affine(xhat, node, scale, shift, allowed, dropout, next(filter(None, effects.values()), ""), tapped)


def _vector(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other operand of a binary operation, if it is a vector over the last dimension."""
    if user.op != "call_function" or len(user.args) != 2 or user.kwargs:
        return None
    others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
    value = tensor_of(others[0]) if len(others) == 1 else None
    return others[0] if value is not None and value.dim() == 1 else None


def _reaches(node: fx.Node, target: fx.Node) -> bool:
    return node is target or any(_reaches(i, target) for i in node.all_input_nodes if i.op != "placeholder")
