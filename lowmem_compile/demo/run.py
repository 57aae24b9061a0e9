"""``lowmem demo``: fine-tune real pretrained models on real text, eager, Inductor and lowmem side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from lowmem_compile import _torch
from lowmem_compile.api import report
from lowmem_compile.demo.cell import CellResult, VariantResult, measure_cell
from lowmem_compile.demo.models import load
from lowmem_compile.demo.table import cell_table
from lowmem_compile.demo.variants import select
from lowmem_compile.demo.workload import Mode, Precision, Workload
from lowmem_compile.errors import LowMemError
from lowmem_compile.reporting import write_html
from lowmem_compile.reporting.units import format_bytes, format_change

DEMO_MODELS = ("minilm", "smollm2")
DEMO_VARIANTS = ("eager", "inductor", "lowmem")
_ABOUT = {
    "minilm": "all-MiniLM-L6-v2 (LayerNorm, GELU) learns which paragraphs of the Python manual go together",
    "smollm2": "SmolLM2-135M (RMSNorm, SwiGLU) learns to write the Python manual",
}


@dataclass(frozen=True)
class DemoResult:
    """One model's figures and the HTML report that was written."""

    cell: CellResult
    html: Path


def demo(
    *,
    folder: Path,
    models: Sequence[str] = DEMO_MODELS,
    steps: int = 5,
    layers: int | None = None,
    precision: Precision = "autocast",
    mode: Mode = "full",
    console: Console | None = None,
) -> list[DemoResult]:
    """Train each model a few steps in each way, print the figures and write a report.

    Args:
        folder: where the HTML reports and the Markdown table go; made if it is not there.
        models: names in :data:`lowmem_compile.demo.models.MODELS`.
        steps: training steps of each variant.
        layers: blocks of each model; its default where None, all where 0.
        precision: ``"bf16"``, ``"autocast"`` or ``"fp32"``.
        mode: ``"full"``, ``"qv"`` or ``"all"``.
        console: where to print.

    Raises:
        LowMemError: an unknown model, or a variant that failed.
        MissingPackageError: a package is not installed.
    """
    console = console or Console()
    console.print(
        f"[bold]lowmem demo[/bold]: {', '.join(models)}; {steps} training steps, three ways side by side. "
        "Nothing is downloaded; each first step compiles."
    )
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for name in models:
        result = _one_model(name, folder, steps, layers, precision, mode, console)
        results.append(result)
        (folder / "table.md").write_text("\n\n".join(cell_table(r.cell) for r in results) + "\n")
    console.print(f"The same figures as Markdown: {folder / 'table.md'}")
    return results


def _one_model(
    name: str,
    folder: Path,
    steps: int,
    layers: int | None,
    precision: Precision,
    mode: Mode,
    console: Console,
) -> DemoResult:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    variants = select(list(DEMO_VARIANTS))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{name}: loading weights and text", total=len(variants) + steps + 2)

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=f"{name}: {what}")

        workload = load(name, precision=precision, mode=mode, layers=layers, batches=steps)
        progress.print(_introduction(workload))
        with _torch.without_graph_caches():
            cell, runners = measure_cell(workload, variants, progress=advance)
    for variant in cell.variants:
        if variant.error is not None:
            raise LowMemError(f"{variant.label} failed on {name}:\n{variant.error}")
    html = write_html(report(runners["lowmem"].model), folder / f"{name}.html")
    console.print(_table(cell))
    console.print(_sentence(cell))
    console.print(f"What was kept, what went, and why: [link={html.resolve().as_uri()}]{html}[/link]\n")
    return DemoResult(cell, html)


def _introduction(workload: Workload) -> str:
    blocks: int = workload.model.config.num_hidden_layers  # type: ignore[union-attr, assignment]
    lines = [_ABOUT.get(workload.name, workload.title)]
    size = f"{blocks} layers, {workload.tokens} tokens a step, {workload.precision}, {workload.mode} fine-tuning"
    if workload.whole_layers is not None and blocks < workload.whole_layers:
        size += f" (cut from {workload.whole_layers} layers to keep the demo short, so its loss starts high)"
    return "\n".join([*lines, f"  {size}"])


def _table(cell: CellResult) -> Table:
    title = f"{cell.title}, {cell.mode} fine-tuning, {cell.precision}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)  # fits a terminal of 80 columns
    table.caption = "Step time: of Inductor's, median of paired ratios, 90 % interval. Gradient: to float32's."
    table.caption_justify = "left"
    table.add_column("")
    for heading in (
        "kept for\nbackward",
        "peak of\na step",
        "step\ntime",
        "gradient\ncosine",
        "loss,\nfirst",
        "loss,\nlast step",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in DEMO_VARIANTS:
        v = cell.variant(name)
        if v is not None:
            table.add_row(v.label, *_row(v), style="bold" if name == "lowmem" else None)
    return table


def _row(v: VariantResult) -> list[str]:
    assert v.saved is not None
    assert v.peak is not None
    assert v.ratio is not None
    return [
        format_bytes(v.saved),
        format_bytes(v.peak),
        f"{v.ratio:.2f}\n{v.ratio_low:.2f}–{v.ratio_high:.2f}",
        f"{v.cosine:.5f}",
        f"{v.losses[0]:.4f}",
        f"{v.losses[-1]:.4f}",
    ]


def _sentence(cell: CellResult) -> str:
    """The outcome in words: what is kept against eager and Inductor."""
    ours, parts = cell.variant("lowmem"), []
    assert ours is not None
    for name in ("eager", "inductor"):
        rival = cell.variant(name)
        assert rival is not None
        kept, peak = (_change(getattr(ours, what), getattr(rival, what)) for what in ("saved", "peak"))
        parts.append(f"{kept} kept and {peak} peak against {rival.label}")
    return f"lowmem: {'; '.join(parts)}. Peak counts gradients too, which every way needs."


def _change(ours: int | None, theirs: int | None) -> str:
    assert ours is not None
    assert theirs is not None
    return format_change(ours, theirs)
