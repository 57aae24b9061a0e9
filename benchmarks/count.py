"""Count the bytes saved for backward, without running a step: eager, Inductor, Inductor with its one flag, lowmem.

    python benchmarks/count.py minilm/bf16/qv smollm2/bf16/full ...
    python benchmarks/count.py --budget 0.25 minilm/bf16/full ...      # lowmem with options={"memory_budget": 0.25}

Each argument is model/precision/mode as in ``run.py``. The figures are those of ``lowmem_compile.explain`` on model and loss
together: the graphs are captured and partitioned, no code is generated. Times and peaks are measured by ``run.py``.
"""

from __future__ import annotations

from typing import Annotated

import typer

import lowmem_compile
from lowmem_compile.demo.models import load
from lowmem_compile.demo.workload import Workload

CONTENDERS = ("eager", "inductor", "one_flag", "lowmem")


def count(workload: Workload, budget: float | None) -> dict[str, int]:
    """Bytes each contender saves for one training step, summed over the graphs; ``budget`` is lowmem's ``memory_budget``."""
    batch = workload.batches[0]

    def loss_of() -> object:
        return workload.forward(workload.model, batch)[0]

    report = lowmem_compile.explain(loss_of, options={"strict": True, "memory_budget": budget})
    return {name: report.saved_bytes(name) or 0 for name in CONTENDERS}


def main(
    cells: Annotated[list[str], typer.Argument(help="model/precision/mode")],
    budget: Annotated[float | None, typer.Option(help="memory_budget of lowmem, a share of Inductor's bytes.")] = None,
) -> None:
    """Print a Markdown table, a row a cell as soon as it is counted."""
    print("| model | precision | trained | tokens | eager | Inductor | one flag | lowmem | of Inductor |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for cell in cells:
        name, precision, mode = cell.split("/")
        workload = load(name, precision=precision, mode=mode)  # type: ignore[arg-type]
        saved = count(workload, budget)
        figures = " | ".join(f"{saved[c] / 2**20:.1f} MiB" for c in CONTENDERS)
        share = saved["lowmem"] / saved["inductor"]
        print(f"| {workload.title} | {precision} | {mode} | {workload.tokens} | {figures} | {share:.3f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
