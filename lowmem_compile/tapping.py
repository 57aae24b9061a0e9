"""One Dynamo graph, compiled once for each set of weights whose gradients are projected in it.

Which weights these are is known only when the graph runs: Dynamo runs one graph for several modules of the same code, the
optimizer may be built after the model is compiled, and a step that makes a new basis needs whole gradients. So the compiled
callable looks up the optimizer of each weight it is handed, and picks or makes the variant for the answer:

    (x, W1, b1, W2, b2)                    whole gradients
    (x, W1, b1, W2, b2, A1, Z1, A2, Z2)    projected: a basis and a zero for each, behind the other inputs

The lookup costs a few dictionary reads a weight. A variant is compiled when it is first met, from a copy of the graph and the
fake inputs of Dynamo's own compile, so sizes that are dynamic there stay dynamic.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lowmem_compile._torch import copy_dynamo_module, mark_source_unknown, own_tracing_context, static_fakes
from lowmem_compile.graph import placeholders
from lowmem_compile.optim.taps import Tap, state_bytes, tap_or_reason

log = logging.getLogger(__name__)

MOST_VARIANTS = 8
"""Of one graph; further combinations of projected and whole gradients run with whole ones."""

LINEARS = (torch.nn.functional.linear, torch._C._nn.linear)

DISTRIBUTED = "DistributedDataParallel reduces the gradients of parameters, which have to be whole for it"


@dataclass(frozen=True)
class TapInput:
    """What the pass is told of a weight: its extra inputs, or why it has none.

    Attributes:
        basis: name of the placeholder of A or L.
        zero: name of the placeholder of Z.
        left: the output side is projected.
        refresh: the basis is made in the backward pass; ``basis`` names the placeholder of a ticket.
        reason: why the gradient is whole; then the names are empty.
        state_bytes: what the optimizer keeps for the weight.
    """

    basis: str = ""
    zero: str = ""
    left: bool = False
    refresh: bool = False
    reason: str = ""
    state_bytes: int = 0


def is_tapped(linear: fx.Node, taps: Mapping[str, TapInput]) -> bool:
    """Whether the gradient of a linear's weight is to be projected; folding something into the weight would need it whole."""
    weight = linear.args[1] if len(linear.args) > 1 else None
    tap = taps.get(weight.name) if isinstance(weight, fx.Node) else None
    return tap is not None and not tap.reason


Build = Callable[[fx.GraphModule, list[Any], Sequence[Any], Mapping[str, TapInput]], Callable[..., Any]]
"""(graph, example inputs, the inputs of this call, what is known of the weights) → compiled callable."""


def tapped_positions(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[int]:
    """Positions of the parameters that a linear of the graph reads as its weight and that get a gradient."""
    return [
        position
        for position, (node, value) in enumerate(zip(placeholders(gm.graph), example_inputs, strict=True))
        if isinstance(value, torch.nn.Parameter)
        and value.requires_grad
        and any(u.op == "call_function" and u.target in LINEARS and u.args[1:2] == (node,) for u in node.users)
    ]


class Variants:
    """The callable that stands for a training graph with linears; see the module docstring."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], positions: list[int], build: Build) -> None:
        self.gm, self.positions, self.build = copy_dynamo_module(gm), positions, build
        for node in placeholders(self.gm.graph):
            node.meta.pop("grapharg", None)  # Dynamo lets go of the inputs of its first call; so does the copy
        self.fakes = [n.meta.get("example_value", value) for n, value in zip(placeholders(gm.graph), example_inputs, strict=True)]
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        taps = self.taps(example_inputs)
        self.compiled[_key(taps)] = self.compile(gm, list(example_inputs), example_inputs, taps)

    def __call__(self, *args: Any) -> Any:
        """Run the variant that this call needs."""
        taps = self.taps(args)
        compiled = self.compiled.get(_key(taps))
        if compiled is None:
            if len(self.compiled) >= MOST_VARIANTS:
                log.warning("%d variants of one graph: further ones get whole gradients", len(self.compiled))
                taps = dict.fromkeys(taps, f"the graph has {MOST_VARIANTS} other variants")
            compiled = self.compiled.get(_key(taps))
        if compiled is None:
            with own_tracing_context(self.fakes):
                compiled = self.compile(copy_dynamo_module(self.gm), list(self.fakes), args, taps)
            self.compiled[_key(taps)] = compiled
        return compiled(*args, *_extras(taps))

    def taps(self, args: Sequence[Any]) -> dict[int, Tap | str]:
        """What the optimizers say about the weights among these inputs."""
        found = {i: tap for i in self.positions if (tap := tap_or_reason(args[i])) is not None}
        if found and torch.nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None:
            return dict.fromkeys(found, DISTRIBUTED)
        return found

    def compile(
        self, gm: fx.GraphModule, inputs: list[Any], args: Sequence[Any], taps: Mapping[int, Tap | str]
    ) -> Callable[..., Any]:
        """Compile the variant for these taps, with the extra inputs behind the others."""
        nodes = placeholders(gm.graph)
        known: dict[str, TapInput] = {}
        if any(isinstance(tap, Tap) for tap in taps.values()):
            gm = copy_dynamo_module(gm)  # Dynamo reads the placeholders of its own graph again
        last = placeholders(gm.graph)[-1]
        added: dict[int, str] = {}

        def add(label: str, tensor: torch.Tensor) -> str:
            nonlocal last
            if id(tensor) not in added:
                value, fake = static_fakes(tensor, self.fakes)
                with gm.graph.inserting_after(last):
                    last = gm.graph.placeholder(f"lowmem_{label}_{len(added)}")
                last.meta["example_value"] = value
                mark_source_unknown(last)
                inputs.append(fake)
                added[id(tensor)] = last.name
            return added[id(tensor)]

        for position, tap in taps.items():
            known[nodes[position].name] = (
                TapInput(reason=tap)
                if isinstance(tap, str)
                else TapInput(
                    basis=add("basis", tap.basis),
                    zero=add("zero", tap.zero),
                    left=tap.side == "left",
                    refresh=tap.refresher is not None,
                    state_bytes=state_bytes(args[position]),
                )
            )
        gm.recompile()
        return self.build(gm, inputs, [*args, *_extras(taps)], known)


def _key(taps: Mapping[int, Tap | str]) -> tuple[Any, ...]:
    """What tells variants apart: which weights are tapped, side and rank, and who shares a basis."""
    first: dict[int, int] = {}
    return tuple(
        (i, t.side, t.refresher is None, tuple(t.zero.shape), first.setdefault(id(t.basis), i))
        for i, t in taps.items()
        if isinstance(t, Tap)
    )


def _extras(taps: Mapping[int, Tap | str]) -> list[torch.Tensor]:
    """The extra inputs: the basis and the zero of each tap, a shared basis once."""
    tensors = [tensor for t in taps.values() if isinstance(t, Tap) for tensor in (t.basis, t.zero)]
    return list({id(tensor): tensor for tensor in tensors}.values())


TAPS = ("lowmem.projection_tap.default", "lowmem.refresh_tap.default")


def remove_taps(graph: fx.Graph) -> None:
    """Take the taps out of a joint graph: their forward is the identity."""
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target) in TAPS:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
