"""Check a graph after a pass: every node's recorded value against a fresh run with fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lowmem_compile._torch import FakeTensor, FakeTensorMode, HigherOrderOperator


def verify_values(gm: fx.GraphModule) -> None:
    """Re-run an ATen graph with fake tensors; shapes, dtypes and devices must be what ``meta["val"]`` says.

    Graphs of the Dynamo stage (no ``meta["val"]``) are not re-run.

    Raises:
        AssertionError: a value differs; the message shows the node and its neighbours.
    """
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if any("val" not in n.meta for n in inputs):
        return
    modes = [n.meta["val"].fake_mode for n in inputs if isinstance(n.meta["val"], FakeTensor)]
    if not modes:
        return
    gm.recompile()
    with modes[0], torch.no_grad():
        _Checking(gm, modes[0]).run(*[n.meta["val"] for n in inputs])


UNKNOWN = object()
"""The value of a higher-order operation that does not say what it computes."""


class _Checking(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.mode = mode

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self.mode.from_tensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) else value

    def run_node(self, n: fx.Node) -> Any:
        if isinstance(n.target, HigherOrderOperator) and "val" not in n.meta:  # keeps and restores the state of random numbers
            return UNKNOWN
        if n.op != "output" and any(self.env[i] is UNKNOWN for i in n.all_input_nodes):
            return n.meta.get("val", UNKNOWN)
        result = super().run_node(n)
        recorded = n.meta.get("val")
        if isinstance(result, torch.Tensor) and isinstance(recorded, torch.Tensor) and n.op != "output":
            found = (tuple(map(str, result.shape)), result.dtype, result.device)
            wanted = (tuple(map(str, recorded.shape)), recorded.dtype, recorded.device)
            if found != wanted:
                raise AssertionError(f"{n.format_node()} computes {found}, its meta says {wanted}\n{_around(n)}")
        return result


def _around(node: fx.Node, reach: int = 10) -> str:
    nodes = list(node.graph.nodes)
    at = nodes.index(node)
    lines = [str(n.format_node()) for n in nodes[max(0, at - reach) : at + reach + 1]]
    return "\n".join(lines)
