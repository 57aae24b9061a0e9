"""Slopes take fewer bits where a budget would leave too little for everything else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lowmem_compile.contract import Context
from lowmem_compile.errors import BudgetError
from lowmem_compile.options import Options
from lowmem_compile.partition import COARSE, FEWER_SLOPE_BITS, Attempt, best_attempt
from lowmem_compile.passes.approximate_activation import default_slope_bits

FINE, ROUGH, WORSE = COARSE / 2, 2 * COARSE, 3 * COARSE
REFUSED = None


def tried(errors: dict[int, float | None], *, for_budget: bool = True, **options: Any) -> tuple[Attempt, list[int]]:
    """The best of attempts whose plans have these errors by slope bits, and the bits that were tried."""
    bits: list[int] = []

    def attempt(ctx: Context) -> Any:
        wanted = default_slope_bits(ctx)
        bits.append(wanted)
        error = errors[wanted]
        if error is REFUSED:
            raise BudgetError(f"{wanted} bits")
        return SimpleNamespace(ctx=ctx, plan=SimpleNamespace(error=error, for_budget=for_budget))

    return best_attempt(attempt, Context(Options.from_dict({"slope_bits": 8, **options}))), bits


@pytest.mark.parametrize(
    ("errors", "taken", "tries"),
    [
        ({8: FINE}, 8, [8]),
        ({8: ROUGH, 6: FINE}, 6, [8, 6]),
        ({8: ROUGH, 6: WORSE}, 8, [8, 6]),
        ({8: REFUSED, 6: WORSE}, 6, [8, 6]),
    ],
)
def test_the_attempt_of_least_error(errors: dict[int, float | None], taken: int, tries: list[int]) -> None:
    best, bits = tried(errors)
    assert bits == tries
    assert default_slope_bits(best.ctx) == taken


def test_what_neither_meets_is_refused_by_the_smaller() -> None:
    with pytest.raises(BudgetError, match="6 bits"):
        tried({8: REFUSED, 6: REFUSED})


@pytest.mark.parametrize(
    "options", [{"slope_bits": None}, {"slope_bits": FEWER_SLOPE_BITS}, {"table": "derivative"}, {"gradients": "exact"}]
)
def test_without_wide_slopes_there_is_one_attempt(options: dict[str, Any]) -> None:
    errors: dict[int, float | None] = {8: ROUGH, FEWER_SLOPE_BITS: ROUGH}
    assert len(tried(errors, **options)[1]) == 1
    with pytest.raises(BudgetError):
        tried(dict.fromkeys(errors, REFUSED), **options)


def test_a_plan_for_no_budget_is_kept() -> None:
    assert tried({8: ROUGH}, for_budget=False)[1] == [8]
