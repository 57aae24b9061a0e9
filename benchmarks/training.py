"""Does training end where it would end with exact saved tensors? Inductor, lowmem and lowmem with a budget, several seeds.

    python benchmarks/training.py                                   # MiniLM and SmolLM2, 3 seeds, 200 steps: an hour on a CPU
    python benchmarks/training.py --models minilm --seeds 0 --steps 20
    python benchmarks/training.py --table                           # what is finished

Pretrained models on real text (``lowmem_compile.demo``), full fine-tuning with AdamW under autocast. The learning rate
falls linearly to zero, as ``transformers.Trainer`` has it, and is the same for all; ``--schedule constant`` leaves it as it
is. A seed is an order of the training batches, the same for every variant. Figure: mean loss over batches that were not
trained on, in eager PyTorch, after the last step, and its distance to Inductor's with the same seed, which saves every
tensor exactly. ``--variants eager`` saves them exactly too: its distance is what rounding alone does.

Each result is a line of JSON in ``--output``; a run found there is not repeated. A variant is compiled once for all its seeds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import stdev
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm, trange

from lowmem_compile.demo.cell import Runner
from lowmem_compile.demo.models import load
from lowmem_compile.demo.variants import BASELINE, VARIANTS, Variant, select
from lowmem_compile.demo.workload import Workload, one_of

SIZES = {"minilm": (8, 64), "smollm2": (4, 64)}
"""Rows and length of a batch."""
HELD_OUT, TRAINED = 20, 100
"""Batches; the trained ones are seen in a new order every epoch."""


Schedule = Literal["linear", "constant"]


@dataclass(frozen=True)
class Settings:
    """What every run of a comparison has in common; part of its identity in the results."""

    steps: int
    lr: float
    schedule: Schedule


Key = tuple[str, str, Settings, int]


def key(row: dict[str, Any]) -> Key:
    """Model, variant, settings and seed of a result."""
    return row["model"], row["variant"], Settings(row["steps"], row["lr"], row["schedule"]), row["seed"]


def order(seed: int, steps: int) -> list[int]:
    """The training batch of every step."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps // TRAINED)
    return torch.cat([torch.randperm(TRAINED, generator=generator) for _ in range(epochs)])[:steps].tolist()


@torch.no_grad()
def held_out(workload: Workload, runner: Runner) -> float:
    """Mean loss over the batches behind the trained ones, eager."""
    batches = workload.batches[TRAINED:]
    with workload.autocast():
        return sum(runner.loss_of(batch).item() for batch in batches) / len(batches)


def train(workload: Workload, runner: Runner, settings: Settings, seed: int) -> tuple[float, float]:
    """Train from the pretrained weights; held-out loss before and after."""
    steps = settings.steps
    runner.model.load_state_dict(workload.model.state_dict())
    runner.optimizer = torch.optim.AdamW(workload.parameters(runner.model).values(), lr=settings.lr)
    end = 0.0 if settings.schedule == "linear" else 1.0
    schedule = torch.optim.lr_scheduler.LinearLR(runner.optimizer, start_factor=1.0, end_factor=end, total_iters=steps)
    before = held_out(workload, runner)
    bar = trange(steps, desc=f"{workload.name}, {runner.variant.name}, seed {seed}", mininterval=5, leave=False)
    for _, batch in zip(bar, order(seed, steps), strict=True):
        _, loss = runner.train(batch)
        schedule.step()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return before, held_out(workload, runner)


def finished(output: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def table(rows: list[dict[str, Any]]) -> Table:
    """A line a model and variant: losses by seed, the distances to Inductor's with the same seeds and of the means.

    Behind the means, of more than two seeds: the standard error of the distances.
    """
    made = Table(title="held-out loss, by seed")
    for head in ("model", "variant", "steps, lr", "before", "after", "against Inductor", "means"):
        made.add_column(head)
    by = {key(r): r for r in rows}
    for model, variant, settings in dict.fromkeys(k[:3] for k in by):
        mine = [r for k, r in by.items() if k[:3] == (model, variant, settings)]
        pairs = [(r["after"], e["after"]) for r in mine if (e := by.get((model, BASELINE, settings, r["seed"])))]
        distances = [100 * (r / e - 1) for r, e in pairs]
        distance = ", ".join(f"{d:+.2f} %" for d in distances)
        mean = f"{100 * (sum(r for r, _ in pairs) / sum(e for _, e in pairs) - 1):+.2f} %" if pairs else ""
        if len(pairs) > 2 and variant != BASELINE:
            mean += f" ± {stdev(distances) / len(distances) ** 0.5:.2f}"
        after = ", ".join(f"{r['after']:.4f}" for r in mine)
        run_as = f"{settings.steps}, {settings.lr:g} {settings.schedule}"
        made.add_row(model, variant, run_as, f"{mine[0]['before']:.4f}", after, distance, mean)
    return made


def main(
    models: Annotated[str, typer.Option(help=f"Of {', '.join(SIZES)}.")] = ",".join(SIZES),
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(VARIANTS)}.")] = "inductor,lowmem,lowmem_0.25",
    seeds: str = "0,1,2",
    steps: Annotated[int, typer.Option(min=1)] = 200,
    lr: float = 1e-4,
    schedule: Annotated[Schedule, typer.Option(help="Of the learning rate.")] = "linear",
    output: Annotated[Path, typer.Option(help="JSON-lines file of finished runs.")] = Path(".cache/bench/training.jsonl"),
    only_table: Annotated[bool, typer.Option("--table", help="Print what is finished, run nothing.")] = False,
) -> None:
    """Train what is not in the file, then print the table."""
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = Settings(steps, lr, schedule)
    chosen = select(variants.split(","))
    wanted = [int(seed) for seed in seeds.split(",")]
    cells = [] if only_table else [(one_of("model", model, SIZES), variant) for model in models.split(",") for variant in chosen]
    bar = tqdm(cells, unit="variant", disable=only_table)
    for name, variant in bar:
        done = {key(r) for r in finished(output)}
        todo = [seed for seed in wanted if (name, variant.name, settings, seed) not in done]
        if todo:
            bar.set_description(f"{name}, {variant.label}")
            run(name, variant, todo, settings, output)
    Console(width=150).print(table(finished(output)))


def run(name: str, variant: Variant, seeds: list[int], settings: Settings, output: Path) -> None:
    """Train one model one way, once a seed."""
    rows, length = SIZES[name]
    workload = load(name, precision="autocast", batches=TRAINED + HELD_OUT, rows=rows, length=length)
    runner = Runner(variant, workload, settings.lr)
    for seed in seeds:
        before, after = train(workload, runner, settings, seed)
        row = {"model": name, "variant": variant.name, "seed": seed, **asdict(settings), "before": before, "after": after}
        with output.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    typer.run(main)
