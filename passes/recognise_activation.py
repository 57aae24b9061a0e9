"""Recognise GELU (erf, tanh, quick) and SiLU written by hand, and make them the library's operation.

    before   0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))        (GPT-2's NewGELU, and kin)
    after    torch.nn.functional.gelu(x, approximate="tanh")
    before   x * torch.sigmoid(1.702 * x)                                              (CLIP's QuickGELU)
    after    torch.nn.functional.silu(1.702 * x) / 1.702

Any spelling is found: a product whose cone has one tensor leaf is evaluated in float64 and compared with the known functions.
Bytes: written by hand, autograd keeps an intermediate for each operation; the library's operation keeps x alone.
Matched only in one floating dtype (no cast inside the cone). Numerics class: REASSOCIATED (constants may differ in the
tenth digit). Sources: Hendrycks & Gimpel 2016; Ramachandran et al. 2017.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from lowmem_compile.cone import cone, erase_unused, evaluate, is_cast, is_elementwise, leaf_of, strip_casts
from lowmem_compile.contract import Context, Decline, Match, Numerics, Stage
from lowmem_compile.graph import sympy_numel, tensor_of

QUICK = 1.702
KNOWN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(QUICK * x),
    "silu": F.silu,
}
TOLERANCE = 1e-6
PRODUCTS = {operator.mul, torch.mul}


class RecogniseActivation:
    """Replace hand-written activations by the library's."""

    name = "recognise_activation"
    stage = Stage.DYNAMO
    numerics = Numerics.REASSOCIATED

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:  # noqa: ARG002
        sample = torch.cat([torch.linspace(-9, 9, 61, dtype=torch.float64), torch.tensor([0.1, -0.2, 1e-3])])
        found: list[Match] = []
        inside: set[fx.Node] = set()
        for root in reversed(graph.nodes):
            if root in inside or root.op != "call_function" or root.target not in PRODUCTS or tensor_of(root) is None:
                continue
            for leaf in _leaves(root):
                nodes = cone(root, leaf)
                if not nodes or len(nodes) < 2 or any(n.target is F.silu for n in nodes):
                    continue
                value = evaluate(nodes, leaf, sample.clone())
                if not isinstance(value, torch.Tensor) or value.shape != sample.shape:
                    continue
                name = next((k for k, f in KNOWN.items() if torch.allclose(value, f(sample), 0, TOLERANCE)), None)
                if name is not None:
                    inside.update(nodes)
                    found.append(Match(root, (name, leaf, tuple(nodes))))
                    break
        return found[::-1]

    def check(self, match: Match, ctx: Context) -> Decline | None:  # noqa: ARG002
        name, leaf, nodes = match.info
        if any(is_cast(n) for n in nodes):
            return Decline("LM205", f"{name} is computed in another dtype than its input")
        inner = set(nodes)
        if any(u not in inner for n in nodes if n is not match.node for u in n.users):
            return Decline("LM206", f"an intermediate of {name} is used elsewhere")
        x, y = tensor_of(leaf), tensor_of(match.node)
        if x is None or y is None or x.dtype != y.dtype or not x.dtype.is_floating_point or x.shape != y.shape:
            return Decline("LM205", f"{name} changes the dtype or the shape of its input")
        return None

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:  # noqa: ARG002
        name, _, nodes = match.info
        root, leaf = match.node, leaf_of(nodes)
        value = root.meta["example_value"]
        with graph.inserting_before(root):
            if name == "quick_gelu":
                scaled = graph.call_function(operator.mul, (leaf, QUICK))
                inner = graph.call_function(F.silu, (scaled,))
                new = graph.call_function(operator.mul, (inner, 1.0 / QUICK))
                made = [scaled, inner, new]
            elif name == "silu":
                new = graph.call_function(F.silu, (leaf,))
                made = [new]
            else:
                kwargs: dict[str, Any] = {"approximate": "tanh"} if name == "gelu_tanh" else {}
                new = graph.call_function(F.gelu, (leaf,), kwargs)
                made = [new]
        for node in made:
            node.meta = {**root.meta, "example_value": value}
        root.replace_all_uses_with(new)
        erase_unused(root)

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:  # noqa: ARG002
        value = match.node.meta["example_value"]
        inner = sum(1 for n in match.info[2] if n is not match.node)
        return sympy_numel(value) * value.element_size() * max(inner - 1, 0)


def _leaves(root: fx.Node) -> list[fx.Node]:
    """Candidate inputs x: nodes below products that are not themselves part of the cone, nearest first."""
    found: list[fx.Node] = []
    work = list(root.all_input_nodes)
    depth = 0
    while work and depth < 24:
        node = work.pop(0)
        depth += 1
        if node not in found and tensor_of(node) is not None:
            found.append(node)
            if is_elementwise(node):
                work.extend(node.all_input_nodes)
    return [n for n in found if len(n.users) >= 2 or strip_casts(n) is not n or not is_elementwise(n)]
