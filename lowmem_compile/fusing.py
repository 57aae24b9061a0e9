"""What Inductor makes one GPU kernel of, as far as passes have to know: whether a codec's work needs a launch of its own.

A rule on the graph, held to the generated code by ``tests/gpu_free``. Inductor fuses pointwise work with pointwise work on the
same elements, and a reduction over the last elements of a row with pointwise work beside it. It fuses nothing with a library call
(a matrix product, attention), nor two reductions over different lengths: the scales of groups, and a norm's statistics over rows.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx

from lowmem_compile._torch import MIXED_READS, OpOverload, inductor_config, mixed_reads_limit, op_types, uses_templates
from lowmem_compile.graph import VIEW_OPS, numel, storage_root, tensor_value
from lowmem_compile.options import Options

REDUCTIONS = frozenset(
    {
        "amax",
        "amin",
        "argmax",
        "argmin",
        "cumsum",
        "max",
        "mean",
        "min",
        "prod",
        "sum",
        "var",
        "var_mean",
        "_softmax",
        "logsumexp",
    }
)
"""Operations that reduce, by name."""


PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default})
"""Matrix products of which Inductor has templates."""


SCHEDULER_PASS = "_post_fusion_custom_pass"  # noqa: S105 (no password)
"""Inductor's configuration for a pass on its schedule; it holds one."""


@functools.cache
def runs_triton(device: str) -> bool:
    """Whether kernels written in Triton run on a device of this type."""
    return device == "cuda" and importlib.util.find_spec("triton") is not None


def shares_launches(options: Options, device: str) -> bool:
    """Whether :mod:`lowmem_compile.launches` runs: on a GPU, unless the options or a scheduler pass of the user forbid it."""
    taken = options.inductor.get(SCHEDULER_PASS) or inductor_config._post_fusion_custom_pass
    return options.launches == "shared" and runs_triton(device) and (taken is None or type(taken).__name__ == "ShareLaunches")


def settings_for_codes(device: str) -> dict[str, int]:
    """Inductor's configuration for graphs in which a norm's backward reads codes; it holds without codes too.

    It sums a norm's rows and columns, and computes the norm's gradient, in one kernel that reads at most ten tensors, so that
    registers suffice. A code is two tensors, or three, of fewer bytes together than the one in whose place it is: three more may
    be read. Without them the gradient has a kernel of its own, which reads everything again.
    """
    limit = mixed_reads_limit()
    return {MIXED_READS: limit + 3} if limit and runs_triton(device) else {}


def encode_is_fused(node: fx.Node, bits: int) -> bool:
    """Whether group codes of the tensor are made inside a kernel that Inductor launches anyway.

    8 bits alone: other codes put elements of several runs into a byte, for which Inductor reads the tensor again in a kernel of
    its own. There must be pointwise work on the tensor, and none of its neighbours may reduce rows.
    """
    if bits != 8:
        return False
    root = storage_root(node)
    beside = is_pointwise(root) or any(is_pointwise(n) and numel(n) == numel(root) for n in _through_views(root))
    return beside and not (_meets_reduction(root, _inputs) or _meets_reduction(root, _users))


def decode_is_fused(placeholder: fx.Node) -> bool:
    """Whether the tensor that is decoded is read by a kernel that Inductor launches anyway.

    A kernel that repeats it (keys for several queries) does not count: it would decode each element as often, or Inductor decodes
    in a kernel before it.
    """
    readers = _through_views(placeholder)
    return any(is_reduction(n) or (is_pointwise(n) and numel(n) <= numel(placeholder)) for n in readers)


def rows_are_summed(node: fx.Node) -> bool:
    """Whether pointwise work and views of the tensor lead to a reduction over the last dimension."""
    return _meets_reduction(node, _users, reduces_rows)


def made_of(node: fx.Node) -> Iterator[fx.Node]:
    """What pointwise work and views make of the tensor, each once."""
    seen, work = {node}, [node]
    while work:
        for user in work.pop().users:
            if user not in seen and (user.target in VIEW_OPS or is_pointwise(user)):
                seen.add(user)
                work.append(user)
                yield user


def results_of(node: fx.Node) -> int:
    """How many values that pointwise work makes of the tensor are read by something else: each takes a kernel."""
    return sum(is_pointwise(n) and not all(map(is_pointwise, _through_views(n))) for n in made_of(node))


def decode_is_prologue(placeholder: fx.Node, bits: int) -> bool:
    """Whether one matrix product alone reads what is decoded, and Inductor may decode as it loads its tiles.

    Up to 8 bits: what takes more, Inductor computes in a kernel before it.
    """
    readers = _through_views(placeholder)
    return bits <= 8 and uses_templates() and len(readers) == 1 and readers[0].target in PRODUCTS


def is_pointwise(node: fx.Node) -> bool:
    """An operation that computes element by element, and not a view or a reduction."""
    if node.op != "call_function" or node.target in VIEW_OPS or is_reduction(node):
        return False
    return bool(op_types().is_fusible(node)) and isinstance(node.target, OpOverload) and _is_tensor(node)


def is_reduction(node: fx.Node) -> bool:
    """An operation that reduces some dimensions."""
    return isinstance(node.target, OpOverload) and node.target.overloadpacket.__name__ in REDUCTIONS


def reduces_rows(node: fx.Node) -> bool:
    """A reduction over the last dimension, alone or with others."""
    if not is_reduction(node):
        return False
    dims = node.args[1] if len(node.args) > 1 else None
    last = tensor_value(node.all_input_nodes[0]).dim() - 1
    return not isinstance(dims, list | tuple | int) or any(d in (-1, last) for d in ([dims] if isinstance(dims, int) else dims))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _through_views(node: fx.Node) -> list[fx.Node]:
    """What reads the tensor, views of it followed."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _through_views(user) if user.target in VIEW_OPS else [user]
    return found


def _inputs(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def _users(node: fx.Node) -> Iterable[fx.Node]:
    return node.users


def _meets_reduction(
    start: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]], wanted: Callable[[fx.Node], bool] = is_reduction
) -> bool:
    """Whether a chain of pointwise work and views from the node in one direction meets a reduction that is wanted."""
    seen = {start}
    work = [start]
    while work:
        node = work.pop()
        for other in neighbours(node) if node is not start or neighbours is _users or is_pointwise(node) else ():
            if wanted(other):
                return True
            if other not in seen and (other.target in VIEW_OPS or is_pointwise(other)):
                seen.add(other)
                work.append(other)
    return False
