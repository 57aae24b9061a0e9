"""Fine-tune a pretrained model with AdamW, COAP, GaLore and Fira on the same text: held-out losses, several seeds, one table.

    python benchmarks/projected_quality.py                       # learning rates swept, then 3 seeds: hours on a CPU
    python benchmarks/projected_quality.py --table               # what is finished
    python benchmarks/projected_quality.py --steps 20 --sweep-steps 5 --seeds 0 --rates 1e-3

SmolLM2-135M cut to 6 layers (`lowmem_compile.demo.weights`), float32, dropout off. Text: Python's language reference
(``pydoc_data.topics``); the last tenth is held out. The vocabulary is cut to the tokens that occur in the text, embedding (the
head) with it: all methods train the same smaller model. Linears of the layers are projected at rank width / 4, the rest gets
each method's base update (AdamW), at AdamW's own best rate (``--rest-rate``): the embedding is a large part of the parameters,
and a rate that suits projected linears is too high for it. The learning rate rises over a tenth of the steps and falls to a tenth
along a cosine. Its peak is the best of ``--rates`` for each method, by held-out loss after a sweep of ``--sweep-steps`` with a
seed of its own. Windows of a step depend on the seed and the step alone, so all methods see the same batches.

Results are lines of JSON in ``--output``, one a run; a run that is found there is not repeated. A run that is cut short goes on
from a checkpoint beside it.
"""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import trange

from lowmem_compile import optim
from lowmem_compile.demo import weights
from lowmem_compile.demo.data import corpus

METHODS = ("adamw", "coap", "galore", "fira")
SWEEP_SEED = 99
"""Windows of the sweep are not those of a run."""


@dataclass(frozen=True)
class Cell:
    """A run: all that decides its result."""

    method: str
    seed: int
    lr: float
    steps: int
    rows: int
    length: int
    layers: int
    ratio: int
    interval: int
    scale: float
    rest_rate: float | None = None
    """Of what is not projected; ``None``: as the rest."""

    @property
    def name(self) -> str:
        """A name for its checkpoint and its progress bar."""
        rates = f"{self.lr:g}-{self.rest_rate or self.lr:g}"
        return f"{self.method}-seed{self.seed}-lr{rates}-{self.steps}x{self.rows}x{self.length}-{self.layers}layers"


class Task:
    """The text as token ids of a smaller vocabulary, and the model with that vocabulary."""

    def __init__(self, layers: int) -> None:
        ids = torch.tensor(weights.smollm2_tokenizer().encode(corpus(), add_special_tokens=False))
        tokens, text = ids.unique(return_inverse=True)
        cut = len(text) * 9 // 10
        self.train, self.held_out = text[:cut], text[cut:]
        model: Any = weights.smollm2(layers=layers, keep_dropout=False)
        table = model.get_input_embeddings().weight.detach()[tokens].clone()
        model.set_input_embeddings(nn.Embedding.from_pretrained(table, freeze=False))
        model.lm_head = nn.Linear(table.shape[1], len(tokens), bias=False)
        model.lm_head.weight = model.get_input_embeddings().weight
        model.config.vocab_size, model.config.use_cache = len(tokens), False
        self.pretrained = model.train()

    def model(self) -> Any:
        """A copy of the pretrained model, rows of other tokens taken out."""
        return copy.deepcopy(self.pretrained)


class Run:
    """A cell at some step."""

    def __init__(self, cell: Cell, task: Task) -> None:
        self.cell, self.task, self.step, self.seconds = cell, task, 0, 0.0
        self.model = task.model()
        self.optimizer = make_optimizer(cell, self.model)

    def windows(self, text: Tensor, seed: int, rows: int) -> Tensor:
        """Random windows of a text, int64 [rows, length]."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text) - self.cell.length, (rows,), generator=generator)
        return torch.stack([text[s : s + self.cell.length] for s in starts.tolist()])

    def schedule(self) -> float:
        """The current step's share of the peak learning rate."""
        warm = max(self.cell.steps // 10, 1)
        if self.step < warm:
            return (self.step + 1) / warm
        turn = math.pi * (self.step - warm) / max(self.cell.steps - warm, 1)
        return 0.1 + 0.45 * (1 + math.cos(turn))

    def advance(self) -> float:
        """One step; its loss."""
        started = time.perf_counter()
        ids = self.windows(self.task.train, 10_000 * (self.cell.seed + 1) + self.step, self.cell.rows)
        for group in self.optimizer.param_groups:
            projected = any(group.get(key) is not None for key in ("rank", "rank_ratio"))
            group["lr"] = self.schedule() * (self.cell.lr if projected or self.cell.rest_rate is None else self.cell.rest_rate)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - started
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean held-out loss over 64 fixed windows, in nats a token."""
        parts = self.windows(self.task.held_out, 7, 64).split(8)
        return sum(float(self.model(input_ids=part, labels=part).loss) for part in parts) / len(parts)

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        state: dict[str, Any] = {"step": self.step, "seconds": self.seconds}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def make_optimizer(cell: Cell, model: nn.Module) -> torch.optim.Optimizer:
    """The cell's method."""
    if cell.method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=cell.lr, weight_decay=0.0)
    kinds: dict[str, Any] = {"coap": optim.COAP, "galore": optim.GaLore, "fira": optim.Fira}
    groups = optim.split(model, rank_ratio=cell.ratio, include=["*attn*", "*mlp*"]).groups
    interval: dict[str, int] = {} if cell.method == "coap" else {"update_interval": cell.interval}
    made: torch.optim.Optimizer = kinds[cell.method](groups, cell.lr, scale=cell.scale, **interval)
    return made


def done(output: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def run(cell: Cell, task: Task, output: Path, save_every: int) -> dict[str, Any]:
    """Run a cell, or go on with it, unless its result is there."""
    for row in done(output):
        if all(row[key] == value for key, value in asdict(cell).items()):
            return row
    current, checkpoint = Run(cell, task), output.parent / f"{cell.name}.pt"
    if checkpoint.exists():
        current.load(checkpoint)
    first = current.evaluate() if not current.step else None
    bar = trange(
        current.step, cell.steps, initial=current.step, total=cell.steps, desc=cell.name, mininterval=5, dynamic_ncols=True
    )
    loss = math.nan
    for _ in bar:
        loss = current.advance()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if current.step % save_every == 0 and current.step < cell.steps:
            current.save(checkpoint)
    row = {**asdict(cell), "held_out": current.evaluate(), "first": first, "loss": loss, "seconds": current.seconds}
    with output.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    checkpoint.unlink(missing_ok=True)
    return row


def best_rate(rows: list[dict[str, Any]]) -> float:
    """The learning rate of the run with the least held-out loss; a loss that is not a number counts as infinite."""
    return float(min(rows, key=lambda r: r["held_out"] if math.isfinite(r["held_out"]) else math.inf)["lr"])


def table(rows: list[dict[str, Any]], steps: int) -> Table:
    """Held-out loss of each method over seeds, and against AdamW and GaLore on the same seeds."""
    made = Table(title=f"held-out loss after {steps} steps")
    for head in ("method", "lr", "seeds", "held-out loss", "against AdamW", "against GaLore", "s/step"):
        made.add_column(head)
    by = {(r["method"], r["seed"]): r for r in rows if r["steps"] == steps and r["seed"] != SWEEP_SEED}
    for method in METHODS:
        mine = {seed: r for (m, seed), r in by.items() if m == method}
        if not mine:
            continue

        def against(other: str, mine: dict[int, dict[str, Any]] = mine) -> str:
            pairs = [(r["held_out"], by[other, s]["held_out"]) for s, r in mine.items() if (other, s) in by]
            return ", ".join(f"{100 * (a / b - 1):+.2f} %" for a, b in pairs)

        losses = ", ".join(f"{r['held_out']:.4f}" for r in mine.values())
        rates = ", ".join(dict.fromkeys(f"{r['lr']:g}" for r in mine.values()))
        speed = sum(r["seconds"] / r["steps"] for r in mine.values()) / len(mine)
        made.add_row(method, rates, ", ".join(map(str, mine)), losses, against("adamw"), against("galore"), f"{speed:.2f}")
    return made


def main(
    methods: Annotated[str, typer.Option(help=f"of {', '.join(METHODS)}")] = ",".join(METHODS),
    seeds: str = "0,1,2",
    steps: int = 300,
    rates: Annotated[str, typer.Option(help="peak learning rates that are tried")] = "5e-4,1e-3,2e-3,4e-3",
    sweep_steps: int = 100,
    rows: int = 4,
    length: int = 64,
    layers: int = 6,
    ratio: Annotated[int, typer.Option(help="rank is the smaller dimension of a weight divided by it")] = 4,
    interval: Annotated[int, typer.Option(help="steps between bases of GaLore and Fira")] = 100,
    scale: float = 1.0,
    rest_rate: Annotated[float | None, typer.Option(help="of what is not projected; default: AdamW's best of --rates")] = None,
    save_every: int = 100,
    output: Path = Path("benchmarks/results/quality/runs.jsonl"),
    only_table: Annotated[bool, typer.Option("--table", help="print what is finished, run nothing")] = False,
) -> None:
    """Sweep, run, print."""
    names, tried = methods.split(","), [float(r) for r in rates.split(",")]
    for name in names:
        if name not in METHODS:
            raise typer.BadParameter(f"method {name!r}: there are {', '.join(METHODS)}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not only_table:
        task = Task(layers)

        def cell(method: str, seed: int, lr: float, steps: int) -> dict[str, Any]:
            rest = None if method == "adamw" else rest_rate or best["adamw"]
            made = Cell(method, seed, lr, steps, rows, length, layers, ratio, interval, scale, rest)
            return run(made, task, output, save_every)

        best: dict[str, float] = {}
        for name in names if rest_rate else dict.fromkeys(("adamw", *names)):
            best[name] = best_rate([cell(name, SWEEP_SEED, lr, sweep_steps) for lr in tried]) if len(tried) > 1 else tried[0]
        for seed in map(int, seeds.split(",")):
            for name in names:
                cell(name, seed, best[name], steps)
    Console(width=150).print(table(done(output), steps))


if __name__ == "__main__":
    typer.run(main)
