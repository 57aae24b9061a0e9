"""Simulated memory of a partition: bytes alive at each operation of its forward and backward graph.

Counted: everything beyond parameters, buffers and inputs. A pointwise or view node that only feeds fusible nodes is taken as
fused (never in memory). A tensor dies after its last reader; saved tensors live from forward into backward; gradients stay.
"""

from __future__ import annotations

from torch import fx

from lowmem_compile._torch import op_types
from lowmem_compile.graph import VIEW_OPS, is_tangent, module_path, nbytes, storage_root, tensor_of
from lowmem_compile.reporting.model import TimelinePoint
from lowmem_compile.saved import Partition

MOST_POINTS = 300


def simulate(partition: Partition) -> tuple[TimelinePoint, ...]:
    """Forward then backward, at most ``MOST_POINTS`` points (peaks are kept)."""
    forward = _run(partition.forward.graph, {}, "forward")
    kept = {n.name: nbytes(n) for n in partition.kept()}
    by_name = {n.name: storage_root(n).name for n in partition.saved_nodes()}
    start = {
        p: kept[by_name[p.name]]
        for p in partition.backward.graph.find_nodes(op="placeholder")
        if not is_tangent(p) and by_name.get(p.name) in kept
    }
    backward = _run(partition.backward.graph, start, "backward")
    return tuple(_thin(forward) + _thin(backward))


def peak(points: tuple[TimelinePoint, ...]) -> int:
    """The highest point."""
    return max((p.live_bytes for p in points), default=0)


def _run(graph: fx.Graph, start: dict[fx.Node, int], phase: str) -> list[TimelinePoint]:
    ops = op_types()
    outputs = {storage_root(n) for n in graph.output_node().all_input_nodes}
    last: dict[fx.Node, int] = {}
    order = {n: i for i, n in enumerate(graph.nodes)}
    alive: dict[fx.Node, int] = dict(start)
    for node in reversed(graph.nodes):
        root = storage_root(node)
        reach = order[node]
        for user in node.users:
            reach = max(reach, last[user] if _fused(user, ops, outputs) else order[user])
        last[node] = reach
        last[root] = max(last.get(root, 0), reach)
    expiry: dict[int, list[fx.Node]] = {}
    for node, when in last.items():
        expiry.setdefault(when, []).append(node)
    total = sum(alive.values())
    points: list[TimelinePoint] = []
    for node in graph.nodes:
        if node.op == "output":
            break
        if node.op == "call_function":
            size = 0 if _fused(node, ops, outputs) or node.target in VIEW_OPS else nbytes(node)
            if size:
                alive[node] = size
                total += size
                points.append(TimelinePoint(module_path(node) or str(node.target), phase, total))  # type: ignore[arg-type]
        for dead in expiry.get(order[node], ()):
            if dead in alive and dead not in outputs:
                total -= alive.pop(dead)
    points.append(TimelinePoint(f"end of {phase}", phase, total))  # type: ignore[arg-type]
    return points


def _fused(node: fx.Node, ops: object, outputs: set[fx.Node]) -> bool:
    """A pointwise value that never reaches memory: every reader can be fused with it."""
    if node.op != "call_function" or node in outputs or tensor_of(node) is None:
        return False
    if node.target in VIEW_OPS:
        return True
    fusible = ops.is_fusible  # type: ignore[attr-defined]
    return bool(fusible(node)) and all(u.op == "call_function" and (u.target in VIEW_OPS or fusible(u)) for u in node.users)


def _thin(points: list[TimelinePoint]) -> list[TimelinePoint]:
    if len(points) <= MOST_POINTS // 2:
        return points
    step = -(-len(points) // (MOST_POINTS // 2))
    return [max(points[i : i + step], key=lambda p: p.live_bytes) for i in range(0, len(points), step)]
