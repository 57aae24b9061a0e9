"""Inductor's C++ loops over whole sizes: a loop is split only where the divisor of its index divides its size.

PyTorch 2.13 splits a loop of N around an index ``x // d`` into N // d blocks of d and forgets the N mod d elements that are left:
nothing is written to them, and what the memory held before is read (pytorch#195582). Codes whose last group is padded are read
in such loops; so is what a model reshapes after padding it. Where a rest is left the loop stays whole here, as it does for every
index that Inductor does not split.
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import sympy

from lowmem_compile._torch import loop_splitting


@contextlib.contextmanager
def whole_loops() -> Iterator[None]:
    """While this is active, or a function runs that it decorates, Inductor writes no split loop that leaves a rest out.

    In a version that splits no loop it does nothing.
    """
    private = loop_splitting()
    split = getattr(private.CppScheduling, "try_loop_split", None)
    if split is None:
        yield
        return
    with unittest.mock.patch.object(private.CppScheduling, "try_loop_split", unless_rest(split, private.FloorDiv)):
        yield


def unless_rest(split: Callable[..., list[Any]], floor_div: type) -> Callable[..., list[Any]]:
    """The splitting of the loops of some nodes, which are returned as they are where a rest would be left out."""

    def split_evenly(scheduling: Any, nodes: list[Any], *more: Any, **named: Any) -> list[Any]:
        return nodes if any(leaves_rest(node, floor_div) for node in nodes) else split(scheduling, nodes, *more, **named)

    return split_evenly


def leaves_rest(node: Any, floor_div: type) -> bool:
    """Whether an index of a node's loops is divided by a number that is not known to divide its size."""
    _, body, _ = node.node.get_default_sizes_body()
    size_of = body.var_ranges
    divisions = {d for e in body.indexing_exprs.values() if isinstance(e, sympy.Expr) for d in e.find(floor_div)}
    return any(d.args[0] in size_of and size_of[d.args[0]] % d.args[1] != 0 for d in divisions)
