"""Linear + cross-entropy over a large vocabulary, computed in chunks: logits are neither saved nor ever whole.

    before   logits = linear(h, W);  loss = cross_entropy(logits.float().view(-1, V), target)        saves logits: N·V
    after    total, ... = lowmem.linear_cross_entropy(h.view(-1, D), W, target);  loss = total / count
             saves ∂L/∂h: N·D, and ∂L/∂W: V·D if W is trained

Between the linear and the loss, casts, views, ``contiguous`` and slices of leading dimensions may stand (the shift of a language
model); they are replayed on h. ``ignore_index``, label smoothing and the reductions mean and sum are supported, and so is a
z-loss beside a mean: ``cross_entropy(x, target) + c * logsumexp(x, -1).square().mean()`` (or ``sum``), of the same rows x.
Bytes saved: (N·V − N·D − [W trained] V·D)·itemsize; declined where that is not positive (LM306), where the logits are used for
anything else, returned to the caller for instance (LM207), or the loss has class weights or soft targets (LM208).
Numerics class: REASSOCIATED (see ``kernels/linear_cross_entropy``).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.graph import argument, emit, optional_argument, sympy_numel, tensor_of, tensor_value
from lowmem_compile.kernels.linear_cross_entropy import linear_cross_entropy

LINEARS = (F.linear, torch._C._nn.linear)
CASTS = {"float", "to", "type"}
SHAPES = {"view", "reshape", "contiguous"}
ARGUMENTS = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")


@dataclass(frozen=True)
class ZLoss:
    """``cross_entropy + weight · mean or sum of logsumexp²``."""

    nodes: tuple[fx.Node, ...]
    """From the logsumexp to the sum with the cross-entropy, the last one."""
    weight: float
    mean: bool


@dataclass(frozen=True)
class Head:
    """A classification head and its loss."""

    linear: fx.Node
    chain: tuple[fx.Node, ...]
    """Nodes from the linear (excluded) to the loss (excluded)."""
    target: fx.Node
    given: dict[str, Any]
    z: ZLoss | None = None


class ChunkLoss:
    """Replace linear + cross-entropy by the chunked operation."""

    name = "chunk_loss"
    stage = Stage.DYNAMO
    numerics = Numerics.REASSOCIATED

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:  # noqa: ARG002
        found = []
        for node in graph.nodes:
            if node.op != "call_function" or node.target is not F.cross_entropy:
                continue
            given = {**dict(zip(ARGUMENTS, node.args, strict=False)), **node.kwargs}
            head = _head(given)
            if head is not None:
                found.append(Match(node, replace(head, z=_z_loss(head, node))))
        return found

    def check(self, match: Match, ctx: Context) -> Decline | None:
        head: Head = match.info
        if ctx.options.chunked_loss == "never":
            return Decline("LM200", "options['chunked_loss'] is 'never'")
        if not ctx.facts.get("training", True):
            return Decline("LM303", "no gradient flows through this loss")
        known = set() if head.z is None else {head.z.nodes[0]}
        for node in (head.linear, *head.chain):
            if len(set(node.users) - known) != 1:
                return Decline("LM207", "the logits are also used elsewhere or returned to the caller")
        weighted = head.given.get("weight") is not None
        target = tensor_of(head.target)
        if weighted or target is None or target.dtype != torch.int64 or head.given.get("reduction", "mean") == "none":
            return Decline("LM208", "class weights, soft targets and reduction='none' are not supported")
        logits, hidden = tensor_of(head.linear), tensor_of(argument(head.linear, 0))
        if logits is None or hidden is None or logits.dtype == torch.float16:
            return Decline("LM208", "float16 gradients of a whole batch may overflow")
        shapes = [v.shape for n in head.chain if (v := tensor_of(n)) is not None]
        if any(n.op == "call_function" and not _slices_only(n) for n in head.chain) or any(
            after[-1:] != before[-1:]
            for n, before, after in zip(head.chain, [logits.shape, *shapes], shapes, strict=False)
            if n.op == "call_function"
        ):
            return Decline("LM207", "the logits are sliced along the vocabulary")
        if any(s[-1:] != logits.shape[-1:] for s in shapes) or len([logits.shape, *shapes][-1]) != 2:
            return Decline("LM208", "the loss does not take the rows of the linear as they are, [N, V]")
        saved = self.bytes_saved(match, ctx)
        if saved.is_number and saved <= 0:
            return Decline("LM306", f"∂L/∂W and ∂L/∂h are larger than the logits by {-int(saved)} bytes")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:
        head: Head = match.info
        root = match.node
        h, weight = argument(head.linear, 0), argument(head.linear, 1)
        bias = optional_argument(head.linear, 2, "bias")
        dtype = ctx.facts.get("autocast", {}).get(head.linear, tensor_value(h).dtype)
        _, width = tensor_value(weight).shape
        result = root if head.z is None else head.z.nodes[-1]
        with graph.inserting_before(root):

            def cast(node: fx.Node) -> fx.Node:
                if tensor_value(node).dtype == dtype:
                    return node
                return emit(graph, "to", (node, dtype), like=head.linear)

            h = cast(h)
            for step in head.chain:
                if step.op == "call_function":
                    h = emit(graph, operator.getitem, (h, step.args[1]), like=step)
                elif step.target in SHAPES and step.target != "contiguous":
                    sizes = step.args[1:] if not isinstance(step.args[1], (tuple, list)) else tuple(step.args[1])
                    h = emit(graph, "reshape", (h, *sizes[:-1], width), like=step)
            h = emit(graph, "reshape", (h, -1, width), like=head.linear)
            target = emit(graph, "reshape", (head.target, -1), like=root)
            ignore = head.given.get("ignore_index", -100)
            want = any(t is not None and tensor_value(t).requires_grad for t in (weight, bias))
            smoothing = float(head.given.get("label_smoothing", 0.0))
            args: tuple[Any, ...] = (h, cast(weight), None if bias is None else cast(bias), target, ignore, smoothing, want)
            if head.given.get("reduction", "mean") == "mean":
                valid = emit(graph, torch.ne, (target, ignore), like=root)
            if head.z is not None:  # a share of the sum of cross-entropies, which is divided by the number of valid rows
                wide = emit(graph, "double", (valid,), like=head.z.nodes[0])
                count = emit(graph, "mean" if head.z.mean else "sum", (wide,), like=head.z.nodes[0])
                args += (emit(graph, torch.mul, (count, head.z.weight), like=head.z.nodes[0]),)
            both = emit(graph, linear_cross_entropy._opoverload, args, like=head.linear)
            loss = emit(graph, operator.getitem, (both, 0), like=head.linear)
            if head.given.get("reduction", "mean") == "mean":
                loss = emit(graph, torch.div, (loss, emit(graph, "sum", (valid,), like=root)), like=root)
            if tensor_value(result).dtype != tensor_value(loss).dtype:
                loss = emit(graph, "to", (loss, tensor_value(result).dtype), like=root)
        result.replace_all_uses_with(loss)
        for node in (*reversed(() if head.z is None else head.z.nodes), root, *reversed(head.chain), head.linear):
            graph.erase_node(node)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        head: Head = match.info
        logits, hidden = tensor_of(head.linear), tensor_of(argument(head.linear, 0))
        weight = tensor_of(argument(head.linear, 1))
        if logits is None or hidden is None or weight is None:
            return sympy.Integer(0)
        kept = sympy_numel(hidden) + (sympy_numel(weight) if weight.requires_grad else 0)
        return (sympy_numel(logits) - kept) * logits.element_size()


def _head(given: dict[str, Any]) -> Head | None:
    node, target = given.get("input"), given.get("target")
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and isinstance(target, fx.Node):
        if node.op == "call_function" and node.target in LINEARS and len(node.args) >= 2:
            return Head(node, tuple(reversed(chain)), target, given)
        step = (node.op == "call_method" and node.target in CASTS | SHAPES) or node.target is operator.getitem
        if not step:
            return None
        chain.append(node)
        node = node.args[0]
    return None


def _z_loss(head: Head, loss: fx.Node) -> ZLoss | None:
    """The z-loss of the rows that the cross-entropy takes, if nothing else reads a part of it."""
    if head.given.get("reduction", "mean") != "mean":
        return None
    own = {loss, *head.chain}
    cuts = [i for i, n in enumerate(head.chain) if n.op == "call_function"]
    rows = (head.linear, *head.chain)[cuts[-1] + 1 if cuts else 0 :]
    first = [u for n in rows for u in n.users if u not in own and _named(u, "logsumexp")]
    if len(first) != 1 or not _over_last(first[0]):
        return None
    nodes = first
    factor, mean = 1.0, None
    while len(nodes[-1].users) == 1 and nodes[-1] is not loss:
        before, node = nodes[-1], next(iter(nodes[-1].users))
        constants = [a for a in node.args if isinstance(a, (int, float))]
        squares = _named(node, "square") or (_named(node, "pow") and constants == [2])
        nodes = [*nodes, node]
        if len(nodes) == 2 and (squares or (_named(node, "mul") and node.args == (before, before))):
            continue
        if len(nodes) == 3 and (_named(node, "mean") or _named(node, "sum")) and node.args == (before,) and not node.kwargs:
            mean = _named(node, "mean")
        elif mean is not None and _named(node, "mul") and len(constants) == 1 and len(node.args) == 2:
            factor *= constants[0]
        elif mean is not None and _named(node, "add") and set(node.args) == {before, loss} and not node.kwargs:
            return ZLoss(tuple(nodes), factor, mean) if list(loss.users) == [node] else None
        else:
            return None
    return None


def _named(node: fx.Node, name: str) -> bool:
    """Whether the node calls the tensor operation of this name: as an operator, a function or a method."""
    if node.op == "call_method":
        return node.target == name
    functions = (getattr(torch, name, None), getattr(operator, name, None), getattr(operator, f"i{name}", None))
    return node.op == "call_function" and any(f is not None and node.target is f for f in functions)


def _over_last(node: fx.Node) -> bool:
    """True for a reduction over the last dimension that drops it."""
    value = tensor_of(node.all_input_nodes[0])
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = dims[0] if isinstance(dims, (tuple, list)) and len(dims) == 1 else dims
    kept = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return value is not None and isinstance(dims, int) and dims in (-1, value.dim() - 1) and not kept


def _slices_only(node: fx.Node) -> bool:
    """True for an index that keeps every dimension."""
    index = node.args[1]
    return all(isinstance(i, slice) or i is Ellipsis for i in (index if isinstance(index, tuple) else (index,)))
