"""The plan of one graph: how each tensor that crosses is kept, so that a budget is met at the least error and time.

Which choices meet a cap is solved in :mod:`lowmem_compile.planner.choose`. Fewer saved bytes are not always a lower peak, so
plans for smaller and smaller caps are simulated (:mod:`lowmem_compile.planner.timeline`):

- a share B of Inductor's bytes: the plan of the largest cap ≤ B whose simulated peak is not above that of any larger cap (3 %,
  less than the simulation's error, count as nothing), so that the peak is monotone in the budget; where there is none, the plan
  that loses least, a higher peak weighed in;
- a peak in bytes: the plan of the largest cap whose simulated peak is below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lowmem_compile.contract import Context
from lowmem_compile.errors import BudgetError
from lowmem_compile.planner.budget import Budget
from lowmem_compile.planner.calibrate import Measured
from lowmem_compile.planner.choices import BALANCE, Item, chain_of, items_of, step_time
from lowmem_compile.planner.choose import ERROR, TIME, choose, error_of
from lowmem_compile.planner.program import Op, Program, program_of
from lowmem_compile.planner.timeline import peak, timeline
from lowmem_compile.saved import Partition

COSINE = 0.9999
"""What the calibrated default grants each tensor."""
RUNGS = (1.0, 0.8, 0.65, 0.55, 0.48, 0.42, 0.37, 0.33, 0.29, 0.26, 0.23, 0.2, 0.17, 0.14, 0.12, 0.1, 0.08, 0.06, 0.04, 0.02)
"""Caps that are tried, as shares of what Inductor saves."""
SLACK = 1.03
"""Two simulated peaks closer than this are taken as equal."""
SMALLEST_GRAPH = 1 << 18
"""Graphs for which Inductor saves fewer bytes have no budget of their own: the small graphs around a graph break."""


@dataclass(frozen=True)
class Plan:
    """What is done with each tensor that crosses.

    Attributes:
        decisions: by the name of the storage's owner in the forward graph: ``"exact"``, a codec, ``"recompute"``.
        nbytes: bytes kept.
        error: estimated relative error of the gradient.
        time: estimated extra time as a share of the step.
        peak: simulated peak in bytes.
        measured: what a calibration found, by the same names.
        for_budget: made for ``options["memory_budget"]``; otherwise the calibrated default (:meth:`Planner.careful`).
    """

    decisions: dict[str, str]
    nbytes: int
    error: float
    time: float
    peak: int
    measured: Mapping[str, Measured] = field(default_factory=dict)
    for_budget: bool = True

    def worse(self, lowest: int) -> float:
        """What is minimised, plus a penalty for a peak above ``lowest``: 1 for every 2.5 %."""
        return self.error**2 / ERROR**2 + self.time / TIME + 40 * max(0.0, self.peak / (SLACK * max(lowest, 1)) - 1)

    def decision(self, root: str) -> str:
        """What is done with a tensor; one the plan does not know stays exact."""
        return self.decisions.get(root, "exact")


class Planner:
    """Plans for one partition.

    Args:
        partition: forward and backward graph, before the saved stage.
        ctx: context of the saved stage.
        measured: what a calibration found.
    """

    def __init__(self, partition: Partition, ctx: Context, measured: Mapping[str, Measured] | None = None) -> None:
        self.program = program_of(partition)
        self.measured = dict(measured or {})
        self.items = items_of(partition.forward.graph, ctx, self.program, self.measured)
        self.step = max(step_time(self.program, BALANCE.get(ctx.device, BALANCE["cpu"])), 1.0)
        self.ctx = ctx
        self._solved: dict[int, Plan | None] = {}

    def solve(self, cap: int) -> Plan | None:
        """The plan of least error and time that keeps at most ``cap`` bytes, or ``None`` if there is none; solved once a cap."""
        if cap not in self._solved:
            decisions = choose(self.items, self.step, cap)
            self._solved[cap] = None if decisions is None else self.plan_of(decisions)
        return self._solved[cap]

    def plan_of(self, decisions: dict[str, str]) -> Plan:
        """The plan with these decisions, one for every item."""
        chosen = [item.choice(decisions[item.root]) for item in self.items]
        return Plan(
            decisions,
            sum(c.nbytes for c in chosen),
            error_of(self.items, decisions),
            sum(c.cost for c in chosen) / self.step,
            peak(timeline(self.applied(decisions))),
            self.measured,
        )

    def careful(self, cosine: float = COSINE) -> Plan:
        """Without a budget: each measured tensor in the fewest bits of 8, 10, its usual codec's and all that keep every gradient.

        Args:
            cosine: the least cosine of a parameter's gradient with its exact one, for each tensor alone.
        """
        decisions = {}
        for item in self.items:
            found = self.measured.get(item.root)
            have = [c.name for c in reversed(item.choices) if c.name in (item.usual, "int8", "int10")]
            harmless = [name for name in have if found is not None and found.cosine(name) >= cosine]
            decisions[item.root] = harmless[0] if harmless else "exact"
        return replace(self.plan_of(decisions), for_budget=False)

    def applied(self, decisions: dict[str, str]) -> Program:
        """The program as the saved stage will make it."""
        program = self.program
        for item in self.items:
            if decisions[item.root] == "recompute" and item.recipe is not None:
                program = _recomputed(program, item)
        for item in self.items:
            crossing = next((c for c in program.crossings if c.root == item.root), None)
            kept = item.choice(decisions[item.root]).nbytes
            if crossing is not None and decisions[item.root] != "recompute" and kept < crossing.nbytes:
                program = program.encoded(crossing, kept)
        return program

    def nearest(self, ceiling: int, inductor: int) -> Plan:
        """The plan of the largest cap whose simulated peak is not above ``ceiling``, or else the one of the lowest peak."""
        lowest: Plan | None = None
        for ratio in RUNGS:
            plan = self.solve(int(ratio * inductor))
            if plan is None:
                break
            if plan.peak <= ceiling:
                return plan
            lowest = plan if lowest is None or plan.peak < lowest.peak else lowest
        return lowest if lowest is not None else self.plan_of({item.root: "exact" for item in self.items})

    def meet(self, budget: Budget, inductor: int, room: int = 0, off: int = 0) -> Plan:
        """The plan for a budget.

        Args:
            budget: share or peak.
            inductor: bytes that Inductor saves for this graph.
            room: Inductor's own simulated peak, for the message.
            off: bytes that a real peak is above a simulated one.

        Raises:
            BudgetError: no plan meets it; the message says what the minimum is.
        """
        caps = [int(r * inductor) for r in RUNGS]
        if budget.share is not None:
            wanted = int(budget.share * inductor)
            caps = sorted({*(c for c in caps if c > wanted), wanted, *(c for c in caps if c < wanted)}, reverse=True)
        lowest: int | None = None
        best: Plan | None = None
        for cap in caps:
            plan = self.solve(cap)
            if plan is None:
                break
            if budget.peak is not None and plan.peak + off <= budget.peak:
                return plan
            lowest = plan.peak if lowest is None else min(lowest, plan.peak)
            if budget.share is not None and cap <= wanted:
                if plan.peak <= SLACK * lowest:
                    return plan
                best = plan if best is None or plan.worse(lowest) < best.worse(lowest) else best
        if best is not None:
            return best
        smallest = choose(self.items, self.step, None)
        assert smallest is not None
        least = self.plan_of(smallest)
        if budget.share is not None:
            raise BudgetError(
                f"options['memory_budget'] = {budget.share:g} asks for {_mib(int(budget.share * inductor))} saved for backward; "
                f"the least this graph can keep is {_mib(least.nbytes)}, {least.nbytes / max(inductor, 1):.3f} of Inductor's "
                f"{_mib(inductor)}. Ask for more than that, or release what options['keep_exact'] pins."
            )
        assert budget.peak is not None
        reached = min(least.peak, lowest if lowest is not None else least.peak) + off
        raise BudgetError(
            f"options['memory_budget'] asks for a peak of {_mib(budget.peak)}; the lowest this graph can reach is "
            f"{_mib(reached)} (Inductor: {_mib(room)}), beyond parameters, buffers, inputs and optimizer state. "
            "Ask for more, or take a smaller batch."
        )


def _recomputed(program: Program, item: Item) -> Program:
    assert item.recipe is not None
    crossing = next(c for c in program.crossings if c.root == item.root)
    names = {s.name: next(c.inputs[0] for c in program.crossings if c.root == s.name) for s in item.recipe.sources}
    have = {op.name for op in program.backward}
    inputs = {i.name: i.name for i in item.recipe.inputs}
    extra = [op for op in program.forward if op.name in inputs and op.name not in have]
    chain = chain_of(item.recipe, program)
    known = {**names, **inputs, **{op.name: op.name for op in chain}}
    chain = [replace(op, reads=tuple(r for r in op.reads if r in known)) for op in chain]
    return program.recomputed(crossing, _last(chain, item.root), {**names, **inputs}, extra)


def _last(chain: Sequence[Op], root: str) -> list[Op]:
    return [op for op in chain if op.name != root] + [op for op in chain if op.name == root]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
