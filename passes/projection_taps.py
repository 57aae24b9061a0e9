"""Give the projected gradient of a weight, and never its whole gradient.

    before   y = linear(x, W, b)                                     G  = dYᵀ x [O, I]; the optimizer projects it
    after    y = projection_tap(linear(x, W.detach(), b), x, A, Z)   dZ = dYᵀ (x A) = G A [O, r]            right side
             y = projection_tap(linear(x, W.detach(), b), x, L, Z)   dZ = (dY L)ᵀ x = Lᵀ G [r, I]           left side

This is the gradient of ``linear(x, W.detach(), b) + (x A) Zᵀ`` (left: ``(x Zᵀ) Lᵀ``) at Z = 0. The forward result is unchanged to
the bit, and so are the gradients of x and b. A [I, r] or L [O, r] and Z belong to the optimizer that holds W
(``lowmem_compile.optim``); Z takes 4 bytes, and its gradient becomes ``W.grad``, in projected form. A weight that several
linears read (a module that is called more than once) has one Z, whose gradient is the sum.

Bytes: the gradient takes r/I (right) or r/O (left) of W's; x is not needed for it on the right side, only x A [N, r],
where that is smaller than what x is made from (the partition decides).

A step that makes a basis uses ``lowmem::refresh_tap`` where the optimizer has ``refresh_in_backward``: G exists in one operation
of the backward pass, which makes the basis and projects G.

Declined: the optimizer needs the whole gradient (LM217: a step that makes a basis, Fira, APOLLO); W is read by anything but
linears (LM218: tied to an embedding, a chunked loss, inside a checkpoint) or written in place (LM214); no gradient (LM303).
Weights that no optimizer of ``lowmem_compile.optim`` holds are not matched.
Numerics class: REASSOCIATED. Source: the identities of CompAct (arXiv:2410.15352) and VeLoRA for x A; taps are this project's.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.effects import is_written, name_of
from lowmem_compile.graph import argument, emit, tensor_of, tensor_value
from lowmem_compile.kernels.projection_tap import projection_tap, refresh_tap
from lowmem_compile.reporting.units import format_bytes
from lowmem_compile.tapping import TapInput

LINEARS = (F.linear, torch._C._nn.linear)


@dataclass(frozen=True)
class Weight:
    """One weight and what its optimizer says.

    Attributes:
        node: its placeholder.
        tap: names of the extra inputs, or the reason why there are none.
        basis: placeholder of A or L, if there is one.
        zero: placeholder of Z, if there is one.
    """

    node: fx.Node
    tap: TapInput
    basis: fx.Node | None
    zero: fx.Node | None


class ProjectionTaps:
    """Replace the gradient of weights by its projection."""

    name = "projection_taps"
    stage = Stage.DYNAMO
    numerics = Numerics.REASSOCIATED

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        taps = ctx.facts.get("taps", {})
        inputs = {n.name: n for n in graph.nodes if n.op == "placeholder"}
        weights = [
            Weight(inputs[name], tap, inputs.get(tap.basis), inputs.get(tap.zero)) for name, tap in taps.items() if name in inputs
        ]
        return [Match(linear, w) for w in weights if (linear := _first_linear(w.node)) is not None]

    def check(self, match: Match, ctx: Context) -> Decline | None:
        weight: Weight = match.info
        if not ctx.facts.get("training", True):
            return Decline("LM303", "no gradient flows here")
        if weight.tap.reason:
            return Decline("LM217", weight.tap.reason)
        other = next((u for u in weight.node.users if not _is_linear_of(u, weight.node)), None)
        if other is not None:
            return Decline("LM218", f"the weight is also read by {name_of(other) or other.op}")
        if weight.tap.refresh and len(weight.node.users) > 1:
            return Decline(
                "LM217", "the weight is read more than once, and the step makes a new basis from the sum of its gradients"
            )
        if is_written(weight.node):
            return Decline("LM214", "the weight is changed in place")
        value = tensor_of(weight.node)
        if any((y := tensor_of(u)) is None or not y.requires_grad for u in weight.node.users) or value is None:
            return Decline("LM303", "no gradient flows through this linear")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:  # noqa: ARG002
        weight: Weight = match.info
        for linear in list(weight.node.users):
            x, rest = argument(linear, 0), linear.args[2:]
            with graph.inserting_after(linear):
                new = emit(graph, "detach", (weight.node,), like=linear)
            linear.prepend(new)
            linear.args = (x, new, *rest)
            with graph.inserting_after(linear):
                arguments = (linear, x, weight.basis, weight.zero, weight.tap.left)
                tap = emit(graph, (refresh_tap if weight.tap.refresh else projection_tap)._opoverload, arguments, like=linear)
            for user in [u for u in linear.users if u is not tap]:
                user.replace_input_with(linear, tap)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        """Nothing by itself: what crosses is for the partition to decide, and the gradient is not kept for the backward pass."""
        return sympy.Integer(0)

    def describe(self, match: Match, ctx: Context) -> str:  # noqa: ARG002
        """Side, rank and bytes."""
        weight: Weight = match.info
        assert weight.zero is not None
        whole, low = tensor_value(weight.node), tensor_value(weight.zero)
        side, rank = ("left", low.shape[0]) if weight.tap.left else ("right", low.shape[1])
        before, after = (format_bytes(v.numel() * v.element_size()) for v in (whole, low))
        state = f", state {format_bytes(weight.tap.state_bytes)}" if weight.tap.state_bytes else ""
        made = ", basis made here" if weight.tap.refresh else ""
        return f"{side} side, rank {rank}: gradient {before} → {after}{state}{made}"


def _is_linear_of(node: fx.Node, weight: fx.Node) -> bool:
    """Whether a node is a linear that reads this as its weight, and as nothing else."""
    return (
        node.op == "call_function"
        and node.target in LINEARS
        and node.args[1:2] == (weight,)
        and node.args.count(weight) == 1
        and weight not in node.kwargs.values()
    )


def _first_linear(weight: fx.Node) -> fx.Node | None:
    return next((u for u in weight.users if u.op == "call_function" and u.target in LINEARS and u.args[1:2] == (weight,)), None)
