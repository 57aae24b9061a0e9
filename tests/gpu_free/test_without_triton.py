"""Triton is optional: without it everything but its kernels is imported, compiles and runs, and the tests here are skipped."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

HIDE = """
import sys
from importlib.machinery import PathFinder

class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else super().find_spec(name, path, target)

sys.meta_path[:] = [Hidden if f is PathFinder else f for f in sys.meta_path]
"""

IMPORT = """
import importlib, pkgutil
import lowmem_compile, lowmem_compile.kernels, lowmem_compile.passes

for package in (lowmem_compile.kernels, lowmem_compile.passes, lowmem_compile):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        other_extras = module.name.startswith(("lowmem_compile.demo", "lowmem_compile.integrations"))
        if not other_extras and not module.name.endswith(("_triton", ".far_rows")):
            importlib.import_module(module.name)
"""

COMPILE = """
import torch
from lowmem_compile._torch import dry_run
from lowmem_compile.kernels.group_codes import encode_groups

net = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
dry_run(net, [torch.randn(128, 64)], {}, {"strict": True, "report": False})
codes, scales = encode_groups(torch.randn(2, 64), 4, 64, False, None)
try:
    import triton
except ModuleNotFoundError:
    print("hidden", codes.shape)
"""

TEST = """
import pytest

files = [f"tests/gpu_free/{name}.py" for name in ("test_own_kernels", "test_whole_models")]
sys.exit(pytest.main([*files, "-q", "-k", "test_encode or test_exact or compile"]))
"""


def test_everything_else_works_without_triton() -> None:
    """One process for all: most of its time is the import of torch."""
    code = HIDE + IMPORT + COMPILE + TEST
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("hidden torch.Size([2, 32])\n")
    assert re.search(r"^\d+ skipped, \d+ deselected", done.stdout, re.MULTILINE), done.stdout
    assert "no triton: the extra `dev` installs it on Linux x86-64 alone" in done.stdout


@pytest.mark.parametrize(
    ("platform", "machine", "installed"),
    [("linux", "x86_64", True), ("linux", "aarch64", False), ("darwin", "arm64", False), ("win32", "AMD64", False)],
)
def test_triton_is_a_development_tool_where_it_has_wheels(platform: str, machine: str, installed: bool) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any(Requirement(line).name == "triton" for line in project["dependencies"])
    (found,) = [r for r in map(Requirement, project["optional-dependencies"]["dev"]) if r.name == "triton"]
    assert found.marker is not None
    assert found.marker.evaluate({"sys_platform": platform, "platform_machine": machine}) is installed
