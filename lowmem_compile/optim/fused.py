"""``fused_backward=True``: the whole step of a parameter inside the backward pass, so that gradients never exist together.

Compiled with lowmem: when a graph is called, each weight that a fused group holds brings a :class:`Fused`: a rule for its
gradient (:mod:`lowmem_compile.optim.fused_rules`) and the tensors of the rule, which become inputs of the graph; the pass
``update_in_backward`` writes the rule into the backward graph. The numbers that change from step to step are tensors, filled
when the graph is called. Eager, and where the pass declines: a hook on each parameter steps it when its gradient is complete.

The loop stays as it is: ``loss.backward(); optimizer.step(); optimizer.zero_grad()``. ``step`` ends the step: it counts, and
steps what is left (weights that share a projector, at a refresh). Between two calls of ``step`` a parameter is updated once. A
second backward pass, a clipping of gradients, ``GradScaler`` and any other reader of ``param.grad`` get a GradientError: in the
place of a consumed gradient stands a :class:`~lowmem_compile.optim.gradient.ConsumedGradient`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lowmem_compile.errors import GradientError
from lowmem_compile.kernels.projection_tap import Refresher
from lowmem_compile.optim.fused_rules import Kind, Spec, options_of, rule_of, state_keys
from lowmem_compile.optim.gradient import ConsumedGradient, ProjectedGradient
from lowmem_compile.optim.moments import rates_of
from lowmem_compile.optim.projector import Factors, Plan
from lowmem_compile.optim.quantise import dynamic_map
from lowmem_compile.optim.rates import RateTable
from lowmem_compile.optim.slots import compute_dtype
from lowmem_compile.optim.taps import Tap
from lowmem_compile.optim.units import Group, Refresh, Unit

if TYPE_CHECKING:
    from lowmem_compile.optim.base import LowRankOptimizer


@dataclass(frozen=True)
class Fused:
    """How a compiled graph updates one parameter.

    Attributes:
        fusion: of the optimizer that holds it.
        tap: gives the projected gradient, where the step needs no whole one.
        low: rule for the tap's gradient; empty without a tap.
        whole: rule for the whole gradient, also where the graph cannot tap the weight.
        tensors: of both rules.
        reason: why the gradient is whole; empty with a tap.
    """

    fusion: Fusion
    tap: Tap | None
    low: str
    whole: str
    tensors: tuple[Tensor, ...]
    reason: str


class Fusion:
    """What an optimizer knows of its updates in the backward pass.

    Attributes:
        of: the optimizer.
        window: how often ``step`` ended; what happens between two ends belongs together.
        begun: parameters whose compiled backward graph has begun in this window.
        updated: parameters that a compiled graph updated in this window.
        stepped: parameters that a hook stepped in this window.
    """

    def __init__(self, optimizer: LowRankOptimizer) -> None:
        self.of = weakref.ref(optimizer)
        self.window = 0
        self.begun: set[Tensor] = set()
        self.updated: set[Tensor] = set()
        self.stepped: set[Tensor] = set()
        self.hooks: dict[Tensor, RemovableHandle] = {}
        self.forget()

    def forget(self) -> None:
        """Forget what was looked up: groups or state are other objects now."""
        self.rows: dict[Tensor, tuple[RateTable, int]] = {}
        self.tickets: dict[Tensor, Refresher] = {}
        self.held: dict[Tensor, tuple[int, Tensor | None, Factors]] = {}
        self.maps: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.options: dict[int, tuple[int, str]] = {}
        self.known: dict[tuple[Tensor, Kind], tuple[str, str, tuple[Tensor, ...]]] = {}

    @property
    def optimizer(self) -> LowRankOptimizer:
        """The optimizer; an ``AssertionError`` if it is gone."""
        found = self.of()
        assert found is not None
        return found

    # The window between two steps, and eager hooks.

    def watch(self, params: Iterable[Tensor]) -> None:
        """Step these parameters when their gradients are complete."""
        mine = weakref.ref(self)

        def hook(param: Tensor) -> None:
            fusion = mine()
            if fusion is not None and fusion.of() is not None:
                fusion.take(param)

        for p in params:
            if p.requires_grad and p not in self.hooks:
                self.hooks[p] = p.register_post_accumulate_grad_hook(hook)

    def foreign_hooks(self, param: Tensor) -> bool:
        """Whether others have hooks on the gradient of a parameter."""
        hooks: Any = getattr(param, "_post_accumulate_grad_hooks", None) or {}
        return bool(param._backward_hooks) or len(hooks) > (param in self.hooks)

    @torch.no_grad()
    def take(self, param: Tensor) -> None:
        """A whole gradient of a parameter is complete: step it, and drop the gradient."""
        if param.grad is None or isinstance(param.grad, (ConsumedGradient, ProjectedGradient)):
            return  # autograd calls hooks also where a compiled graph returned no gradient
        optimizer = self.optimizer
        group, unit = optimizer.unit_of(param)
        if param in self.stepped or param in self.updated:
            param.grad = None
            raise GradientError(self.twice(param))
        if len(unit.params) > 1:
            return  # a shared basis moves on once a step, in step()
        optimizer.step_one(group, unit)
        self.stepped.add(param)
        param.grad = ConsumedGradient(param)

    def name_of(self, param: Tensor) -> str:
        """For messages."""
        _, unit = self.optimizer.unit_of(param)
        return unit.names[next(i for i, p in enumerate(unit.params) if p is param)]

    def twice(self, param: Tensor) -> str:
        """The message for a second gradient."""
        return (
            f"{self.name_of(param)} got a second gradient before optimizer.step(), and was updated from the first in the "
            "backward pass (fused_backward=True). Call optimizer.step() after every backward pass; to accumulate gradients, to "
            "clip by their global norm or to use GradScaler, build the optimizer with fused_backward=False."
        )

    def clocks(self) -> dict[Tensor, int]:
        """Take the stand-ins away; the steps that units which graphs updated had taken before, by their leaders."""
        for p in self.hooks:
            if isinstance(p.grad, ConsumedGradient):
                p.grad = None
        optimizer = self.optimizer
        units = [optimizer.unit_of(p)[1] for p in self.updated]
        return {u.params[0]: optimizer.state[u.params[0]]["basis_step"] for u in units if not isinstance(u.plan, str)}

    def end(self, clocks: dict[Tensor, int]) -> None:
        """End the window: count the steps that graphs took."""
        state = self.optimizer.state
        for p in self.updated:
            state[p]["step"] += 1
        for leader, t in clocks.items():
            state[leader]["basis_step"] = t + 1
        self.begun.clear()
        self.updated.clear()
        self.stepped.clear()
        self.window += 1

    # What a compiled graph is handed.

    def of_parameter(self, param: Tensor) -> Fused | str | None:
        """How a graph that is called now is to update a parameter, or why its gradient must come out; ``None`` without fusion."""
        optimizer = self.optimizer
        group, unit = optimizer.unit_of(param)
        if not group["fused_backward"]:
            return None
        if self.foreign_hooks(param):
            return "the parameter has hooks on its gradient, which have to see it whole"
        plan = unit.plan
        if isinstance(plan, str):
            return self._fused(param, group, unit, "plain", f"not projected: {plan}")
        leader, t = optimizer.leader_of(group, unit)
        if optimizer.due(group, unit):
            if optimizer.refresh_needs_gradient and len(unit.params) > 1:
                return "this step makes a basis for several weights from their whole gradients"
            if optimizer.refresh_needs_gradient:
                return self._fused(param, group, unit, "refresh" if t else "first", "this step makes a new basis")
            with torch.no_grad():
                optimizer.refresh(group, unit, plan, [])
            leader["basis_made"] = t
        tap = optimizer.tap(param)
        reason = tap if isinstance(tap, str) else ""
        return self._fused(param, group, unit, "whole", reason, None if isinstance(tap, str) else tap)

    def _fused(self, param: Tensor, group: Group, unit: Unit, kind: Kind, reason: str, tap: Tap | None = None) -> Fused:
        whole, states = self._rule(param, group, unit, kind)
        low = self._rule(param, group, unit, "low")[0] if tap is not None else ""
        more: tuple[Tensor, ...] = ()
        if kind in ("first", "refresh"):
            more = (self._ticket(param),)
        elif kind == "whole":
            more = (tap.basis,) if tap is not None else self._factors(param, group, unit)
        if any(t.dtype == torch.uint8 for t in states):
            more += self._maps(param.device)
        return Fused(self, tap, low, whole, (*states, *more, self._rates(param, group)), reason)

    def _rule(self, param: Tensor, group: Group, unit: Unit, kind: Kind) -> tuple[str, tuple[Tensor, ...]]:
        """The name of a rule, and the states that it changes."""
        options = self._options(group)
        known = self.known.get((param, kind))
        if known is None or known[0] != options:
            optimizer = self.optimizer
            plan = None if isinstance(unit.plan, str) else unit.plan
            state, slots = optimizer.state_of(param, group, plan)
            makes = kind in ("first", "refresh")
            factor_slots = optimizer.factor_slots(plan, param.dtype, group) if makes and plan is not None else ()
            for slot in factor_slots:
                slot.create(state, param.device)
            spec = Spec(type(optimizer), kind, plan, slots, factor_slots, options, param.dtype)
            states = tuple(state[key] for key in state_keys(spec.stored))
            known = self.known[param, kind] = (options, rule_of(spec, group), states)
        return known[1:]

    def _options(self, group: Group) -> str:
        """The group's constants, read once a window."""
        known = self.options.get(id(group))
        if known is None or known[0] != self.window:
            known = self.options[id(group)] = (self.window, options_of(group))
        return known[1]

    def _rates(self, param: Tensor, group: Group) -> Tensor:
        """The row of a parameter's rates, staged for its next step."""
        if param not in self.rows:
            self._make_tables()
        table, index = self.rows[param]
        table.stage(index, tuple(map(float, rates_of(group, self.optimizer.state[param]["step"] + 1))))
        return table.rows[index]

    def _make_tables(self) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in self.hooks:
            kinds.setdefault((p.device, compute_dtype(p.dtype)), []).append(p)
        for (device, dtype), params in kinds.items():
            table = RateTable(len(params), device, dtype)
            self.rows.update({p: (table, i) for i, p in enumerate(params)})

    def fill(self) -> None:
        """Bring the rates on their devices up to date."""
        for table in {id(table): table for table, _ in self.rows.values()}.values():
            table.fill()

    def _factors(self, param: Tensor, group: Group, unit: Unit) -> Factors:
        """The factors of this step, for a rule that projects a whole gradient: the stored tensors where they serve."""
        optimizer, plan = self.optimizer, unit.plan
        assert isinstance(plan, Plan)
        leader, t = optimizer.leader_of(group, unit)
        slots = optimizer.factor_slots(plan, param.dtype, group)
        if slots and not any(slot.block for slot in slots):
            return tuple(leader[slot.key] for slot in slots)
        generation, stored = t // group["update_interval"], leader.get(slots[0].key) if slots else None
        known = self.held.get(param)
        if known is None or known[0] != generation or known[1] is not stored:
            known = self.held[param] = (generation, stored, optimizer.factors(group, unit, plan, t))
        return known[2]

    def _maps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self.maps:
            self.maps[device] = (dynamic_map(signed=False, device=device), dynamic_map(signed=True, device=device))
        return self.maps[device]

    def _ticket(self, param: Tensor) -> Tensor:
        """Stands for this optimizer where a graph makes a basis for the parameter."""
        if param not in self.tickets:
            mine, to = weakref.ref(self), weakref.ref(param)

            def take(G: Tensor) -> Factors:
                fusion, target = mine(), to()
                assert fusion is not None
                assert target is not None
                return fusion.new_factors(target, G)

            self.tickets[param] = Refresher(take)
        return self.tickets[param].ticket

    def new_factors(self, param: Tensor, G: Tensor) -> Factors:
        """The factors of the basis that is due, from a whole gradient; the state is left as it is.

        Raises:
            GradientError: the gradient is not finite.
        """
        optimizer = self.optimizer
        group, unit = optimizer.unit_of(param)
        plan = unit.plan
        assert isinstance(plan, Plan)
        if not bool(G.isfinite().all()):
            raise GradientError(
                f"the gradient of {self.name_of(param)} is not finite at a step that computes a basis from it. Parameters behind "
                "it were updated in this backward pass already (fused_backward=True): load a checkpoint."
            )
        _, t = optimizer.leader_of(group, unit)
        old = optimizer.factors(group, unit, plan, t - 1) if t else None
        with torch.no_grad():
            return optimizer.new_factors(Refresh(group, plan, t, G, old, lambda: optimizer.momentum(param, group, plan)))
