"""Saved tensors that the plan gives up are computed again in the backward pass.

    before   forward returns q = x̂ Wᵀ + b;  backward reads q
    after    backward: q = x̂ Wᵀ + b, where q is first read

Runs only where ``options["memory_budget"]`` is given and the planner (:mod:`lowmem_compile.planner.plan`) chose it. The
operations repeated lie between the tensor and the nearest graph inputs and saved tensors
(:mod:`lowmem_compile.rematerialise`); inputs that the backward graph did not have, weights as a rule, are handed to it, which
takes no memory.

Bytes saved: those of the tensor. Time: the operations repeated.
Numerics class: EXACT; where it reads a tensor that is kept as codes, it inherits that tensor's error.
"""

from __future__ import annotations

import sympy
from torch import fx

from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.crossing import exchange, first_reader, retire
from lowmem_compile.graph import storage_root, sympy_numel, tensor_value
from lowmem_compile.rematerialise import Recipe, recipe_of, repeat


class RecomputeSaved:
    """Compute saved tensors again, as planned."""

    name = "recompute_saved"
    stage = Stage.SAVED
    numerics = Numerics.EXACT

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        plan = ctx.facts.get("plan")
        if plan is None:
            return []
        crossing = crossing_nodes(ctx)
        return [
            Match(root, (tuple(saved), crossing))
            for root, saved in crossing.items()
            if root.graph is graph and plan.decision(root.name) == "recompute"
        ]

    def check(self, match: Match, ctx: Context) -> Decline | None:  # noqa: ARG002
        saved, crossing = match.info
        recipe = recipe_of(match.node, saved, crossing)
        return None if isinstance(recipe, Recipe) else Decline("LM203", recipe)

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:
        root, (saved, crossing) = match.node, match.info
        recipe = recipe_of(root, saved, crossing)
        assert isinstance(recipe, Recipe)
        placeholder_of: dict[fx.Node, fx.Node] = ctx.facts["placeholder_of"]
        new = [i for i in recipe.inputs if i not in placeholder_of]
        holder, *others = saved
        placeholder_of.update(zip(new, exchange(graph, ctx, holder, new), strict=True))
        for other in others:
            exchange(graph, ctx, other, [])
        backward: fx.Graph = ctx.facts["backward"]
        order = {n: i for i, n in enumerate(backward.nodes)}
        readers = [first_reader(p) for n in saved if (p := placeholder_of[n]).users]
        if readers:
            made = repeat(recipe, backward, min(readers, key=order.__getitem__), placeholder_of, saved)
            for node, copy in made.items():
                placeholder_of[node].replace_all_uses_with(copy)
        for node in saved:
            retire(ctx, node)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        value = tensor_value(match.node)
        return sympy_numel(value) * value.element_size()


def crossing_nodes(ctx: Context) -> dict[fx.Node, list[fx.Node]]:
    """The nodes of each storage that cross, inputs of the graph left out."""
    placeholder_of: dict[fx.Node, fx.Node] = ctx.facts["placeholder_of"]
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in ctx.facts["saved"]:
        root = storage_root(node)
        if node in placeholder_of and root.op != "placeholder" and node not in groups.get(root, ()):
            groups.setdefault(root, []).append(node)
    return groups
