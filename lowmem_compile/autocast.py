"""In which dtype autocast runs each node of a Dynamo graph."""

from __future__ import annotations

import torch
from torch import fx


def autocast_dtypes(graph: fx.Graph, device: str) -> dict[fx.Node, torch.dtype]:
    """Nodes that run under autocast on ``device``, with the autocast dtype.

    Reads the ambient state (the caller's ``with torch.autocast(...)``) and the enter/exit nodes of the graph.
    """
    ambient = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    stack: list[torch.dtype | None] = [ambient]
    found: dict[fx.Node, torch.dtype] = {}
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name == "_enter_autocast":
            where, dtype, enabled = node.args[0], node.args[1], node.args[2]
            if where != device:
                stack.append(stack[-1])
            else:
                stack.append((dtype or torch.get_autocast_dtype(device)) if enabled else None)
        elif name == "_exit_autocast":
            stack.pop()
        elif stack[-1] is not None:
            found[node] = stack[-1]
    return found


def ambient_autocast(device: str) -> torch.autocast:
    """A context that restores the caller's autocast state of ``device``."""
    return torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
