"""A plan for a peak in bytes that holds in the code Inductor generates, not only in the estimate from the graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence

from lowmem_compile.errors import ScheduleError
from lowmem_compile.planner.budget import Budget
from lowmem_compile.planner.plan import Plan, Planner
from lowmem_compile.planner.timeline import peak, simulate
from lowmem_compile.reporting.model import TimelinePoint
from lowmem_compile.saved import Partition

log = logging.getLogger(__name__)

CLOSE = 0.03
"""How far, as a share, the peak of the generated code may be from its estimate before the plan is made again."""


def met_in_code(
    planner: Planner, budget: Budget, stock: Partition, timeline_of: Callable[[Plan], Sequence[TimelinePoint]]
) -> Plan:
    """The plan for a budget, made once more where the estimate of its peak is off.

    Args:
        planner: for the partition at hand.
        budget: a peak.
        stock: Inductor's partition.
        timeline_of: timeline of a plan by the code that Inductor generates for it.

    Raises:
        BudgetError: no plan meets the budget, the estimate corrected by what the first plan's code showed.
    """
    assert budget.peak is not None
    inductor, room = stock.saved_bytes(), peak(simulate(stock))
    first = planner.nearest(budget.peak, inductor)
    try:
        real = peak(timeline_of(first))
        off = real - first.peak
        if abs(off) <= CLOSE * first.peak and real <= budget.peak:
            return first
        log.info("plan: peak of the generated code %d, estimated %d; planned again", real, first.peak)
        again = planner.meet(budget, inductor, room, off)
        found = real if again.decisions == first.decisions else peak(timeline_of(again))
    except ScheduleError as error:
        log.warning("the plan's peak stays an estimate: %s", error)
        return planner.meet(budget, inductor, room)
    if found <= budget.peak:
        return again
    if real <= budget.peak:
        return first
    found, best = min((found, again), (real, first), key=lambda pair: pair[0])
    warnings.warn(
        f"options['memory_budget'] asks for a peak of {budget.peak / 2**20:.1f} MiB; the generated code of the best of two plans "
        f"peaks at {found / 2**20:.1f} MiB (docs/planner.md). Ask for less to get below.",
        RuntimeWarning,
        stacklevel=2,
    )
    return best
