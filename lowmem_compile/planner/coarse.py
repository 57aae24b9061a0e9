"""A coarse peak of a partition, node by node: what the choice between partitions goes by.

A pointwise or view node that only feeds fusible nodes is taken as fused; every other node is a buffer that dies after its last
reader. Unlike :mod:`lowmem_compile.planner.timeline` it does not see which loops Inductor fuses or which buffers a call holds, so
that a graph of one layer is judged by what it keeps and not by the scratch memory of one fused kernel.
"""

from __future__ import annotations

from torch import fx

from lowmem_compile._torch import op_types
from lowmem_compile.graph import VIEW_OPS, is_tangent, nbytes, storage_root, tensor_of
from lowmem_compile.saved import Partition


def coarse_peak(partition: Partition) -> int:
    """The highest number of bytes alive at once, beyond parameters, buffers and inputs."""
    kept = {n.name: nbytes(n) for n in partition.kept()}
    by_name = {n.name: storage_root(n).name for n in partition.saved_nodes()}
    start = {
        p: kept[by_name[p.name]]
        for p in partition.backward.graph.find_nodes(op="placeholder")
        if not is_tangent(p) and by_name.get(p.name) in kept
    }
    return max(_highest(partition.forward.graph, {}), _highest(partition.backward.graph, start))


def _highest(graph: fx.Graph, start: dict[fx.Node, int]) -> int:
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
    highest = total
    for node in graph.nodes:
        if node.op == "output":
            break
        if node.op == "call_function":
            size = 0 if _fused(node, ops, outputs) or node.target in VIEW_OPS else nbytes(node)
            if size:
                alive[node] = size
                total += size
                highest = max(highest, total)
        for dead in expiry.get(order[node], ()):
            if dead in alive and dead not in outputs:
                total -= alive.pop(dead)
    return highest


def _fused(node: fx.Node, ops: object, outputs: set[fx.Node]) -> bool:
    """A pointwise value that never reaches memory: every reader can be fused with it."""
    if node.op != "call_function" or node in outputs or tensor_of(node) is None:
        return False
    if node.target in VIEW_OPS:
        return True
    fusible = ops.is_fusible  # type: ignore[attr-defined]
    return bool(fusible(node)) and all(u.op == "call_function" and (u.target in VIEW_OPS or fusible(u)) for u in node.users)
