"""The docs against the code: options, passes, reason codes, links, and Python blocks. Imports no torch."""

from __future__ import annotations

import ast
import dataclasses
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from lowmem_compile.options import Options
from lowmem_compile.reporting.codes import FAMILIES, REASONS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *DOCS.rglob("*.md"),
        *(ROOT / "kernels").rglob("*.md"),
    ]
)
PACKAGES = {"lowmem_compile.passes": "passes", "lowmem_compile.kernels": "kernels"}

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
CODE = re.compile(r"\bLM\d{3}\b")


@dataclasses.dataclass(frozen=True)
class PassSource:
    """What the source of a pass says: its name, numerics class, and the reason codes it can give."""

    name: str
    numerics: str
    codes: frozenset[str]


def relative(path: Path) -> str:
    """The path as a test's name."""
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """The page's prose: fenced blocks and inline code are blanked."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def section(text: str, title: str) -> str:
    """What stands below a second-level heading, up to the next one."""
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of the table rows in a text, headings and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = {i for i, row in enumerate(cells) if set("".join(row)) <= set("-: ")}
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page."""
    return frozenset(slug(heading) for heading in HEADING.findall(FENCE.sub("", page.read_text())))


@cache
def passes() -> tuple[PassSource, ...]:
    """Every pass in `passes/`, read from the source."""
    found = []
    for path in sorted((ROOT / "passes").glob("*.py")):
        source = path.read_text()
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ClassDef):
                continue
            values = {t.id: s.value for s in node.body if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)}
            match values:
                case {"name": ast.Constant(value=str(name)), "numerics": ast.Attribute(attr=numerics)}:
                    found.append(PassSource(name, numerics.lower(), declines(source)))
    assert found
    return tuple(found)


def declines(source: str) -> frozenset[str]:
    """The reason codes that a source file gives: first arguments of `Decline(...)`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return frozenset(
        arg.value
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "Decline"
        for arg in call.args[:1]
        if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
    )


def option_rows() -> dict[str, list[str]]:
    """The rows of the option table, by name."""
    text = (DOCS / "options.md").read_text().split("\n## ")[0]
    return {row[0].strip("`"): row for row in rows(text)}


def test_every_option_is_documented_and_nothing_else() -> None:
    assert list(option_rows()) == [f.name for f in dataclasses.fields(Options)]


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Options)])
def test_an_option_has_its_default_and_its_values(name: str) -> None:
    _, values, default, effect = option_rows()[name]
    assert ast.literal_eval(default.strip("`")) == getattr(Options(), name)
    hint = get_type_hints(Options)[name]
    if get_origin(hint) is Literal:
        assert [ast.literal_eval(v) for v in re.findall(r"`([^`]+)`", values)] == list(get_args(hint))
    elif hint is bool:
        assert values == "`True`, `False`"
    assert effect


def test_the_options_in_the_index_exist() -> None:
    table = rows(section((DOCS / "index.md").read_text(), "Quick reference"))
    named = {name for row in table for name in re.findall(r"`(\w+)`", row[1])}
    assert named
    assert named <= {f.name for f in dataclasses.fields(Options)}


def test_every_pass_has_a_page_and_every_page_a_pass() -> None:
    pages = {path.stem for path in (DOCS / "passes").glob("*.md")}
    assert pages == {p.name for p in passes()} | {"recompute"}


def test_the_index_lists_the_passes_in_their_order_with_their_class() -> None:
    table = rows(section((DOCS / "index.md").read_text(), "Quick reference"))
    listed = [(re.sub(r"\[(.*)\].*", r"\1", row[0]), row[3]) for row in table]
    classes = {p.name: p.numerics for p in passes()}
    source = (ROOT / "lowmem_compile" / "pipeline.py").read_text()
    names = {re.sub(r"(?<!^)(?=[A-Z])", "_", n).lower(): n for n in re.findall(r"^    (\w+)\(\),", source, re.MULTILINE)}
    assert listed == [*((name, classes[name]) for name in names), ("recompute rules", "exact")]


@pytest.mark.parametrize("source", passes(), ids=lambda p: p.name)
def test_a_page_says_the_numerics_class_and_every_reason_code(source: PassSource) -> None:
    page = (DOCS / "passes" / f"{source.name}.md").read_text()
    assert page.startswith(f"# {source.name}\n")
    assert f"| numerics class | {source.numerics} |" in page
    assert section(page, "Numerics").strip().lower().startswith(source.numerics)
    documented = set(CODE.findall("".join(row[0] for row in rows(section(page, "Declined")))))
    assert documented - {"LM300"} == source.codes - {"LM300"}  # the pipeline gives it too


def test_every_reason_code_is_documented() -> None:
    headings = [h for h in HEADING.findall((DOCS / "reason-codes.md").read_text()) if CODE.fullmatch(h)]
    assert headings == sorted(set(headings))
    used = set().union(*(p.codes for p in passes()))
    assert set(headings) == set(REASONS) | used
    assert {h[:3] for h in headings} == set(FAMILIES)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_reason_codes_in_the_prose_exist(page: Path) -> None:
    assert set(CODE.findall(page.read_text())) <= set(REASONS) | set().union(*(p.codes for p in passes()))


def python_blocks() -> list[tuple[str, str]]:
    """(name, source) of every Python block of the docs."""
    return [
        (f"{relative(page)}#{number}", textwrap.dedent(block))
        for page in PAGES
        for number, (_, language, block) in enumerate(FENCE.findall(page.read_text()))
        if language == "python"
    ]


@pytest.mark.parametrize(("name", "source"), python_blocks(), ids=lambda value: value if "#" in value[:80] else "")
def test_python_blocks_compile_and_import_what_exists(name: str, source: str) -> None:
    compile(source, name, "exec")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lowmem_compile"):
            defined = module_file(node.module or "").read_text()
            for alias in node.names:
                assert re.search(rf"\b{alias.name}\b", defined), f"{node.module} has no {alias.name}"


def module_file(module: str) -> Path:
    """The source file of one of our modules."""
    for package, folder in PACKAGES.items():
        if module == package or module.startswith(package + "."):
            module = folder + module.removeprefix(package)
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize(("name", "source"), python_blocks(), ids=lambda value: value if "#" in value[:80] else "")
def test_no_block_calls_a_method_that_compiles_nothing(name: str, source: str) -> None:
    """``nn.Sequential.compile`` (pytorch#150915)."""
    assert not ("Sequential(" in source and re.search(r"\bmodel\.compile\(", source)), name


def test_there_are_python_blocks() -> None:
    assert len(python_blocks()) >= 5


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_relative_links_resolve(page: Path) -> None:
    for link in LINK.findall(without_code(page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_every_page_can_be_reached_from_the_index() -> None:
    reached: set[Path] = set()
    todo = [DOCS / "index.md"]
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = [link.partition("#")[0] for link in LINK.findall(without_code(page.read_text())) if "://" not in link]
        todo += [(page.parent / link).resolve() for link in links if link]
    assert set(DOCS.rglob("*.md")) <= reached


def test_the_readme_keeps_the_place_of_the_table() -> None:
    readme = (ROOT / "README.md").read_text()
    begin, end = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"
    assert readme.count(begin) == readme.count(end) == 1
    assert readme.index(begin) < readme.index(end)
