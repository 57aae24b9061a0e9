"""options["memory_budget"]: what it may be, and what it says when it cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from lowmem_compile.errors import OptionError
from lowmem_compile.options import Options
from lowmem_compile.planner.budget import Budget, budget_of


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (0.25, Budget(share=0.25)),
        (1, Budget(share=1.0)),
        ("6GiB", Budget(peak=6 * 2**30)),
        ("800 MiB", Budget(peak=800 * 2**20)),
        ("1.5 gb", Budget(peak=1_500_000_000)),
        (".5KiB", Budget(peak=512)),
    ],
)
def test_shares_and_sizes(value: float | str, want: Budget) -> None:
    assert budget_of(value) == want
    assert Options.from_dict({"memory_budget": value}).memory_budget == value


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.5, True, "6", "GiB", "six GiB", "-1GiB", "0MiB", "", [0.3], {}])
def test_anything_else_is_an_error(value: Any) -> None:
    with pytest.raises(OptionError, match="memory_budget"):
        Options.from_dict({"memory_budget": value})


def test_a_codec_for_all_contradicts_it() -> None:
    with pytest.raises(OptionError, match="int8"):
        Options.from_dict({"memory_budget": 0.3, "codec": "int8"})
    assert Options.from_dict({"memory_budget": 0.3, "codec": "none"}).codec == "none"
