"""One Dynamo graph, compiled once for each set of weights whose gradients are projected in it.

Which weights these are is known only when the graph runs: Dynamo runs one graph for several modules of the same code, the
optimizer may be built after the model is compiled, and a step that makes a new basis needs whole gradients. So the compiled
callable looks up the optimizer of each weight it is handed, and picks or makes the variant for the answer:

    (x, W1, b1, W2, b2)                    whole gradients
    (x, W1, b1, W2, b2, A1, Z1, A2, Z2)    projected: a basis and a zero for each, behind the other inputs
    (x, W1, b1, ..., m1, v1, A1, Z1, ...)  updated in the backward graph: the optimizer's state too (lowmem_compile.optim.fused)

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
from lowmem_compile.errors import OptionError
from lowmem_compile.graph import placeholders
from lowmem_compile.in_backward import Planned
from lowmem_compile.optim.claims import BITS, Claim
from lowmem_compile.optim.fused import Fused
from lowmem_compile.optim.taps import Tap, fused_or_none, state_bytes, tap_or_reason

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


Known = Tap | Fused | str
"""What an optimizer says of a parameter: how its gradient is projected, how it is updated, or why its gradient is whole."""
Build = Callable[[fx.GraphModule, list[Any], Sequence[Any], Mapping[str, TapInput], Sequence[Planned]], Callable[..., Any]]
"""(graph, example inputs, the inputs of this call, what is known of the weights, updates) → compiled callable."""


def parameter_positions(example_inputs: Sequence[Any]) -> list[int]:
    """Positions of the parameters that get a gradient."""
    return [i for i, value in enumerate(example_inputs) if isinstance(value, torch.nn.Parameter) and value.requires_grad]


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
    """The callable that stands for a training graph with parameters; see the module docstring."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], build: Build) -> None:
        self.gm, self.build = copy_dynamo_module(gm), build
        self.parameters, self.weights = parameter_positions(example_inputs), set(tapped_positions(gm, example_inputs))
        for node in placeholders(self.gm.graph):
            node.meta.pop("grapharg", None)  # Dynamo lets go of the inputs of its first call; so does the copy
        self.fakes = [n.meta.get("example_value", value) for n, value in zip(placeholders(gm.graph), example_inputs, strict=True)]
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        known = self.known(example_inputs)
        self.compiled[_key(known)] = self.compile(gm, list(example_inputs), example_inputs, known)

    def __call__(self, *args: Any) -> Any:
        """Run the variant that this call needs."""
        known = self.known(args)
        compiled = self.compiled.get(_key(known))
        if compiled is None:
            if len(self.compiled) >= MOST_VARIANTS:
                log.warning("%d variants of one graph: further ones get whole gradients", len(self.compiled))
                known = dict.fromkeys(known, f"the graph has {MOST_VARIANTS} other variants")
            compiled = self.compiled.get(_key(known))
        if compiled is None:
            with own_tracing_context(self.fakes):
                compiled = self.compile(copy_dynamo_module(self.gm), list(self.fakes), args, known)
            self.compiled[_key(known)] = compiled
        fused = _fused(known)
        if not fused:
            return compiled(*args, *_extras(known))
        claim = Claim([(args[i], entry.fusion) for i, entry in fused.items()])
        outputs = compiled(*args, *_extras(known), *claim.counts)
        claim.made(outputs)
        return outputs

    def known(self, args: Sequence[Any]) -> dict[int, Known]:
        """What the optimizers say about the parameters among these inputs.

        Raises:
            OptionError: DistributedDataParallel is to reduce gradients that the backward pass would consume.
        """
        found: dict[int, Known] = {}
        for i in self.parameters:
            entry: Known | None = fused_or_none(args[i])
            if entry is None and i in self.weights:
                entry = tap_or_reason(args[i])
            if entry is not None:
                found[i] = entry
        if found and torch.nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None:
            if _fused(found):
                raise OptionError(
                    "fused_backward=True updates parameters from the gradient of one rank, before DistributedDataParallel could "
                    "reduce it: the ranks' weights would differ. Build the optimizer with fused_backward=False."
                )
            return dict.fromkeys(found, DISTRIBUTED)
        return found

    def compile(
        self, gm: fx.GraphModule, inputs: list[Any], args: Sequence[Any], known: Mapping[int, Known]
    ) -> Callable[..., Any]:
        """Compile the variant for these parameters, with the extra inputs behind the others."""
        nodes, fused = placeholders(gm.graph), _fused(known)
        if any(isinstance(entry, (Tap, Fused)) for entry in known.values()):
            gm = copy_dynamo_module(gm)  # Dynamo reads the placeholders of its own graph again
        last = placeholders(gm.graph)[-1]
        added: dict[int, tuple[str, int]] = {}
        extras = _extras(known)
        counts = [torch.zeros((), dtype=torch.int64) for _ in range(-(-len(fused) // BITS))]
        for k, tensor in enumerate([*extras, *counts]):
            value, fake = static_fakes(tensor, self.fakes)
            with gm.graph.inserting_after(last):
                last = gm.graph.placeholder(f"lowmem_extra_{k}")
            last.meta["example_value"] = value
            mark_source_unknown(last)
            added[id(tensor)] = (last.name, len(inputs))
            inputs.append(fake)

        def tap_input(tap: Tap, position: int) -> TapInput:
            return TapInput(
                basis=added[id(tap.basis)][0],
                zero=added[id(tap.zero)][0],
                left=tap.side == "left",
                refresh=tap.refresher is not None,
                state_bytes=state_bytes(args[position]),
            )

        weights: dict[str, TapInput] = {}
        for position, entry in known.items():
            tap = entry.tap if isinstance(entry, Fused) else entry
            reason = entry.reason if isinstance(entry, Fused) else entry
            if position in self.weights:
                weights[nodes[position].name] = tap_input(tap, position) if isinstance(tap, Tap) else TapInput(reason=str(reason))
        planned = []
        for k, (position, entry) in enumerate(fused.items()):
            tensors = tuple(added[id(t)][1] for t in entry.tensors)
            count, unit = added[id(counts[k // BITS])][1], 1 << k % BITS
            planned.append(Planned(position, entry.whole, count, tensors, unit=unit))
            if entry.tap is not None:
                planned.append(Planned(position, entry.low, count, tensors, added[id(entry.tap.zero)][1], unit))
        gm.recompile()
        return self.build(gm, inputs, [*args, *extras, *counts], weights, planned)


def _fused(known: Mapping[int, Known]) -> dict[int, Fused]:
    """Those that are updated in the backward graph."""
    return {i: entry for i, entry in known.items() if isinstance(entry, Fused)}


def _tensors(entry: Known) -> list[torch.Tensor]:
    """The extra inputs of one parameter."""
    if isinstance(entry, Tap):
        return [entry.basis, entry.zero]
    if isinstance(entry, Fused):
        return [*entry.tensors, *([entry.tap.basis, entry.tap.zero] if entry.tap is not None else [])]
    return []


def _key(known: Mapping[int, Known]) -> tuple[Any, ...]:
    """What tells variants apart: which parameters are tapped or updated, side, rank and rule, and which tensors they share."""
    first: dict[int, int] = {}
    parts: list[tuple[Any, ...]] = []
    for i, entry in known.items():
        if isinstance(entry, str):
            continue
        places = tuple(first.setdefault(id(t), len(first)) for t in _tensors(entry))
        tap = entry.tap if isinstance(entry, Fused) else entry
        side = None if tap is None else (tap.side, tap.refresher is None, tuple(tap.zero.shape))
        rules = (entry.low, entry.whole) if isinstance(entry, Fused) else ()
        parts.append((i, side, rules, places))
    return tuple(parts)


def _extras(known: Mapping[int, Known]) -> list[torch.Tensor]:
    """The extra inputs of all, a tensor that several share once."""
    return list({id(t): t for entry in known.values() for t in _tensors(entry)}.values())
