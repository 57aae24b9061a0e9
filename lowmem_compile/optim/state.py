"""The state that projected optimizers keep for units: projectors, moments, and when a basis is made anew.

The state of a parameter holds tensors and whole numbers alone: ``step`` (gradients seen), the slots of its method, and on the
first parameter of a unit ``basis_step`` (steps of the unit, which decides when the basis is refreshed), ``basis_made`` (the one
of them whose basis a backward pass made) and the projector's factors ``projector``, or ``projector_0`` and ``projector_1``.
Random bases are not stored: they come from ``seed`` and the number of the refresh. A parameter without a gradient is left alone,
and its count does not move: a refresh that was due then happens with its next gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowmem_compile.errors import OptionError
from lowmem_compile.optim.bases import mix
from lowmem_compile.optim.moments import moment_slots
from lowmem_compile.optim.projector import Factors, Plan
from lowmem_compile.optim.sharded import gathered, gathered_rows, local_shape, same_everywhere
from lowmem_compile.optim.slots import Slot, State, compute_dtype
from lowmem_compile.optim.units import Group, Move, Refresh, Unit, units_of


class ProjectedState(Optimizer):
    """Units, their bases and their moments. A method says how a basis is made and which tensors are kept."""

    bases: ClassVar[tuple[str, ...]] = ("adamw", "adafactor")
    projects_convolutions: ClassVar[bool] = False
    stores_projector: ClassVar[bool] = True
    needs_full_gradient: ClassVar[bool] = False
    refresh_needs_gradient: ClassVar[bool] = True

    _index: dict[Tensor, tuple[Group, Unit]]

    def units(self) -> Iterator[tuple[Group, Unit]]:
        """Every group and unit, in order."""
        ordinal = 0
        for number, group in enumerate(self.param_groups):
            for unit in self._units_of(group, number, ordinal):
                yield group, unit
            ordinal += len(group["params"])

    def _units_of(self, group: Group, number: int, ordinal: int) -> Iterator[Unit]:
        return units_of(group, number, ordinal, convolutions=self.projects_convolutions)

    def unit_of(self, param: Tensor) -> tuple[Group, Unit]:
        """The group and the unit of a parameter.

        Raises:
            OptionError: it is not one of this optimizer's.
        """
        if param not in self._index:
            self._index = {p: (group, unit) for group, unit in self.units() for p in unit.params}
        if param not in self._index:
            raise OptionError("the parameter is not one of this optimizer's")
        return self._index[param]

    def due(self, group: Group, unit: Unit) -> bool:
        """Whether the next step makes a basis: every so many steps, unless the backward pass has made it already."""
        leader = self.state.get(unit.params[0], {})
        t = leader.get("basis_step", 0)
        return bool(t % group["update_interval"] == 0) and leader.get("basis_made", -1) != t

    def leader_of(self, group: Group, unit: Unit) -> tuple[State, int]:
        """The state of the parameter that stands for a projected unit, and the steps that the unit has taken."""
        leader = self.state[unit.params[0]]
        if not self.stores_projector:
            leader.setdefault("seed", mix(group["seed"], unit.ordinal))
        return leader, leader.setdefault("basis_step", 0)

    def refresh(self, group: Group, unit: Unit, plan: Plan, live: list[tuple[Tensor, Tensor]]) -> None:
        """Put a new basis, from parameters and their whole gradients, into the state of the unit; carry the moments over."""
        first = unit.params[0]
        t = self.state[first]["basis_step"]
        old = tuple(factor.clone() for factor in self.factors(group, unit, plan, t - 1)) if t else None
        if self.stores_projector:
            grads = [gathered(grad).to(compute_dtype(p.dtype)) for p, grad in live]

            def momentum() -> Tensor:
                return _stacked([self.momentum(p, group, plan) for p, _ in live])

            new = same_everywhere(self.new_factors(Refresh(group, plan, t, _stacked(grads), old, momentum)), first)
            for slot, factor in zip(self.factor_slots(plan, first.dtype, group), new, strict=True):
                slot.create(self.state[first], first.device)
                slot.save(self.state[first], factor)
        if old is not None:
            current = self.factors(group, unit, plan, t)
            for p in unit.params:
                if "step" in self.state[p]:
                    state, slots = self.state_of(p, group, plan)
                    self.carry(Move(state, slots, old, current, plan, group))

    def momentum(self, p: Tensor, group: Group, plan: Plan) -> Tensor:
        """The first moment of a projected parameter; zeros if there is none."""
        state = self.state[p]
        for slot in self.slots(local_shape(p), p.dtype, group, plan):
            if slot.key == "exp_avg" and slot.key in state:
                return gathered_rows(slot.load(state), p) if plan.side == "right" else slot.load(state)
        return torch.zeros(plan.low_shape(tuple(p.shape)), dtype=compute_dtype(p.dtype), device=p.device)

    def factors(self, group: Group, unit: Unit, plan: Plan, t: int) -> Factors:
        """The projector of step t of a unit, in the dtype that updates are computed in."""
        first = unit.params[0]
        state = self.state[first]
        if self.stores_projector:
            return tuple(slot.load(state) for slot in self.factor_slots(plan, first.dtype, group))
        seed = state.get("seed", mix(group["seed"], unit.ordinal))
        return self.drawn_factors(plan, mix(seed, t // group["update_interval"]), first)

    def state_of(self, p: Tensor, group: Group, plan: Plan | None) -> tuple[State, tuple[Slot, ...]]:
        """The state of a parameter, made at its first gradient, and its slots."""
        state, slots = self.state[p], self.slots(local_shape(p), p.dtype, group, plan)
        if "step" not in state:
            state["step"] = 0
            for slot in slots:
                slot.create(state, p.device)
        return state, slots

    # What a method defines.

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group, plan: Plan | None) -> tuple[Slot, ...]:
        """The tensors kept for a parameter, the projector not counted."""
        return moment_slots(shape if plan is None else plan.low_shape(shape), dtype, group)

    def factor_slots(self, plan: Plan, dtype: torch.dtype, group: Group) -> tuple[Slot, ...]:
        """The tensors that hold the projector; none if it comes from a seed."""
        if not self.stores_projector:
            return ()
        keys = ("projector",) if len(plan.ranks) == 1 else ("projector_0", "projector_1")
        block = group["block_size"] if group["projector_bits"] == 8 else 0
        return tuple(Slot(key, shape, dtype, block) for key, shape in zip(keys, plan.factor_shapes, strict=True))

    def new_factors(self, refresh: Refresh) -> Factors:
        """A basis for the coming steps."""
        raise NotImplementedError

    def drawn_factors(self, plan: Plan, seed: int, like: Tensor) -> Factors:
        """The basis that a seed stands for, for methods that do not store it; on the device of ``like``."""
        raise NotImplementedError

    def carry(self, move: Move) -> None:
        """Carry the moments to a new basis; they are left as they are unless a method says otherwise."""


def _stacked(parts: list[Tensor]) -> Tensor:
    """The tensors one below the other; one alone as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
