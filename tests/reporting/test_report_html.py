"""The report as a page: loads nothing, is well formed, escapes what comes from a model, says what it must."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lowmem_compile.reporting import (
    GraphReport,
    PassRun,
    Report,
    SavedTensor,
    Site,
    TimelinePoint,
    charts,
    render_html,
    write_html,
)
from lowmem_compile.reporting.units import exact_bytes, format_bytes

VOID = {"br", "meta", "wbr", "input"}


class Page(HTMLParser):
    """Reads a page, keeps its tags, attributes and text, and insists that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.code: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute of {tag} is there twice"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.code[self.open[-1]] = data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module", params=["sample", "several", "inference", "no sites", "cached", "no timeline", "empty"])
def report(request: pytest.FixtureRequest, sample: Report, several: Report) -> Report:
    graph = sample.graphs[0]
    return {
        "sample": sample,
        "several": several,
        "inference": Report((GraphReport("0", "inference", passes=graph.passes),)),
        "no sites": replace(sample, graphs=(replace(graph, sites=()),)),
        "cached": Report((GraphReport("0", "training", from_cache=True),)),
        "no timeline": replace(sample, graphs=(replace(graph, timelines={}),)),
        "empty": Report(),
    }[request.param]


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(render_html(report))


@pytest.fixture(scope="module")
def sample_page(sample: Report) -> Page:
    return Page(render_html(sample))


def test_the_page_is_well_formed_and_loads_nothing(page: Page) -> None:
    assert [tag for tag, _ in page.tags].count("html") == 1
    assert not {"link", "img", "iframe", "object", "embed", "base", "audio", "video"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action", "data", "xlink:href", "style"} & set(attributes), tag
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes), f"inline handler on {tag}"
    for code in page.code.values():
        assert not re.search(r"https?:|//\w|@import|url\(|fetch\(|import\(|XMLHttpRequest", code)


def test_anchors_and_their_targets_agree(page: Page, report: Report) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert len(ids) == len(set(ids)) == len(report.graphs)
    assert links <= {f"#{name}" for name in ids}


def test_only_the_page_s_own_script_may_run(sample_page: Page) -> None:
    page = sample_page
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.code["script"].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_the_page_says_what_was_kept_what_went_and_why(sample_page: Page) -> None:
    text = sample_page.text
    for part in (
        "lowmem keeps 165 MiB for the backward pass; Inductor would keep 206 MiB (-20 %).",
        "41 of 49places rewritten, 7 declined, 1 failed",
        "Still kept: 165 MiB",
        "56.2 MiBActivation input kept as codes5 places, 60.0 MiB became 3.75 MiB",
        "the partitioner would not keep fewer bytes with this rewrite",
        "Way out: Please report it with the graph dump",
        "lowmem: 83 tensors, 165 MiB",
        "eager PyTorch 326 MiB",
        "recognise_normdynamoother rounding1.27 s",
        "lowmem_dumps/graph_0",
        "torch2.13.0+cpu",
        "Saved tensor",
        "Recompute",
    ):
        assert part in text


def test_every_tensor_and_every_site_has_a_row(sample: Report, sample_page: Page) -> None:
    graph = sample.graphs[0]
    titles = [attributes.get("title", "") for _, attributes in sample_page.tags]
    for tensors in graph.saved.values():
        for tensor in tensors:
            assert tensor.name in titles
            assert tensor.source in titles
            assert exact_bytes(tensor.nbytes) in titles
    assert sum(title in {site.pass_name for site in graph.sites} for title in titles) == len(graph.sites)


def test_what_comes_from_the_model_is_escaped_everywhere(sample: Report) -> None:
    evil = "<script>alert(1)</script>\"'&\x00\u202e"
    tensor = SavedTensor(evil, evil, (evil, 2), evil, 7, evil, evil, "activation", evil)
    graph = GraphReport(
        evil,
        "training",
        (
            Site(evil, evil, evil, "rewritten", evil, evil, "exact", 2, 1),
            Site(evil, evil, evil, "declined", evil, evil, "exact", 2, 1),
        ),
        dict.fromkeys(("eager", "inductor", "lowmem"), (tensor,)),
        {"lowmem": (TimelinePoint(evil, "forward", 5), TimelinePoint(evil, "backward", 4))},
        (PassRun(evil, evil, "exact", 1.0, 1, 1, 0, 1, 1),),
        evil,
    )
    text = render_html(Report((graph, graph), {evil: evil}, {evil: [evil]}), title=evil)
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "\x00" not in text
    assert "\u202e" not in text
    shown = "<script>alert(1)</script>\"'&\\x00\\u202e"
    assert page.text.count(shown) > 20
    assert any(shown in attributes.get("title", "") for _, attributes in page.tags)


def test_write_html_writes_one_utf8_file(tmp_path: Path, sample: Report) -> None:
    path = write_html(replace(sample, versions={"é": "\udcff"}), tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert "é" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_the_notes_of_graphs_without_figures(several: Report) -> None:
    text = Page(render_html(several)).text
    assert "This graph computes no gradients." in text
    assert "This graph came from the compile cache, so it was not looked at again" in text
    assert "None: no pass found anything to rewrite in this graph." in text


def test_bars_are_as_long_as_their_bytes(sample: Report) -> None:
    graph = sample.graphs[0]
    bars = str(charts.saved_bars(graph))
    lengths: dict[str, float] = {}
    for y, width in re.findall(r'<rect class="kind-[a-z-]+" x="[\d.]+" y="(\d+)" width="([\d.]+)"', bars):
        lengths[y] = lengths.get(y, 0) + float(width)
    totals = [graph.saved_bytes(name) or 0 for name in ("eager", "inductor", "one_flag", "lowmem")]
    expected = [total / totals[0] for total in totals]
    assert [length / lengths["4"] for length in lengths.values()] == pytest.approx(expected, abs=1e-3)


def test_each_peak_is_marked_at_its_point_and_labelled(sample: Report) -> None:
    graph = sample.graphs[0]
    drawing = str(charts.memory_timeline(graph))
    for name in graph.timelines:
        curve = re.search(rf'class="curve who-{name}" d="M([^"]+)"', drawing)
        dot = re.search(rf'class="peak who-{name}">.*?cx="([\d.]+)" cy="([\d.]+)"', drawing)
        assert curve
        assert dot
        highest = min((pair.split() for pair in curve[1].split("L")), key=lambda pair: float(pair[1]))
        assert [dot[1], dot[2]] == highest
        assert f"{format_bytes(graph.peak(name) or 0)}</text>" in drawing


def test_a_long_timeline_is_thinned_and_keeps_its_peak() -> None:
    points = [TimelinePoint("op", "forward" if i < 9000 else "backward", 1000 + i % 7) for i in range(20_000)]
    points[12_345] = TimelinePoint("the peak", "backward", 9999)
    drawing = str(charts.memory_timeline(GraphReport("0", "training", timelines={"lowmem": tuple(points)})))
    assert len(drawing) < 60_000
    assert "the peak (9,999 bytes)" in drawing
    curve = re.search(r'class="curve who-lowmem" d="M([^"]+)"', drawing)
    dot = re.search(r'cx="([\d.]+)" cy="([\d.]+)"', drawing)
    assert curve
    assert dot
    assert f"{dot[1]} {dot[2]}" in curve[1].split("L")


@pytest.mark.parametrize("phases", [["forward"], ["backward"], ["forward", "backward"]])
@pytest.mark.parametrize("size", [0, 1, 1500, 2**45])
def test_small_timelines(phases: list[str], size: int) -> None:
    points = tuple(TimelinePoint("op", phase, size) for phase in phases)  # type: ignore[arg-type]
    drawing = str(charts.memory_timeline(GraphReport("0", "training", timelines={"lowmem": points, "eager": ()})))
    assert bool(drawing) == bool(size)
    assert [f"{phase} pass" in drawing for phase in phases] == [bool(size)] * len(phases)


@pytest.mark.parametrize("rows", [[50, 51, 52, 200], [290, 291, 292], [26, 26, 26, 26], [296, 296, 296, 296]])
def test_labels_never_overlap_nor_leave_the_drawing(rows: list[float]) -> None:
    placed = charts._spread(rows, 26, 296)
    assert all(below - above >= 19 for above, below in itertools.pairwise(placed))
    assert placed[0] >= 26
    assert placed[-1] <= 296
