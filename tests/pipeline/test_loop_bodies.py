"""Loop bodies run without repeats: what is run once, and what each time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import fx

from lowmem_compile.loop_bodies import run_body


class Writer:
    """A handler that writes down what is run; a result is a line's number."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def operation(*args: Any) -> str:
            self.lines.append(f"{name}({', '.join(map(str, args))})")
            return f"v{len(self.lines)}"

        return operation


def body(*calls: tuple[Any, ...]) -> SimpleNamespace:
    """An interpreter of a body: each call is a name and arguments, a number in a list for the result of an earlier call."""
    graph = fx.Graph()
    ops = graph.placeholder("ops")
    made: list[fx.Node] = []
    for name, *args in calls:
        made.append(graph.call_method(name, (ops, *(made[a[0]] if isinstance(a, list) else a for a in args))))
    graph.output(made[-1])
    return SimpleNamespace(graph=graph, fetch_attr={}.__getitem__)


def lines(interpreter: Any, *, dtypes: Any = lambda _: None) -> list[str]:
    writer = Writer()
    run_body(interpreter, writer, dtypes)
    return writer.lines


def test_repeats_are_left_out_with_what_they_read() -> None:
    calls = (("load", "x", 0), ("mul", [0], 2.0), ("load", "x", 0), ("mul", [2], 2.0), ("add", [1], [3]))
    assert lines(body(*calls)) == ["load(x, 0)", "mul(v1, 2.0)", "add(v2, v2)"]
    assert len(lines(body(*calls), dtypes=None)) == 5


@pytest.mark.parametrize(
    "calls",
    [
        (("rand", 0, 1), ("rand", 0, 1)),
        (("load", "x", 0), ("store", "x", 0, [0]), ("load", "x", 0)),
        (("constant", 1), ("constant", 1.0), ("constant", True)),
        (("constant", 0.0), ("constant", -0.0)),
        (("load", "x", 0), ("load", "x", 1), ("load", "y", 0)),
        (("load", "x", 0), ("load", "y", 0), ("sub", [0], [1]), ("sub", [1], [0])),
    ],
)
def test_what_is_run_each_time(calls: tuple[tuple[Any, ...], ...]) -> None:
    assert len(lines(body(*calls))) == len(calls)


def test_nodes_of_two_dtypes_are_no_repeats() -> None:
    interpreter = body(("load", "x", 0), ("load", "x", 0))
    assert len(lines(interpreter, dtypes=lambda node: node.name)) == 2


def test_results() -> None:
    interpreter = body(("load", "x", 0), ("neg", [0]))
    assert run_body(interpreter, Writer(), None) == "v2"
    assert interpreter.current_node.op == "output"
