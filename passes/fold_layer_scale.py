"""Fold a LayerScale into the linear before it, so that the linear's output need not be saved.

    before   y = linear(a, W, b);  z = y·λ                 dλ = Σ_n dz∘y          saves y: N·O
    after    W' = λ[:, None]·W;  b' = λ·b;  z = linear(a, W', b')

Gradients stay exact, through autograd on the two small expressions: with G' = dzᵀ a and d = column sums of dz,
    dW = diag(λ)·G'        db = λ∘d        dλ = row sums of (W ∘ G') + b∘d
Nothing is divided by λ. W' exists in the graph only, is recomputed in backward and never saved; no state_dict shows it.
Bytes saved: N·O·itemsize a site (two sites a block in DINOv2, CaiT, BEiT and other vision transformers).
Declined: λ frozen (y is not needed then, LM308), y used elsewhere (LM206), grad mode, autocast or a value changes between the
two (LM214); dropout with p > 0 in between is not matched.
Numerics class: REASSOCIATED (W' is rounded once in W's dtype). Source: Touvron et al. 2021 (LayerScale); derivation here.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.effects import may_read_together
from lowmem_compile.graph import (
    argument,
    emit,
    numel,
    optional_argument,
    sympy_numel,
    tensor_of,
    tensor_value,
)
from lowmem_compile.tapping import is_tapped

LINEARS = (F.linear, torch._C._nn.linear)
MULTIPLY = (operator.mul, torch.mul)


@dataclass(frozen=True)
class Scaled:
    """A linear and the vector its output is multiplied by."""

    linear: fx.Node
    scale: fx.Node
    between: tuple[fx.Node, ...]
    """Dropouts with p = 0, from the linear to the product."""


class FoldLayerScale:
    """Fold λ of ``linear(a, W, b)·λ`` into W and b."""

    name = "fold_layer_scale"
    stage = Stage.DYNAMO
    numerics = Numerics.REASSOCIATED

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:  # noqa: ARG002
        return [Match(n, found) for n in graph.nodes if (found := _scaled(n)) is not None]

    def check(self, match: Match, ctx: Context) -> Decline | None:
        site: Scaled = match.info
        if not ctx.facts.get("training", True):
            return Decline("LM303", "no gradient flows through this layer")
        if any(len(n.users) != 1 for n in (site.linear, *site.between)):
            return Decline("LM206", "the output of the linear is used elsewhere")
        scale, weight, product = tensor_of(site.scale), tensor_of(argument(site.linear, 1)), tensor_of(match.node)
        if scale is None or weight is None or product is None or scale.shape[0] != weight.shape[0]:
            return Decline("LM206", "the vector does not scale the outputs of the linear")
        if not scale.requires_grad:
            return Decline("LM308", "the scale is frozen, so the output of the linear is not saved for it")
        if is_tapped(site.linear, ctx.facts.get("taps", {})):
            return Decline("LM219", "the gradient of the scale would need the whole gradient of the weight")
        inputs = (*site.linear.all_input_nodes, site.scale, site.linear, *site.between)
        effect = may_read_together(site.linear, match.node, inputs)
        if effect:
            return Decline("LM214", effect)
        if numel(match.node) <= 2 * numel(argument(site.linear, 1)) // max(int(weight.shape[0]), 1):
            return Decline("LM306", "the output is smaller than a row of the weight")
        if tensor_value(site.linear).dtype != product.dtype and not ctx.facts.get("autocast", {}).get(site.linear):
            return Decline("LM205", "the product changes the dtype")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:  # noqa: ARG002
        site: Scaled = match.info
        linear, root = site.linear, match.node
        weight, bias = argument(linear, 1), optional_argument(linear, 2, "bias")
        with graph.inserting_before(root):
            column = emit(graph, "unsqueeze", (site.scale, 1), like=root)
            w = _cast(graph, emit(graph, torch.mul, (weight, column), like=root), weight)
            b = None if bias is None else _cast(graph, emit(graph, torch.mul, (bias, site.scale), like=root), bias)
            new = emit(graph, linear.target, (linear.args[0], w, b), like=linear)
            new.meta["example_value"] = linear.meta["example_value"]
            new = _cast(graph, new, root)
        root.replace_all_uses_with(new)
        for node in (root, *reversed(site.between), linear):
            graph.erase_node(node)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        value = match.info.linear.meta["example_value"]
        return sympy_numel(value) * value.element_size()


def _cast(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    dtype = like.meta["example_value"].dtype
    return node if node.meta["example_value"].dtype == dtype else emit(graph, "to", (node, dtype), like=node)


def _scaled(node: fx.Node) -> Scaled | None:
    if node.op != "call_function" or node.target not in MULTIPLY or len(node.args) != 2:
        return None
    for value, scale in (node.args, node.args[::-1]):
        if not isinstance(value, fx.Node) or not isinstance(scale, fx.Node):
            return None
        vector = tensor_of(scale)
        between: list[fx.Node] = []
        source = value
        while source.op == "call_function" and source.target is F.dropout and source.args[1:2] == (0.0,):
            between.append(source)
            source = argument(source, 0)
        if (
            vector is not None
            and vector.dim() == 1
            and source.op == "call_function"
            and source.target in LINEARS
            and len(source.args) >= 2
        ):
            return Scaled(source, scale, tuple(reversed(between)))
    return None
