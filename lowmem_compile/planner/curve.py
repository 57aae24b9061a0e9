"""What the report shows of the planner: each tensor's choice, and the curve of bytes, error and time.

Time is estimated by one model for lowmem and for Inductor (:mod:`lowmem_compile.planner.choices`): bytes moved and matrix
products, those that are computed again included; lowmem's codecs on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lowmem_compile.errors import BudgetError
from lowmem_compile.graph import module_path, shape_names, source_line, storage_root, tensor_value
from lowmem_compile.planner.budget import Budget
from lowmem_compile.planner.choices import BALANCE, GAINS, LADDER, Item, step_time
from lowmem_compile.planner.choose import relative_errors
from lowmem_compile.planner.plan import Plan, Planner
from lowmem_compile.planner.program import program_of
from lowmem_compile.planner.timeline import peak, timeline
from lowmem_compile.reporting.model import CurvePoint, PlannedTensor
from lowmem_compile.saved import Partition, kind_of

if TYPE_CHECKING:
    from torch import fx

LOWMEM_BUDGETS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03)
INDUCTOR_BUDGETS = (0.7, 0.5, 0.35, 0.25, 0.1)


def planned_tensors(planner: Planner, plan: Plan | None, partition: Partition) -> tuple[PlannedTensor, ...]:
    """A row for every tensor that crosses; without a plan what the options do by default."""
    nodes: dict[str, fx.Node] = {}
    for node in partition.saved_nodes():
        nodes.setdefault(storage_root(node).name, node)
    decisions = plan.decisions if plan is not None else default_decisions(planner)
    decisions = {item.root: decisions.get(item.root, "exact") for item in planner.items}
    errors = relative_errors(planner.items, decisions)
    return tuple(_row(planner, item, decisions[item.root], errors[item.root], nodes[item.root]) for item in planner.items)


def _row(planner: Planner, item: Item, decision: str, error: float, saved: fx.Node) -> PlannedTensor:
    choice = item.choice(decision)
    root = storage_root(saved)
    value = tensor_value(saved)
    return PlannedTensor(
        name=root.name,
        module=module_path(root),
        source=source_line(root),
        shape=shape_names(value),
        dtype=str(value.dtype).removeprefix("torch."),
        kind=kind_of(root, value),
        choice=choice.name,
        bytes_before=item.choices[0].nbytes,
        bytes_after=choice.nbytes,
        error=error,
        gradient_error=item.gain2**0.5 * error,
        time=choice.cost / planner.step,
    )


def default_decisions(planner: Planner) -> dict[str, str]:
    """What is done without a budget, as far as the planner's choices go: ``options["codec"]`` where the item allows it."""
    named = planner.ctx.options.codec
    found: dict[str, str] = {}
    for item in planner.items:
        wanted = item.usual if named == "auto" else named
        allowed = item.kind in GAINS and wanted in {c.name for c in item.choices}
        found[item.root] = wanted if allowed and wanted in LADDER else "exact"
    return found


def curve_of(planner: Planner, rivals: Mapping[str, Partition]) -> tuple[CurvePoint, ...]:
    """Lowmem by default and at several budgets, Inductor by default and at several of its own.

    Args:
        planner: of the chosen partition.
        rivals: Inductor's partitions: ``"inductor"``, ``"inductor 0.5"`` and so on.
    """
    balance = BALANCE.get(planner.ctx.device, BALANCE["cpu"])
    stock = program_of(rivals["inductor"])
    step = max(step_time(stock, balance), 1.0)
    points = []
    for name, partition in rivals.items():
        if name == "inductor" or name.startswith("inductor "):
            program = program_of(partition)
            budget = float(name.split()[1]) if " " in name else None
            time = step_time(program, balance) / step - 1
            points.append(CurvePoint("inductor", budget, program.saved_bytes(), peak(timeline(program)), 0.0, time))
    plans: list[tuple[float | None, Plan]] = [(None, planner.plan_of(default_decisions(planner)))]
    for budget in LOWMEM_BUDGETS:
        try:
            plans.append((budget, planner.meet(Budget(share=budget), stock.saved_bytes())))
        except BudgetError:
            break  # what is below cannot be met either
    for asked, plan in plans:
        time = (1 + plan.time) * planner.step / step - 1
        points.append(CurvePoint("lowmem", asked, plan.nbytes, plan.peak, plan.error, time))
    return tuple(points)
