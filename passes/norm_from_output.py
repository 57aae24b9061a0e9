"""Norm from its output: save the normalised value once, in the compute dtype, instead of a wider residual stream.

    before   xhat, r = normalize(x: f32[N, D]); y = bf16(xhat·γ + β); dW = dYᵀ y; dx = f(g, x)     saves x: 4·N·D
    after    xc = bf16(xhat)                                                                       saves xc: 2·N·D
             backward: y' = bf16(f32(xc)·γ + β); dW = dYᵀ y'; dx = r·(g − mean g − xc·mean(g·xc))

The forward pass is untouched: xc is written beside it, for the backward pass only, and shared by the norm's own backward,
dγ, and every linear that reads y (they rebuild y from it). Exact gradient and ours differ by one rounding of xhat (2⁻⁹ for
bf16). Bytes saved: (itemsize(x) − itemsize(compute)) · N·D a site.
Declined where x is no wider than the compute dtype (recomputing xhat from x is then as small, and exact), where a linear
reads y in float32, and where x is saved for another reason.
Numerics class: REASSOCIATED. Source: LowMemoryBP (ICML 2024), memory-sharing norms.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from lowmem_compile._torch import op_types
from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.graph import (
    VIEW_OPS,
    argument,
    backward_nodes,
    numel,
    storage_root,
    sympy_numel,
    tensor_of,
    tensor_value,
)

NORMALIZE = "lowmem.normalize.default"
NARROW = (torch.bfloat16, torch.float16)


class NormFromOutput:
    """Let the backward pass read the normalised output in the compute dtype."""

    name = "norm_from_output"
    stage = Stage.JOINT
    numerics = Numerics.REASSOCIATED

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:  # noqa: ARG002
        found = [n for n in graph.nodes if n.op == "call_function" and str(n.target) == NORMALIZE]
        if not found:
            return []
        backward = backward_nodes(graph)
        return [Match(n, backward) for n in found]

    def check(self, match: Match, ctx: Context) -> Decline | None:  # noqa: ARG002
        node = match.node
        x = tensor_of(argument(node, 0))
        xhat = _output(node, 0)
        if x is None or xhat is None or not _used_in(xhat, match.info):
            return Decline("LM303", "no gradient flows through this norm")
        if x.element_size() <= 2:
            return Decline("LM301", f"the input ({_short(x.dtype)}) is no wider than the compute dtype; recomputing is as small")
        dtype, why = compute_dtype(xhat, match.info)
        if dtype is None:
            return Decline("LM204", why)
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:  # noqa: ARG002
        node, backward = match.node, match.info
        xhat = _output(node, 0)
        if xhat is None:
            raise AssertionError(f"{node.name} lost its output between check and rewrite")
        dtype, why = compute_dtype(xhat, backward)
        if dtype is None:
            raise AssertionError(f"{node.name} lost its readers between check and rewrite: {why}")
        value = xhat.meta["val"]
        cast = torch.ops.prims.convert_element_type.default
        with graph.inserting_after(xhat):
            narrow = graph.call_function(cast, (xhat, dtype))
        with graph.inserting_after(narrow):
            wide = graph.call_function(cast, (narrow, value.dtype))
        narrow.meta = _forward_meta(node, value.to(dtype))
        narrow.meta.update(lowmem_pin=True, lowmem_site=node.name, lowmem_kind=f"normalised output, {_short(dtype)}")
        wide.meta = _forward_meta(node, value)
        Rebuild(graph, xhat, wide, backward).run()

    def displaced(self, match: Match) -> list[fx.Node]:
        """The tensors that need not be saved any more if the rewrite pays."""
        xhat = _output(match.node, 0)
        return [storage_root(argument(match.node, 0)), *([xhat] if xhat is not None else [])]

    def site_class(self, match: Match) -> tuple[Any, ...]:
        """Sites that the partitioner treats alike."""
        value = tensor_value(argument(match.node, 0))
        return (self.name, tuple(map(str, value.shape)), str(value.dtype))

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        value = tensor_value(argument(match.node, 0))
        return sympy_numel(value) * (value.element_size() - 2)


class Rebuild:
    """Clone the cheap forward nodes between xhat and the backward pass on top of a replacement for xhat.

    A forward node is cloned if it is a view, cast or pointwise operation whose only large input is xhat or another clone;
    parameters, statistics and boolean masks may be read besides.
    """

    def __init__(self, graph: fx.Graph, root: fx.Node, replacement: fx.Node, backward: set[fx.Node]) -> None:
        self.graph, self.backward, self.ops = graph, backward, op_types()
        self.size = numel(root)
        self.clones: dict[fx.Node, fx.Node | None] = {root: replacement}

    def run(self) -> None:
        """Point every backward reader of the cone at the clones."""
        for reader in [n for n in self.graph.nodes if n in self.backward]:
            for source in reader.all_input_nodes:
                if source not in self.backward and (clone := self.clone(source)) is not None:
                    reader.replace_input_with(source, clone)

    def clone(self, node: fx.Node) -> fx.Node | None:
        """The clone of a forward node, or ``None`` if it is not part of the cone."""
        if node not in self.clones:
            self.clones[node] = None
            if self.allowed(node):
                inputs = {i: self.clone(i) for i in node.all_input_nodes}
                if any(v is not None for v in inputs.values()) and all(v is not None or self.small(i) for i, v in inputs.items()):
                    with self.graph.inserting_after(node):
                        new = self.graph.node_copy(node, lambda i: inputs[i] or i)
                    new.meta = dict(node.meta)
                    self.clones[node] = new
        return self.clones[node]

    def allowed(self, node: fx.Node) -> bool:
        return (
            node.op == "call_function"
            and node not in self.backward
            and (node.target in VIEW_OPS or self.ops.is_recomputable(node))
            and node.target is not operator.getitem
            and numel(node) * 4 >= self.size
        )

    def small(self, node: fx.Node) -> bool:
        value = tensor_of(node)
        return (
            value is None or value.dtype == torch.bool or numel(node) * 4 <= self.size or storage_root(node).op == "placeholder"
        )


def compute_dtype(xhat: fx.Node, backward: set[fx.Node]) -> tuple[torch.dtype | None, str]:
    """The 2-byte dtype in which every matmul reads the norm's output, or ``None`` and why there is none."""
    ops = op_types()
    seen: set[fx.Node] = set()
    dtypes: set[torch.dtype] = set()
    work = [xhat]
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        value = tensor_of(node)
        for user in node.users:
            if user in backward or user.op == "output" or value is None:
                continue
            if ops.is_compute_intensive(user):
                dtypes.add(value.dtype)
            elif (user.target in VIEW_OPS or ops.is_recomputable(user)) and _single_large_input(user, node):
                work.append(user)
    if not dtypes:
        return None, "no matmul reads the output of this norm"
    if len(dtypes) > 1 or next(iter(dtypes)) not in NARROW:
        return None, f"a matmul reads the output of this norm in {', '.join(sorted(map(_short, dtypes)))}"
    return next(iter(dtypes)), ""


def _single_large_input(user: fx.Node, node: fx.Node) -> bool:
    size = numel(node)
    return all(i is node or numel(i) * 4 <= size or i.meta["val"].dtype == torch.bool for i in user.all_input_nodes)


def _output(node: fx.Node, index: int) -> fx.Node | None:
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == index:
            return user
    return None


def _used_in(node: fx.Node, backward: set[fx.Node]) -> bool:
    return any(u in backward for u in node.users)


def _forward_meta(node: fx.Node, value: torch.Tensor) -> dict[str, Any]:
    keys = ("stack_trace", "nn_module_stack", "seq_nr")
    return {"val": value, **{k: node.meta[k] for k in keys if k in node.meta}}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
