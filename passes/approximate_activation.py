"""Approximate-BP activations: save a code of 2 to 8 bits per element instead of the activation's input.

    before   a = f(h);      dh = f_backward(g, h)                        saves h: bf16[..., D]
    after    a = f(h);      c = codes of f'(h); p = sum(h·0)             saves c: b bits an element, p: f32[..., 1]
             dh = g · slope(c) + p

Forward: exact. Exact gradient: g·f'(h). Ours: g·s(h), where s depends on ``options["table"]``:

- ``"slope"`` (default): f'(h) itself, rounded to 2^b − 1 equal steps over its range, b = ``options["slope_bits"]``. The error is
  at most half a step, (hi − lo)/(2^b − 1)/2, whatever h is, and backward computes neither erf nor exp;
- ``"derivative"``: step function of ``options["code_bits"]`` = 5, 4 or 2 bits fitted to f' (FewBit);
- ``"primitive"``: ReGELU2/ReSiLU2, 2 bits.

p is 0 for finite rows and NaN for a row that holds a NaN or an Inf, so non-finite activations reach the gradient.

Bytes saved: N·(itemsize − b/8) − 4·N/D a site, and only where nothing else in the backward pass needs h. The pipeline asks the
partitioner for each site and undoes the ones that do not pay.
Not matched: activations whose input is a graph input, integer or float64 tensors, activations without a table.
Numerics class: APPROXIMATE. Source: LowMemoryBP (ICML 2024), eq. 13–16; FewBit (arXiv 2202.00441) for the derivative tables.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
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
    storage_root,
    sympy_numel,
    tensor_of,
    tensor_value,
)
from lowmem_compile.kernels.activation_codes.tables import StepTable, step_table
from lowmem_compile.kernels.group_codes import in_memory, pack_codes, planes, unpack_codes

aten = torch.ops.aten

ACTIVATIONS: Mapping[Any, str] = {
    aten.gelu_backward.default: "gelu",
    aten.silu_backward.default: "silu",
    aten.mish_backward.default: "mish",
    aten.softplus_backward.default: "softplus",
    aten.log_sigmoid_backward.default: "log_sigmoid",
}


def pack(h: torch.Tensor, thresholds: tuple[float, ...]) -> tuple[torch.Tensor, ...]:
    """Codes of h (b bits for 2^b − 1 thresholds), packed by :func:`pack_codes_of` as one row of N elements.

    Packing reads a code more than once; from 4 bits on it is a byte in memory, so that its thresholds are compared once.
    """
    bits = (len(thresholds) + 1).bit_length() - 1
    value = h.reshape(-1).to(torch.float32)
    code = torch.where(value > thresholds[0], 1.0, 0.0)
    for threshold in thresholds[1:]:
        code = code + torch.where(value > threshold, 1.0, 0.0)
    if bits > 2:
        code = in_memory(code.to(torch.uint8)).to(torch.float32)
    return pack_codes_of(code, bits)


def pack_slope(slope: torch.Tensor, low: float, high: float, bits: int) -> tuple[torch.Tensor, ...]:
    """Codes of f'(h) over [low, high]: i8[..., D] at 8 bits, else the planes of ``kernels/group_codes``.

    Planes are packed from a byte for each element: packing reads an element more than once, and Inductor would keep float32.
    """
    top = float(2**bits - 1)
    code = torch.round((slope.to(torch.float32) - low) * (top / (high - low)))
    if bits == 8:
        return ((code - 128.0).to(torch.int8),)
    return pack_codes_of(in_memory(code.to(torch.uint8)).to(torch.float32), bits)


def unpack_slope(packed: tuple[torch.Tensor, ...], width: int, low: float, high: float, bits: int) -> torch.Tensor:
    """f32[..., width]: the slopes that :func:`pack_slope` packed."""
    step = (high - low) / (2**bits - 1)
    if bits == 8:
        whole: torch.Tensor = packed[0].to(torch.float32) * step + (low + 128 * step)
        return whole
    slope: torch.Tensor = unpack_codes_of(packed, width, bits) * step + low
    return slope


def pack_codes_of(code: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """u8[..., ·] planes, as ``kernels/group_codes`` packs them, of codes f32[..., D] from 0 to 2^bits − 1.

    One conversion to uint8 at the end: Inductor's C++ is 20–40 times slower on uint8 arithmetic.
    """
    runs, length = code_runs(code.shape[-1], bits)
    pad = runs * length - code.shape[-1]
    if not is_static(pad, 0):
        code = aten.constant_pad_nd(code, [0, pad])
    return tuple(plane.flatten(-3) for plane in pack_codes(code.reshape(*code.shape[:-1], runs, 1, length), bits))


def unpack_codes_of(packed: tuple[torch.Tensor, ...], width: int, bits: int) -> torch.Tensor:
    """f32[..., width]: the codes that :func:`pack_codes_of` packed."""
    runs, length = code_runs(width, bits)
    code = unpack_codes(packed, length, bits)
    rows: torch.Tensor = code.reshape(*code.shape[:-2], runs * length)[..., :width]
    return rows


def poison(h: torch.Tensor) -> torch.Tensor:
    """f32[..., 1]: 0 for a finite row, NaN for a row with a NaN or an Inf."""
    return (h.to(torch.float32) * 0.0).sum(-1, keepdim=True)


def apply_levels(
    grad: torch.Tensor, packed: tuple[torch.Tensor, ...], bad: torch.Tensor, levels: tuple[float, ...]
) -> torch.Tensor:
    """grad · level[code] + poison, computed in float32, in grad's dtype."""
    slope = select(unpack_codes_of(packed, grad.numel(), len(levels).bit_length() - 1), levels).reshape(grad.shape)
    return (grad.to(torch.float32) * slope + bad).to(grad.dtype)


def select(code: torch.Tensor, levels: tuple[float, ...], first: int = 0) -> torch.Tensor:
    """levels[code − first] by a binary tree of selections (a gather from memory is twice as slow on a CPU)."""
    half = len(levels) // 2
    if half == 1:
        return torch.where(code == first, levels[0], levels[1])
    above = select(code, levels[half:], first + half)
    return torch.where(code < first + half, select(code, levels[:half], first), above)


SLOPE_RANGE: Mapping[str, tuple[float, float]] = {
    "gelu": (-0.12891, 1.12891),
    "gelu_tanh": (-0.129, 1.129),
    "silu": (-0.09985, 1.09985),
    "mish": (-0.1126, 1.0886),
    "softplus": (0.0, 1.0),
    "log_sigmoid": (0.0, 1.0),
}
"""Least and greatest slope of each activation."""


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
        decompositions = dict(select_decomp_table())
        after_h = h.next
        while after_h.op == "placeholder" or after_h.target is operator.getitem:
            after_h = after_h.next
        encode, decode, kind = self._codes(match, ctx)
        *codes, bad = splice(graph, after_h, lambda x: (*encode(x), poison(x)), [h], like=h, decompositions=decompositions)
        for new in (*codes, *map(storage_root, codes), bad):  # the partitioner pins no views
            new.meta["lowmem_pin"] = True
            new.meta["lowmem_site"] = node.name
            new.meta["lowmem_kind"] = "poison" if new is bad else kind
            for key in ("nn_module_stack", "stack_trace"):
                if key in h.meta:
                    new.meta[key] = h.meta[key]
        out = splice(graph, node, decode, [grad, bad, *codes], like=node, decompositions=decompositions, backward=True)
        replace_and_erase(graph, node, out)

    @staticmethod
    def _codes(match: Match, ctx: Context) -> tuple[Callable[..., Any], Callable[..., Any], str]:
        """How to make the codes of h, how to make dh of (grad, poison, codes), and what the report calls them."""
        name, node = match.info.name, match.node
        if ctx.options.table != "slope":
            table = table_of(name, ctx)

            def by_table(grad: torch.Tensor, bad: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
                return apply_levels(grad, packed, bad, table.levels)

            return lambda h: pack(h, table.thresholds), by_table, f"{table.bits}-bit codes"
        low, high = SLOPE_RANGE[name]
        bits, extra, kwargs = slope_bits(match, ctx), node.args[2:], dict(node.kwargs)

        def encode(h: torch.Tensor) -> tuple[torch.Tensor, ...]:
            wide = h.to(torch.float32)
            rest = (wide, *extra) if name != "log_sigmoid" else (wide, torch.exp(-wide.abs()))
            slope = decompositions_of(node.target)(torch.ones_like(wide), *rest, **kwargs)
            return pack_slope(slope, low, high, bits)

        def by_slope(grad: torch.Tensor, bad: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
            slope = unpack_slope(packed, grad.shape[-1], low, high, bits)
            return (grad.to(torch.float32) * slope + bad).to(grad.dtype)

        return encode, by_slope, f"{bits}-bit slope codes"

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
        width = last.node.expr if isinstance(last, torch.SymInt) else sympy.Integer(max(int(last), 1))
        rows = elements / width
        if ctx.options.table == "slope":
            codes = rows * code_bytes(width, slope_bits(match, ctx))
        else:
            codes = code_bytes(elements, table_of(match.info.name, ctx).bits)
        return elements * value.element_size() - codes - 4 * rows


def code_bytes(elements: sympy.Expr, bits: int) -> sympy.Expr:
    """Bytes of the codes of a row of so many elements: all planes."""
    runs = 8 // planes(bits)[-1]
    return sympy.ceiling(elements / runs) * runs * bits / 8


def slope_bits(match: Match, ctx: Context) -> int:
    """Bits of a slope code: 8 where the last dimension is dynamic, else the option's."""
    width = sizes(tensor_value(argument(match.node, 1)))[-1]
    return default_slope_bits(ctx) if isinstance(width, int) else 8


def default_slope_bits(ctx: Context) -> int:
    """The option's bits; without it 6 on a CPU and 8 elsewhere, where codes of fewer bits take launches of their own."""
    return ctx.options.slope_bits or (6 if ctx.device == "cpu" else 8)


def code_runs(width: int, bits: int) -> tuple[int, int]:
    """Runs of a row and elements a run, as ``kernels/group_codes`` packs them."""
    runs = 8 // planes(bits)[-1]
    return runs, (width + runs - 1) // runs


def decompositions_of(target: Any) -> Callable[..., Any]:
    """The decomposition of an activation's backward."""
    found: Callable[..., Any] = select_decomp_table()[target]
    return found


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
