"""The least and the largest value that an integer tensor of a graph can hold, where the graph proves it.

Interval arithmetic from the operations that make the tensor (positions, comparisons, arg max, sums of those), or from one that
reads it: an index beyond the size of what it indexes would raise. Nothing is measured and no value is assumed, so inputs of the
graph have no bound unless they are used as an index.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from lowmem_compile.graph import VIEW_OPS, tensor_of

Interval = tuple[int, int]
aten = torch.ops.aten
prims = torch.ops.prims

SAME_VALUES = VIEW_OPS | {
    aten.clone.default,
    aten._to_copy.default,
    prims.convert_element_type.default,
    aten.repeat.default,
    aten.flip.default,
    aten.roll.default,
    aten.index_select.default,
    aten.gather.default,
    aten.index.Tensor,
}
"""Operations whose result holds values of their first argument only."""
INDEX_AND_VALUE = {aten.max.dim, aten.min.dim, aten.topk.default, aten.sort.default, aten.sort.stable}
"""Operations whose second result is a place along a dimension."""


def interval_of(node: fx.Node, seen: dict[fx.Node, Interval | None] | None = None) -> Interval | None:
    """Bounds of an integer or boolean tensor, both included; ``None`` where none can be proved.

    Args:
        node: a tensor of the graph.
        seen: bounds found before; filled.
    """
    seen = {} if seen is None else seen
    if node not in seen:
        seen[node] = None  # a graph has no cycles; this only bounds the work
        made, used = _made(node, seen), _used(node)
        known = [i for i in (made, used) if i is not None]
        seen[node] = (max(i[0] for i in known), min(i[1] for i in known)) if known else None
    return seen[node]


def _made(node: fx.Node, seen: dict[fx.Node, Interval | None]) -> Interval | None:
    value = tensor_of(node)
    if value is None or value.dtype.is_floating_point or value.dtype.is_complex:
        return None
    if value.dtype == torch.bool:
        return 0, 1
    if node.op != "call_function":
        return None
    target = node.target
    if target is operator.getitem:
        source = node.all_input_nodes[0]
        return _place(source) if source.target in INDEX_AND_VALUE and node.args[1] == 1 else None
    if target in SAME_VALUES:
        kept = _bounds(node.args[0], seen)
        return kept if kept is None or fits(kept, value.dtype) else None
    if target in RULES:
        found = RULES[target](node, lambda i: _bounds(_argument(node, i), seen))
        return found if found is None or fits(found, value.dtype) else None  # beyond its dtype it would wrap around
    return None


def fits(interval: Interval, dtype: torch.dtype) -> bool:
    """Whether an integer dtype holds every value between the bounds."""
    if dtype == torch.bool:
        return interval[0] >= 0 and interval[1] <= 1
    return torch.iinfo(dtype).min <= interval[0] and interval[1] <= torch.iinfo(dtype).max


def _argument(node: fx.Node, index: int) -> Any:
    return node.args[index] if index < len(node.args) else None


def _bounds(value: Any, seen: dict[fx.Node, Interval | None]) -> Interval | None:
    """Of an argument: a node, or a number."""
    if isinstance(value, fx.Node):
        return interval_of(value, seen)
    return (int(value), int(value)) if isinstance(value, (bool, int)) else None


def _used(node: fx.Node) -> Interval | None:
    """What an operation that takes the tensor as an index proves; it counts negative ones from the end."""
    sizes = []
    for user in node.users:
        if user.target is aten.embedding.default and user.args[1] is node:
            sizes.append(_size(user.args[0], 0))
        elif user.target in (aten.gather.default, aten.index_select.default) and user.args[2] is node:
            sizes.append(_size(user.args[0], user.args[1]))
        elif user.target in (aten.index.Tensor, aten._unsafe_index.Tensor):
            at: Sequence[Any] = user.args[1]  # type: ignore[assignment]
            sizes += [_size(user.args[0], d) for d, index in enumerate(at) if index is node]
    known = [s for s in sizes if s is not None]
    return (-min(known), min(known) - 1) if known else None


def _size(source: Any, dim: Any) -> int | None:
    value = tensor_of(source)
    if value is None or not value.dim():
        return None
    size = value.shape[dim]
    return size if isinstance(size, int) else None


def _place(node: fx.Node) -> Interval | None:
    """A place along the dimension that an operation reduces or sorts."""
    source, dim = node.args[0], _argument(node, 2 if node.target is aten.topk.default else 1)
    if node.target is aten.sort.stable:
        dim = node.kwargs.get("dim", -1)
    size = _size(source, -1 if dim is None else dim)
    return None if size is None else (0, size - 1)


Rule = Callable[[fx.Node, Callable[[int], Interval | None]], Interval | None]


def _both(combine: Callable[[Interval, Interval], Interval]) -> Rule:
    def rule(_: fx.Node, given: Callable[[int], Interval | None]) -> Interval | None:
        left, right = given(0), given(1)
        return None if left is None or right is None else combine(left, right)

    return rule


def _product(a: Interval, b: Interval) -> Interval:
    ends = [x * y for x in a for y in b]
    return min(ends), max(ends)


def _sum(alpha: int) -> Rule:
    def rule(node: fx.Node, given: Callable[[int], Interval | None]) -> Interval | None:
        scale = node.kwargs.get("alpha", 1)
        left, right = given(0), given(1)
        if left is None or right is None or not isinstance(scale, int):
            return None
        low, high = _product(right, (alpha * scale, alpha * scale))
        return left[0] + low, left[1] + high

    return rule


def _iota(node: fx.Node, _: Any) -> Interval | None:
    length, start, step = node.args[0], node.kwargs["start"], node.kwargs["step"]
    if not (isinstance(length, int) and isinstance(start, int) and isinstance(step, int)):
        return None
    last = start + max(length - 1, 0) * step
    return min(start, last), max(start, last)


def _arg_reduction(node: fx.Node, _: Any) -> Interval | None:
    source = tensor_of(node.args[0])  # type: ignore[arg-type]
    dim = _argument(node, 1)
    if source is None or not all(isinstance(s, int) for s in source.shape):
        return None
    return 0, max((math.prod(source.shape) if dim is None else int(source.shape[dim])) - 1, 0)


def _running_sum(node: fx.Node, given: Callable[[int], Interval | None]) -> Interval | None:
    found, size = given(0), _size(node.args[0], node.args[1])
    return None if found is None or size is None else (min(found[0], found[0] * size), max(found[1], found[1] * size))


def _clamp(_: fx.Node, given: Callable[[int], Interval | None]) -> Interval | None:
    """A bound on one side does for that side; both sides are needed."""
    found, low, high = given(0), given(1), given(2)
    lows = [i[0] for i in (found, low) if i is not None]
    highs = [i[1] for i in (found, high) if i is not None]
    if not lows or not highs:
        return None
    least = max(lows) if high is None else min(max(lows), high[0])
    largest = min(highs) if low is None else max(min(highs), low[1])
    return least, largest


def _either(node: fx.Node, given: Callable[[int], Interval | None]) -> Interval | None:
    first = 1 if node.target is aten.where.self else 0
    second = 2
    a, b = given(first), given(second)
    return None if a is None or b is None else (min(a[0], b[0]), max(a[1], b[1]))


def _join(node: fx.Node, _: Any) -> Interval | None:
    parts: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    found = [interval_of(p) for p in parts]
    known = [i for i in found if i is not None]
    return (min(i[0] for i in known), max(i[1] for i in known)) if known and len(known) == len(found) else None


def _remainder(_: fx.Node, given: Callable[[int], Interval | None]) -> Interval | None:
    by = given(1)
    return (0, by[1] - 1) if by is not None and by[0] > 0 else None


RULES: dict[Any, Rule] = {
    prims.iota.default: _iota,
    aten.full.default: lambda _, given: given(1),
    aten.full_like.default: lambda _, given: given(1),
    aten.scalar_tensor.default: lambda _, given: given(0),
    aten.add.Tensor: _sum(1),
    aten.add.Scalar: _sum(1),
    aten.sub.Tensor: _sum(-1),
    aten.sub.Scalar: _sum(-1),
    aten.mul.Tensor: _both(_product),
    aten.mul.Scalar: _both(_product),
    aten.maximum.default: _both(lambda a, b: (max(a[0], b[0]), max(a[1], b[1]))),
    aten.minimum.default: _both(lambda a, b: (min(a[0], b[0]), min(a[1], b[1]))),
    aten.clamp.default: _clamp,
    aten.where.self: _either,
    aten.constant_pad_nd.default: _either,
    aten.cat.default: _join,
    aten.cumsum.default: _running_sum,
    aten.argmax.default: _arg_reduction,
    aten.argmin.default: _arg_reduction,
    aten.remainder.Scalar: _remainder,
}
