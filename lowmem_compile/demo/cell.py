"""Measure one model in one precision and mode, all variants side by side in one process.

First each variant alone, at the initial weights: bytes saved, peak, gradients, output. Then rounds of
training in which every variant takes one step on the same batch: step times are paired within a round, and
the losses after the last round are compared.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_compile import _torch
from lowmem_compile.demo.data import Batch
from lowmem_compile.demo.gradients import Gradients, compare, exact_gradients, gradients_of
from lowmem_compile.demo.measure import peak_bytes, resident_tensors, saved_bytes
from lowmem_compile.demo.timing import paired_ratio, round_order
from lowmem_compile.demo.variants import BASELINE, Variant
from lowmem_compile.demo.workload import Workload

Progress = Callable[[str], None]


@dataclass
class VariantResult:
    """All figures of one variant; ``error`` is a traceback where it failed, and then figures may be missing.

    Bytes are integers, times seconds. ``saved`` counts everything kept for backward, ``saved_intermediate``
    leaves out the model's outputs. ``compile_seconds`` is the first step. ``output_difference`` is the
    largest difference from the baseline's output over the largest magnitude in it. ``losses`` are those of
    the training rounds.
    """

    name: str
    label: str
    saved: int | None = None
    saved_intermediate: int | None = None
    peak: int | None = None
    after_forward: int | None = None
    compile_seconds: float | None = None
    cosine: float | None = None
    relative_error: float | None = None
    worst_cosine: float | None = None
    worst_parameter: str | None = None
    output_difference: float | None = None
    loss: float | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    error: str | None = None


@dataclass
class CellResult:
    """One row group of the table: a workload and its variants, the baseline first."""

    workload: str
    title: str
    activation: str
    pretrained: bool
    precision: str
    mode: str
    layers: int
    tokens: int
    parameters: int
    trained: int
    variants: list[VariantResult]
    seconds: float

    @property
    def key(self) -> str:
        """Such as ``minilm/bf16/full``."""
        return f"{self.workload}/{self.precision}/{self.mode}"

    def variant(self, name: str) -> VariantResult | None:
        """The variant of this name, or None if it was not measured."""
        return next((v for v in self.variants if v.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CellResult:
        """Read what :meth:`to_json` wrote."""
        return cls(**{**value, "variants": [VariantResult(**v) for v in value["variants"]]})


class Runner:
    """One variant with its own copy of the model and its optimizer."""

    def __init__(self, variant: Variant, workload: Workload, learning_rate: float) -> None:
        self.variant = variant = variant.fitted(workload.unit_bytes)
        self.workload = workload
        self.model = copy.deepcopy(workload.model)
        with variant.active():
            self.call = variant.prepare(self.model, function=self.loss_of)
        self.optimizer = torch.optim.AdamW(workload.parameters(self.model).values(), lr=learning_rate)

    def forward(self, index: int = 0) -> tuple[Tensor, Tensor]:
        """Loss of a batch, twice (it is all that a training step returns); call it inside ``variant.active()``."""
        with self.workload.autocast():
            loss = self.call(self.workload.batches[index])
        return loss, loss

    def loss_of(self, batch: Batch) -> Tensor:
        """Model and loss: the function that every variant compiles, so that logits are returned by none."""
        return self.workload.loss_fn(self.model(**batch), batch)

    def step(self, index: int = 0) -> tuple[float, float]:
        """One forward and backward pass; seconds and loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.variant.active():
            start = time.perf_counter()
            loss, _ = self.forward(index)
            loss.backward()
            seconds = time.perf_counter() - start
        return seconds, loss.item()

    def train(self, index: int) -> tuple[float, float]:
        """A timed step and an optimizer step that is not timed."""
        figures = self.step(index)
        self.optimizer.step()
        return figures


def measure_cell(
    workload: Workload,
    variants: list[Variant],
    *,
    progress: Progress = lambda _: None,
    learning_rate: float = 5e-5,
) -> tuple[CellResult, dict[str, Runner]]:
    """Measure ``variants`` on ``workload``, which needs one batch for each training round.

    A variant that fails has its traceback in its result and takes no part in what follows. The runners, with
    the trained models and what was compiled, are returned for a report.
    """
    start = time.perf_counter()
    runners: dict[str, Runner] = {}
    results = [VariantResult(v.name, v.label) for v in variants]
    with _torch.many_variants():
        progress("exact gradients")
        exact = exact_gradients(workload)
        baseline_output: Tensor | None = None
        for variant, result in zip(variants, results, strict=True):
            progress(variant.label)
            with _noting_failure(result):
                runners[variant.name] = runner = Runner(variant, workload, learning_rate)
                output = _measure_alone(runner, result, exact, baseline_output)
                if variant.name == BASELINE:
                    baseline_output = output
            gc.collect()
        del exact, baseline_output
        working = [r for r in results if r.error is None]
        _train(working, runners, len(workload.batches), progress)
    _add_ratios(results)
    model = workload.model
    cell = CellResult(
        workload=workload.name,
        title=workload.title,
        activation=workload.activation,
        pretrained=workload.pretrained,
        precision=workload.precision,
        mode=workload.mode,
        layers=_layers(model),
        tokens=workload.tokens,
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in workload.parameters(model).values()),
        variants=results,
        seconds=time.perf_counter() - start,
    )
    return cell, runners


class _noting_failure:  # noqa: N801
    """Put the traceback of an exception into the result: the other variants are still worth measuring."""

    def __init__(self, result: VariantResult) -> None:
        self.result = result

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        self.result.error = "".join(traceback.format_exception(error))
        return True


def _measure_alone(runner: Runner, result: VariantResult, exact: Gradients, baseline: Tensor | None) -> Tensor:
    """Fill in bytes, gradients and output difference at the initial weights; returns the output."""
    result.compile_seconds, result.loss = runner.step()
    runner.optimizer.zero_grad(set_to_none=True)
    with runner.variant.active():
        kept = saved_bytes(
            runner.forward,
            exclude=resident_tensors(runner.model, runner.workload.batches[0].values()),
            outputs=lambda loss_and_output: loss_and_output,
        )
        peak = peak_bytes(lambda: runner.forward()[0])
        with torch.no_grad():
            gradients = gradients_of(runner.model)
        output = runner.forward()[1].detach().float()
    runner.optimizer.zero_grad(set_to_none=True)
    result.saved, result.saved_intermediate = kept.total, kept.intermediate
    result.peak, result.after_forward = peak.peak, peak.after_forward
    error = compare(gradients, exact)
    result.cosine, result.relative_error = error.cosine, error.relative_error
    result.worst_cosine, result.worst_parameter = error.worst_cosine, error.worst
    if baseline is None:
        result.output_difference = 0.0 if runner.variant.name == BASELINE else None
    else:
        result.output_difference = float((output - baseline).abs().max() / baseline.abs().max())
    return output


def _train(results: list[VariantResult], runners: dict[str, Runner], rounds: int, progress: Progress) -> None:
    by_name = {r.name: r for r in results}
    for index in range(rounds):
        progress(f"round {index + 1} of {rounds}")
        for name in round_order(list(by_name), index):
            result = by_name[name]
            with _noting_failure(result):
                seconds, loss = runners[name].train(index)
                result.seconds.append(seconds)
                result.losses.append(loss)


def _add_ratios(results: list[VariantResult]) -> None:
    """Ratios of step times to the baseline's, where both ran every round."""
    baseline = next((r for r in results if r.name == BASELINE and r.error is None), None)
    if baseline is None or not baseline.seconds:
        return
    for result in results:
        if result.error is None:
            ratio = paired_ratio(result.seconds, baseline.seconds)
            result.ratio, result.ratio_low, result.ratio_high = ratio.median, ratio.low, ratio.high


def _layers(model: nn.Module) -> int:
    """The length of the longest list of blocks."""
    lists: Iterable[nn.ModuleList] = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    return max((len(blocks) for blocks in _non_empty(lists)), default=0)


def _non_empty(lists: Iterable[nn.ModuleList]) -> Iterator[nn.ModuleList]:
    return (blocks for blocks in lists if len(blocks))
