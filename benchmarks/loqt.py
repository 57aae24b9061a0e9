"""Pre-train a LLaMA from scratch with LoQT and with AdamW, on the same text, and compare held-out losses.

    python benchmarks/loqt.py                                  # 60M shape, 1000 steps: hours on a CPU
    python benchmarks/loqt.py --lr 0.0025,0.00025 --rows 4 --length 128     # with rates that suit short runs
    python benchmarks/loqt.py --shape small                    # half of its width and depth: minutes
    python benchmarks/loqt.py --shape small --steps 200 --methods loqt,galore,adamw
    python benchmarks/loqt.py --shape small --peaks            # memory of one step, in seconds

Text: the language reference that comes with Python (``pydoc_data.topics``, 465,048 characters), as bytes; the last twentieth is
held out. Every step's windows depend on the step alone, so all methods see the same batches in the same order. The learning rate
rises over a tenth of the steps and falls to a tenth along a cosine. Its peak and LoQT's scale are the published ones for 60M
(LoQT: lr 0.01, s 0.4, rank a quarter of the width, C = 5, τ = 100, ψ = 1.2; GaLore: lr 0.01, α 0.25, T = 200); AdamW has 0.001.

A run stops and goes on: it is saved every ``--save-every`` steps in ``--output``. Published at 60M, of perplexity on C4 after 1.1
billion tokens: full rank 33.32, LoQT 33.98, GaLore 34.15 (arXiv:2405.16528, table 1).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

import lowmem_compile
from lowmem_compile.demo.data import corpus
from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.optim import GaLore, split
from lowmem_compile.optim.loqt import AdamW, LoQT
from lowmem_compile.reporting.units import format_bytes

INCLUDE = ("*self_attn*", "*mlp*")
SHAPES: Mapping[str, dict[str, int]] = {
    "60m": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 2},
}
PEAK_LR = {"loqt": 0.01, "galore": 0.01, "adamw": 0.001}


@dataclass(frozen=True)
class Plan:
    """A run: what has to be the same for it to be resumed."""

    method: str
    shape: str
    steps: int
    rows: int
    length: int
    lr: float
    rank: int
    compensation: int
    bits: int | None
    quantise: bool
    seed: int
    backend: str

    @property
    def name(self) -> str:
        """A name for its files."""
        variant = "" if self.method != "loqt" or self.quantise else "-whole"
        stored = f"-{self.bits}bit" if self.bits else ""
        return f"{self.method}{variant}{stored}-{self.shape}-{self.steps}x{self.rows}x{self.length}-lr{self.lr:g}-seed{self.seed}"


class Run:
    """A model with its optimizer, at some step."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.step, self.history = plan, 0, []  # type: ignore[var-annotated]
        self.seconds = 0.0
        torch.manual_seed(plan.seed)
        shape: dict[str, Any] = dict(SHAPES[plan.shape])
        config = LlamaConfig(vocab_size=256, max_position_embeddings=plan.length, use_cache=False, **shape)
        self.model = LlamaForCausalLM(config).train()
        self.training: LoQT | None = None
        if plan.method == "loqt":
            self.training = lowmem_compile.loqt(
                self.model, plan.rank, include=INCLUDE, scale=0.4, compensation=plan.compensation, quantise=plan.quantise
            )
            self.optimizer: torch.optim.Optimizer = AdamW(self.training.parameters(), plan.lr, bits=plan.bits)
        elif plan.method == "galore":
            groups = split(self.model, rank=plan.rank, include=[f"{pattern}.weight" for pattern in INCLUDE]).groups
            self.optimizer = GaLore(groups, plan.lr, scale=0.25, update_interval=200, bits=plan.bits)
        else:
            self.optimizer = AdamW(self.model.parameters(), plan.lr, bits=plan.bits)
        text = torch.frombuffer(bytearray(corpus().encode()), dtype=torch.uint8).long()
        cut = len(text) * 19 // 20
        self.train_text, self.held_out = text[:cut], text[cut:]
        self.call: Any = self.model if plan.backend == "eager" else torch.compile(self.model, backend=plan.backend)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean cross entropy of the next byte, in nats."""
        loss: Tensor = self.call(input_ids=ids, labels=ids).loss
        return loss

    def windows(self, text: Tensor, seed: int, rows: int) -> Tensor:
        """Random windows of a text, int64 [rows, length]."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text) - self.plan.length, (rows,), generator=generator)
        return torch.stack([text[s : s + self.plan.length] for s in starts.tolist()])

    def lr(self) -> float:
        """The learning rate of the current step."""
        warm = max(self.plan.steps // 10, 1)
        if self.step < warm:
            return self.plan.lr * (self.step + 1) / warm
        turn = math.pi * (self.step - warm) / max(self.plan.steps - warm, 1)
        return self.plan.lr * (0.1 + 0.45 * (1 + math.cos(turn)))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Held-out loss over 64 fixed windows."""
        self.model.eval()
        ids = self.windows(self.held_out, 7, 64)
        losses = [float(self.loss(part)) * len(part) for part in ids.split(self.plan.rows)]
        self.model.train()
        return sum(losses) / len(ids)

    def advance(self) -> float:
        """One training step; its loss."""
        started = time.perf_counter()
        ids = self.windows(self.train_text, 1000 + self.step, self.plan.rows)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        if self.training is not None:
            self.training.before_step(lambda: self.loss(ids))
        loss = self.loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - started
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write a checkpoint that :meth:`load` goes on from."""
        state = {
            "plan": asdict(self.plan),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "training": self.training.state_dict() if self.training is not None else None,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Take over a checkpoint."""
        state = torch.load(path, weights_only=True)
        if state["plan"] != asdict(self.plan):
            raise typer.BadParameter(f"{path} is of another run: {state['plan']}. Use another --output.")
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.training is not None:
            self.training.load_state_dict(state["training"])

    def held(self) -> dict[str, int]:
        """Bytes of weights, of gradients as a step makes them, and of optimizer state, counted on the tensors."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return {
            "weights": _bytes(self.model),
            "gradients": sum(p.nbytes for p in trained),
            "state": sum(t.nbytes for t in state),
        }


def _bytes(model: nn.Module) -> int:
    """Of parameters and of buffers that a checkpoint has."""
    return sum(t.nbytes for t in model.state_dict(keep_vars=True).values())


def run(plan: Plan, output: Path, save_every: int, evaluate_every: int) -> dict[str, Any]:
    """Run or go on with a plan; its row of the table."""
    result = output / f"{plan.name}.json"
    if result.exists():
        row: dict[str, Any] = json.loads(result.read_text())
        return row
    current, checkpoint = Run(plan), output / f"{plan.name}.pt"
    if checkpoint.exists():
        current.load(checkpoint)
    bar = trange(
        current.step, plan.steps, initial=current.step, total=plan.steps, desc=plan.name, mininterval=5, dynamic_ncols=True
    )
    for _ in bar:
        loss = current.advance()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if current.step % evaluate_every == 0 or current.step == plan.steps:
            current.history.append({"step": current.step, "loss": loss, "held_out": current.evaluate()})
        if current.step % save_every == 0:
            current.save(checkpoint)
    row = {**asdict(plan), **current.held(), "seconds": current.seconds, "history": current.history}
    row["held_out"] = current.history[-1]["held_out"]
    if current.training is not None:
        row["merges"] = current.training.merges
    result.write_text(json.dumps(row, indent=1))
    checkpoint.unlink(missing_ok=True)
    return row


def peak(plan: Plan) -> dict[str, int]:
    """Bytes that exist before a step, and what its forward and backward pass adds at the peak of the CPU allocator."""
    current = Run(plan)
    current.advance()
    ids = current.windows(current.train_text, 1, plan.rows)
    current.loss(ids).backward()  # compiles the gradient's graph, if any
    current.optimizer.zero_grad()
    held = current.held()
    return {"held": held["weights"] + held["state"], "step": peak_bytes(lambda: current.loss(ids)).peak}


def print_peaks(plans: list[Plan]) -> None:
    """One row a method."""
    table = Table(title=f"one step of LLaMA {plans[0].shape}, {plans[0].rows} x {plans[0].length} bytes, {plans[0].backend}")
    for head in ("method", "weights and state", "peak of forward and backward", "together"):
        table.add_column(head)
    for plan in plans:
        sizes = peak(plan)
        row = (sizes["held"], sizes["step"], sum(sizes.values()))
        table.add_row(plan.method, *(format_bytes(size) for size in row))
    Console(width=130).print(table)


def main(
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}")] = "60m",
    steps: int = 1000,
    rows: int = 8,
    length: int = 256,
    methods: Annotated[str, typer.Option(help="of loqt, galore, adamw")] = "loqt,adamw",
    rank: Annotated[int | None, typer.Option(help="a quarter of the width by default")] = None,
    lr: Annotated[
        str | None, typer.Option(help="peak learning rates, one or one a method, instead of the published ones")
    ] = None,
    compensation: int = 5,
    bits: Annotated[int | None, typer.Option(help="8: moments in 8 bits")] = None,
    quantise: bool = True,
    seed: int = 0,
    backend: Annotated[str, typer.Option(help="eager, lowmem or inductor")] = "eager",
    save_every: int = 50,
    evaluate_every: int = 100,
    peaks: Annotated[bool, typer.Option("--peaks", help="only measure the peak of a step")] = False,
    output: Path = Path("benchmarks/results/loqt"),
) -> None:
    """Train with each method and print one table."""
    names = methods.split(",")
    for name in names:
        if name not in PEAK_LR:
            raise typer.BadParameter(f"method {name!r}: there are {', '.join(PEAK_LR)}.")
    if shape not in SHAPES:
        raise typer.BadParameter(f"shape {shape!r}: there are {', '.join(SHAPES)}.")
    width = SHAPES[shape]["hidden_size"]
    given = [float(rate) for rate in lr.split(",")] if lr else [PEAK_LR[name] for name in names]
    rates = given * len(names) if len(given) == 1 else given
    if len(rates) != len(names):
        raise typer.BadParameter(f"--lr {lr}: {len(rates)} learning rates for {len(names)} methods; give one, or one a method.")
    plans = [
        Plan(name, shape, steps, rows, length, rate, rank or width // 4, compensation, bits, quantise, seed, backend)
        for name, rate in zip(names, rates, strict=True)
    ]
    if peaks:
        print_peaks(plans)
        return
    output.mkdir(parents=True, exist_ok=True)
    made = [run(plan, output, save_every, evaluate_every) for plan in plans]
    base = next((r["held_out"] for r in made if r["method"] == "adamw"), None)
    table = Table(title=f"LLaMA {shape}, {steps} steps of {rows} x {length} bytes, rank {rank or width // 4}")
    for head in ("method", "lr", "held-out loss", "against AdamW", "weights", "gradients", "state", "s/step", "merges"):
        table.add_column(head)
    for r in made:
        change = "" if base is None else f"{100 * (r['held_out'] / base - 1):+.2f} %"
        sizes = [format_bytes(r[key]) for key in ("weights", "gradients", "state")]
        seconds = f"{r['seconds'] / r['steps']:.2f}"
        table.add_row(r["method"], f"{r['lr']:g}", f"{r['held_out']:.4f}", change, *sizes, seconds, str(r.get("merges", "")))
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
