"""What becomes of the inputs of linears whose weight gradient is projected: the report's line for each.

The whole gradient dYᵀ x needs x in the backward pass; the projected one needs x A or nothing of its own. Whether x is let go
depends on what else reads it, so it is told from the partitions: Inductor's of the graph as captured, and the one compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from lowmem_compile.graph import module_path, source_line, storage_root
from lowmem_compile.reporting.model import SavedTensor, Site
from lowmem_compile.reporting.units import format_bytes
from lowmem_compile.saved import describe

NAME = "projection_taps"
TAPS = ("lowmem.projection_tap.default", "lowmem.refresh_tap.default")


@dataclass(frozen=True)
class TappedInput:
    """The input x of one tapped linear.

    Attributes:
        module: path of the linear.
        source: line of the linear.
        tensor: x, as it would be listed if it were kept; ``None`` if it is an input of the graph.
    """

    module: str
    source: str
    tensor: SavedTensor | None


def remove_taps(graph: fx.Graph) -> list[TappedInput]:
    """Take the taps out of a joint graph: their forward is the identity."""
    inputs = []
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target) in TAPS:
            x = storage_root(node.args[1])
            inputs.append(TappedInput(module_path(node), source_line(node), None if x.op == "placeholder" else describe(x)))
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return inputs


def with_inputs(
    sites: Sequence[Site], inputs: Sequence[TappedInput], inductor: Sequence[SavedTensor], compiled: Sequence[SavedTensor]
) -> tuple[Site, ...]:
    """The sites, those of tapped weights with what becomes of their input.

    Args:
        sites: of all passes.
        inputs: what :func:`remove_taps` found.
        inductor: what Inductor keeps.
        compiled: what the chosen partition keeps, before codecs.
    """
    before, after = {_place(t) for t in inductor}, {_place(t) for t in compiled}
    said: dict[tuple[str, str], str] = {}
    freed: set[object] = set()
    for entry in inputs:
        x = entry.tensor
        if x is None or _place(x) not in before:
            continue
        if _place(x) in after:
            words = f"its input ({format_bytes(x.nbytes)}) is kept for others"
        elif _place(x) in freed:
            words = "its input is no longer kept, counted before"
        else:
            words = f"its input ({format_bytes(x.nbytes)}) is no longer kept"
            freed.add(_place(x))
        said.setdefault((entry.module, entry.source), words)
    return tuple(
        replace(s, reason=f"{s.reason}; {said[s.module, s.source]}")
        if s.pass_name == NAME and s.action == "rewritten" and (s.module, s.source) in said
        else s
        for s in sites
    )


def _place(tensor: SavedTensor) -> tuple[object, ...]:
    """What the same tensor has in two captures of one model."""
    return tensor.module, tensor.source, tensor.nbytes
