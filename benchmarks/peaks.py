"""Simulated against measured peak of a training step, cell by cell.

    python benchmarks/peaks.py --layers 2                                 # the six models, bf16, full fine-tuning
    python benchmarks/peaks.py minilm/bf16/qv roberta/autocast/full --settings inductor,default
    python benchmarks/peaks.py --layers 2 --stub-kernels                  # generated loops do nothing: much faster

A cell is model/precision/mode as in ``run.py``; model and loss are compiled together. *Estimated* is what the planner goes by,
from the graphs alone; *simulated* is by the code that Inductor generated (``report(...)``, :mod:`lowmem_compile.planner.replay`);
*measured* is the CPU allocator's peak over one step. Generated loops allocate nothing, so that stubs for them leave
the allocator's peak as it is.

Each result is a line of JSON in ``--output``; what is found there is not measured again.
"""

from __future__ import annotations

import contextlib
import gc
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

import lowmem_compile
from lowmem_compile import _torch
from lowmem_compile.demo.cell import Runner
from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.demo.models import load
from lowmem_compile.demo.variants import VARIANTS, Variant
from lowmem_compile.demo.workload import Workload, one_of
from lowmem_compile.planner.generated import followed
from lowmem_compile.planner.replay import Code, replay
from lowmem_compile.reporting.model import GraphReport, Phase, Report

CELLS = [f"{m}/bf16/full" for m in ("minilm", "smollm2", "dinov2", "roberta", "vit", "swin")]
SETTINGS = {
    "inductor": VARIANTS["inductor"],
    "default": VARIANTS["lowmem"],
    "0.25": VARIANTS["lowmem_0.25"],
    "exact": VARIANTS["lowmem_exact"],
}


class _Stub:
    """In place of Inductor's C++ compiler: loops that do nothing, except that indices they would write are 0."""

    def __getattr__(self, _kind: str) -> Callable[..., Callable[..., None]]:
        return lambda *_args, **_kwargs: self.loop

    @staticmethod
    def loop(*args: Any) -> None:
        for tensor in args:
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.int64, torch.int32):
                tensor.zero_()

    def wait(self, _scope: dict[str, Any]) -> None:
        """Nothing to wait for."""


class Inductor:
    """A backend that compiles with Inductor and keeps the generated code of training graphs."""

    def __init__(self) -> None:
        self.codes: list[tuple[Phase, Code | None]] = []
        self.frames: list[str] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.frames.append(_torch.compiled_frame())
        return _torch.compile_fx(gm, example_inputs, inner_compile=followed(lambda *found: self.codes.append(found)))

    def report(self) -> Report:
        """Timelines of all graphs; a graph's backward is compiled right behind its forward."""
        pairs = zip(self.frames, self.codes[::2], self.codes[1::2], strict=True)
        graphs = [
            GraphReport(str(i), "training", timelines={"inductor": replay(forward, backward)}, frame=frame)
            for i, (frame, (_, forward), (_, backward)) in enumerate(pairs)
        ]
        return Report(tuple(graphs))


def measure(workload: Workload, variant: Variant) -> dict[str, int | None]:
    """Bytes: estimated, simulated and measured peak of one step."""
    torch._dynamo.reset()
    gc.collect()
    runner = Runner(variant, workload, 1e-5)
    inductor = Inductor()
    if variant.kind == "inductor":
        runner.call = torch.compile(runner.loss_of, backend=inductor)
    for _ in range(2):  # some models change their configuration in the first step, and are compiled again
        runner.step()
    runner.optimizer.zero_grad(set_to_none=True)
    with variant.active():
        measured = peak_bytes(lambda: runner.forward()[0])
    if variant.kind == "inductor":
        report = inductor.report()
        return {"estimated": None, "simulated": report.step_peak("inductor"), "measured": measured.peak}
    report = lowmem_compile.report(runner.call)
    frames = {g.frame for g in report.training_graphs}
    return {
        "estimated": report.training_graphs[-1].estimated.get("lowmem") if len(frames) == 1 else None,
        "simulated": report.step_peak("lowmem") if all("lowmem" in g.estimated for g in report.training_graphs) else None,
        "measured": measured.peak,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: simulated over measured peak, a row a cell; the measured peaks in a second table."""
    names = [n for n in SETTINGS if any(r["setting"] == n for r in results)]
    cells = list(dict.fromkeys((r["cell"], r["layers"], r["stubs"]) for r in results))
    found = {(r["cell"], r["layers"], r["stubs"], r["setting"]): r for r in results}
    head = ["cell", "layers", "loops", *names]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]

    def figure(r: dict[str, Any] | None) -> str:
        if r is None:
            return "-"
        if r["simulated"] is None:
            return "not replayed"
        estimate = "" if r["estimated"] is None else f" ({r['estimated'] / r['measured']:.3f})"
        return f"{r['simulated'] / r['measured']:.4f}{estimate} of {r['measured'] / 2**20:.1f} MiB"

    for key in cells:
        cell, layers, stubs = key
        row = [cell, str(layers or "default"), "stubs" if stubs else "real", *(figure(found.get((*key, n))) for n in names)]
        lines.append(f"| {' | '.join(row)} |")
    known = [r["simulated"] / r["measured"] for r in results if r["simulated"] is not None]
    if known:
        lines += ["", f"{len(known)} peaks; simulated over measured {min(known):.4f} to {max(known):.4f}."]
    return "\n".join(lines)


def read(path: Path) -> list[dict[str, Any]]:
    """Results that were measured before."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.contextmanager
def kernels(*, stubs: bool) -> Iterator[None]:
    """Compile anew, with generated loops or stubs for them."""
    with _torch.without_graph_caches(), _torch.stub_kernels(_Stub) if stubs else contextlib.nullcontext():
        yield


def main(
    cells: Annotated[list[str] | None, typer.Argument(help="model/precision/mode; the six models in bf16 by default.")] = None,
    settings: Annotated[str, typer.Option(help=f"Of {', '.join(SETTINGS)}.")] = ",".join(SETTINGS),
    layers: Annotated[int, typer.Option(help="Blocks of each model; 0 for the benchmark's number.")] = 0,
    output: Annotated[Path, typer.Option(help="JSON-lines file of results.")] = Path(".cache/bench/peaks.jsonl"),
    *,
    stub_kernels: Annotated[bool, typer.Option(help="Stubs in place of the generated loops.")] = False,
    render_only: Annotated[bool, typer.Option(help="Measure nothing.")] = False,
) -> None:
    """Measure what is not in the file yet, and print the table."""
    names = [one_of("setting", name.strip(), SETTINGS) for name in settings.split(",")]
    cells = cells or CELLS
    done = {(r["cell"], r["layers"], r["stubs"], r["setting"]) for r in read(output)}
    todo = [(c, n) for c in cells for n in names if (c, layers, stub_kernels, n) not in done]
    output.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm([] if render_only else todo)
    for cell, name in bar:
        bar.set_description(f"{cell} {name}")
        model, precision, mode = cell.split("/")
        workload = load(model, precision=precision, mode=mode, layers=layers or None)
        with kernels(stubs=stub_kernels):
            found = measure(workload, SETTINGS[name])
        with output.open("a") as file:
            file.write(json.dumps({"cell": cell, "layers": layers, "stubs": stub_kernels, "setting": name, **found}) + "\n")
    print(table(read(output)))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="torch")
    typer.run(main)
