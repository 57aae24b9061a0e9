"""Run mypy over the package as it is installed, and over the tests and scripts.

``passes/`` and ``kernels/`` are installed as ``lowmem_compile.passes`` and ``lowmem_compile.kernels``. mypy
cannot follow setuptools' package-dir, so this lays the package out with symbolic links and checks that.
Arguments are passed on to mypy; messages name the real files.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = Path(".cache/typecheck")
EXTRA = ("tests", "benchmarks", "examples", "scripts")


def lay_out() -> Path:
    """Link the package's folders into the layout that they are installed in."""
    base = ROOT / LAYOUT
    shutil.rmtree(base, ignore_errors=True)
    package = base / "lowmem_compile"
    package.mkdir(parents=True)
    for source in (*(ROOT / "lowmem_compile").iterdir(), ROOT / "passes", ROOT / "kernels"):
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    return LAYOUT / "lowmem_compile"


def real_names(output: str) -> str:
    """Replace the layout's file names by those of the repository."""
    package = f"{LAYOUT.as_posix()}/lowmem_compile/"
    for folder in ("passes/", "kernels/"):
        output = output.replace(package + folder, folder)
    return output.replace(package, "lowmem_compile/")


def main() -> int:
    """Lay out, check, and return mypy's exit status."""
    targets = [str(lay_out())]
    targets += [name for name in EXTRA if any((ROOT / name).rglob("*.py"))]
    command = [sys.executable, "-m", "mypy", *sys.argv[1:], *targets]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    sys.stdout.write(real_names(done.stdout))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
