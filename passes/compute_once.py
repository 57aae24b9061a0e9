"""On a CPU, a small result of a costly function is computed once, and not again wherever it is read.

    before   q' = q * cos(freqs[1, S, D]) + rotate(q) * sin(freqs)    cosines and sines of B·H·S·D elements, in every loop
    after    c = in_memory(cos(freqs)); ...; q' = q * c + ...         of S·D elements, once a graph;  q: [B, H, S, D]

Inductor computes pointwise work where it is read. So the rotary embedding's cosines are computed for each head, in each layer,
and once more in each loop behind them: the codes of queries and keys read these in four loops. A GPU hides such work behind its
memory, and would need a launch for it.

Bytes saved: 0; S·D·itemsize are held for the length of the forward and of the backward graph.
Not matched: devices other than a CPU; a function whose result is nowhere read ``REPEATS`` times as often as it has elements;
roots of sums (a norm's), which Inductor keeps in a register.
Numerics class: EXACT (the result is kept in the precision in which it is computed).
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.fusing import is_pointwise, made_of
from lowmem_compile.graph import nbytes, numel

COSTLY = frozenset({"cos", "sin", "exp", "exp2", "log", "log2", "tanh", "erf", "sigmoid"})
"""Operations whose vector code takes tens of instructions an element, by name."""
REPEATS = 4


class ComputeOnce:
    """Mark small results of costly functions to be written to memory."""

    name = "compute_once"
    stage = Stage.SAVED
    numerics = Numerics.EXACT

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        if ctx.device != "cpu":
            return []
        return [Match(n) for g in (graph, ctx.facts["backward"]) for n in g.nodes if self.would_keep(n)]

    @staticmethod
    def would_keep(node: fx.Node) -> bool:
        """Whether the result is costly, small beside what is computed with it, and not in memory yet."""
        return is_costly(node) and reach(node) >= REPEATS * numel(node)

    def check(self, match: Match, ctx: Context) -> Decline | None:  # noqa: ARG002
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:  # noqa: ARG002
        node = match.node
        with node.graph.inserting_after(node):
            kept = node.graph.call_function(torch.ops.lowmem.in_memory.default, (node,))
        kept.meta = dict(node.meta)
        node.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        return sympy.Integer(0)

    def describe(self, match: Match, ctx: Context) -> str:  # noqa: ARG002
        return f"{nbytes(match.node)} bytes in memory; it was computed for {reach(match.node)} elements"


def is_costly(node: fx.Node) -> bool:
    """Whether this is a costly function that is not in memory yet."""
    named = is_pointwise(node) and node.target.overloadpacket.__name__ in COSTLY  # type: ignore[union-attr]
    return named and not all(u.target is torch.ops.lowmem.in_memory.default for u in node.users)


def reach(node: fx.Node) -> int:
    """Elements of the largest result that Inductor computes with this one inside: through pointwise work and views."""
    return max(map(numel, made_of(node)), default=0)
