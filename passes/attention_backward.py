"""On a CPU, the gradients of a fused attention come from queries, keys and values alone, by the library's matrix products.

    before   dQ, dK, dV = flash_attention_backward(dO, Q, K, V, O, L)      saves O: B·H·S·E·itemsize, L: 4·B·H·S
             dW = dyᵀ O
    after    P = softmax(scale·QKᵀ + M);  dP = dO Vᵀ;  dS = P ∘ (dP − rowsum(P∘dP))
             dV = Pᵀ dO;  dQ = scale·dS K;  dK = scale·dSᵀ Q                of some heads at a time
             dW = dyᵀ (PV)                                                 where the next linear's weight is trained

PyTorch's kernel for a CPU takes two to four times as long for 16-bit tensors of up to some hundred keys: it multiplies small
blocks, each a call of the library. And it needs O and L. Where the weight behind the attention is trained, its gradient reads O
too; P is there, so O is made again beside the gradients, and the weight's gradient comes after them.

Bytes saved: 4·B·H·S of L, and O: B·H·S·E·itemsize. O stays saved where the forward pass returns it, or where the backward pass
reads it before, or other than through views. Scratch memory: eight bytes for each of half a million scores.
Not matched: other devices. Declined: float32 and processors without instructions for 16-bit matrix products (PyTorch's kernel is
as fast), more than ``LARGEST`` scores a head, ``LARGEST_CAUSAL`` if keys ahead are left out (likewise), a dynamic number of
queries or keys, dropout, grouped heads that the kernel itself expands.
Numerics class: REASSOCIATED. Its error in bfloat16 is about that of PyTorch's kernel (kernels/attention_backward).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from lowmem_compile._torch import narrow_products
from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.crossing import repeatable, view_chain
from lowmem_compile.graph import VIEW_OPS, backward_nodes, replace_and_erase, splice, sympy_numel, tensor_value
from lowmem_compile.kernels.attention_backward import attention_backward

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
LARGEST, LARGEST_CAUSAL = 1 << 20, 1 << 18
"""Scores of a head, above which PyTorch's kernel is as fast: it leaves blocks of keys that are ahead out. A quarter of it where
the processor has instructions for 16-bit vectors and not for tiles."""


class Call(NamedTuple):
    """The arguments of PyTorch's kernel."""

    grad: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    out: fx.Node
    logsumexp: fx.Node
    dropout: float
    causal: bool
    mask: fx.Node | None
    scale: float | None


class AttentionBackward:
    """Compute an attention's gradients without its output and logsumexp."""

    name = "attention_backward"
    stage = Stage.JOINT
    numerics = Numerics.REASSOCIATED

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        if ctx.device != "cpu":
            return []
        return [Match(n, call_of(n)) for n in graph.find_nodes(op="call_function", target=FLASH)]

    def check(self, match: Match, ctx: Context) -> Decline | None:  # noqa: ARG002
        call: Call = match.info
        query, key, value = (tensor_value(n) for n in (call.query, call.key, call.value))
        if call.dropout != 0:
            return Decline("LM203", "the attention drops scores at random")
        if query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3]:
            return Decline("LM203", "queries have more heads than keys")
        products = narrow_products(query.dtype)
        if products == "none":
            return Decline(
                "LM311", f"this processor multiplies no {_short(query.dtype)} matrices faster than the library's kernel"
            )
        if not all(isinstance(n, int) for n in (query.shape[2], key.shape[2])):
            return Decline("LM203", "the number of queries or keys is dynamic")
        largest = LARGEST_CAUSAL if call.causal else LARGEST
        if query.shape[2] * key.shape[2] > (largest if products == "tiles" else largest // 4):
            return Decline("LM311", f"the library's kernel is as fast over {key.shape[2]} keys")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:  # noqa: ARG002
        node, call = match.node, match.info
        inputs = [call.grad, call.query, call.key, call.value, *([] if call.mask is None else [call.mask])]
        scale = tensor_value(call.query).shape[3] ** -0.5 if call.scale is None else call.scale

        reads = reads_of_output(graph, match)

        def gradients(*given: torch.Tensor) -> Any:
            mask = given[4] if len(given) > 4 else None
            made = attention_backward(*given[:4], mask, call.causal, scale, bool(reads))
            return made if reads else made[:3]

        new = splice(graph, node, gradients, inputs, like=node, decompositions={}, backward=True)
        if reads:
            read_again(graph, match, new[3], reads)
        replace_and_erase(graph, node, new[:3])

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        """Of the logsumexp; the output's, where it is not kept for something else, come on top."""
        kept = tensor_value(match.info.logsumexp)
        return sympy_numel(kept) * kept.element_size()

    def describe(self, match: Match, ctx: Context) -> str:  # noqa: ARG002
        query, key = (tensor_value(n) for n in (match.info.query, match.info.key))
        return f"{query.shape[2]} queries, {key.shape[2]} keys, {_short(query.dtype)}"


class Read(NamedTuple):
    """A backward node that reads the output, and the output or view of it that it reads."""

    reader: fx.Node
    seen: fx.Node


def call_of(node: fx.Node) -> Call:
    """What PyTorch's kernel is called with."""
    given: dict[str, Any] = dict(zip(Call._fields, node.args, strict=False))
    return Call(**given, mask=node.kwargs.get("attn_mask"), scale=node.kwargs.get("scale"))  # type: ignore[arg-type]


def reads_of_output(graph: fx.Graph, match: Match) -> list[Read]:
    """Where the backward pass reads the attention's output beside its gradients; empty where it has to be saved anyway."""
    node, out = match.node, match.info.out
    if not _lies_as_made(tensor_value(out)):
        return []
    backward = backward_nodes(graph)
    reads, work = [], [out]
    while work:
        seen = work.pop()
        for user in seen.users:
            if user.op == "output":
                return []
            if user in backward and user is not node:
                reads.append(Read(user, seen))
            elif user.target in VIEW_OPS:
                work.append(user)
    possible = all(repeatable(view_chain(r.seen)) for r in reads) and node not in dependents(r.reader for r in reads)
    return reads if possible else []


def read_again(graph: fx.Graph, match: Match, made: fx.Node, reads: list[Read]) -> None:
    """Let the readers of the output, behind its gradients from now on, read ``made`` in its place."""
    late = dependents(r.reader for r in reads)
    again: dict[fx.Node, fx.Node] = {match.info.out: made}
    with graph.inserting_before(match.node):
        for reader, seen in reads:
            for view in view_chain(seen):
                if view not in again:
                    again[view] = graph.node_copy(view, again.__getitem__)
                    again[view].meta["partitioner_tag"] = "is_backward"
            reader.replace_input_with(seen, again[seen])
    before = takewhile(lambda n: n is not match.node, graph.nodes)
    for moved in reversed([n for n in before if n in late]):
        match.node.append(moved)


def dependents(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that is computed from them."""
    found, work = set[fx.Node](), list(nodes)
    while work:
        node = work.pop()
        if node not in found:
            found.add(node)
            work.extend(node.users)
    return found


def _lies_as_made(out: torch.Tensor) -> bool:
    """Whether O [B, H, S, E] lies as [B, S, H, E], as the operation makes it."""
    _, heads, queries, width = out.shape
    return tuple(map(str, out.stride())) == tuple(map(str, (queries * heads * width, width, heads * width, 1)))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
