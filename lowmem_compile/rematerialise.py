"""How a tensor that crosses to the backward graph can be computed there again, from what the backward graph is given anyway.

A recipe is the part of the forward graph between a saved tensor and the nearest graph inputs and other saved tensors. Unlike the
partitioner's recomputation it may contain matrix products; it is for the planner to say whether they are worth it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lowmem_compile.graph import VIEW_OPS, numel, sizes, storage_root, tensor_of, tensor_value
from lowmem_compile.planner.program import has_parts, repeatable

SCRATCH = frozenset({torch.ops.aten.convolution.default, torch.ops.aten._convolution.default})
"""Operations that may take scratch memory many times the size of what they make: a bf16 patch embedding of DINOv2 takes 104 MB
on a CPU for 2.4 MB. At the end of the backward pass, beside all gradients, that would be the peak of the step."""
MOST_NODES = 60
"""A longer recipe reaches back into other blocks of the model."""


@dataclass(frozen=True)
class Recipe:
    """How to compute a saved tensor again.

    Attributes:
        nodes: forward operations to repeat, in order; they make every saved view of the tensor.
        inputs: inputs of the forward graph that are read.
        sources: other saved tensors that are read, by storage, each with the saved node to read it from.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    sources: Mapping[fx.Node, fx.Node]


def recipe_of(root: fx.Node, saved: Sequence[fx.Node], kept: Mapping[fx.Node, Sequence[fx.Node]]) -> Recipe | str:
    """The recipe of a storage, or the reason why there is none.

    Args:
        root: owner of the storage.
        saved: nodes of it that cross.
        kept: the crossing nodes of every storage that crosses, this one's included.
    """
    nodes: dict[fx.Node, None] = {}
    inputs: dict[fx.Node, None] = {}
    sources: dict[fx.Node, fx.Node] = {}
    work: list[tuple[fx.Node, bool]] = [(n, False) for n in saved]
    while work:
        node, ready = work.pop()
        if ready:
            nodes[node] = None
            continue
        if node in nodes or node in inputs or node in sources:
            continue
        if node.op == "placeholder":
            inputs[node] = None
            continue
        if node is not root and node is storage_root(node) and node in kept:
            whole = next((s for s in kept[node] if _same_memory(s, node)), None)
            if whole is None:
                return f"the backward pass has {node.name} in another layout only"
            sources[node] = whole
            continue
        if node.op != "call_function" or not (repeatable(node) or node.target in VIEW_OPS):
            return f"{node.name} cannot be computed twice with the same result"
        if node.target in SCRATCH:
            return f"{node.name} is a convolution, whose scratch memory may exceed by far what it makes"
        if tensor_of(node) is None and not has_parts(node):
            return "its size is computed in the graph"
        if len(nodes) > MOST_NODES:
            return "too much would have to be computed again"
        work.append((node, True))
        work += [(i, False) for i in node.all_input_nodes]
    order = {n: i for i, n in enumerate(root.graph.nodes)}
    return Recipe(tuple(sorted(nodes, key=order.__getitem__)), tuple(inputs), sources)


def _same_memory(saved: fx.Node, root: fx.Node) -> bool:
    """Whether the saved node is the whole storage in the root's own order, so that a view restores it."""
    one, other = tensor_value(saved), tensor_of(root)
    if other is None or numel(saved) != numel(root):
        return False
    return saved is root or (one.is_contiguous() and other.is_contiguous())


def repeat(
    recipe: Recipe, backward: fx.Graph, before: fx.Node, given: Mapping[fx.Node, fx.Node], wanted: Iterable[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Insert a recipe into the backward graph; returns the copies of the ``wanted`` nodes.

    Args:
        recipe: what to insert.
        backward: the graph.
        before: node in front of which it goes.
        given: placeholders of the recipe's inputs and of the saved nodes it reads.
        wanted: saved nodes of the tensor.
    """
    env: dict[fx.Node, fx.Node] = {n: given[n] for n in recipe.inputs}
    with backward.inserting_before(before):
        for root, saved in recipe.sources.items():
            placeholder = given[saved]
            env[root] = placeholder if saved is root else _viewed(backward, placeholder, tensor_value(root), root)
        for node in recipe.nodes:
            copy = backward.node_copy(node, lambda n: env[n])
            copy.meta = {k: v for k, v in node.meta.items() if k not in ("recompute", "lowmem_pin", "ac_graph_id", "lowmem_kind")}
            copy.meta["partitioner_tag"] = "is_backward"
            env[node] = copy
    return {n: env[n] for n in wanted}


def _viewed(graph: fx.Graph, placeholder: fx.Node, value: torch.Tensor, like: fx.Node) -> fx.Node:
    new = graph.call_function(torch.ops.aten.view.default, (placeholder, list(sizes(value))))
    new.meta = {k: v for k, v in like.meta.items() if k != "lowmem_kind"}
    new.meta["val"] = value
    new.meta["partitioner_tag"] = "is_backward"
    return new
