"""What a partition keeps for the backward pass: distinct storages, parameters and inputs excluded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lowmem_compile.graph import (
    is_static,
    module_path,
    nbytes,
    output_values,
    shape_names,
    source_line,
    storage_root,
    tensor_of,
)
from lowmem_compile.reporting.model import Kind, SavedTensor


@dataclass(frozen=True)
class Partition:
    """The forward and backward graph, and how many of the forward's outputs belong to the user."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    num_user_outputs: int

    def saved_nodes(self) -> list[fx.Node]:
        """Tensors the forward graph hands to the backward graph, in order (inputs included)."""
        outputs = output_values(self.forward.graph)
        return [n for n in outputs[self.num_user_outputs :] if isinstance(n, fx.Node) and tensor_of(n) is not None]

    def user_outputs(self) -> set[fx.Node]:
        """The forward graph's own outputs."""
        outputs = output_values(self.forward.graph)
        return {n for n in outputs[: self.num_user_outputs] if isinstance(n, fx.Node)}

    def kept(self) -> list[fx.Node]:
        """One node for each storage that lives because of the backward pass."""
        roots: dict[fx.Node, fx.Node] = {}
        for node in self.saved_nodes():
            root = storage_root(node)
            if root.op != "placeholder":
                roots.setdefault(root, node)
        return list(roots)

    def saved_bytes(self) -> int:
        """Bytes of :meth:`kept`."""
        return sum(map(nbytes, self.kept()))

    def saved_tensors(self) -> tuple[SavedTensor, ...]:
        """The report's rows."""
        return tuple(describe(n) for n in self.kept())


def describe(node: fx.Node) -> SavedTensor:
    """A report row for a saved tensor."""
    value = node.meta["val"]
    return SavedTensor(
        name=node.name,
        op=str(node.target),
        shape=shape_names(value),
        dtype=str(value.dtype).removeprefix("torch."),
        nbytes=nbytes(node),
        module=module_path(node),
        source=source_line(node),
        kind=kind_of(node, value),
        decision=node.meta.get("lowmem_kind", "exact"),
    )


def kind_of(node: fx.Node, value: torch.Tensor) -> Kind:
    """Activation, statistic, mask, weight copy, index or random state."""
    if value.dtype == torch.bool or node.meta.get("lowmem_kind") == "1-bit mask":
        return "mask"
    if "seed" in node.name:
        return "rng"
    if "codes" in node.meta.get("lowmem_kind", ""):
        return "activation"
    if not value.dtype.is_floating_point:
        return "index"
    if all(_from_parameter(i) for i in node.all_input_nodes) and node.all_input_nodes:
        return "weight copy"
    if value.dim() and is_static(value.shape[-1], 1):
        return "statistic"
    return "activation"


def _from_parameter(node: fx.Node) -> bool:
    return storage_root(node).op == "placeholder" and bool(storage_root(node).meta.get("lowmem_static"))
