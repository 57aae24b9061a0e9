"""The gradient of a weight that was computed with the loss is kept as codes until the backward pass hands it on.

    before   forward returns g: bf16[V, D];  backward: dW = t · g (+ rows of the embedding)
    after    forward returns q: i8[V, D], s: bf16[V, D/g];  backward: dW = t · (q · s), made last

The chunked loss makes such a gradient (:mod:`.chunk_loss`); nothing but a factor and a sum comes between it and the result. It is
as large again at the end of the backward pass, and there its codes lie beside it: where that moment is the highest of the step,
codes are bytes on top. So both steps are simulated (:mod:`lowmem_compile.planner.timeline`), and the site is declined where the
peak would rise by more than the simulation's error. Under a plan for a budget the plan decides, and ``encode_saved`` does it.

Bytes saved: V·D·itemsize − V·D·b/8 − 2·V·D/g. Numerics class: APPROXIMATE (one rounding, not amplified).
Source: codes as in :mod:`.encode_saved`.
"""

from __future__ import annotations

from torch import fx

from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.passes.encode_saved import EncodeSaved, code_bytes, codec_of, for_budget, is_gradient
from lowmem_compile.planner.program import Crossing, Program, program_of
from lowmem_compile.planner.timeline import peak, timeline
from lowmem_compile.saved import Partition

RISE = 1.03
"""Simulated peaks closer than this count as equal."""


class EncodeGradient(EncodeSaved):
    """Keep gradients that the forward pass made as integer codes."""

    name = "encode_gradient"
    stage = Stage.SAVED
    numerics = Numerics.APPROXIMATE

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        return [] if for_budget(ctx) else [m for m in self.crossings(graph, ctx) if is_gradient(m, ctx)]

    def check(self, match: Match, ctx: Context) -> Decline | None:
        declined = super().check(match, ctx)
        if declined is not None:
            return declined
        forward, backward = match.node.graph.owning_module, ctx.facts["backward"].owning_module
        assert forward is not None
        program = program_of(Partition(forward, backward, ctx.facts["num_user_outputs"]))
        crossing = next(c for c in program.crossings if c.root == match.node.name)
        without, with_codes = peaks(program, crossing, code_bytes(match, codec_of(ctx, match.info)))
        if with_codes > RISE * without:
            mib = f"{without / 2**20:.1f} to {with_codes / 2**20:.1f} MiB"
            return Decline("LM215", f"beside the gradient that they become, its codes would raise the step's peak: {mib}")
        return None


def peaks(program: Program, crossing: Crossing, nbytes: int) -> tuple[int, int]:
    """Simulated peak in bytes of a step as it is, and of one that keeps ``crossing`` as codes of ``nbytes`` bytes."""
    return peak(timeline(program)), peak(timeline(program.encoded(crossing, nbytes)))
