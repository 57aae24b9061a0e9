"""The report's data: checks on construction, totals, and the JSON round trip."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_compile.reporting import GraphReport, PassRun, Report, SavedTensor, Site, TimelinePoint
from lowmem_compile.reporting.model import ACTIONS, CONTENDERS, KINDS, NUMERICS

natural = st.integers(0, 2**60)
word = st.text(max_size=12)
saved_tensors = st.builds(
    SavedTensor,
    word,
    word,
    st.lists(natural | word, max_size=4).map(tuple),
    word,
    natural,
    word,
    word,
    st.sampled_from(KINDS),
    word,
)
sites = st.builds(Site, word, word, word, st.sampled_from(ACTIONS), word, word, st.sampled_from(NUMERICS), natural, natural)
runs = st.builds(
    PassRun,
    word,
    word,
    st.sampled_from(NUMERICS),
    st.floats(0, 1e6),
    natural,
    natural,
    natural,
    natural,
    natural,
)


def several(one: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(one, max_size=3).map(tuple)


def timeline(forward: list[int], backward: list[int]) -> tuple[TimelinePoint, ...]:
    return tuple(TimelinePoint("op", "forward", n) for n in forward) + tuple(TimelinePoint("op", "backward", n) for n in backward)


timelines = st.builds(timeline, st.lists(natural, max_size=3), st.lists(natural, max_size=3))
graphs = st.builds(
    GraphReport,
    word,
    st.sampled_from(["training", "inference"]),
    several(sites),
    st.dictionaries(st.sampled_from(CONTENDERS), several(saved_tensors)),
    st.dictionaries(st.sampled_from(CONTENDERS), timelines),
    several(runs),
    st.none() | word,
    st.booleans(),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | word,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(word, inner, max_size=3),
    max_leaves=5,
)
reports = st.builds(Report, several(graphs), st.dictionaries(word, values, max_size=3), st.dictionaries(word, word))


@settings(max_examples=25, deadline=None)
@given(reports)
def test_a_report_survives_json(report: Report) -> None:
    text = report.to_json()
    assert Report.from_json(text) == report
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not standard JSON"))


def test_the_sample_survives_json(sample: Report) -> None:
    again = Report.from_json(sample.to_json(indent=2))
    assert again == sample
    assert isinstance(again.graphs[0].saved["lowmem"][0].shape, tuple)


def test_option_values_that_json_cannot_hold_become_text() -> None:
    report = Report((), {"dtype": complex, "limit": math.inf, "names": {"b", "a"}, "pair": (1, None)}, {})
    expected = {"dtype": "<class 'complex'>", "limit": "inf", "names": ["a", "b"], "pair": [1, None]}
    assert report.options == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["graphs"][0].pop("mode"), r"Report\.graphs\[0\]: missing fields \['mode'\]"),
        (lambda d: d.update(extra=1), r"unknown fields \['extra'\]"),
        (lambda d: d["graphs"][0]["sites"][0].update(action="ignored"), r"sites\[0\]\.action: 'ignored'"),
        (lambda d: d["graphs"][0]["sites"][0].update(bytes_after="1"), r"bytes_after: '1'"),
        (
            lambda d: d["graphs"][0]["saved"]["lowmem"][0].update(nbytes=True),
            r"saved\['lowmem'\]\[0\]\.nbytes: True",
        ),
        (lambda d: d["graphs"][0].update(saved=[]), r"saved: \[\]"),
        (lambda d: d.update(schema=99), "schema=99"),
    ],
)
def test_a_damaged_report_is_refused_by_field(sample: Report, change: Any, message: str) -> None:
    data = json.loads(sample.to_json())
    change(data)
    with pytest.raises(ValueError, match=message):
        Report.from_dict(data)


def test_what_cannot_be_is_refused(sample: Report) -> None:
    graph = sample.graphs[0]
    one = graph.saved["lowmem"][0].to_dict()
    with pytest.raises(ValueError, match="kind='gradient'"):
        SavedTensor(**(one | {"kind": "gradient"}))
    with pytest.raises(ValueError, match="nbytes=-1"):
        SavedTensor(**(one | {"nbytes": -1}))
    with pytest.raises(ValueError, match="contender='thunder'"):
        GraphReport("0", "training", saved={"thunder": ()})
    with pytest.raises(ValueError, match="contender='thunder'"):
        graph.saved_bytes("thunder")
    with pytest.raises(ValueError, match="seconds=nan"):
        PassRun("p", "joint", "exact", math.nan, 0, 0, 0, 0, 0)
    backward_first = (TimelinePoint("a", "backward", 1), TimelinePoint("b", "forward", 1))
    with pytest.raises(ValueError, match="forward point comes after"):
        GraphReport("0", "training", timelines={"lowmem": backward_first})


def test_totals(sample: Report, several: Report) -> None:
    graph = sample.graphs[0]
    lowmem = graph.saved_bytes("lowmem")
    assert lowmem == sum(tensor.nbytes for tensor in graph.saved["lowmem"])
    assert sample.saved_bytes("lowmem") == lowmem
    assert lowmem is not None
    assert several.saved_bytes("lowmem") == 2 * lowmem
    assert several.saved_bytes("eager") == graph.saved_bytes("eager")
    assert graph.peak("inductor") == max(point.live_bytes for point in graph.timelines["inductor"])
    assert several.graphs[1].saved_bytes("eager") is None
    assert several.graphs[1].peak("eager") is None
    assert (graph.count("rewritten"), graph.count("declined"), graph.count("failed")) == (41, 7, 1)
    assert [graph.has_figures for graph in several.graphs] == [True, True, True, False]


def test_only_rewritten_sites_save_bytes() -> None:
    saved = [Site("p", "m", "s", action, "LM100", "r", "exact", 100, 40).saved_bytes for action in ACTIONS]
    assert saved == [60, 0, 0]


def test_the_first_of_equal_peaks_counts() -> None:
    points = (
        TimelinePoint("a", "forward", 3),
        TimelinePoint("b", "forward", 3),
        TimelinePoint("c", "backward", 1),
    )
    graph = GraphReport("0", "training", timelines={"lowmem": points})
    assert graph.peak_point("lowmem") is points[0]


def test_the_report_needs_no_torch() -> None:
    program = "import sys, lowmem_compile.reporting; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
