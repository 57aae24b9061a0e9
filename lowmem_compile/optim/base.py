"""What the projected optimizers share: groups, units, the step, projected gradients from outside, exact resume.

A unit is one parameter, or a list of parameters that read one input and share a projector. For each unit a step

    1. refreshes the basis if it is due, from the gradients that are there (stacked along O for a shared projector),
    2. projects each gradient, unless it was given already projected,
    3. advances the moments and applies the update.

The state of a parameter holds tensors and whole numbers alone: ``step`` (gradients seen), the slots of its method, and on the
first parameter of a unit ``basis_step`` (steps of the unit, which decides when the basis is refreshed), ``basis_made`` (the one
of them whose basis a backward pass made) and the projector's factors ``projector``, or ``projector_0`` and ``projector_1``.
Random bases are not stored: they come from ``seed`` and the number of the refresh. A parameter without a gradient is left alone,
and its count does not move: a refresh that was due then happens with its next gradient.

NOTE [dtypes]. Gradients, moments and updates are computed in float32 (float64 for float64 parameters) and stored in the
parameter's dtype, or as ``bits`` says. A bfloat16 v with β₂ = 0.999 stops following changes below 0.2 %; ``bits=32`` avoids that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowmem_compile.errors import GradientError, OptionError
from lowmem_compile.optim.bases import mix
from lowmem_compile.optim.fused import Fusion
from lowmem_compile.optim.gradient import projected_gradient, whole_gradient
from lowmem_compile.optim.moments import Rates, Update, apply_update, moment_slots, take_step
from lowmem_compile.optim.pieces import apply_projected, plain_step, project
from lowmem_compile.optim.projector import Factors, Plan
from lowmem_compile.optim.resume import check_structure, take_over
from lowmem_compile.optim.settings import (
    COMMON,
    FOREIGN,
    ParamsLike,
    check_names,
    check_values,
    settle_rank,
    shared_indices,
)
from lowmem_compile.optim.sharded import (
    check_sharded,
    factors_of_rows,
    gathered,
    gathered_rows,
    is_finite,
    is_sharded,
    local,
    local_shape,
    same_everywhere,
    total_of,
)
from lowmem_compile.optim.slots import Slot, State, compute_dtype, total_bytes
from lowmem_compile.optim.taps import Tap, announce, make_refresh_tap, make_tap
from lowmem_compile.optim.units import Group, Move, Refresh, Unit, Work, units_of


class LowRankOptimizer(Optimizer):
    """Base of the optimizers that keep their moments in a projected space.

    A method says how a basis is made (:meth:`new_factors`), which tensors it keeps (:meth:`slots`) and how a projected step
    becomes a full one (:meth:`projected_step`).
    """

    bases: ClassVar[tuple[str, ...]] = ("adamw", "adafactor")
    projects_convolutions: ClassVar[bool] = False
    stores_projector: ClassVar[bool] = True
    needs_full_gradient: ClassVar[bool] = False
    refresh_needs_gradient: ClassVar[bool] = True

    def __init__(self, params: ParamsLike, options: Mapping[str, Any], common: Mapping[str, Any]) -> None:
        self._pending: dict[Tensor, Tensor] = {}
        self.fusion = Fusion(self)
        self._forget()
        name = type(self).__name__
        check_names(common, COMMON, name)
        defaults = {**COMMON, **options, **common}
        self._shared = [list(members) for members in defaults.pop("shared")]
        defaults["shared"] = ()
        if defaults["rank"] is not None and defaults["rank_ratio"] is not None:
            raise OptionError(
                f"{name} got both rank={defaults['rank']} and rank_ratio={defaults['rank_ratio']}; give one of them."
            )
        super().__init__(params, defaults)
        used = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(p) not in used for members in self._shared for p in members):
            raise OptionError(f"{name}: shared names a parameter that no group holds.")

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as in any optimizer.

        Raises:
            OptionError: an unknown or wrong option, no rank, no parameter to project, or a rank that is not below the
                projected dimension.
        """
        method, where = type(self).__name__, f"group {len(self.param_groups)}"
        param_group = dict(param_group)
        check_names(param_group, [*self.defaults, *FOREIGN], f"{method}: {where}")
        settle_rank(param_group, self.defaults, method, where)
        shared = param_group.pop("shared", None)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group, where, shared)
        except OptionError:
            self.param_groups.pop()
            raise
        self._forget()
        announce(self, group["params"])
        if group["fused_backward"]:
            self.fusion.watch(group["params"])

    def _check_group(self, group: Group, where: str, shared: Any) -> None:
        method, params = type(self).__name__, group["params"]
        check_values(group, self.bases, method, where)
        projected = group["rank"] is not None or group["rank_ratio"] is not None
        if projected and not params:
            rank = "rank" if group["rank"] is not None else "rank_ratio"
            raise OptionError(
                f"{method}: {where} ({rank}={group[rank]}) has no parameters: the filter that made it matched nothing. "
                "lowmem_compile.optim.split says which names there are."
            )
        if shared is None:
            inside = {id(p) for p in params}
            shared = [members for members in self._shared if any(id(p) in inside for p in members)]
        if shared and not projected:
            raise OptionError(f"{method}: {where} has shared parameters but rank=None; give it a rank, or leave out shared.")
        group["shared"] = shared_indices(shared, params, where)
        for unit in self._units_of(group, len(self.param_groups) - 1, 0):  # every plan is made once, for its errors
            for p, name in zip(unit.params, unit.names, strict=True):
                check_sharded(p, name, group, unit.plan, f"{method}: {where}")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            GradientError: a gradient is sparse, or has to give a basis and is not finite or was given projected only.
                Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clocks = self.fusion.clocks()
        work = [(group, unit) for group, unit in self.units() if self._live(group, unit)]
        for group, unit in work:
            self._check_gradients(group, unit)
        for group, unit in work:
            self._step_unit(group, unit)
        self.fusion.end(clocks)
        self._pending.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, projected ones too."""
        self._pending.clear()
        super().zero_grad(set_to_none)

    def units(self) -> Iterator[tuple[Group, Unit]]:
        """Every group and unit, in order."""
        ordinal = 0
        for number, group in enumerate(self.param_groups):
            for unit in self._units_of(group, number, ordinal):
                yield group, unit
            ordinal += len(group["params"])

    def _units_of(self, group: Group, number: int, ordinal: int) -> Iterator[Unit]:
        return units_of(group, number, ordinal, convolutions=self.projects_convolutions)

    # Projected gradients from outside.

    def full_gradient_due(self, param: Tensor) -> bool:
        """Whether the next step needs this parameter's whole gradient: always, at a refresh, or not."""
        group, unit = self.unit_of(param)
        return isinstance(unit.plan, str) or self._needs_whole(group, unit)

    def factors_of(self, param: Tensor) -> Factors:
        """The factors that project this parameter's next gradient, in the dtype that updates are computed in.

        Raises:
            GradientError: the basis comes from the next whole gradient, or the parameter is not projected.
        """
        group, unit = self.unit_of(param)
        if isinstance(unit.plan, str):
            raise GradientError(f"{unit.names[0]} is not projected: {unit.plan}.")
        t = self.state[unit.params[0]].get("basis_step", 0)
        if self.refresh_needs_gradient and self.due(group, unit):
            raise GradientError(f"the basis of {unit.names[0]} comes from its next whole gradient; see full_gradient_due.")
        return self.factors(group, unit, unit.plan, t)

    def give_projected(self, param: Tensor, low: Tensor) -> None:
        """Add an already projected gradient for the next step; it adds up with others and with ``param.grad``.

        Args:
            param: one of the optimizer's parameters.
            low: G A [O, r] or Lᵀ G [r, I], with the factors of :meth:`factors_of`.

        Raises:
            GradientError: the next step needs the whole gradient, or the shape is wrong.
        """
        _, unit = self.unit_of(param)
        if isinstance(unit.plan, str) or self.full_gradient_due(param):
            raise GradientError(f"the next step needs the whole gradient of {' + '.join(unit.names)}; see full_gradient_due.")
        expected = unit.plan.low_shape(tuple(param.shape))
        if tuple(low.shape) != expected:
            raise GradientError(f"a projected gradient of {' + '.join(unit.names)} has shape {expected}, not {tuple(low.shape)}.")
        self._pending[param] = self._pending[param] + low if param in self._pending else low.detach()

    def tap(self, param: Tensor) -> Tap | str:
        """What a compiled graph needs to give this parameter's next gradient projected, or the reason why it must be whole.

        The tap is the same object until the basis changes.
        """
        group, unit = self.unit_of(param)
        plan = unit.plan
        if isinstance(plan, str):
            return f"not projected: {plan}"
        if is_sharded(param):
            return "the parameter is sharded over ranks"
        if self.needs_full_gradient:
            return f"{type(self).__name__} needs the whole gradient at every step"
        if plan.side not in ("right", "left"):
            return "convolutions are projected in the optimizer"
        first = self.state.get(unit.params[0], {})
        t = first.get("basis_step", 0)
        generation, stored = t // group["update_interval"], first.get("projector")
        if self.refresh_needs_gradient and self.due(group, unit):
            if not group["refresh_in_backward"] or len(unit.params) > 1:
                return "this step makes a new basis from the whole gradient"
            tap = self._refreshing.get(param)
            if tap is None or tap.generation != generation:
                tap = make_refresh_tap(self, param, plan.side, plan.low_shape(tuple(param.shape)), generation)
                self._refreshing[param] = tap
            return tap
        known = self._taps.get(param)
        if known is None or known[0] is not stored or known[1].generation != generation:
            others = [self._taps[p] for p in unit.params if p in self._taps]
            basis = next((t.basis for of, t in others if of is stored and t.generation == generation), None)
            if basis is None and stored is not None and stored.dtype == param.dtype:
                basis = stored
            if basis is None or basis.dtype != param.dtype:
                basis = self.factors(group, unit, plan, t)[0].to(param.dtype)
            tap = make_tap(param, plan.side, basis, plan.low_shape(tuple(param.shape)), generation)
            known = self._taps[param] = (stored, tap)
        return known[1]

    @torch.no_grad()
    def make_basis(self, param: Tensor, G: Tensor) -> Tensor:
        """Make the basis that is due from this whole gradient, now and not in the step, and project it.

        If the basis was made meanwhile, the gradient is projected alone. If the gradient is not finite, nothing is made, and the
        projection is NaN everywhere.
        """
        group, unit = self.unit_of(param)
        assert not isinstance(unit.plan, str)
        leader = self.state[param]
        t = leader.setdefault("basis_step", 0)
        if self.due(group, unit):
            if not bool(G.isfinite().all()):
                return G.new_full(unit.plan.low_shape(tuple(param.shape)), float("nan"))
            self.refresh(group, unit, unit.plan, [(param, G)])
            leader["basis_made"] = t
        return project(G, self.factors(group, unit, unit.plan, t), unit.plan.side)

    def state_bytes(self, param: Tensor) -> int:
        """Bytes kept for a parameter; the projector counts for the first of those that share it."""
        group, unit = self.unit_of(param)
        plan = None if isinstance(unit.plan, str) else unit.plan
        held = total_bytes(self.slots(local_shape(param), param.dtype, group, plan))
        if plan is not None and param is unit.params[0]:
            held += total_bytes(self.factor_slots(plan, param.dtype, group))
        return held

    def _forget(self) -> None:
        """Forget what was looked up: groups or state are other objects now."""
        self._taps: dict[Tensor, tuple[Tensor | None, Tap]] = {}
        self._refreshing: dict[Tensor, Tap] = {}
        self._index: dict[Tensor, tuple[Group, Unit]] = {}
        self.fusion.forget()

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

    # One step of a unit.

    def _live(self, group: Group, unit: Unit) -> list[Tensor]:
        live = [p for p in unit.params if p.grad is not None or p in self._pending]
        if isinstance(unit.plan, str):
            return live
        # A gradient that zero_grad(set_to_none=False) left in projected form can make no basis: as if there were none.
        empty = [p for p in live if (low := projected_gradient(p)) is not None and low.empty]
        return [p for p in live if not any(p is q for q in empty)] if self._needs_whole(group, unit) else live

    def _needs_whole(self, group: Group, unit: Unit) -> bool:
        """Whether the next step of a projected unit needs whole gradients."""
        return self.needs_full_gradient or (self.refresh_needs_gradient and self.due(group, unit))

    def due(self, group: Group, unit: Unit) -> bool:
        """Whether the next step makes a basis: every so many steps, unless the backward pass has made it already."""
        leader = self.state.get(unit.params[0], {})
        t = leader.get("basis_step", 0)
        return bool(t % group["update_interval"] == 0) and leader.get("basis_made", -1) != t

    def _check_gradients(self, group: Group, unit: Unit) -> None:
        due = not isinstance(unit.plan, str) and self.due(group, unit)
        for p, name in zip(unit.params, unit.names, strict=True):
            low = projected_gradient(p)
            if low is not None and not low.empty:
                self._check_projected(group, unit, name, low.generation)
            grad = whole_gradient(p)
            if grad is None:
                continue
            if grad.is_sparse:
                raise GradientError(f"the gradient of {name} is sparse; make it dense (sparse=False for an embedding).")
            if due and self.refresh_needs_gradient and not is_finite(grad):
                raise GradientError(
                    f"the gradient of {name} is not finite at a step that computes a basis from it. Leave the step out "
                    "(as torch.amp.GradScaler does) or clip the gradient."
                )

    def _check_projected(self, group: Group, unit: Unit, name: str, generation: int) -> None:
        """Refuse a projected gradient that the step cannot use."""
        t = self.state[unit.params[0]].get("basis_step", 0)
        if isinstance(unit.plan, str) or self._needs_whole(group, unit):
            raise GradientError(
                f"this step needs the whole gradient of {name}, and a compiled model gave it projected: its forward pass ran "
                "before the last step, or gradients were kept over a step. Call optimizer.zero_grad() after each step, and run "
                "the forward pass after it."
            )
        if generation != t // group["update_interval"]:
            raise GradientError(
                f"the projected gradient of {name} is in a basis that a step has replaced since its forward pass ran; run "
                "forward and backward pass between the same two steps."
            )

    def _step_unit(self, group: Group, unit: Unit) -> None:
        live = self._live(group, unit)
        if isinstance(unit.plan, str):
            for p in live:
                self._plain_step(group, p)
            return
        leader, t = self.leader_of(group, unit)
        if self.due(group, unit):
            live_grads = [(p, grad) for p in unit.params if (grad := whole_gradient(p)) is not None]
            self.refresh(group, unit, unit.plan, live_grads)
        factors = self.factors(group, unit, unit.plan, t)
        for p in live:
            state, slots = self.state_of(p, group, unit.plan)
            wide = compute_dtype(p.dtype)
            grad, tapped = whole_gradient(p), projected_gradient(p)
            grad, rows, total = None if grad is None else local(grad), factors_of_rows(factors, p, unit.plan), total_of(p)
            full = grad.to(wide) if grad is not None and self.needs_full_gradient else None
            low = None if grad is None else project(grad, rows, unit.plan.side)
            if low is not None and total is not None and unit.plan.side == "left":
                low = total(low)
            if tapped is not None:
                low = tapped.low.to(wide)
            if p in self._pending:
                given = self._pending[p].to(wide)
                low = given if low is None else low + given
            assert low is not None
            state["step"] += 1
            self.projected_step(Work(local(p), state, slots, low, full, rows, unit.plan, group, total=total))
        leader["basis_step"] = t + 1

    def step_one(self, group: Group, unit: Unit) -> None:
        """One step of one unit from the gradients that are there.

        Raises:
            GradientError: see :meth:`step`.
        """
        self._check_gradients(group, unit)
        self._step_unit(group, unit)

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

    def _plain_step(self, group: Group, p: Tensor) -> None:
        grad = whole_gradient(p)
        assert grad is not None
        state, slots = self.state_of(p, group, None)
        state["step"] += 1
        self.unprojected_step(local(p), local(grad), state, slots, group)

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

    def unprojected_step(
        self, p: Tensor, grad: Tensor, state: State, slots: tuple[Slot, ...], group: Group, rates: Rates | None = None
    ) -> None:
        """Advance the moments by the whole gradient of a parameter that is not projected, and change it."""
        plain_step(p, grad, state, slots, group, rates)

    def projected_step(self, work: Work) -> None:
        """Advance the moments by a projected gradient and change the parameter: W ← W - η·scale·up(N)."""
        update = take_step(work.state, work.slots, work.low, work.param, work.group, work.rates)
        scaled = update._replace(size=update.size * work.group["scale"])
        apply_projected(work.param, update.direction, work.factors, work.plan.side, scaled)

    def apply(self, work: Work, direction: Tensor, update: Update) -> None:
        """Apply a full-size direction, times the group's scale."""
        apply_update(work.param, direction, update._replace(size=update.size * work.group["scale"]))

    # Resume.

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_pending", {})
        self.__dict__.setdefault("_shared", [])
        if "fusion" not in self.__dict__:
            self.fusion = Fusion(self)
        self._forget()
        for group in self.param_groups:
            announce(self, group["params"])
            if group.setdefault("fused_backward", False):
                self.fusion.watch(group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint exactly: tensors keep their dtypes (PyTorch would cast them to the parameter's).

        Raises:
            OptionError: rank, side, storage or another option that decides the shapes of the state differs.
        """
        seen: list[dict[str, Any]] = []

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            check_structure(type(self).__name__, self.param_groups, loaded["param_groups"])
            seen.append(loaded)

        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        take_over(self.state, [p for group in self.param_groups for p in group["params"]], seen[0])
        self.fusion.forget()


def _stacked(parts: list[Tensor]) -> Tensor:
    """The tensors one below the other; one alone as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
