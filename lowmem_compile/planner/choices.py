"""What may be done with each tensor that crosses from forward to backward, and what each choice costs.

Error model. A saved tensor with relative error e changes the whole gradient by a relative s·e. Errors of different tensors are
independent, so squares add: E² = Σ s²e². Without a measurement s² is a prior, the same for all tensors of a kind:

    ordinary        Σ s² = 4      (MiniLM, SmolLM2, ViT: int8 in all of them, e = 0.6 %, gives E = 1.2 to 1.4 %)
    query, key      Σ s² = 40     (from 4 in MiniLM to 130 in DINOv2, whose scores are large)
    value, output   Σ s² = 12     (of attention; 34 in DINOv2, where attention is sharp, an ordinary tensor's share in MiniLM)
    attended        Σ s² = 8      (query and key of ``lowmem::attention_backward``: 8 in MiniLM, 5 in DINOv2)
    normalised      Σ s² = 0.25   (read as the input of a norm alone: 0.05 in MiniLM, 0.22 at most)
    gradient        s² = 1        (of a weight, computed with the loss: its error is the gradient's)

e of each codec: :attr:`lowmem_compile.kernels.group_codes.Codec.error`. A tensor computed again has no error of its own, but
those of the tensors it is computed from: a query computed again from an input in 8 bits is no better than a query in 8 bits.
With ``options["calibrate"]`` s and e are measured (:mod:`lowmem_compile.planner.calibrate`).

Time model. Bytes that a memory-bound kernel would move: a codec's arithmetic as a multiple of the tensor's bytes (rough, from
encode and decode on one CPU),
a recipe's matrix products at ``BALANCE`` operations a byte, its other operations at what they read and write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from lowmem_compile.contract import Context, Match
from lowmem_compile.graph import concrete, nbytes, numel, storage_root, tensor_value
from lowmem_compile.kernels.group_codes import Codec
from lowmem_compile.options import CodecName
from lowmem_compile.passes.encode_saved import EncodeSaved, codec_of, default_codec, rows_and_width
from lowmem_compile.passes.narrow_integers import NarrowIntegers
from lowmem_compile.passes.pack_masks import PackMasks
from lowmem_compile.passes.recompute_saved import crossing_nodes
from lowmem_compile.planner.calibrate import Measured
from lowmem_compile.planner.program import Op, Program
from lowmem_compile.rematerialise import Recipe, recipe_of
from lowmem_compile.sensitivity import becomes_gradient

LADDER: tuple[CodecName, ...] = ("bf16", "int10", "int8", "int7", "int6", "int5", "int4")
GAINS = {"ordinary": 4.0, "normalised": 0.25, "score": 40.0, "difference": 12.0, "attended": 8.0}
"""Prior Σ s² of saved tensors, by kind."""
BALANCE = {"cpu": 30.0, "cuda": 300.0}
"""Operations a device does in the time it moves a byte."""
EFFORT = {"int10": 3.0, "int8": 0.5, "int7": 4.0, "int6": 3.0, "int5": 4.0, "int4": 1.0, "bf16": 0.0}
"""Extra time of encode and decode, in bytes moved per byte of the tensor."""


COPY = 20.0
"""Extra time charged for a gradient in codes: decoded it is as large again, so that it raises the peak and is the last resort."""


@dataclass(frozen=True)
class Choice:
    """One way to keep a tensor.

    Attributes:
        name: ``"exact"``, a codec or ``"recompute"``.
        nbytes: what is kept.
        relative: relative error of the tensor, without that of what it is computed from.
        cost: extra time, in bytes moved.
    """

    name: str
    nbytes: int
    relative: float = 0.0
    cost: float = 0.0


@dataclass(frozen=True)
class Item:
    """A tensor that crosses, its choices (exact first), and the recipe if it can be computed again."""

    root: str
    choices: tuple[Choice, ...]
    gain2: float = 0.0
    """s²: what the square of its relative error is multiplied by in the gradient's. Zero for kind ``"exact"``, whose error has no
    estimate: it is computed again from exact tensors or not at all."""
    sources: frozenset[str] = frozenset()
    """Roots of saved tensors that its recipe reads: they have to be kept if it is computed again."""
    recipe: Recipe | None = None
    kind: str = "ordinary"
    """``"ordinary"``, ``"normalised"`` (input of a norm alone), ``"score"`` (query or key), ``"difference"`` (value or output of
    attention), ``"attended"`` (query or key of our own backward pass), ``"gradient"`` (of a weight, made with the loss), or
    ``"exact"``."""

    usual: str = "exact"
    """The choice without a budget, where ``options["codec"]`` names none."""

    def choice(self, name: str) -> Choice:
        """The choice of that name."""
        return next(c for c in self.choices if c.name == name)


def items_of(graph: fx.Graph, ctx: Context, program: Program, measured: Mapping[str, Measured] | None = None) -> list[Item]:
    """The choices for every tensor that crosses.

    Args:
        graph: the forward graph.
        ctx: context of the saved stage.
        program: the same partition, for the sizes of operations.
        measured: of the tensors that could be encoded, by name, where they were measured.
    """
    encode = EncodeSaved()
    crossing = crossing_nodes(ctx)
    matches = {m.node: m for m in encode.find(graph, ctx)}
    kinds = {root: _kind(matches.get(root), ctx) for root in crossing}
    counts = {kind: max(sum(k == kind for k in kinds.values()), 1) for kind in (*GAINS, "gradient")}
    ops = {op.name: op for op in program.forward}
    balance = BALANCE.get(ctx.device, BALANCE["cpu"])
    items = []
    for root, saved in crossing.items():
        choices = [Choice("exact", exact_bytes(graph, ctx, saved))]
        gain2, usual = 0.0, "exact"
        if kinds[root] != "exact":
            sums = {**GAINS, "gradient": counts["gradient"]}
            found = (measured or {}).get(root.name)
            gain2 = sums[kinds[root]] / counts[kinds[root]] if found is None else found.gain**2
            extra = COPY if kinds[root] == "gradient" else 0.0
            choices += _codes(encode, matches[root], ctx, nbytes(root), extra, found)
            usual = default_codec(matches[root].info, ctx)
        recipe = recipe_of(root, saved, crossing)
        if isinstance(recipe, Recipe) and numel(root) >= 64:
            choices.append(Choice("recompute", 0, 0.0, _time(recipe, ops, balance)))
            sources = frozenset(s.name for s in recipe.sources)
            items.append(Item(root.name, tuple(choices), gain2, sources, recipe, kinds[root], usual))
        else:
            items.append(Item(root.name, tuple(choices), gain2, kind=kinds[root], usual=usual))
    return items


def _kind(match: Match | None, ctx: Context) -> str:
    if match is None:
        return "exact"
    if all(becomes_gradient(ctx.facts["placeholder_of"][n]) for n in match.info.saved):
        return "gradient"
    kinds = {u.kind for u in match.info.uses}
    if kinds == {"normalised"}:
        return "normalised"
    return next((kind for kind in ("score", "difference", "attended") if kind in kinds), "ordinary")


def encodable(graph: fx.Graph, ctx: Context) -> list[Match]:
    """The matches of ``encode_saved`` for which some codec serves, gradients of weights left out."""
    encode, trial = EncodeSaved(), replace(ctx, options=replace(ctx.options, codec="int8", memory_budget=None, calibrate=False))
    return [m for m in encode.find(graph, trial) if encode.check(m, trial) is None]


def _codes(encode: EncodeSaved, match: Match, ctx: Context, exact: int, extra: float, measured: Measured | None) -> list[Choice]:
    if ctx.options.codec == "none":
        return []
    found = []
    for name in LADDER:
        options = replace(ctx.options, codec=name, memory_budget=None, calibrate=False)
        trial = replace(ctx, options=options, facts={**ctx.facts, "planning": True})
        if encode.check(match, trial) is not None:
            continue
        codec = codec_of(trial, match.info)
        size = code_bytes(match, codec)
        if size < exact:
            error = codec.error if measured is None else measured.errors[name]
            found.append(Choice(name, size, error, (EFFORT[name] + extra) * exact))
    return found


def exact_bytes(graph: fx.Graph, ctx: Context, saved: Sequence[fx.Node]) -> int:
    """Bytes of a storage that is kept exact: of a mask its bits, of integers the narrowest dtype that holds them.

    Args:
        graph: the forward graph.
        ctx: context of the saved stage.
        saved: the nodes of the storage that cross.
    """
    whole = nbytes(storage_root(saved[0]))
    alone = replace(ctx, facts={**ctx.facts, "saved": list(saved)})
    for p in (PackMasks(), NarrowIntegers()):
        if p.name in ctx.options.disable:
            continue
        for match in p.find(graph, alone):
            if p.check(match, alone) is None:
                freed = p.bytes_saved(match, alone)
                return whole - int(freed) if freed.is_number else whole
    return whole


def code_bytes(match: Match, codec: Codec) -> int:
    """Bytes of the codes of a tensor; symbolic sizes by their hint."""
    rows, width = rows_and_width(tensor_value(match.info.encoded), codec)
    if isinstance(width, int):
        return codec.nbytes(concrete(rows), width)
    return concrete(rows) * (concrete(width) * codec.bits // 8 + 2)


def _time(recipe: Recipe, ops: Mapping[str, Op], balance: float) -> float:
    total = 0.0
    for node in recipe.nodes:
        op = ops.get(node.name)
        if op is not None:
            total += op.flops / balance + (op.nbytes if op.flops else 0.25 * op.nbytes)
    return total


def chain_of(recipe: Recipe, program: Program) -> list[Op]:
    """The recipe's operations in the program."""
    wanted = {n.name for n in recipe.nodes if storage_root(n) is n}
    return [op for op in program.forward if op.name in wanted]


def step_time(program: Program, balance: float) -> float:
    """The whole step in the same unit."""
    work: Sequence[Op] = (*program.forward, *program.backward)
    return sum(op.flops / balance + op.nbytes for op in work if op.role not in ("input", "nothing"))
