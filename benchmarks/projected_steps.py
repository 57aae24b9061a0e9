"""Time and peak of whole training steps (forward, backward, optimizer) with AdamW and with low-rank optimizers, side by side.

    python benchmarks/projected_steps.py                                    # LLaMA-60M shape, 2 layers
    python benchmarks/projected_steps.py --model smollm2 --layers 6 --length 128
    python benchmarks/projected_steps.py --variants "AdamW,COAP,COAP fused" --coap ../coap

Linears of the layers are projected at rank width / 4, the rest gets the method's base update. AdamW is torch's, fused, with the
model compiled by Inductor; so are the packages galore-torch and fira, and COAP's released code in the folder ``--coap`` (none of
them is a dependency: a variant that cannot be imported is left out, and said so). Ours are compiled with lowmem. In each round
every variant takes one step on the same batch; the ratio to AdamW of the same round is taken, and the median over the rounds in
which no basis was made is the ordinary step. A refresh is the median over steps that make one from an old one; the average is
((T - 1)·ordinary + refresh) / T with the published T: 40 for COAP (its rSVD every fifth refresh is not told apart), 200 for the
others. Peaks are the CPU allocator's, in one step, above what was there before: parameters and state are not in it. Graph
caches are left on: Inductor's graph is one for all that use it.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from lowmem_compile import optim
from lowmem_compile.demo import weights
from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.reporting.units import format_bytes

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PERIOD = {"COAP": 40}
OTHERS = 200
INCLUDE = ("*attn*", "*mlp*")


def llama(layers: int) -> Any:
    """A LLaMA of 60M's shape, with random weights."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32000, num_hidden_layers=layers, use_cache=False, **shape))


def smollm2(layers: int) -> Any:
    """SmolLM2-135M, its first and last layers."""
    model: Any = weights.smollm2(layers=layers, keep_dropout=False)
    model.config.use_cache = False
    return model


MODELS: dict[str, Callable[[int], Any]] = {"llama60m": llama, "smollm2": smollm2}


class Several:
    """Optimizers that step together."""

    def __init__(self, *members: torch.optim.Optimizer) -> None:
        self.members = members

    def step(self) -> None:
        """Step all."""
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for member in self.members:
            member.zero_grad()


class Nothing:
    """Stands for a name of a package that is not there."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class Absent(types.ModuleType):
    """Stands for a package that a rival imports for optimizers that are not measured here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


def rival(name: str, needs: tuple[str, ...]) -> Any:
    """A package, with empty modules in place of what it needs and is not installed."""
    for need in needs:
        try:
            __import__(need)
        except ImportError:
            sys.modules[need] = Absent(need)
            sys.modules[need].__path__ = []
            parent, _, child = need.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, sys.modules[need])
    module = __import__(name)
    for part in name.split(".")[1:]:
        module = getattr(module, part)
    return module


def groups_of(model: nn.Module, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights that are projected, and the rest."""
    first, *rest = optim.split(model, rank=rank, include=INCLUDE).groups
    return [p for _, p in first["params"]], [p for group in rest for _, p in group["params"]]


def adamw(params: Any, rate: float) -> torch.optim.Optimizer:
    """torch's, in one kernel."""
    return torch.optim.AdamW(params, lr=rate, weight_decay=0.0, fused=True)


def galore_torch(model: nn.Module, rank: int, interval: int) -> Any:
    """The package galore-torch."""
    needs = ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer", "bitsandbytes.functional")
    low, rest = groups_of(model, rank)
    group = {"params": low, "rank": rank, "update_proj_gap": interval, "scale": 0.25, "proj_type": "std"}
    return rival("galore_torch", needs).GaLoreAdamW([{"params": rest}, group], lr=1e-3, no_deprecation_warning=True)


def fira(model: nn.Module, rank: int, interval: int) -> Any:
    """The package fira."""
    low, rest = groups_of(model, rank)
    group = {"params": low, "rank": rank, "update_proj_gap": interval, "alpha": 1.0, "proj_type": "std"}
    return rival("fira", ()).FiraAdamW([{"params": rest}, group], lr=1e-3, no_deprecation_warning=True)


def released_coap(model: nn.Module, rank: int, interval: int) -> Any:
    """COAP's released code; the rest of the parameters by torch's AdamW."""
    needs = ("bitsandbytes", "bitsandbytes.functional", "tensorly", "tensorly.decomposition")
    low, rest = groups_of(model, rank)
    kind = rival("coap_torch.optimizer.adamw", needs).AdamW
    return Several(kind(low, lr=1e-3, rank=rank, update_interval=interval), adamw(rest, 1e-3))


def ours(kind: Any, **options: Any) -> Callable[[nn.Module, int, int], Any]:
    """One of ``lowmem_compile.optim``."""

    def make(model: nn.Module, rank: int, interval: int) -> Any:
        return kind(optim.split(model, rank=rank, include=INCLUDE).groups, 1e-3, update_interval=interval, **options)

    return make


Make = Callable[[nn.Module, int, int], Any]
VARIANTS: dict[str, tuple[str, Make]] = {
    "AdamW": ("inductor", lambda model, _rank, _interval: adamw(model.parameters(), 1e-3)),
    "COAP": ("lowmem", ours(optim.COAP)),
    "COAP fused": ("lowmem", ours(optim.COAP, fused_backward=True)),
    "COAP released": ("inductor", released_coap),
    "GaLore": ("lowmem", ours(optim.GaLore)),
    "GaLore fused": ("lowmem", ours(optim.GaLore, fused_backward=True)),
    "GaLore galore-torch": ("inductor", galore_torch),
    "Fira": ("lowmem", ours(optim.Fira)),
    "Fira fused": ("lowmem", ours(optim.Fira, fused_backward=True)),
    "Fira package": ("inductor", fira),
}


@dataclass
class Runner:
    """A variant in training.

    Attributes:
        seconds: of each round.
        peaks: bytes of an ordinary step and of one that makes a basis.
    """

    name: str
    call: Any
    optimizer: Any
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def step(self, ids: Tensor) -> Tensor:
        """One step; its loss."""
        loss: Tensor = self.call(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def timed(self, ids: Tensor) -> None:
        """One step of a round."""
        start = time.perf_counter()
        self.step(ids)
        self.seconds.append(time.perf_counter() - start)

    def peak(self, ids: Tensor) -> None:
        """One step under the profiler."""
        self.peaks.append(peak_bytes(lambda: self.step(ids), lambda _: None).peak)


def main(
    model: Annotated[str, typer.Option(help=f"of {', '.join(MODELS)}")] = "llama60m",
    layers: int = 2,
    rows: int = 4,
    length: int = 64,
    ratio: int = 4,
    interval: Annotated[int, typer.Option(help="steps between bases in this run")] = 8,
    cycles: Annotated[int, typer.Option(help="times that bases are made anew")] = 2,
    variants: str = ",".join(VARIANTS),
    coap: Annotated[str | None, typer.Option(help="folder with COAP's released code, coap_torch")] = None,
    precision: Annotated[str, typer.Option(help=f"of {', '.join(PRECISIONS)}: of weights, gradients and states")] = "fp32",
    disable: Annotated[str, typer.Option(help="passes that lowmem leaves out, such as attention_backward")] = "",
) -> None:
    """Measure and print."""
    if precision not in PRECISIONS:
        raise typer.BadParameter(f"precision {precision!r}: there are {', '.join(PRECISIONS)}.")
    if coap is not None:
        sys.path.append(coap)
    base = MODELS[model](layers).train().to(PRECISIONS[precision])
    rank = base.config.hidden_size // ratio
    ids = torch.randint(0, base.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    runners = []
    for name in variants.split(","):
        if name not in VARIANTS:
            raise typer.BadParameter(f"variant {name!r}: there are {', '.join(VARIANTS)}.")
        backend, make = VARIANTS[name]
        mine = copy.deepcopy(base)
        try:
            optimizer = make(mine, rank, interval)
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        options: Any = {"gradients": "exact", "codec": "none", "disable": list(filter(None, disable.split(",")))}
        options = options if backend == "lowmem" else None
        runners.append(Runner(name, torch.compile(mine, backend=backend, options=options), optimizer))
    first = 2 * interval + 1  # before it everything is compiled, and the peaks are taken
    steps = first + interval * cycles
    bar = tqdm(total=len(runners) * steps, mininterval=5, dynamic_ncols=True)
    for step in range(steps):
        for runner in runners:
            bar.set_postfix_str(f"step {step}, {runner.name}", refresh=False)
            if step in (first - 2, first - 1):
                runner.peak(ids)
            elif step < first:
                runner.step(ids)
            else:
                runner.timed(ids)
            bar.update()
    bar.close()
    title = f"{model}, {layers} layers, {rows} x {length} tokens, rank {rank}, {precision}, {torch.get_num_threads()} threads"
    report(runners, interval, title)


def report(runners: list[Runner], interval: int, title: str) -> None:
    """The table; of the rounds every ``interval``-th makes a basis."""
    made = Table(title=title)
    for head in ("variant", "ordinary step", "refresh", "average", "ms", "peak", "peak of a refresh"):
        made.add_column(head)
    against = runners[0].seconds
    for runner in runners:
        ratios = [mine / theirs for mine, theirs in zip(runner.seconds, against, strict=True)]
        ordinary = statistics.median(r for i, r in enumerate(ratios) if (i + 1) % interval)
        refresh = statistics.median([r for i, r in enumerate(ratios) if not (i + 1) % interval] or [ordinary])
        period = PERIOD.get(runner.name.split()[0], OTHERS)
        average = ((period - 1) * ordinary + refresh) / period
        plain, making = map(format_bytes, runner.peaks)
        speed = f"{1e3 * statistics.median(runner.seconds):.0f}"
        made.add_row(runner.name, f"{ordinary:.3f}", f"{refresh:.2f}", f"{average:.3f}", speed, plain, making)
    Console(width=140).print(made)


if __name__ == "__main__":
    typer.run(main)
