"""Does training end where it would end with exact saved tensors? Inductor, lowmem and lowmem with a budget, several seeds.

    python benchmarks/training.py                                   # MiniLM and SmolLM2, 3 seeds, 200 steps: an hour on a CPU
    python benchmarks/training.py --models minilm --seeds 0 --steps 20
    python benchmarks/training.py --table                           # what is finished

Pretrained models on real text (``lowmem_compile.demo``), full fine-tuning with AdamW under autocast, one learning rate for all. A
seed is an order of the training batches, the same for every variant. Figure: mean loss over batches that were not trained on, in
eager PyTorch, after the last step, and its distance to Inductor's with the same seed, which saves every tensor exactly.

Each result is a line of JSON in ``--output``; a run found there is not repeated. A variant is compiled once for all its seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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


def train(workload: Workload, runner: Runner, lr: float, steps: int, seed: int) -> tuple[float, float]:
    """Train from the pretrained weights; held-out loss before and after."""
    runner.model.load_state_dict(workload.model.state_dict())
    runner.optimizer = torch.optim.AdamW(workload.parameters(runner.model).values(), lr=lr)
    before = held_out(workload, runner)
    bar = trange(steps, desc=f"{workload.name}, {runner.variant.name}, seed {seed}", mininterval=5, leave=False)
    for _, batch in zip(bar, order(seed, steps), strict=True):
        _, loss = runner.train(batch)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return before, held_out(workload, runner)


def finished(output: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def table(rows: list[dict[str, Any]]) -> Table:
    """A line a model and variant: losses by seed, and the distance to Inductor's with the same seed."""
    made = Table(title="held-out loss, by seed")
    for head in ("model", "variant", "steps", "lr", "before", "after", "against Inductor"):
        made.add_column(head)
    by = {(r["model"], r["variant"], r["steps"], r["lr"], r["seed"]): r for r in rows}
    for model, variant, steps, lr in dict.fromkeys(key[:4] for key in by):
        mine = [r for key, r in by.items() if key[:4] == (model, variant, steps, lr)]
        exact = [by.get((model, BASELINE, steps, lr, r["seed"])) for r in mine]
        distance = [f"{100 * (r['after'] / e['after'] - 1):+.2f} %" for r, e in zip(mine, exact, strict=True) if e]
        after = ", ".join(f"{r['after']:.4f}" for r in mine)
        made.add_row(model, variant, str(steps), f"{lr:g}", f"{mine[0]['before']:.4f}", after, ", ".join(distance))
    return made


def main(
    models: Annotated[str, typer.Option(help=f"Of {', '.join(SIZES)}.")] = ",".join(SIZES),
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(VARIANTS)}.")] = "inductor,lowmem,lowmem_0.25",
    seeds: str = "0,1,2",
    steps: Annotated[int, typer.Option(min=1)] = 200,
    lr: float = 1e-4,
    output: Annotated[Path, typer.Option(help="JSON-lines file of finished runs.")] = Path(".cache/bench/training.jsonl"),
    only_table: Annotated[bool, typer.Option("--table", help="Print what is finished, run nothing.")] = False,
) -> None:
    """Train what is not in the file, then print the table."""
    output.parent.mkdir(parents=True, exist_ok=True)
    chosen = select(variants.split(","))
    wanted = [int(seed) for seed in seeds.split(",")]
    cells = [] if only_table else [(one_of("model", model, SIZES), variant) for model in models.split(",") for variant in chosen]
    bar = tqdm(cells, unit="variant", disable=only_table)
    for name, variant in bar:
        done = {(r["model"], r["variant"], r["seed"], r["steps"], r["lr"]) for r in finished(output)}
        todo = [seed for seed in wanted if (name, variant.name, seed, steps, lr) not in done]
        if todo:
            bar.set_description(f"{name}, {variant.label}")
            run(name, variant, todo, steps, lr, output)
    Console(width=150).print(table(finished(output)))


def run(name: str, variant: Variant, seeds: list[int], steps: int, lr: float, output: Path) -> None:
    """Train one model one way, once a seed."""
    rows, length = SIZES[name]
    workload = load(name, precision="autocast", batches=TRAINED + HELD_OUT, rows=rows, length=length)
    runner = Runner(variant, workload, lr)
    for seed in seeds:
        before, after = train(workload, runner, lr, steps, seed)
        row = {"model": name, "variant": variant.name, "seed": seed, "steps": steps, "lr": lr, "before": before, "after": after}
        with output.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    typer.run(main)
