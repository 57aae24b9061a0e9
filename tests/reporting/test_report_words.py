"""Numbers and names as people read them, reason codes, headlines and groups."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_compile.reporting import GraphReport, Report, SavedTensor, Site, summary, units
from lowmem_compile.reporting.codes import FAMILIES, REASONS, REWRITES, explain_code
from lowmem_compile.reporting.model import Action


def keeps(nbytes: int, module: str = "m") -> tuple[SavedTensor, ...]:
    return (SavedTensor("x", "op", (nbytes,), "uint8", nbytes, module, "", "activation", "exact"),)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * 1024 - 1, "10.0 KiB"),
        (23 * 2**20, "23.0 MiB"),
        (2**20 - 1, "1.00 MiB"),
        (165 * 2**20, "165 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (-1536, "-1.50 KiB"),
        (5000 * 2**50, "5000 PiB"),
    ],
)
def test_bytes_have_three_digits_and_a_unit(count: int, text: str) -> None:
    assert units.format_bytes(count) == text


@given(st.integers(0, 2**50))
def test_bytes_are_right_to_three_digits(count: int) -> None:
    number, unit = units.format_bytes(count).split()
    scale = {"B": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4, "PiB": 5}[unit]
    assert float(number) * 1024**scale == pytest.approx(count, rel=0.006)
    assert len(number.replace(".", "")) <= 4


@pytest.mark.parametrize(
    ("new", "base", "text"),
    [
        (62, 100, "-38 %"),
        (165, 100, "+65 %"),
        (100, 100, "0 %"),
        (0, 100, "-100 %"),
        (1, 10_000, "-99.9 %"),
        (996, 1000, "-0.4 %"),
        (100_001, 100_000, "about 0 %"),
        (0, 0, "0 %"),
        (5, 0, ""),
    ],
)
def test_changes(new: int, base: int, text: str) -> None:
    assert units.format_change(new, base) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004, "0.4 ms"), (0.0412, "41 ms"), (0.9999, "1.00 s"), (1.27, "1.27 s"), (75, "75 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert units.format_seconds(seconds) == text


def test_characters_that_do_not_print_are_spelt_out() -> None:
    assert units.visible("a\x1b[2J\n\u202e\udcff é") == r"a\x1b[2J\n\u202e\udcff é"
    assert units.format_shape((16, "s0", 4)) == "16 x s0 x 4"
    assert units.format_shape(()) == "scalar"


@pytest.mark.parametrize("code", sorted({**REASONS, **REWRITES}))
def test_each_code_is_well_formed(code: str) -> None:
    title, explanation, way_out = {**REASONS, **REWRITES}[code]
    assert code in REWRITES or (re.fullmatch(r"LM\d{3}", code) and code[:3] in FAMILIES)
    assert title
    assert not title.endswith(".")
    assert re.fullmatch(r"[A-Z][^.]*\.", explanation), "one sentence"
    assert not way_out or way_out.endswith(".")


def test_every_code_and_every_pass_in_the_sources_has_words() -> None:
    root = Path(__file__).resolve().parents[2]
    passes = [path.read_text(encoding="utf-8") for path in (root / "passes").glob("*.py")]
    others = [path.read_text(encoding="utf-8") for path in (root / "lowmem_compile").glob("*.py")]
    codes = {code for text in passes + others for code in re.findall(r'"(LM\d{3})"', text)}
    names = {name for text in passes for name in re.findall(r'(?m)^    name(?:: str)? = "(\w+)"', text)}
    assert len(codes) > 5
    assert len(names) > 3
    assert codes <= set(REASONS), "add the code to lowmem_compile/reporting/codes.py"
    assert names <= set(REWRITES), "say in lowmem_compile/reporting/codes.py what LM100 means for the pass"


def test_a_generic_code_is_explained_by_its_pass() -> None:
    assert explain_code("LM100", "pack_masks").title == "Mask packed to one bit per element"
    assert explain_code("LM100", "another").title == "Rewritten"
    assert explain_code("LM305", "pack_masks").title == "Too small to matter"


def test_unknown_codes_are_explained_by_family() -> None:
    assert explain_code("LM399").title == "Declined: the rewrite would not pay"
    for code in ("LM999999", "LM799", "lm101", ""):
        assert explain_code(code).title == "Unknown reason"


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        (
            {"lowmem": 23, "inductor": 37, "eager": 60},
            "lowmem keeps 23.0 MiB for the backward pass; Inductor would keep 37.0 MiB (-38 %).",
        ),
        (
            {"lowmem": 23, "inductor": 23},
            "lowmem keeps 23.0 MiB for the backward pass, the same as Inductor would.",
        ),
        (
            {"lowmem": 23, "inductor": 20},
            "lowmem keeps 23.0 MiB for the backward pass; Inductor would keep only 20.0 MiB (+15 %).",
        ),
        (
            {"lowmem": 23, "inductor": 0},
            "lowmem keeps 23.0 MiB for the backward pass; Inductor would keep only 0 B.",
        ),
        (
            {"lowmem": 23, "eager": 46},
            "lowmem keeps 23.0 MiB for the backward pass; eager PyTorch would keep 46.0 MiB (-50 %).",
        ),
        ({"lowmem": 23}, "lowmem keeps 23.0 MiB for the backward pass."),
        ({"inductor": 23}, "The compiled training graphs carry no figures."),
    ],
)
def test_headlines(saved: dict[str, int], text: str) -> None:
    graph = GraphReport("0", "training", saved={name: keeps(size * 2**20) for name, size in saved.items()})
    assert summary.headline(Report((graph,))) == text


def test_headlines_of_other_reports(several: Report) -> None:
    cached = GraphReport("0", "training", from_cache=True)
    assert summary.headline(several).startswith("Over 2 training graphs, lowmem keeps 329 MiB")
    assert summary.headline(Report()) == "No graph was compiled, so there is nothing to report."
    assert "came from the compile cache" in summary.headline(Report((cached,)))
    assert "Nothing was compiled for training" in summary.headline(Report((GraphReport("0", "inference"),)))


def test_the_headline_compares_only_what_all_graphs_measured() -> None:
    both = GraphReport("0", "training", saved={"lowmem": keeps(10), "inductor": keeps(20), "eager": keeps(40)})
    some = GraphReport("1", "training", saved={"lowmem": keeps(10), "eager": keeps(40)})
    assert "eager PyTorch would keep 80 B (-75 %)" in summary.headline(Report((both, some)))


def test_gradients_note_follows_the_loosest_rewrite(sample: Report) -> None:
    graph = sample.graphs[0]
    without = [site for site in graph.sites if site.numerics != "approximate"]
    exact = [site for site in without if site.numerics == "exact"]
    assert summary.gradients_note([graph]) == ("approximate", "at 5 places")
    assert summary.gradients_note([replace(graph, sites=tuple(without))]) == (
        "exact up to rounding",
        "at 24 places",
    )
    assert summary.gradients_note([replace(graph, sites=tuple(exact))])[0] == "exact"


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("encoder.layer.3.attention.self", "encoder.layer.3"),
        ("layers.1.blocks.0.mlp.2", "layers.1.blocks.0"),
        ("embeddings.LayerNorm", "embeddings"),
        ("features.3", "features.3"),
        ("features.3.conv", "features.3"),
        ("0", "0"),
        ("pooler", "pooler"),
        ("", "(no module)"),
    ],
)
def test_layers(module: str, layer: str) -> None:
    assert summary.layer_of(module) == layer


def test_modules_that_differ_in_one_index_are_drawn_together() -> None:
    modules = [f"layer.{i}.mlp" for i in (3, 0, 1, 5)] + ["head"] + [f"s.{i}.b.{j}" for i in (0, 1) for j in (0, 1)]
    expected = (("layer.{0-1,3,5}.mlp", 4), ("head", 1), ("s.*.b.*", 4))
    assert summary.collapse_modules(modules) == expected
    assert summary.collapse_modules([""]) == (("(no module)", 1),)


@given(st.lists(st.text(alphabet="ab.01#*{٣", max_size=8), max_size=8))
def test_collapsing_loses_no_module(modules: list[str]) -> None:
    assert sum(count for _, count in summary.collapse_modules(modules)) == len(modules)


def test_the_change_by_kind_adds_up(sample: Report) -> None:
    graph = sample.graphs[0]
    rows = summary.change_by_kind(graph)
    assert [kind for kind, _, _ in rows] == ["activation", "weight copy", "mask"]
    change = sum(after - before for _, before, after in rows)
    assert change == (graph.saved_bytes("lowmem") or 0) - (graph.saved_bytes("inductor") or 0) < 0
    assert summary.change_by_kind(GraphReport("0", "training", saved={"lowmem": keeps(1)})) == ()


def test_names_of_graphs() -> None:
    names = [summary.graph_name(GraphReport(name, "training")) for name in ("0", "graph_12", "my_graph_1")]
    assert names == ["graph 0", "graph 12", "graph my_graph_1"]


@pytest.mark.parametrize(
    ("action", "before", "after", "text"),
    [
        ("rewritten", 2048, 1024, "2.00 KiB became 1.00 KiB"),
        ("rewritten", 2048, 0, "2.00 KiB freed"),
        ("rewritten", 0, 0, ""),
        ("declined", 2048, 2048, "2.00 KiB"),
        ("declined", 0, 0, ""),
    ],
)
def test_what_became_of_the_bytes(action: Action, before: int, after: int, text: str) -> None:
    site = Site("p", "m", "s", action, "LM100", "", "exact", before, after)
    (group,) = summary.group_sites(GraphReport("0", "training", (site,)))
    assert group.outcome == text


def test_groups_cover_all_sites_in_the_order_of_the_passes(sample: Report) -> None:
    graph = sample.graphs[0]
    groups = summary.group_sites(graph)
    assert sorted(len(group.sites) for group in groups) == [1, 1, 5, 6, 12, 12, 12]
    assert list(dict.fromkeys(group.pass_name for group in groups)) == [run.name for run in graph.passes]
    assert sum(group.saved_bytes for group in groups) == sum(site.saved_bytes for site in graph.sites)


def test_alike_tensors_of_all_layers_are_one_row(sample: Report) -> None:
    first, second = summary.largest(sample.graphs[0].saved["lowmem"], 2)
    assert (first.module, len(first.tensors)) == ("encoder.layer.{0-5}.intermediate.intermediate_act_fn", 6)
    assert first.nbytes == 36 * 2**20 > second.nbytes
