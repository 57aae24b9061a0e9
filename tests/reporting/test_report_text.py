"""The report as text."""

from __future__ import annotations

import re
from dataclasses import replace

from lowmem_compile.reporting import GraphReport, Report, Site, render_text
from lowmem_compile.reporting.summary import headline


def test_the_first_line_is_the_headline(sample: Report) -> None:
    assert render_text(sample).splitlines()[0] == headline(sample)


def test_the_comparison_table(sample: Report) -> None:
    rows = [" ".join(line.split()) for line in render_text(sample).splitlines()]
    assert "eager PyTorch 314 MiB +52 % 326 MiB +45 %" in rows
    assert "Inductor 206 MiB 224 MiB" in rows
    assert "Inductor, one flag 193 MiB -7 % 210 MiB -6 %" in rows
    assert "lowmem 165 MiB -20 % 182 MiB -18 %" in rows
    change = "activation -20.2 MiB, weight copy -13.5 MiB, mask -7.88 MiB"
    assert f"lowmem against Inductor, by kind: {change}" in rows


def test_sites_are_grouped_with_counts_reasons_and_ways_out(sample: Report) -> None:
    text = render_text(sample, width=200)
    assert "Sites: 41 rewritten, 7 declined, 1 failed" in text
    assert "5 rewritten LM100 Activation input kept as codes (60.0 MiB became 3.75 MiB, gradients app" in text
    assert "12 rewritten LM100 Norm recognised (gradients other rounding)" in text
    assert "at encoder.layer.{0-4}.intermediate.intermediate_act_fn (5)" in text
    assert "1 declined  LM300 No fewer bytes in the end (12.0 MiB)" in text
    assert "why: the partitioner would not keep fewer bytes with this rewrite" in text
    assert "way out: Please report it with the graph dump" in text
    assert "1 failed    LM900" in text
    assert "and 3 other reasons" in text


def test_the_largest_tensors_come_first_with_module_and_source(sample: Report) -> None:
    lines = render_text(sample, top=2).splitlines()
    start = next(i for i, line in enumerate(lines) if "Largest tensors" in line)
    assert "(12 of 83)" in lines[start]
    assert lines[start + 2].split()[:4] == ["36.0", "MiB", "6", "activation"]
    assert lines[start + 2].endswith("transformers/models/bert/modeling_bert.py:237")
    assert lines[start + 4] == ""


def test_other_graphs(several: Report) -> None:
    text = render_text(several)
    for part in (
        "graph 2 (inference)",
        "This graph computes no gradients",
        "graph 3 (training, from the compile cache)",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1",
        "Sites: none",
        "Graph dumps: lowmem_dumps/graph_1",
    ):
        assert part in text


def test_an_empty_report_is_one_line() -> None:
    assert render_text(Report()) == "No graph was compiled, so there is nothing to report."


def test_names_from_the_model_cannot_write_to_the_terminal(sample: Report) -> None:
    site = Site("p", "a\x1b[31m.b", "f\r.py:1", "declined", "LM201", "x\ny", "exact", 1, 1)
    graph = GraphReport("0\x07", "training", (site,), dump_dir="d\x9b")
    text = render_text(replace(sample, graphs=(graph,)))
    assert all(line.isprintable() for line in text.split("\n"))
    assert r"a\x1b[31m.b" in text


def test_sentences_are_wrapped(sample: Report) -> None:
    narrow, wide = (render_text(sample, width=width).splitlines() for width in (60, 200))
    indented = [line for line in narrow if re.match(r" {19}\S", line) and "module" not in line]
    assert len(narrow) > len(wide)
    assert all(len(line) <= 60 or " " not in line.strip() for line in indented)
