"""One trace: the graphs of a training step over fake tensors, and what every contender keeps and peaks at.

The model is compiled with lowmem up to code generation. All tensors are fake: no weight is ever allocated and no kernel runs.
Graphs are those of the CPU; the simulated kernels are launches of their own, as on a GPU, unless the device is ``"cpu"``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_compile import registry
from lowmem_compile._torch import FakeTensorMode, dry_run
from lowmem_compile.errors import BudgetError, LowMemError
from lowmem_compile.memory_plan.fixed import in_dtype
from lowmem_compile.memory_plan.subject import Made
from lowmem_compile.partition import Candidates, after_saved_stage, planner_of, stock_of
from lowmem_compile.passes.attention_backward import AttentionBackward
from lowmem_compile.pipeline import Recorder
from lowmem_compile.planner.budget import Budget
from lowmem_compile.planner.program import program_of
from lowmem_compile.planner.timeline import kernel_points
from lowmem_compile.planner.timeline import peak as highest
from lowmem_compile.registry import Entry
from lowmem_compile.reporting.model import SavedTensor, TimelinePoint
from lowmem_compile.saved import Partition


@dataclass(frozen=True)
class Run:
    """What one contender does in one training step.

    Attributes:
        saved: tensors kept for the backward pass.
        forward: bytes alive at each kernel, beyond parameters, buffers, inputs and optimizer state; without dead buffers that
            wait for later ones.
        backward: the same; gradients stay until the end.
        held: how much higher the peak is with buffers that wait for later ones.
        error: estimated relative error of the gradient, where a budget was planned.
        gradients_stay: gradients live to the end of the backward pass, and not only where the optimizer's step reads them.
    """

    saved: tuple[SavedTensor, ...]
    forward: tuple[TimelinePoint, ...]
    backward: tuple[TimelinePoint, ...]
    held: int = 0
    error: float | None = None
    gradients_stay: bool = True

    @property
    def saved_bytes(self) -> int:
        """Bytes kept for the backward pass."""
        return sum(t.nbytes for t in self.saved)

    @property
    def peak(self) -> int:
        """The highest point, with buffers that wait for later ones."""
        return highest((*self.forward, *self.backward)) + self.held


@dataclass(frozen=True)
class Setting:
    """What a trace depends on besides the model and its batch.

    Attributes:
        precision: ``"bf16"``, ``"fp32"``, or ``"autocast"`` (float32 weights, autocast to bfloat16).
        budgets: values of ``options["memory_budget"]`` as shares of Inductor's bytes.
        options: further options of the backend.
        loss_only: compile a function that returns the loss alone, not the model with all its outputs.
        device: whose kernels are simulated: ``"cuda"`` or ``"cpu"``.
        fused_backward: lowmem steps the optimizer inside the backward graph, where each gradient goes as soon as it was made.
        part: the traced layers stand for more of their kind. A budget then means its cap alone: the peak of a few layers says
            little about that of many.
    """

    precision: str = "bf16"
    budgets: tuple[float, ...] = (0.25,)
    options: Mapping[str, Any] = field(default_factory=dict)
    loss_only: bool = False
    device: str = "cuda"
    fused_backward: bool = False
    part: bool = False


@dataclass(frozen=True)
class Trace:
    """What was found: one :class:`Run` a contender, budgets that cannot be met with the reason, graphs and seconds."""

    runs: Mapping[str, Run]
    refused: Mapping[str, str]
    graphs: int
    seconds: float


def trace(made: Made, setting: Setting) -> Trace:
    """Trace one training step.

    Raises:
        LowMemError: the step cannot be captured, or computes no gradient.
    """
    start = time.perf_counter()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = on_cpu(in_dtype(made.model, setting.precision), mode)
    args, kwargs = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: fake(t, mode, _dtype(t.dtype, setting.precision)), (made.args, made.kwargs)
    )
    found: list[tuple[dict[str, Run], dict[str, str]]] = []

    def observe(entry: Entry, candidates: Candidates) -> None:
        found.append(runs_of(entry, candidates, setting))

    before = list(registry.ENTRIES)
    registry.ENTRIES.clear()
    try:
        with mode, torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "autocast"):
            dry_run(_loss_alone(model) if setting.loss_only else model, args, kwargs, options_of(setting), observe)
    finally:
        registry.ENTRIES[:] = before
    if not found:
        raise LowMemError("the step has no graph with a backward pass: does the model have parameters that require gradients?")
    refused: dict[str, str] = {}
    for _, reasons in found:
        refused.update(reasons)
    names = [n for n in found[0][0] if n not in refused]
    runs = {n: joined([graph[n] for graph, _ in found if n in graph]) for n in names}
    return Trace(runs, refused, len(found), time.perf_counter() - start)


def options_of(setting: Setting) -> dict[str, Any]:
    """The backend's options: for a GPU without what the CPU's attention alone gets."""
    options = dict(setting.options)
    if setting.device != "cpu":
        options["disable"] = (*options.get("disable", ()), AttentionBackward.name)
    return options


def runs_of(entry: Entry, candidates: Candidates, setting: Setting) -> tuple[dict[str, Run], dict[str, str]]:
    """The contenders of one graph, and the budgets that it cannot meet."""
    runs: dict[str, Run] = {}
    saved, points = entry.eager
    if saved:
        forward = tuple(p for p in points if p.phase == "forward")
        runs["eager"] = Run(saved, forward, points[len(forward) :])
    ctx = candidates.context
    stock = stock_of(candidates.partitions["inductor"], ctx)
    runs["inductor"] = run_of(stock, setting.device)
    stay = not setting.fused_backward
    runs["lowmem"] = run_of(candidates.compiled, setting.device, gradients_stay=stay)
    refused: dict[str, str] = {}
    if setting.budgets:
        planner = planner_of(candidates.before_codecs, ctx)
        for budget in setting.budgets:
            name = budget_name(budget)
            try:
                plan = planner.solve(int(budget * stock.saved_bytes())) if setting.part else None
                plan = plan or planner.meet(Budget(share=budget), stock.saved_bytes())
            except BudgetError as error:
                refused[name] = str(error)
                continue
            planned = replace(ctx, facts={**ctx.facts, "plan": plan})
            compiled = after_saved_stage(candidates.before_codecs, planned, Recorder())
            runs[name] = replace(run_of(compiled, setting.device, gradients_stay=stay), error=plan.error)
    return runs, refused


def budget_name(budget: float) -> str:
    """What a contender with a budget is called."""
    return f"lowmem {budget:g}"


def run_of(partition: Partition, device: str, *, gradients_stay: bool = True) -> Run:
    """A partition's saved tensors and simulated kernels."""
    program = program_of(partition)
    forward, backward = kernel_points(program, device, hold=False, gradients_stay=gradients_stay)
    with_held = [p for phase in kernel_points(program, device, gradients_stay=gradients_stay) for p in phase]
    held = highest(with_held) - highest((*forward, *backward))
    return Run(partition.saved_tensors(), tuple(forward), tuple(backward), max(held, 0), gradients_stay=gradients_stay)


def joined(runs: Sequence[Run]) -> Run:
    """The graphs of one step as one: forward in order, backward in reverse; what a graph keeps lies under all between."""
    if len(runs) == 1:
        return runs[0]
    forward: list[TimelinePoint] = []
    held = 0
    bases = []
    for run in runs:
        bases.append(held)
        forward += [replace(p, live_bytes=p.live_bytes + held) for p in run.forward]
        held += run.saved_bytes
    backward: list[TimelinePoint] = []
    gradients = 0
    for run, base in zip(reversed(runs), reversed(bases), strict=True):
        backward += [replace(p, live_bytes=p.live_bytes + base + gradients) for p in run.backward]
        gradients += run.backward[-1].live_bytes if run.backward else 0
    saved = tuple(t for r in runs for t in r.saved)
    held = max(r.held for r in runs)
    return Run(saved, tuple(forward), tuple(backward), held, gradients_stay=runs[0].gradients_stay)


def on_cpu(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Put fake CPU tensors in place of a meta model's parameters and buffers, in place; tied parameters stay tied."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is None:
                    continue
                if id(value) not in known:
                    new = fake(value, mode, value.dtype)
                    trained = isinstance(value, nn.Parameter)
                    known[id(value)] = nn.Parameter(new, requires_grad=value.requires_grad) if trained else new
                table[name] = known[id(value)]
    return model


def fake(value: Tensor, mode: FakeTensorMode, dtype: torch.dtype) -> Tensor:
    """A fake CPU tensor with the size and stride of another."""
    with mode:
        return torch.empty_strided(tuple(value.shape), value.stride(), dtype=dtype, device="cpu")


def _dtype(dtype: torch.dtype, precision: str) -> torch.dtype:
    return torch.bfloat16 if dtype.is_floating_point and precision == "bf16" else dtype


def _loss_alone(model: nn.Module) -> Callable[..., Any]:
    def step(*args: Any, **kwargs: Any) -> Any:
        output = model(*args, **kwargs)
        return output if isinstance(output, Tensor) else output["loss"] if isinstance(output, dict) else output.loss

    return step
