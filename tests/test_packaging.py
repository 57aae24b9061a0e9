"""The package as it is installed: names, imports, entry points, and the one door to private torch."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import lowmem_compile

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_FOLDERS = ("lowmem_compile", "passes", "kernels")
OTHER_FOLDERS = ("tests", "examples", "benchmarks", "docs", "scripts", ".ci")
# The one file that may use torch's private modules.
DOOR = ROOT / "lowmem_compile" / "_torch.py"
# Suffixes of files that hold text.
TEXT = ("", ".py", ".md", ".toml", ".cff", ".sh", ".j2", ".json", ".csv", ".txt", ".yml", ".html", ".svg")

PRIVATE_TORCH = re.compile(r"torch\.(_inductor|_functorch|_dynamo|fx\.(\w+\.)*_\w+)\b")
BARE_PACKAGE = re.compile(r"(passes|kernels)\b")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/\w|\b[A-Z]:\\Users\\")


def files_of(folders: tuple[str, ...], suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    """The files below these folders of the repository with one of these suffixes, sorted."""
    found = (path for name in folders for path in (ROOT / name).rglob("*"))
    return sorted(path for path in found if path.is_file() and path.suffix in suffixes)


def modules_used(source: str) -> set[str]:
    """Dotted names that Python source imports, by statement or by a call, or reaches from `torch`."""
    used: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                used.update(alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=0) if module is not None:
                used.update(f"{module}.{alias.name}" for alias in names)
            case ast.Attribute():
                name = ast.unparse(node)
                if name.startswith("torch."):
                    used.add(name)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if re.search(
                r"(import_module|__import__|find_spec|importorskip)$", ast.unparse(func)
            ):
                used.add(name)
    return used


def run_python(code: str, cwd: Path) -> str:
    """Run code in a new interpreter with `cwd` first on its path, as `python -c` does."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def project() -> dict[str, object]:
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


@pytest.mark.parametrize("cwd", [ROOT, ROOT / "tests"], ids=["root", "tests"])
def test_importing_has_no_side_effects(cwd: Path) -> None:
    """No torch, no change to the environment, to the warning filters or to logging."""
    code = """
import logging, os, sys, warnings
before = dict(os.environ), list(warnings.filters), list(logging.root.handlers), logging.root.level
import lowmem_compile
after = dict(os.environ), list(warnings.filters), list(logging.root.handlers), logging.root.level
print(before == after, sorted({"torch", "numpy", "sympy"} & set(sys.modules)))
"""
    assert run_python(code, cwd) == "True []"


def test_passes_and_kernels_live_inside_the_package() -> None:
    """Even from the repository root, where bare names could be imported, none is."""
    code = """
import sys
import lowmem_compile.kernels, lowmem_compile.passes
print(sorted({"passes", "kernels"} & set(sys.modules)))
print(lowmem_compile.passes.__file__)
print(lowmem_compile.kernels.__file__)
"""
    bare, passes, kernels = run_python(code, ROOT).splitlines()
    assert bare == "[]"
    assert Path(passes) == ROOT / "passes" / "__init__.py"
    assert Path(kernels) == ROOT / "kernels" / "__init__.py"


def test_public_names_are_lazy_and_strict() -> None:
    assert set(lowmem_compile.__all__) <= set(dir(lowmem_compile))
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        lowmem_compile.explian  # noqa: B018


@pytest.mark.parametrize("name", sorted(lowmem_compile.__all__))
def test_public_name_loads(name: str) -> None:
    assert getattr(lowmem_compile, name) is not None


def test_entry_points_are_declared() -> None:
    (backend,) = entry_points(group="torch_dynamo_backends", name="lowmem")
    assert backend.value == "lowmem_compile.backend:lowmem"
    (script,) = entry_points(group="console_scripts", name="lowmem")
    assert script.value == "lowmem_compile.cli:main"


def test_torch_finds_the_backend_without_an_import_of_ours() -> None:
    code = "import sys, torch\nprint('lowmem' in torch._dynamo.list_backends(), 'lowmem_compile' in sys.modules)"
    assert run_python(code, ROOT / "tests") == "True False"


def test_versions_agree() -> None:
    assert project()["version"] == lowmem_compile.__version__
    assert f"\nversion: {lowmem_compile.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert lowmem_compile.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_every_folder_with_python_files_is_a_package() -> None:
    """Or it would be missing from the wheel."""
    folders = {path.parent for path in files_of(PACKAGE_FOLDERS)}
    assert sorted(str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()) == []


def test_wheel_holds_the_whole_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGE_FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Package data of both kinds, whether or not we ship any today.
    for folder in ("lowmem_compile", "kernels"):
        (source / folder / "probe.j2").touch()
    (source / "kernels" / "probe.md").touch()
    run_python("from setuptools import build_meta\nbuild_meta.build_wheel('dist')", source)

    (wheel,) = (source / "dist").glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        "lowmem_compile/probe.j2",
        "lowmem_compile/kernels/probe.j2",
        "lowmem_compile/kernels/probe.md",
    }
    for path in (*files_of(PACKAGE_FOLDERS, (".py", ".typed", ".j2")), *files_of(("kernels",), (".md",))):
        name = path.relative_to(ROOT).as_posix()
        expected.add(name if name.startswith("lowmem_compile/") else f"lowmem_compile/{name}")
    assert held == expected


def test_only_the_door_uses_private_torch() -> None:
    offenders = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files_of(PACKAGE_FOLDERS)
        if path != DOOR
        for name in modules_used(path.read_text())
        if PRIVATE_TORCH.match(name)
    }
    assert sorted(offenders) == []


def test_nothing_imports_a_bare_passes_or_kernels() -> None:
    offenders = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files_of((*PACKAGE_FOLDERS, *OTHER_FOLDERS))
        for name in modules_used(path.read_text())
        if BARE_PACKAGE.match(name)
    }
    assert sorted(offenders) == []


@pytest.mark.parametrize(
    ("source", "pattern", "caught"),
    [
        ("import torch._inductor.config as c", PRIVATE_TORCH, True),
        ("from torch import _dynamo", PRIVATE_TORCH, True),
        ("def f():\n    from torch._functorch.partitioners import x", PRIVATE_TORCH, True),
        ("from torch.fx import _compatibility", PRIVATE_TORCH, True),
        ("from torch.fx.experimental._config import x", PRIVATE_TORCH, True),
        ("import torch\ntorch._dynamo.reset()", PRIVATE_TORCH, True),
        ("import_module('torch._inductor')", PRIVATE_TORCH, True),
        ("import importlib\nimportlib.import_module('torch._inductor')", PRIVATE_TORCH, True),
        ("from torch.fx.passes.shape_prop import ShapeProp", PRIVATE_TORCH, False),
        ("import torch\ntorch.compiler.reset()", PRIVATE_TORCH, False),
        ("'see torch._inductor'", PRIVATE_TORCH, False),
        ("import passes", BARE_PACKAGE, True),
        ("from kernels.gelu import reference", BARE_PACKAGE, True),
        ("import_module('passes.fold')", BARE_PACKAGE, True),
        ("from lowmem_compile.passes import fold", BARE_PACKAGE, False),
        ("import kernels_of_others", BARE_PACKAGE, False),
    ],
)
def test_the_import_checks_catch_what_they_should(source: str, pattern: re.Pattern[str], caught: bool) -> None:
    assert any(pattern.match(name) for name in modules_used(source)) is caught


def test_no_file_mentions_a_path_of_some_machine() -> None:
    top = [path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT and path.name != ".git"]
    offenders = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in (*top, *files_of((*PACKAGE_FOLDERS, *OTHER_FOLDERS), TEXT))
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert offenders == []


@pytest.mark.parametrize("line", ["see {0}home{0}x", "open('{0}root{0}x')", "{0}Users{0}x", "C:{1}Users{1}x"])
def test_the_path_check_catches_what_it_should(line: str) -> None:
    assert MACHINE_PATH.search(line.format("/", "\\"))
    assert not MACHINE_PATH.search("host.example/home/someone ./work/x ../root/y")
