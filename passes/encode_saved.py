"""Floating-point tensors that cross from forward to backward are kept as group-wise codes: integers, or float8.

    before   forward returns x: bf16[..., D];  backward reads x
    after    forward returns q: i8[..., D], s: bf16[..., D/g];  backward: x̃ = q · s, where x is read

Encode stands right behind the producer of x and decode right before its first reader, so Inductor fuses both and the wide
tensor lives no longer than in the forward and backward work that reads it. Formats: ``kernels/group_codes``. On a GPU an encode
or a decode that Inductor could fuse with nothing (:mod:`lowmem_compile.fusing`) is ``lowmem::encode_many`` or
``lowmem::decode_many``: one kernel of ours, which ``launch_together`` shares with its neighbours; with
``options["launches"] = "shared"`` it is Inductor's, marked for :mod:`lowmem_compile.launches`.

Bytes saved: N·itemsize − N·b/8 − 2·N/g for each storage kept.
Kept exact: tensors whose error backward would amplify (:mod:`lowmem_compile.sensitivity`), statistics, weight copies, what the
user or the graph's interface holds anyway, small tensors, and modules named in ``options["keep_exact"]``.
Numerics class: APPROXIMATE. Source: per-group affine-free integer quantisation as in ActNN (arXiv 2104.14129) and GACT
(arXiv 2206.11357), here on the saved set that the partitioner chose.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import fx

from lowmem_compile._torch import OpOverload, select_decomp_table
from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.crossing import behind, exchange, first_reader, repeatable, retire, view_chain
from lowmem_compile.fusing import (
    decode_is_fused,
    decode_is_prologue,
    encode_is_fused,
    results_of,
    rows_are_summed,
    runs_triton,
    shares_launches,
)
from lowmem_compile.graph import (
    insert,
    is_static,
    module_path,
    numel,
    sizes,
    storage_root,
    sympy_numel,
    tensor_of,
    tensor_value,
    trace,
)
from lowmem_compile.kernels.group_codes import Codec, codec_named, encode_runs, in_memory, in_prologue
from lowmem_compile.launches import SHARED
from lowmem_compile.options import CodecName
from lowmem_compile.saved import kind_of
from lowmem_compile.sensitivity import Use, becomes_gradient, use_of

WORTH_A_LAUNCH = 1 << 20
"""Bytes; an H100 moves fewer in less time than a launch takes."""
Encoding = Literal["fused", "in loops", "own", "shared"]
Decoding = Literal["fused", "in loops", "own", "shared", "in prologue"]
Traces = dict[tuple[str, Any], fx.GraphModule]
SMALLEST = 4096
"""Elements; below, two more kernels cost more than the bytes are worth."""
ROW = 64
"""Elements of a row, at least, where dimensions can be merged."""


@dataclass(frozen=True)
class Crossing:
    """The saved nodes that share one storage, the node that is encoded for all of them, and how backward reads them."""

    saved: tuple[fx.Node, ...]
    encoded: fx.Node
    uses: tuple[Use, ...]


class EncodeSaved:
    """Keep saved tensors as integer codes."""

    name = "encode_saved"
    stage = Stage.SAVED
    numerics = Numerics.APPROXIMATE

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        if ctx.options.codec == "none":
            return []
        placeholder_of: dict[fx.Node, fx.Node] = ctx.facts["placeholder_of"]
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in ctx.facts["saved"]:
            value = tensor_of(node)
            crosses = node.graph is graph and node in placeholder_of
            if crosses and value is not None and value.dtype.is_floating_point and not _is_part(node):
                groups.setdefault(storage_root(node), []).append(node)
        return [
            Match(root, Crossing(tuple(dict.fromkeys(nodes)), _encoded(root, nodes), _uses(nodes, placeholder_of)))
            for root, nodes in groups.items()
            if root.op != "placeholder"
        ]

    def check(self, match: Match, ctx: Context) -> Decline | None:
        if ctx.options.gradients == "exact":
            return Decline("LM201", "options['gradients'] is 'exact'")
        root, crossing = match.node, match.info
        value = tensor_value(crossing.encoded)
        outputs = {storage_root(n) for n in ctx.facts["user_outputs"]}
        plan = ctx.facts.get("plan")
        for_budget: bool = plan is not None and plan.for_budget
        if plan is not None and for_budget and plan.decision(root.name) == "exact":
            return Decline("LM216", "the plan for options['memory_budget'] keeps it exact")
        if root in outputs:
            return Decline("LM302", "the tensor is an output of the graph, which is kept alive anyway")
        if value.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return Decline("LM203", f"there is no codec for {value.dtype}")
        path = f".{module_path(root)}."
        pinned = next((n for n in ctx.options.keep_exact if f".{n}." in path), None)
        if pinned is not None:
            return Decline("LM211", f"options['keep_exact'] names {pinned!r}")
        if numel(root) < SMALLEST:
            return Decline("LM305", "the tensor is small")
        if kind_of(root, value) != "activation" or is_auxiliary(root):
            return Decline("LM212", "a statistic or a copy of a weight")
        if crossing.encoded is root and not all(repeatable(view_chain(n)) for n in crossing.saved):
            return Decline("LM203", "the backward pass reads views whose sizes are computed in the graph")
        placeholder_of = ctx.facts["placeholder_of"]
        planned = for_budget or ctx.facts.get("planning", False)
        if not planned and all(becomes_gradient(placeholder_of[n]) for n in crossing.saved):
            return Decline("LM215", "the backward pass hands it on as a gradient")
        worst = next((u for u in crossing.uses if u.kind == "amplified"), None)
        if worst is not None:
            return Decline("LM212", f"the backward pass reads it through {worst.through}")
        if plan is not None and root.name in plan.measured and plan.decision(root.name) == "exact":
            cosine = plan.measured[root.name].cosine("int10")
            return Decline("LM221", f"measured: in ten bits a gradient's cosine is {cosine:.5f}")
        return _useless(codec_of(ctx, crossing), value)

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:
        crossing: Crossing = match.info
        node = crossing.encoded
        value = tensor_value(node)
        placeholder_of = ctx.facts["placeholder_of"]
        codec = codec_of(ctx, crossing)
        made_by = encoding(codec, value, node, ctx)
        encode, _ = coder(codec, value, encoded=made_by)
        dtype = value.dtype
        traces: Traces = ctx.facts.setdefault("traces", {})
        key = (codec, tuple(sizes(value)), tuple(value.stride()), dtype)
        alike = key if all(isinstance(n, int) for n in (*key[1], *key[2])) else None
        parts = spliced(
            traces,
            (f"encode {made_by}", alike),
            graph,
            behind(node),
            encode,
            [node],
            like=node,
            shared=made_by == "shared",
        )
        for i, part in enumerate(parts):
            scales = codec.bits != 16 and i == len(parts) - 1
            for named in (part, storage_root(part)):
                named.meta["lowmem_kind"] = f"scales of {codec.name} codes" if scales else f"{codec.name} codes"
        holder, *others = crossing.saved
        made = exchange(graph, ctx, holder, parts)
        for other in others:
            exchange(graph, ctx, other, [])
        backward: fx.Graph = ctx.facts["backward"]
        for saved in crossing.saved:
            old = placeholder_of[saved]
            if old.users:
                chain = view_chain(saved) if node is not saved else []
                how = decoding(codec, value, old, ctx)
                new = spliced(
                    traces,
                    (f"decode {how}", alike),
                    backward,
                    first_reader(old),
                    coder(codec, value, decoded=how)[1],
                    made,
                    like=old,
                    backward=True,
                    shared=how == "shared",
                )
                for view in chain:
                    with backward.inserting_before(first_reader(old)):
                        copied = backward.node_copy(view, lambda _, new=new: new)  # type: ignore[misc]
                    copied.meta["partitioner_tag"] = "is_backward"
                    new = copied
                old.replace_all_uses_with(new)
            retire(ctx, saved)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:
        value = tensor_value(match.info.encoded)
        codec = codec_of(ctx, match.info)
        elements = sympy_numel(value)
        _, width = rows_and_width(value, codec)
        if codec.bits == 16:
            return elements * (value.element_size() - 2)
        last = sympy.Integer(width) if isinstance(width, int) else width.node.expr
        row = codec.nbytes(1, width) if isinstance(width, int) else last + 2
        return elements * value.element_size() - elements / last * row


def _useless(codec: Codec, value: torch.Tensor) -> Decline | None:
    rows, width = rows_and_width(value, codec)
    if isinstance(width, int) and isinstance(rows, int) and codec.nbytes(rows, width) >= rows * width * value.element_size():
        return Decline("LM306", f"as {codec.name} it would take no fewer bytes")
    if not isinstance(width, int) and codec.bits not in (8, 16):
        return Decline("LM203", "codes of other than 8 bits need a last dimension of static size")
    return None


def has_kernel(codec: Codec, value: torch.Tensor, ctx: Context) -> bool:
    """Whether a kernel of ours writes and reads these codes: static rows, rounded to nearest, a GPU, and Triton."""
    _, width = rows_and_width(value, codec)
    return codec.bits != 16 and not codec.floating and not codec.stochastic and isinstance(width, int) and runs_triton(ctx.device)


def encoding(codec: Codec, value: torch.Tensor, node: fx.Node, ctx: Context) -> Encoding:
    """What encodes a tensor: a kernel that the model has anyway, our kernel, or Inductor's that joins another's launch."""
    if ctx.device == "cpu":
        return "in loops"
    if not has_kernel(codec, value, ctx) or encode_is_fused(node, codec.bits):
        return "fused"
    return "shared" if may_share(value, ctx) else "own"


def may_share(value: torch.Tensor, ctx: Context) -> bool:
    """Whether kernels for the tensor may join the launch of another: of static sizes alone."""
    return shares_launches(ctx.options, ctx.device) and all(isinstance(n, int) for n in (*value.shape, *value.stride()))


def decoding(codec: Codec, value: torch.Tensor, placeholder: fx.Node, ctx: Context) -> Decoding:
    """What decodes a tensor: the kernel that reads it, our kernel, or the matrix product that reads it as it loads its tiles.

    Codes that lie in runs Inductor decodes in a kernel for the elements and one for their order: only what is small.

    On a CPU codes that lie in runs are decoded in loops of their own for library calls, for what sums rows (a sum over such a
    row, written as one loop, is computed element by element: a norm's backward takes ten times as long), and where several
    results are made of them, which Inductor would compute from float32 copies (GELU and its slope: two of 4 bytes each).
    """
    if ctx.device == "cpu":
        alone = not decode_is_fused(placeholder) or rows_are_summed(placeholder) or results_of(placeholder) > 1
        return "in loops" if codec.runs > 1 and alone else "fused"
    if decode_is_fused(placeholder):
        return "fused"
    if not has_kernel(codec, value, ctx):
        return "fused"
    if decode_is_prologue(placeholder, codec.bits):
        return "in prologue"
    if not may_share(value, ctx):
        return "own"
    return "shared" if codec.runs == 1 or value.numel() * value.element_size() < WORTH_A_LAUNCH else "own"


def coder(
    codec: Codec, value: torch.Tensor, *, encoded: Encoding = "fused", decoded: Decoding = "fused"
) -> tuple[Callable[[torch.Tensor], tuple[torch.Tensor, ...]], Callable[..., torch.Tensor]]:
    """Encode and decode for tensors of the shape, strides and dtype of ``value``; rows lie along what is dense in memory.

    ``encoded`` and ``decoded``: see :func:`encoding` and :func:`decoding`.
    """
    order, tail = memory_order(value), row_dims(value, codec)
    back = [order.index(i) for i in range(len(order))]
    dtype, rows = value.dtype, [value.shape[d] for d in order]
    width = math.prod(rows[-tail:])
    dynamic = not isinstance(width, int)

    def encode(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = in_memory(x) if encoded == "in loops" else x  # read in several loops, and here still in its own order of memory
        x = merge(x if order == sorted(order) else x.permute(order), tail)
        if encoded == "shared":
            return encode_runs(codec, x)
        if encoded == "own":
            return tuple(torch.ops.lowmem.encode_many([x], [codec.bits], [codec.group], [codec.keep_zero]))
        return codec.encode(x, in_loops=encoded == "in loops")

    def decode(*given: torch.Tensor) -> torch.Tensor:
        last = given[0].shape[-1] if dynamic else width
        if decoded == "own":
            (x,) = torch.ops.lowmem.decode_many(list(given), [codec.bits], [codec.group], [last], dtype)
        else:
            x = codec.decode(given, last, dtype, in_loops=decoded == "in loops")
        x = (x.unflatten(-1, rows[-tail:]) if tail > 1 else x).permute(back)
        marked: torch.Tensor = in_prologue(x) if decoded == "in prologue" else x
        return marked

    return encode, decode


def spliced(
    traces: Traces,
    key: tuple[str, Any],
    graph: fx.Graph,
    before: fx.Node,
    fn: Callable[..., Any],
    args: list[fx.Node],
    *,
    like: fx.Node,
    backward: bool = False,
    shared: bool = False,
) -> Any:
    """Trace and insert; a function of the same key is traced once (``None`` in the key: every time).

    ``shared``: the nodes are marked for :mod:`lowmem_compile.launches`.
    """
    again = key[1] is not None and key in traces
    traced = traces[key] if again else trace(fn, args, dict(select_decomp_table()))
    if shared:
        for node in traced.graph.nodes:
            node.meta[SHARED] = True
    traces[key] = traced
    return insert(graph, before, traced, args, like=like, backward=backward, again=again)


def codec_of(ctx: Context, crossing: Crossing) -> Codec:
    """The codec that the options name; it keeps zeros apart where the backward pass compares with zero."""
    plan = ctx.facts.get("plan")
    chosen = "exact" if plan is None else plan.decision(storage_root(crossing.encoded).name)
    if chosen == "exact":
        chosen = default_codec(crossing, ctx) if ctx.options.codec == "auto" else ctx.options.codec
    keep_zero = any(u.kind == "compared with zero" for u in crossing.uses)
    return codec_named(
        chosen, group=ctx.options.codec_group, stochastic=ctx.options.rounding == "stochastic", keep_zero=keep_zero
    )


def default_codec(crossing: Crossing, ctx: Context) -> CodecName:
    """Ten bits for what a library's backward pass of attention reads, eight for the rest.

    On a CPU six for the input of a norm, and seven for queries and values of our own backward pass of attention, which are
    decoded in loops of their own anyway (on a GPU codes of other than 8 bits take launches of their own). Keys keep eight: they
    have a few large channels, and with seven bits DINOv2's gradients have a cosine of 0.9995 in place of 0.9998.
    """
    kinds = {u.kind for u in crossing.uses}
    if kinds & {"score", "difference"}:
        return "int10"
    if ctx.device != "cpu" or not isinstance(rows_and_width(tensor_value(crossing.encoded), codec_named("int6"))[1], int):
        return "int8"
    if kinds == {"normalised"}:
        return "int6"
    attending = [u for u in crossing.uses if u.kind == "attended" or u.as_query_or_value]
    return "int7" if attending and all(u.as_query_or_value for u in attending) else "int8"


def memory_order(value: torch.Tensor) -> list[int]:
    """The dimensions from the one of the largest stride to that of the smallest: permuted so, a dense tensor is contiguous.

    Ties and dynamic strides keep the order of the dimensions.
    """
    strides = list(value.stride())
    if not all(isinstance(s, int) for s in strides):
        return list(range(value.dim()))
    return sorted(range(value.dim()), key=lambda d: (-strides[d], d))


def is_auxiliary(node: fx.Node) -> bool:
    """A statistic that an operation returns beside its main result (logsumexp, mean, rstd, philox state)."""
    if node.target is not operator.getitem or node.args[1] == 0:
        return False
    source = node.all_input_nodes[0].target
    return isinstance(source, OpOverload) and source.namespace == "aten"


def _encoded(root: fx.Node, nodes: list[fx.Node]) -> fx.Node:
    """The saved node itself if it is alone and covers its storage, the storage's owner otherwise."""
    only = nodes[0]
    if len(set(nodes)) == 1 and numel(only) == numel(root):
        return only
    return root


def _uses(nodes: list[fx.Node], placeholder_of: dict[fx.Node, fx.Node]) -> tuple[Use, ...]:
    return tuple(use_of(placeholder_of[n]) for n in dict.fromkeys(nodes))


def _is_part(node: fx.Node) -> bool:
    """Codes and packed values of another pass."""
    return any(word in node.meta.get("lowmem_kind", "") for word in ("codes", "poison", "mask"))


def row_dims(value: torch.Tensor, codec: Codec) -> int:
    """How many of the last dimensions in memory order make a row: more than one where the last alone is short.

    Only static dimensions that lie densely behind one another are merged, up to ``ROW`` elements: a row is what belongs together.
    The heads of a token, of values [B, H, N, D] that lie as B, N, H, D, are merged where D alone has no ``ROW`` for each run.
    """
    order = memory_order(value)
    width, tail = 1, 0
    for d in reversed(order):
        size, stride = sizes(value)[d], value.stride(d)
        heads = tail == 1 and value.dim() >= 4 and d == value.dim() - 3
        least = min(codec.group, ROW)
        enough = least * codec.runs if heads else least
        if tail and (width >= enough or not isinstance(size, int) or not is_static(stride, width)):
            break
        tail += 1
        if not isinstance(size, int):
            break
        width *= size
    return max(tail, 1)


def merge(x: torch.Tensor, tail: int) -> torch.Tensor:
    """x with its last ``tail`` dimensions as one."""
    return x.flatten(-tail) if tail > 1 else x


def rows_and_width(value: torch.Tensor, codec: Codec) -> tuple[Any, Any]:
    """Rows, and elements a row, that a codec sees."""
    shape = [value.shape[d] for d in memory_order(value)]
    tail = row_dims(value, codec) if shape else 0
    width = math.prod(shape[len(shape) - tail :])
    return math.prod(shape[: len(shape) - tail]), width
