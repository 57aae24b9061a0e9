"""Approximate-BP activations: save a code of 2 or 4 bits per element instead of the activation's input.

    before   a = gelu(h);      dh = gelu_backward(g, h)                  saves h: bf16[N, D]
    after    a = gelu(h);      c = pack(#{t < h}); p = sum(h·0)          saves c: u8[N·D·bits/8], p: f32[N, 1]
             dh = g · level[unpack(c)] + p

Forward: exact. Exact gradient: g·f'(h). Ours: g·s(h), s the step function of the table
(``options["table"]``: ``"derivative"`` with ``options["code_bits"]`` = 4 or 2; ``"primitive"`` is ReGELU2/ReSiLU2, 2 bits).
p is 0 for finite rows and NaN for a row that holds a NaN or an Inf, so non-finite activations reach the gradient.

Bytes saved: N·D·(itemsize − bits/8) − 4·N a site, and only where nothing else in the backward pass needs h. The pipeline asks the
partitioner for each site and undoes the ones that do not pay.
Not matched: activations whose input is a graph input, integer or float64 tensors, activations without a table.
Numerics class: APPROXIMATE. Source: LowMemoryBP (ICML 2024), eq. 13–16; FewBit (arXiv 2202.00441) for the derivative tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from lowmem_compile._torch import op_types, select_decomp_table
from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.graph import (
    VIEW_OPS,
    argument,
    backward_nodes,
    is_static,
    replace_and_erase,
    sizes,
    splice,
    sympy_numel,
    tensor_of,
    tensor_value,
)
from lowmem_compile.kernels.activation_codes.tables import StepTable, step_table

aten = torch.ops.aten

ACTIVATIONS: Mapping[Any, str] = {
    aten.gelu_backward.default: "gelu",
    aten.silu_backward.default: "silu",
    aten.mish_backward.default: "mish",
    aten.softplus_backward.default: "softplus",
    aten.log_sigmoid_backward.default: "log_sigmoid",
}


def pack(h: torch.Tensor, thresholds: tuple[float, ...]) -> torch.Tensor:
    """Codes of h (2 bits for 3 thresholds, 4 for 15), planar; u8[ceil(N·bits/8)].

    One conversion to uint8 at the end: Inductor's C++ is 20–40 times slower on uint8 arithmetic.
    """
    bits = (len(thresholds) + 1).bit_length() - 1
    runs = 8 // bits
    flat = h.reshape(-1)
    length = (flat.numel() + runs - 1) // runs
    pad = runs * length - flat.numel()
    if not is_static(pad, 0):
        flat = aten.constant_pad_nd(flat, [0, pad])
    value = flat.view(runs, length).to(torch.float32)
    code = torch.where(value > thresholds[0], 1.0, 0.0)
    for threshold in thresholds[1:]:
        code = code + torch.where(value > threshold, 1.0, 0.0)
    packed = code[0]
    for k in range(1, runs):
        packed = packed + code[k] * float(2 ** (bits * k))
    return packed.to(torch.int32).to(torch.uint8)


def poison(h: torch.Tensor) -> torch.Tensor:
    """f32[..., 1]: 0 for a finite row, NaN for a row with a NaN or an Inf."""
    return (h.to(torch.float32) * 0.0).sum(-1, keepdim=True)


def apply_levels(grad: torch.Tensor, packed: torch.Tensor, bad: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """grad · level[code] + poison, computed in float32, in grad's dtype."""
    bits = len(levels).bit_length() - 1
    n = grad.numel()
    shift = torch.arange(0, 8, bits, dtype=torch.int32, device=packed.device).view(8 // bits, 1)
    code = (packed.to(torch.int32).view(1, -1) >> shift) & (2**bits - 1)
    slope = select(code, levels)
    slope = slope.reshape(-1)[:n].reshape(grad.shape)
    return (grad.to(torch.float32) * slope + bad).to(grad.dtype)


def select(code: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """levels[code] by a binary tree of selections (a gather from memory is twice as slow on a CPU)."""
    half = len(levels) // 2
    if half == 1:
        return torch.where(code == 0, levels[0], levels[1])
    return torch.where(code < half, select(code, levels[:half]), select(code - half, levels[half:]))


@dataclass(frozen=True)
class Activation:
    """One activation site: its table's name, and whether the backward pass reads its output."""

    name: str | None
    output_read: bool


class ApproximateActivation:
    """Rewrite ``gelu_backward`` and its kin to step codes."""

    name = "approximate_activation"
    stage = Stage.JOINT
    numerics = Numerics.APPROXIMATE

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:  # noqa: ARG002
        found = [n for n in graph.nodes if n.op == "call_function" and n.target in ACTIVATIONS]
        backward = backward_nodes(graph) if found else set()
        return [Match(n, Activation(_name_of(n), output_is_read(n, backward))) for n in found]

    def check(self, match: Match, ctx: Context) -> Decline | None:
        node, name = match.node, match.info.name
        if ctx.options.gradients == "exact":
            return Decline("LM201", "options['gradients'] is 'exact'")
        if name is None:
            return Decline("LM202", f"{node.target} with these arguments has no step table")
        h = node.args[1]
        if not isinstance(h, fx.Node):
            return Decline("LM203", "the input of the activation is not a tensor")
        value = tensor_of(h)
        if value is None or value.dtype not in (torch.bfloat16, torch.float16, torch.float32) or value.dim() == 0:
            return Decline("LM203", "codes are for bf16, fp16 and fp32 tensors with at least one dimension")
        if h.op == "placeholder":
            return Decline("LM302", "the input of the activation is a graph input, which is kept alive anyway")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:
        node = match.node
        grad, h = argument(node, 0), argument(node, 1)
        table = table_of(match.info.name, ctx)
        decompositions = dict(select_decomp_table())
        after_h = h.next
        while after_h.op == "placeholder":
            after_h = after_h.next
        code, bad = splice(
            graph,
            after_h,
            lambda x: (pack(x, table.thresholds), poison(x)),
            [h],
            like=h,
            decompositions=decompositions,
        )
        for new, kind in ((code, f"{table.bits}-bit codes"), (bad, "poison")):
            new.meta["lowmem_pin"] = True
            new.meta["lowmem_site"] = node.name
            new.meta["lowmem_kind"] = kind
            for key in ("nn_module_stack", "stack_trace"):
                if key in h.meta:
                    new.meta[key] = h.meta[key]
        out = splice(
            graph,
            node,
            lambda g, c, b: apply_levels(g, c, b, table.levels),
            [grad, code, bad],
            like=node,
            decompositions=decompositions,
            backward=True,
        )
        replace_and_erase(graph, node, out)

    def displaced(self, match: Match) -> list[fx.Node]:
        """The tensors that need not be saved any more if the rewrite pays."""
        return [argument(match.node, 1)]

    def site_class(self, match: Match) -> tuple[Any, ...]:
        """Sites that the partitioner treats alike."""
        value = tensor_value(argument(match.node, 1))
        return (self.name, match.info, tuple(map(str, value.shape)), str(value.dtype))

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:
        value = tensor_value(argument(match.node, 1))
        elements = sympy_numel(value)
        last = sizes(value)[-1]
        rows = elements / (last.node.expr if isinstance(last, torch.SymInt) else sympy.Integer(max(int(last), 1)))
        return elements * value.element_size() - sympy.ceiling(elements * table_of(match.info.name, ctx).bits / 8) - 4 * rows


def table_of(name: str, ctx: Context) -> StepTable:
    """The step table of an activation under the options."""
    return step_table(name, ctx.options.table, 2 if ctx.options.table == "primitive" else ctx.options.code_bits)


def output_is_read(node: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether a backward node other than ``node`` reads something pointwise made of the activation's input."""
    ops = op_types()
    seen: set[fx.Node] = set()
    work = [argument(node, 1)]
    while work:
        source = work.pop()
        for user in source.users:
            if user in backward:
                if user is not node:
                    return True
            elif user not in seen and (user.target in VIEW_OPS or ops.is_recomputable(user)):
                seen.add(user)
                work.append(user)
    return False


def _name_of(node: fx.Node) -> str | None:
    name = ACTIVATIONS[node.target]
    if name == "gelu":
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    if name == "softplus":
        beta, threshold = node.args[2], node.args[3]
        return "softplus" if beta == 1 and isinstance(threshold, (int, float)) and threshold >= 20 else None
    return name
