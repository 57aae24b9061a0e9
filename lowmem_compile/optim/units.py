"""Units: what an optimizer projects together, and what a method's hooks are handed.

A unit is one parameter, or several that read one input and share a projector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowmem_compile.optim.moments import Rates
from lowmem_compile.optim.projector import Factors, Plan, make_plan, plan_matrix
from lowmem_compile.optim.slots import Slot, State

Group = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """Parameters that are projected together.

    Attributes:
        params: the parameter, or those that share a projector; the first holds the projector.
        names: their names, for messages and the report.
        ordinal: the place of the first among the optimizer's parameters; seeds depend on it.
        plan: how they are projected, or the reason why not.
    """

    params: tuple[Tensor, ...]
    names: tuple[str, ...]
    ordinal: int
    plan: Plan | str


@dataclass(frozen=True)
class Refresh:
    """What a new basis is made from.

    Attributes:
        group: the parameter group.
        plan: side and ranks.
        t: steps the unit has taken.
        G: its gradient, stacked along O for a shared projector.
        old: the basis until now, ``None`` at first.
        momentum: gives the first moment in the old basis, stacked like G; zeros before a first gradient.
    """

    group: Group
    plan: Plan
    t: int
    G: Tensor
    old: Factors | None
    momentum: Callable[[], Tensor]


@dataclass(frozen=True)
class Move:
    """The state of one parameter that a new basis concerns."""

    state: State
    slots: tuple[Slot, ...]
    old: Factors
    new: Factors
    plan: Plan
    group: Group


@dataclass(frozen=True)
class Work:
    """One projected step of one parameter.

    Attributes:
        param: the parameter.
        state: its state; ``state["step"]`` counts this step already.
        slots: its slots.
        low: the projected gradient.
        full: the whole gradient, for methods that need it at every step.
        factors: the projector.
        plan: side and ranks.
        group: the parameter group.
        rates: those of this step, in a step that is traced into a backward graph.
        total: sums a number over the ranks that hold rows of the parameter; ``None`` if this one holds all.
    """

    param: Tensor
    state: State
    slots: tuple[Slot, ...]
    low: Tensor
    full: Tensor | None
    factors: Factors
    plan: Plan
    group: Group
    rates: Rates | None = None
    total: Callable[[Tensor], Tensor] | None = None


def units_of(group: Group, number: int, ordinal: int, *, convolutions: bool) -> Iterator[Unit]:
    """The units of a group.

    Args:
        group: a checked parameter group.
        number: its place among the groups.
        ordinal: parameters in the groups before it.
        convolutions: the method projects convolutions.

    Raises:
        OptionError: a rank is not below the projected dimension.
    """
    params = group["params"]
    names = group.get("param_names") or [f"group {number}, parameter {i}" for i in range(len(params))]
    sets = {members[0]: members for members in group["shared"]}
    followers = {i for members in group["shared"] for i in members[1:]}
    for i, p in enumerate(params):
        if i in followers:
            continue
        if i in sets:
            members = tuple(sets[i])
            stacked = (sum(params[k].shape[0] for k in members), p.shape[1])
            plan: Plan | str = plan_matrix(stacked, group, " + ".join(names[k] for k in members), shared=True)
        else:
            members = (i,)
            plan = make_plan(tuple(p.shape), group, names[i], convolutions=convolutions)
        yield Unit(tuple(params[k] for k in members), tuple(names[k] for k in members), ordinal + i, plan)
