"""Measure models x precisions x modes against every rival, and print the table.

Each cell runs in a process of its own; its result is written to a JSON-lines file, and a cell found there is
not measured again. So the command can be interrupted and repeated.

    python benchmarks/run.py                                  # everything
    python benchmarks/run.py --models minilm,smollm2 --modes full --precisions bf16
    python benchmarks/run.py --render-only
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from lowmem_compile import _torch
from lowmem_compile.demo.cell import CellResult, measure_cell
from lowmem_compile.demo.models import MODELS, load
from lowmem_compile.demo.table import cell_table, check, one_line_each, overviews, rivals_ahead
from lowmem_compile.demo.variants import VARIANTS, select
from lowmem_compile.demo.workload import MODES, PRECISIONS, Mode, Precision, one_of

DEFAULT_MODELS = "minilm,smollm2,dinov2,roberta,vit,swin"
ROUNDS = 7
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    models: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}.")] = DEFAULT_MODELS,
    precisions: Annotated[str, typer.Option(help=f"Of {', '.join(PRECISIONS)}.")] = "bf16,autocast",
    modes: Annotated[str, typer.Option(help=f"Of {', '.join(MODES)}.")] = ",".join(MODES),
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(VARIANTS)}.")] = ",".join(VARIANTS),
    rounds: Annotated[int, typer.Option(help="Timed training steps of each variant.", min=1)] = ROUNDS,
    results: Annotated[Path, typer.Option(help="JSON-lines file of finished cells.")] = Path(".cache/bench/cells.jsonl"),
    output: Annotated[Path | None, typer.Option(help="Write the Markdown here too.")] = None,
    *,
    again: Annotated[bool, typer.Option(help="Measure cells anew that are in the file.")] = False,
    render_only: Annotated[bool, typer.Option(help="Measure nothing.")] = False,
    details: Annotated[bool, typer.Option(help="Print the full table of every cell.")] = False,
    brief: Annotated[
        bool, typer.Option(help="Print one table: a row a cell, eager, the one flag, lowmem and its budget of 0.25.")
    ] = False,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure cells, then print the table and the check of what was asked."""
    if one is not None:
        _measure_one(one, _names(variants), rounds, results)
        return
    wanted = [
        f"{m}/{p}/{d}"
        for m in (one_of("model", name, MODELS) for name in _names(models))
        for p in (one_of("precision", name, PRECISIONS) for name in _names(precisions))
        for d in (one_of("mode", name, MODES) for name in _names(modes))
    ]
    select(_names(variants))
    failed: list[str] = []
    if not render_only:
        done = {} if again else _finished(results)
        todo = [key for key in wanted if key not in done]
        failed = _measure_all(todo, variants, rounds, results)
    finished = _finished(results)
    cells = [finished[key] for key in wanted if key in finished]
    text = "\n\n".join((one_line_each(cells), check(cells))) if brief else render(cells, details=details)
    print(text)
    if output is not None:
        output.write_text(text + "\n")
    for key in failed:
        print(f"FAILED: {key} (its process ended without a result)", file=sys.stderr)
    broken = [f"{c.key} {v.name}" for c in cells for v in c.variants if v.error]
    for name in broken:
        print(f"FAILED: {name}", file=sys.stderr)
    if failed or broken:
        raise typer.Exit(1)


def render(cells: list[CellResult], *, details: bool) -> str:
    """The Markdown of all cells."""
    if not cells:
        return "No cell has been measured."
    parts = [overviews(cells), rivals_ahead(cells), check(cells)]
    if details:
        parts += [cell_table(cell) for cell in cells]
    return "\n\n".join(parts)


def _measure_all(todo: list[str], variants: str, rounds: int, results: Path) -> list[str]:
    """Run each cell in its own process; returns the keys of those that gave no result."""
    results.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    bar = tqdm(todo, unit="cell", disable=not todo)
    for key in bar:
        bar.set_description(key)
        command = [sys.executable, __file__, "--one", key, "--variants", variants, "--rounds", str(rounds)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([*command, "--results", str(results)], env=environment, check=False)
        if done.returncode:
            failed.append(key)
    return failed


def _measure_one(key: str, variants: list[str], rounds: int, results: Path) -> None:
    """Measure one cell in this process and append its result to the file."""
    model, precision, mode = _split(key)
    workload = load(model, precision=precision, mode=mode, batches=rounds)
    chosen = select(variants)
    steps = tqdm(total=len(chosen) + 1 + rounds, leave=False, unit="step", position=1)

    def progress(what: str) -> None:
        steps.set_description(f"{key}: {what}")
        steps.update()

    with _torch.without_graph_caches():
        cell, _ = measure_cell(workload, chosen, progress=progress)
    steps.close()
    with results.open("a") as file:
        file.write(json.dumps(cell.to_json()) + "\n")


def _split(key: str) -> tuple[str, Precision, Mode]:
    model, precision, mode = key.split("/")
    return model, one_of("precision", precision, PRECISIONS), one_of("mode", mode, MODES)


def _finished(results: Path) -> dict[str, CellResult]:
    """The cells in the file; the last result of each counts."""
    if not results.exists():
        return {}
    cells = (CellResult.from_json(json.loads(line)) for line in results.read_text().splitlines() if line)
    return {cell.key: cell for cell in cells}


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    app()
