"""Inductor's code generation without work that changes no code: what it would write is written, letter for letter.

A codec is some fifty operations a tensor, and each goes through Inductor's C++ writer three to six times: as a scalar loop, as a
vector loop, and as the masked rest of each tiled loop. Four things that are done there change nothing (torch 2.13):

- the table of result types is made anew for each operation that is written;
- the rest of a loop is written where the tile divides the size, and then left out, for it covers nothing;
- a variable that is met again has its bounds intersected with the same bounds, by sympy;
- indices and their strides are simplified anew, by sympy, where a model has more of them than the 128 and 256 that are
  remembered (Swin: 26 of 112 s are saved; most of its indices are met once).

Loop bodies are run by :mod:`lowmem_compile.loop_bodies`. What is generated is the same text: tested on small graphs, and compared
for whole models.
"""

from __future__ import annotations

import contextlib
import functools
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

from lowmem_compile._torch import code_writing, writes_code_as_known
from lowmem_compile.loop_bodies import lighter

REMEMBERED = 1 << 14
"""Results that each function of indices remembers."""


@contextlib.contextmanager
def cheaper() -> Iterator[None]:
    """While this is active Inductor leaves out what the module's docstring names; in other versions than that one, nothing."""
    if not writes_code_as_known():
        yield
        return
    private = code_writing()
    replaced = (
        (private.ResultTypes, "__init__", once(private.ResultTypes.__init__)),
        (private.SchedulerNode, "codegen", unless_empty(private.SchedulerNode.codegen, private.kernel)),
        (private.ValueRanges, "tighten", unless_equal(private.ValueRanges.tighten)),
        (private.Interpreter, "run", lighter(private.Interpreter.run, private)),
        *(
            (owner, name, remembering(getattr(owner, name)))
            for owner, name in (
                (private.sizevars, "stride_at"),
                (private.sizevars, "simplify_index_in_vec_range"),
                (private.sizevars, "stride_at_vec_range"),
                (private.sizevars, "_join_dimensions_cached"),
                (private.cpp, "stride_at_vec_range"),
            )
        ),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replaced:
            stack.enter_context(unittest.mock.patch.object(owner, name, replacement))
        yield


def cheaply(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's compile of one ATen graph, with :func:`cheaper` code generation."""

    @functools.wraps(inner)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        with cheaper():
            return inner(*args, **kwargs)

    return compiled


def once(fill: Callable[[Any], None]) -> Callable[[Any], None]:
    """The filling of a table of which there is one object, the first time alone."""
    filled: list[Any] = []

    def fill_once(table: Any) -> None:
        if not any(table is done for done in filled):
            fill(table)
            filled.append(table)

    return fill_once


@functools.cache
def remembering(function: Any) -> Callable[..., Any]:
    """A function that remembers its last results, with more of them; itself if it is one that this made."""
    return functools.lru_cache(REMEMBERED)(function.__wrapped__)


def unless_empty(write: Callable[..., None], current_kernel: Callable[[], Any]) -> Callable[..., None]:
    """The writing of a node's code, but for kernels that cover nothing."""

    def written(node: Any, index_vars: Any) -> None:
        if not covers_nothing(current_kernel()):
            write(node, index_vars)

    return written


def covers_nothing(kernel: Any) -> bool:
    """Whether a kernel is the rest of a loop that its tile divides: it is written for a size of zero."""
    rests = (getattr(kernel, name, None) for name in ("tail_size", "inner_tail_size", "outer_tail_size"))
    return any(rest is not None and rest == 0 for rest in rests)


def unless_equal(intersect: Callable[..., Any]) -> Callable[..., Any]:
    """The intersection of two ranges, which for equal ones is either."""

    def intersected(mine: Any, other: Any) -> Any:
        return mine if mine is other or mine == other else intersect(mine, other)

    return intersected
