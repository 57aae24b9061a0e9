"""The pages of the optimizers against the code: defaults, classes, base updates."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from lowmem_compile.optim import APOLLO, COAP, Fira, Flora, GaLore, LowRankOptimizer
from lowmem_compile.optim.settings import COMMON, Common

DOCS = Path(__file__).resolve().parents[2] / "docs" / "optim"
KINDS: list[type[LowRankOptimizer]] = [COAP, GaLore, Fira, Flora, APOLLO]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_page_has_the_class_its_bases_and_its_defaults(kind: type[LowRankOptimizer]) -> None:
    page = (DOCS / f"{kind.__name__.lower()}.md").read_text()
    assert page.startswith(f"# {kind.__name__}\n")
    assert f"`lowmem_compile.optim.{kind.__name__}`" in page
    (bases,) = re.findall(r"^\| base updates \| (.*?) \|$", page, re.MULTILINE)
    assert set(re.findall(r'`"(\w+)"`', bases)) == set(kind.bases)
    for section in ("Equations", "State", "Defaults"):
        assert f"\n## {section}\n" in page
    defaults = page.split("\n## Defaults\n")[1].split("\n## ")[0].split("Published")[0]
    parameters = inspect.signature(kind).parameters
    assert str(parameters["update_interval"].default) in re.findall(r"\d+", defaults)
    for name in re.findall(r"`(\w+)`", defaults):
        assert name in parameters or name in COMMON or name == "update_proj_gap", name


def test_the_table_of_options() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)`.*\|$", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == ["base", "bits", "projector_bits", "block_size", "quantise_from"]
    for name, default in rows:
        assert ast.literal_eval(default) == COMMON[name]


def test_every_common_option_is_described() -> None:
    described = re.findall(r"^ {8}(\w+):", inspect.cleandoc(Common.__doc__ or "").replace("\n    ", "\n        "), re.MULTILINE)
    assert set(described) == set(COMMON) == set(Common.__annotations__)
