"""Calls of compiled graphs that update parameters: whether their backward pass may run, and what it did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_compile._torch import at_end_of_backward, compiled_backward
from lowmem_compile.errors import GradientError
from lowmem_compile.optim.fused import Fusion
from lowmem_compile.optim.gradient import ConsumedGradient

BITS = 62
"""Parameters whose updates one count tells apart."""


class Claim:
    """One call of a compiled graph whose backward graph updates parameters.

    Attributes:
        counts: int64 scalars that the graph adds 2ᵏ to when it updates the k-th of 62 parameters.
    """

    def __init__(self, members: Sequence[tuple[Tensor, Fusion]]) -> None:
        self.members = [(p, fusion, fusion.window) for p, fusion in members]
        self.counts = [torch.zeros((), dtype=torch.int64) for _ in range(-(-len(members) // BITS))]
        for fusion in {id(fusion): fusion for _, fusion in members}.values():
            fusion.fill()

    def made(self, outputs: Any) -> None:
        """Watch the backward pass of what the graph returned."""
        node = compiled_backward(outputs)
        if node is not None:
            node.register_prehook(self.begin)

    def begin(self, _: Any) -> None:
        """The backward graph is about to run.

        Raises:
            GradientError: it must not; nothing has been changed.
        """
        for p, fusion, window in self.members:
            if fusion.of() is None:
                raise GradientError(
                    "the optimizer that updates parameters in this backward pass was deleted after the forward pass."
                )
            if p in fusion.updated or p in fusion.stepped:
                raise GradientError(fusion.twice(p))
            if fusion.window != window:
                raise GradientError(
                    f"the backward pass would update {fusion.name_of(p)} by numbers of an earlier step: optimizer.step() ran "
                    "between its forward and its backward pass. Run both between the same two steps, or use fused_backward=False."
                )
            if p.grad is not None and not isinstance(p.grad, ConsumedGradient):
                raise GradientError(
                    f"{fusion.name_of(p)} has a gradient from before, and fused_backward=True cannot add to it: "
                    "call optimizer.zero_grad() before the backward pass."
                )
            if p in fusion.begun:
                raise GradientError(
                    f"{fusion.name_of(p)} is read by two compiled graphs, or twice by one, in one backward pass, and the "
                    "first has updated it (fused_backward=True). The parameters are not to be trusted now: load a checkpoint, "
                    "call the model once a step, and compile it in one piece (fullgraph=True shows what breaks the graph)."
                )
        for p, fusion, _ in self.members:
            fusion.begun.add(p)
        at_end_of_backward(self.end)

    def end(self) -> None:
        """The backward pass is over: note what the graph updated.

        Raises:
            GradientError: other code gave such a parameter a gradient too.
        """
        counts = [int(count) for count in self.counts]
        for k, (p, fusion, _) in enumerate(self.members):
            if not counts[k // BITS] >> k % BITS & 1:
                continue  # no gradient in this graph, or the pass declined: a hook or step() takes it
            if p in fusion.stepped or p.grad is not None:
                raise GradientError(
                    f"{fusion.name_of(p)}: read by a compiled graph, which updated it, and by other code in the same step, "
                    "which gave a gradient too. The parameters are not to be trusted now: load a checkpoint, and compile all of "
                    "the model or none."
                )
            fusion.updated.add(p)
            p.grad = ConsumedGradient(p)
