"""Gradient errors, paired times, and the tables made of them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lowmem_compile.demo.cell import CellResult, VariantResult
from lowmem_compile.demo.gradients import compare
from lowmem_compile.demo.table import Bar, cell_table, check, overviews, rivals_ahead
from lowmem_compile.demo.timing import paired_ratio, round_order


def test_gradient_error_counted_by_hand() -> None:
    exact = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0])}
    error = compare({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([5.0])}, exact)
    assert error.cosine == pytest.approx(25 / math.sqrt(50 * 25))
    assert error.relative_error == pytest.approx(1.0)
    assert error.worst == "a"
    assert error.worst_cosine == pytest.approx(1.0)


def test_the_worst_parameter_is_named_and_tiny_ones_are_left_out() -> None:
    exact = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0, 0.0]), "tiny": torch.tensor([1e-6, 0.0])}
    measured = {
        "a": torch.tensor([1.0, 0.0]),
        "b": torch.tensor([1.0, 1.0]),
        "tiny": torch.tensor([-1e-6, 0.0]),
    }
    error = compare(measured, exact)
    assert error.worst == "b"
    assert error.worst_cosine == pytest.approx(math.sqrt(0.5))


def test_nan_gradients_are_reported_as_nan() -> None:
    error = compare({"a": torch.tensor([math.nan]), "b": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
    assert math.isnan(error.cosine)
    assert error.worst == "a"


def test_gradients_of_other_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="'b'"):
        compare({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})


def test_paired_ratio_removes_drift() -> None:
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    ratio = paired_ratio([1.1 * t for t in drift], drift)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))


def test_paired_ratio_has_an_interval_that_holds_the_median() -> None:
    ratio = paired_ratio([1.0, 1.2, 0.9, 1.1, 1.05], [1.0] * 5)
    assert ratio.low < ratio.median == 1.05 < ratio.high
    with pytest.raises(ValueError, match="same rounds"):
        paired_ratio([1.0], [1.0, 2.0])


def test_round_order_is_a_permutation_and_deterministic() -> None:
    names = ["a", "b", "c", "d"]
    orders = [round_order(names, i) for i in range(6)]
    assert all(sorted(order) == names for order in orders)
    assert orders == [round_order(names, i) for i in range(6)]
    assert len({tuple(order) for order in orders}) > 1


def _variant(name: str, saved: int, peak: int, ratio: float, *, cosine: float = 1.0) -> VariantResult:
    return VariantResult(
        name=name,
        label=name,
        saved=saved,
        saved_intermediate=saved,
        peak=peak,
        after_forward=saved,
        compile_seconds=1.0,
        cosine=cosine,
        relative_error=0.0,
        worst_cosine=cosine,
        worst_parameter="w",
        output_difference=0.0,
        loss=2.0,
        losses=[2.0, 1.5],
        seconds=[1.0, 1.0],
        ratio=ratio,
        ratio_low=ratio - 0.01,
        ratio_high=ratio + 0.01,
    )


def _cell(*variants: VariantResult) -> CellResult:
    return CellResult("minilm", "MiniLM", "GELU", True, "bf16", "full", 6, 2048, 22, 22, list(variants), 1.0)


INDUCTOR = _variant("inductor", 1000, 2000, 1.0)


def test_cells_survive_json() -> None:
    cell = _cell(INDUCTOR, VariantResult("lowmem", "lowmem", error="boom"))
    assert CellResult.from_json(json.loads(json.dumps(cell.to_json()))) == cell


def test_check_counts_what_is_met_and_names_what_is_not() -> None:
    good = _cell(INDUCTOR, _variant("eager", 1100, 2200, 1.0), _variant("lowmem", 600, 1500, 1.01))
    bad = _cell(INDUCTOR, _variant("eager", 1100, 2200, 1.0), _variant("lowmem", 700, 2001, 1.0))
    text = check([good, bad])
    assert "| saved, GELU, full, bf16: at most 0.66 of Inductor | 0.7 | 1 of 2 | minilm/bf16/full (0.7) |" in text
    assert "| peak: below Inductor | 1 | 1 of 2 | minilm/bf16/full (1) |" in text
    assert "| saved, autocast: at most 0.60 of Inductor | not measured | 0 | |" in text


def test_a_failed_lowmem_reaches_no_bar() -> None:
    text = check([_cell(INDUCTOR, VariantResult("lowmem", "lowmem", error="boom"))])
    assert "| step time: at most 1.02 of Inductor | nan | 0 of 1 | minilm/bf16/full (nan) |" in text


def test_a_bar_that_asks_for_at_least() -> None:
    bar = Bar("cosine", 0.999, lambda cell: cell.variants[0].cosine, at_least=True)
    assert "| cosine | 0.9 | 1 of 2 |" in check([_cell(INDUCTOR), _cell(_variant("x", 1, 1, 1, cosine=0.9))], [bar])


def test_rivals_that_need_less_are_listed_with_their_cost() -> None:
    cell = _cell(
        INDUCTOR,
        _variant("one_flag", 700, 1600, 1.0),
        _variant("budget_0.3", 300, 1600, 1.5),
        _variant("fp8", 650, 1400, 1.0),
        _variant("lowmem", 600, 1500, 1.0),
    )
    rows = [line for line in rivals_ahead([cell]).splitlines() if line.startswith("| minilm")]
    assert rows == [
        "| minilm/bf16/full | budget_0.3 | 0.500 | 1.067 | 1.50 [1.49, 1.51] | no | 0.0000 |",
        "| minilm/bf16/full | fp8 | 1.083 | 0.933 | 1.00 [0.99, 1.01] | yes | 0.0000 |",
    ]


def test_tables_have_as_many_columns_as_their_heads() -> None:
    cell = _cell(INDUCTOR, _variant("lowmem", 600, 1500, 1.0), VariantResult("fp8", "fp8", error="X\nboom"))
    for text in (cell_table(cell), overviews([cell])):
        widths: list[int] = []
        for line in [*text.splitlines(), ""]:
            if line.startswith("|"):
                widths.append(line.count("|"))
            else:
                assert len(set(widths)) <= 1
                widths = []
    assert "failed: boom" in cell_table(cell)
