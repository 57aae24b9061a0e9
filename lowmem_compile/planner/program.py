"""A partition as the planner sees it: for each operation what it reads, what it makes and how many bytes that takes.

Much lighter than two FX graphs: a plan is tried by editing a copy of this, not by rewriting and tracing graphs.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from lowmem_compile._torch import OpOverload, op_types
from lowmem_compile.graph import (
    argument,
    concrete,
    is_static,
    is_tangent,
    module_path,
    nbytes,
    numel,
    output_values,
    storage_root,
    tensor_of,
    tensor_value,
)
from lowmem_compile.planner.scratch import scratch_bytes
from lowmem_compile.saved import Partition

aten = torch.ops.aten

Role = Literal["input", "pointwise", "reduction", "scatter", "extern", "part", "nothing"]
"""How Inductor makes it: given · in a loop · in a loop that reduces · added in place to its first argument · by a call of its
own · one result of an operation that has several · it takes no memory."""

REDUCTIONS = frozenset(
    {"sum", "mean", "amax", "amin", "var_mean", "var", "any", "all", "argmax", "argmin", "prod", "_softmax", "_log_softmax"}
)
SCATTERS = frozenset(
    {"index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate", "scatter_add", "scatter", "index_add"}
    | {"embedding_dense_backward"}
)
LOOPS = frozenset(
    {"cat", "full", "full_like", "iota", "arange", "embedding", "index", "gather", "where", "clone", "_to_copy", "copy"}
    | {"constant_pad_nd", "scalar_tensor", "convert_element_type", "inductor_random", "inductor_seeds", "inductor_lookup_seed"}
    | {"repeat", "flip", "slice_scatter", "select_scatter", "roll", "tril", "triu", "zeros_like", "ones_like", "empty", "rev"}
    | {"_unsafe_index", "_unsafe_masked_index", "rand", "rand_like", "bernoulli", "fma"}
    | {"view"}  # of another dtype; other views are looked through
)


@dataclass(frozen=True)
class Op:
    """One operation of a graph.

    Attributes:
        name: of its node.
        target: the operation, such as ``mm``; empty for an input.
        role: how Inductor makes it.
        reads: operations whose memory it reads, views looked through, each once.
        nbytes: size of its result.
        domain: elements its loop runs over (of the largest argument, for a reduction).
        dtype: of the result, for reuse of memory in place.
        module: path of the module, for the report.
        flops: multiplications and additions of a matrix product, for the cost of doing it again.
        columns: a reduction that sums over other dimensions than the last: its loops run in another order.
        adds: what it adds as it is, without a view in between: a matrix product there can be one call with the addition.
        scratch: bytes that a call takes beside its results, while it runs.
    """

    name: str
    target: str
    role: Role
    reads: tuple[str, ...] = ()
    nbytes: int = 0
    domain: int = 0
    dtype: str = ""
    module: str = ""
    flops: int = 0
    columns: bool = False
    adds: tuple[str, ...] = ()
    scratch: int = 0


@dataclass(frozen=True)
class Crossing:
    """One storage that forward keeps for backward: its operation, the names under which backward reads it, its size."""

    root: str
    inputs: tuple[str, ...]
    nbytes: int
    dtype: str = ""


@dataclass(frozen=True)
class Program:
    """Forward and backward of a partition, what each returns, and what crosses."""

    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    forward_outputs: frozenset[str]
    backward_outputs: frozenset[str]
    crossings: tuple[Crossing, ...]

    def saved_bytes(self) -> int:
        """Bytes of all crossings."""
        return sum(c.nbytes for c in self.crossings)

    def encoded(self, crossing: Crossing, code_bytes: int) -> Program:
        """The program with one crossing kept as codes: made behind its producer, undone in front of its first reader."""
        codes = f"{crossing.root}.codes"
        source = next(op for op in self.forward if op.name == crossing.root)
        size = max(source.domain, 1)
        forward = _behind(
            self.forward, source, Op(codes, "encode", "pointwise", (source.name,), code_bytes, size, "codes", source.module)
        )
        decoded = [
            Op(name, "decode", "pointwise", (codes,), source.nbytes, size, source.dtype, source.module)
            for name in crossing.inputs[:1]
        ]
        backward = [Op(codes, "", "input", nbytes=code_bytes)]
        alias = dict.fromkeys(crossing.inputs, crossing.inputs[0])
        pending = list(decoded)
        for op in self.backward:
            if op.name in alias:
                continue
            if pending and any(r in alias for r in op.reads):
                backward += pending
                pending = []
            backward.append(replace(op, reads=tuple(dict.fromkeys(alias.get(r, r) for r in op.reads))))
        outputs = (self.forward_outputs - {crossing.root}) | {codes}
        kept = Crossing(codes, (codes,), code_bytes)
        crossings = tuple(kept if c == crossing else c for c in self.crossings)
        return replace(self, forward=forward, backward=tuple(backward), forward_outputs=frozenset(outputs), crossings=crossings)

    def recomputed(self, crossing: Crossing, chain: Sequence[Op], given: dict[str, str], extra: Iterable[Op]) -> Program:
        """The program with one crossing computed again in backward by ``chain``, in front of its first reader.

        Args:
            crossing: what is kept no longer.
            chain: operations of the forward graph that make it, in order, the crossing's own last.
            given: names in the backward graph of what the chain reads and does not make.
            extra: inputs of the forward graph that the backward graph has to be given too.
        """
        name = crossing.inputs[0]
        names = {**given, **{op.name: f"{op.name} for {name}" for op in chain[:-1]}, chain[-1].name: name}
        copies = [replace(op, name=names[op.name], reads=tuple(names[r] for r in op.reads)) for op in chain]
        alias = dict.fromkeys(crossing.inputs, name)
        backward: list[Op] = list(extra)
        pending = copies
        for op in self.backward:
            if op.name in alias:
                continue
            if pending and any(r in alias for r in op.reads):
                backward += pending
                pending = []
            backward.append(replace(op, reads=tuple(dict.fromkeys(alias.get(r, r) for r in op.reads))))
        return replace(
            self,
            backward=tuple(backward),
            forward_outputs=self.forward_outputs - {crossing.root},
            crossings=tuple(c for c in self.crossings if c != crossing),
        )


def _behind(ops: tuple[Op, ...], source: Op, new: Op) -> tuple[Op, ...]:
    index = ops.index(source) + 1
    while index < len(ops) and ops[index].role == "part":
        index += 1
    return (*ops[:index], new, *ops[index:])


def program_of(partition: Partition) -> Program:
    """Read a partition."""
    forward = ops_of(partition.forward.graph)
    backward = ops_of(partition.backward.graph)
    saved = partition.saved_nodes()
    inputs = [p for p in partition.backward.graph.find_nodes(op="placeholder") if not is_tangent(p) and tensor_of(p) is not None]
    groups: dict[fx.Node, list[str]] = defaultdict(list)
    for node, placeholder in zip(saved, inputs, strict=True):  # the order is the interface; names may differ
        groups[storage_root(node)].append(placeholder.name)
    crossings = tuple(
        Crossing(r.name, tuple(names), nbytes(r), _dtype(tensor_of(r))) for r, names in groups.items() if r.op != "placeholder"
    )
    return Program(forward, backward, _outputs(partition.forward.graph), _outputs(partition.backward.graph), crossings)


def _outputs(graph: fx.Graph) -> frozenset[str]:
    return frozenset(storage_root(n).name for n in output_values(graph) if isinstance(n, fx.Node))


def ops_of(graph: fx.Graph) -> tuple[Op, ...]:
    """The operations of a graph in order; views are looked through."""
    return tuple(op for node in graph.nodes if (op := _op(node)) is not None)


def _op(node: fx.Node) -> Op | None:
    value = tensor_of(node)
    if node.op == "placeholder":
        return Op(node.name, "", "input", nbytes=nbytes(node), dtype=_dtype(value), domain=numel(node))
    if node.op != "call_function" or storage_root(node) is not node:
        return None
    reads = tuple(dict.fromkeys(storage_root(i).name for i in node.all_input_nodes if tensor_of(i) is not None or has_parts(i)))
    if node.target is operator.getitem:
        source = node
        while source.target is operator.getitem:
            source = source.all_input_nodes[0]
        return None if value is None else Op(node.name, "", "part", (source.name,), nbytes(node), numel(node), _dtype(value))
    role = _role(node) if value is not None or has_parts(node) else "nothing"
    return Op(
        node.name,
        _base(node),
        role,
        reads,
        nbytes(node),
        _domain(node, role),
        _dtype(value),
        module_path(node),
        _flops(node),
        role == "reduction" and _sums_columns(node),
        tuple(i.name for i in node.all_input_nodes) if node.target is aten.add.Tensor else (),
        scratch_bytes(node) if role == "extern" else 0,
    )


def _sums_columns(node: fx.Node) -> bool:
    """Whether a dimension that is kept lies behind one that is reduced."""
    source = tensor_of(node.all_input_nodes[0])
    dims = node.args[1] if len(node.args) > 1 else None
    if source is None or not isinstance(dims, (list, tuple, int)) or isinstance(dims, bool):
        return False
    reduced = {d % source.dim() for d in ([dims] if isinstance(dims, int) else dims)}
    wide = [d for d in range(source.dim()) if not is_static(source.shape[d], 1)]
    gone = [d for d in wide if d in reduced]
    return bool(gone) and any(d > gone[0] for d in wide if d not in reduced)


def _domain(node: fx.Node, role: Role) -> int:
    sizes = [numel(i) for i in node.all_input_nodes]
    if role == "reduction":
        return max([numel(node), *sizes])
    if role == "scatter":  # over what is added, not over what it is added to
        return max(sizes[1:] if len(sizes) > 2 else sizes, default=0)
    return numel(node)


def _dtype(value: torch.Tensor | None) -> str:
    return "" if value is None else str(value.dtype)


def has_parts(node: fx.Node) -> bool:
    """Whether an operation returns several tensors."""
    value = node.meta.get("val")
    return isinstance(value, (tuple, list)) and any(map(_holds_tensor, value))


def _holds_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))


def _base(node: fx.Node) -> str:
    return node.target._schema.name.split("::")[1] if isinstance(node.target, OpOverload) else ""


def _role(node: fx.Node) -> Role:
    if str(node.target) == "lowmem.in_memory.default":
        return "pointwise"  # lowered to its input
    if not isinstance(node.target, OpOverload) or node.target.namespace not in ("aten", "prims"):
        return "extern"
    base = _base(node)
    if base in SCATTERS:
        return "scatter"
    if base in REDUCTIONS:
        return "reduction"
    if base in LOOPS or torch.Tag.pointwise in node.target.tags:
        return "pointwise"
    return "extern"


def repeatable(node: fx.Node) -> bool:
    """Whether the operation gives the same result when it is run again."""
    target = node.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return not op_types().is_random(node) and torch.Tag.nondeterministic_seeded not in target.tags


def _flops(node: fx.Node) -> int:
    """2·M·K·N of a matrix product (of which the chunked loss makes three), 4·N·S·D of an attention over S keys; else 0."""
    if str(node.target) == "lowmem.linear_cross_entropy.default":
        hidden, weight = node.all_input_nodes[:2]
        return 6 * numel(hidden) * concrete(tensor_value(weight).shape[0])
    if "scaled_dot_product" in str(node.target) and "backward" not in str(node.target):
        query, key = tensor_of(argument(node, 0)), tensor_of(argument(node, 1))
        return 0 if query is None or key is None else 4 * concrete(query.numel()) * concrete(key.shape[-2])
    if node.target not in (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default):
        return 0
    left = tensor_of(argument(node, 0 if len(node.args) == 2 else 1))
    return 0 if left is None else 2 * numel(node) * concrete(left.shape[-1])
