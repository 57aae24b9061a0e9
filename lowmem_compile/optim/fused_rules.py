"""The step of one parameter as a rule of the backward graph: the code of the eager step, traced on copies.

A rule is (p, g, *tensors) -> (new p, *new states), see :mod:`lowmem_compile.in_backward`. Its tensors, in this order:

    states      the slots of the method; where the step makes a basis, the slots of the projector too
    factors     A or L (convolutions: both), where the step makes none
    ticket      of the optimizer, where it does
    maps        unsigned and signed, [256] each, where any state is in 8 bits
    rates       lr, η and β₂ₜ of this step, [4]

What else the step depends on (β, ε, scale, side, ranks, storage) is a constant of the rule, and part of its name; changing one of
these options makes another rule, so another compiled variant.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lowmem_compile.in_backward import RULES, Rule, register_rule
from lowmem_compile.kernels.projection_tap import fresh_factors
from lowmem_compile.optim.moments import Rates
from lowmem_compile.optim.projector import Factors, Plan, down
from lowmem_compile.optim.quantise import given_maps
from lowmem_compile.optim.slots import Slot, State, compute_dtype
from lowmem_compile.optim.units import Group, Move, Work

if TYPE_CHECKING:
    from lowmem_compile.optim.base import LowRankOptimizer

Kind = Literal["plain", "low", "whole", "first", "refresh"]
"""What the rule takes: the whole gradient of an unprojected parameter; a projected gradient; a whole one to project; a whole one
to make the first basis from; or a new basis in place of another."""


@dataclass(frozen=True)
class Spec:
    """All that decides a rule.

    Attributes:
        method: class of the optimizer.
        kind: what the gradient is, and what is made of it.
        plan: side and ranks; ``None`` for a parameter that is not projected.
        slots: the method's slots of the parameter.
        factor_slots: the projector's, for a rule that makes a basis; otherwise empty.
        options: the group's options, as JSON, without those that the rates hold.
        dtype: of the parameter.
    """

    method: type[LowRankOptimizer]
    kind: Kind
    plan: Plan | None
    slots: tuple[Slot, ...]
    factor_slots: tuple[Slot, ...]
    options: str
    dtype: torch.dtype

    @property
    def stored(self) -> tuple[Slot, ...]:
        """The slots that the rule writes."""
        return self.slots + self.factor_slots

    @property
    def encoded(self) -> bool:
        """Whether any state is in 8 bits."""
        return any(slot.block for slot in self.stored)

    @property
    def name(self) -> str:
        """Unique, with what a reader of a graph wants to know first."""
        parts = (self.method.__module__, self.method.__qualname__, self.kind, self.plan, self.stored, self.options, self.dtype)
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()
        return f"{self.method.__name__} {self.kind} {digest[:16]}"


CHANGING = ("params", "param_names", "lr", "initial_lr", "name", "shared", "fused_backward", "refresh_in_backward", "seed")
"""Entries of a group that a traced step does not depend on."""


def options_of(group: Group) -> str:
    """The options of a group that are constants of its rules."""
    return json.dumps({k: v for k, v in group.items() if k not in CHANGING}, sort_keys=True, default=repr)


def state_keys(slots: Sequence[Slot]) -> list[str]:
    """Keys of the tensors that hold these slots."""
    return [key for slot in slots for key in ((slot.key, slot.key + "_scale") if slot.block else (slot.key,))]


def rule_of(spec: Spec, group: Group) -> str:
    """The name of the rule, which is registered when it is first asked for."""
    name = spec.name
    if name not in RULES:
        constants = {k: v for k, v in group.items() if k not in CHANGING}
        register_rule(Rule(name, _functional(spec, constants), states=len(state_keys(spec.stored))))
    return name


def _functional(spec: Spec, group: Group) -> Callable[..., tuple[Tensor, ...]]:
    """The rule's function: the step changes copies, and tracing turns that into values."""
    method = spec.method.__new__(spec.method)  # what a step calls is decided by the class; there are no parameters here
    keys = state_keys(spec.stored)

    def step(p: Tensor, g: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        W, *values = (t.clone() for t in (p, *tensors[: len(keys)]))
        state: State = dict(zip(keys, values, strict=True))
        rest = list(tensors[len(keys) :])
        row = rest.pop().to(compute_dtype(spec.dtype))
        rates = Rates(row[0], row[1], row[2])
        maps = given_maps(*(rest.pop(-2), rest.pop())) if spec.encoded else contextlib.nullcontext()
        with maps:
            advance(method, spec, group, W, g, state, rest, rates)
        return (W, *(state[key] for key in keys))

    def apply(p: Tensor, g: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = torch.func.functionalize(step, remove="mutations_and_views")(p, g, *tensors)
        return results

    return apply


def advance(
    method: LowRankOptimizer, spec: Spec, group: Group, W: Tensor, g: Tensor, state: State, rest: Sequence[Tensor], rates: Rates
) -> None:
    """One step of one parameter, in place.

    Args:
        method: an optimizer of the class, used for its methods alone.
        spec: the rule.
        group: its options.
        W: the parameter.
        g: its gradient, projected if the kind is "low".
        state: the tensors of the slots.
        rest: the factors, or the ticket.
        rates: of this step.
    """
    if spec.plan is None:
        method.unprojected_step(W, g, state, spec.slots, group, rates)
        return
    wide = g.to(compute_dtype(spec.dtype))
    plan, side = spec.plan, spec.plan.side
    if spec.factor_slots:
        factors = _new_factors(method, spec, group, wide, state, rest[0])
    else:
        factors = tuple(factor.to(wide.dtype) for factor in rest)
    low = wide if spec.kind == "low" else down(wide, factors, side)
    full = wide if method.needs_full_gradient else None
    method.projected_step(Work(W, state, spec.slots, low, full, factors, plan, group, rates))


def _new_factors(method: LowRankOptimizer, spec: Spec, group: Group, G: Tensor, state: State, ticket: Tensor) -> Factors:
    """Put a new basis into the state, carry the moments over, and return the basis as it is stored."""
    assert spec.plan is not None
    old = tuple(slot.load(state).clone() for slot in spec.factor_slots) if spec.kind == "refresh" else None
    sizes = [size for shape in spec.plan.factor_shapes for size in shape]
    for slot, factor in zip(spec.factor_slots, fresh_factors(G, ticket, sizes), strict=True):
        slot.save(state, factor)
    factors = tuple(slot.load(state).clone() for slot in spec.factor_slots)
    if old is not None:
        method.carry(Move(state, spec.slots, old, factors, spec.plan, group))
    return factors
