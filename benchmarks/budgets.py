"""Bytes and peak over budgets, lowmem's beside Inductor's own, without running a step.

    python benchmarks/budgets.py                                   # the six models, bf16, full fine-tuning
    python benchmarks/budgets.py minilm/bf16/qv --layers 2
    python benchmarks/budgets.py vit/bf16/full --layers 2 --code   # also peaks of the code that Inductor generates

A cell is model/precision/mode as in ``run.py``; model and loss are compiled together. ``memory_budget`` of lowmem is a share of
the bytes that Inductor saves by default; ``activation_memory_budget`` of Inductor is what PyTorch makes of it. Printed of each
point: bytes kept for backward, peak and extra time as the planner estimates them, by one model for both; and of each cell

- whether every budget was met, and whether the peak never rises as the budget falls (by more than the planner's 3 %);
- whether lowmem keeps fewer bytes, and has a lower peak, than each of Inductor's points at no more estimated time (2 % of a step,
  what the default may cost, count as none).

Each cell is a line of JSON in ``--output``; a cell found there is not computed again.
"""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

import lowmem_compile
from lowmem_compile.demo.models import load
from lowmem_compile.demo.workload import Workload
from lowmem_compile.planner.plan import SLACK
from lowmem_compile.reporting.model import GraphReport, Report

CELLS = [f"{m}/bf16/full" for m in ("minilm", "smollm2", "dinov2", "roberta", "vit", "swin")]
SHOWN = (1.0, 0.7, 0.5, 0.35, 0.25)
FREE = 0.02


def curve(workload: Workload, *, code: bool) -> dict[str, Any]:
    """The points of the one training graph; ``code``: also lowmem's peaks by the generated code, a budget a time."""
    batch = workload.batches[0]

    def loss() -> object:
        return workload.forward(workload.model, batch)[0]

    graph = largest(lowmem_compile.explain(loss, curve=True))
    points = [p.to_dict() for p in graph.curve]
    if code:
        for point in tqdm(points, desc="generating code", leave=False):
            if point["contender"] == "lowmem" and point["budget"] in SHOWN:
                told = lowmem_compile.explain(loss, options={"memory_budget": point["budget"]}, schedule=True)
                point["code"] = largest(told).peak("lowmem")
    return {"points": points}


def largest(report: Report) -> GraphReport:
    """The graph that keeps most: the model's, where a loss beside it is a graph of its own."""
    return max(report.training_graphs, key=lambda g: g.saved_bytes("inductor") or 0)


def judged(points: list[dict[str, Any]]) -> list[str]:
    """What is asked of the curves, in words."""
    lowmem = sorted((p for p in points if p["contender"] == "lowmem" and p["budget"]), key=lambda p: -p["budget"])
    inductor = [p for p in points if p["contender"] == "inductor"]
    default = next(p for p in inductor if p["budget"] is None)
    missed = [p["budget"] for p in lowmem if p["saved"] > p["budget"] * default["saved"]]
    found = [f"lowest budget planned {lowmem[-1]['budget']:g}" if not missed else f"MISSED: {missed}"]
    for key, name in (("peak", "estimated peak"), ("code", "peak of the code")):
        peaks = [p[key] for p in lowmem if key in p]
        if len(peaks) > 1:
            rises = [b / a for a, b in itertools.pairwise(peaks) if b > a]
            highest = max((b / min(peaks[: i + 1]) for i, b in enumerate(peaks[1:])), default=1.0)
            ok = highest <= SLACK
            found.append(f"{name} {'monotone' if ok else 'NOT MONOTONE'}, {len(rises)} rises, highest {highest:.3f}")
    for key, name in (("saved", "bytes"), ("peak", "peak")):
        above = []
        for rival in inductor:
            mine = [p[key] for p in points if p["contender"] == "lowmem" and p["time"] <= rival["time"] + FREE]
            if not mine or min(mine) > rival[key]:
                above.append(rival["budget"] or 1.0)
        found.append(f"{name} {'below Inductor at every time' if not above else f'ABOVE Inductor at its budgets {above}'}")
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a cell and contender, a column a budget."""
    lines = [f"| cell | | {' | '.join(f'{b:g}' for b in SHOWN)} |", f"|{' --- |' * (2 + len(SHOWN))}"]
    notes = []
    for result in results:
        default = next(p for p in result["points"] if p["contender"] == "inductor" and p["budget"] is None)
        for name in ("inductor", "lowmem"):
            row = []
            for budget in SHOWN:
                asked = None if name == "inductor" and budget == 1.0 else budget
                p = next((q for q in result["points"] if q["contender"] == name and q["budget"] == asked), None)
                code = "" if p is None or "code" not in p else f" ({p['code'] / 2**20:.1f})"
                row.append("-" if p is None else f"{p['saved'] / default['saved']:.3f}, {p['peak'] / 2**20:.1f}{code} MiB")
            lines.append(f"| {result['cell']}, {result['layers'] or 'default'} layers | {name} | {' | '.join(row)} |")
        notes.append(f"- {result['cell']}: {'; '.join(judged(result['points']))}")
    return "\n".join([*lines, "", *notes])


def main(
    cells: Annotated[list[str] | None, typer.Argument(help="model/precision/mode; the six models in bf16 by default.")] = None,
    layers: Annotated[int, typer.Option(help="Blocks of each model; 0 for the benchmark's number.")] = 0,
    output: Annotated[Path, typer.Option(help="JSON-lines file of results.")] = Path(".cache/bench/budgets.jsonl"),
    *,
    code: Annotated[bool, typer.Option(help="Generate Inductor's code for each of lowmem's budgets.")] = False,
) -> None:
    """Compute what is not in the file yet, and print the table."""

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []

    done = {(r["cell"], r["layers"], r["code"]) for r in read()}
    output.parent.mkdir(parents=True, exist_ok=True)
    for cell in (bar := tqdm([c for c in cells or CELLS if (c, layers, code) not in done])):
        bar.set_description(cell)
        model, precision, mode = cell.split("/")
        workload = load(model, precision=precision, mode=mode, layers=layers or None)
        result = {"cell": cell, "layers": layers, "code": code, **curve(workload, code=code)}
        with output.open("a") as file:
            file.write(json.dumps(result) + "\n")
    print(table(read()))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="torch")
    typer.run(main)
