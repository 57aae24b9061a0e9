"""What the projected optimizers share: groups, the step of each unit, exact resume.

A unit is one parameter, or a list of parameters that read one input and share a projector. For each unit a step

    1. refreshes the basis if it is due, from the gradients that are there (stacked along O for a shared projector),
    2. projects each gradient, unless it was given already projected,
    3. advances the moments and applies the update.

What is kept between steps: :mod:`lowmem_compile.optim.state`. What a step takes: :mod:`lowmem_compile.optim.intake`.

NOTE [dtypes]. Gradients, moments and updates are computed in float32 (float64 for float64 parameters) and stored in the
parameter's dtype, or as ``bits`` says. A bfloat16 v with β₂ = 0.999 stops following changes below 0.2 %; ``bits=32`` avoids that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowmem_compile.errors import OptionError
from lowmem_compile.optim.fused import Fusion
from lowmem_compile.optim.gradient import projected_gradient, whole_gradient
from lowmem_compile.optim.intake import GradientIntake
from lowmem_compile.optim.moments import Rates, Update, apply_update, take_step
from lowmem_compile.optim.pieces import apply_projected, plain_step, project
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
from lowmem_compile.optim.sharded import check_sharded, factors_of_rows, local, local_shape, total_of
from lowmem_compile.optim.slots import Slot, State, compute_dtype, total_bytes
from lowmem_compile.optim.taps import announce
from lowmem_compile.optim.units import Group, Unit, Work


class LowRankOptimizer(GradientIntake):
    """Base of the optimizers that keep their moments in a projected space.

    A method says how a basis is made (:meth:`new_factors`), which tensors it keeps (:meth:`slots`) and how a projected step
    becomes a full one (:meth:`projected_step`).
    """

    def __init__(self, params: ParamsLike, options: Mapping[str, Any], common: Mapping[str, Any]) -> None:
        self._pending = {}
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
        self._taps, self._refreshing, self._index = {}, {}, {}
        self.fusion.forget()

    # One step of a unit.

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

    def _plain_step(self, group: Group, p: Tensor) -> None:
        grad = whole_gradient(p)
        assert grad is not None
        state, slots = self.state_of(p, group, None)
        state["step"] += 1
        self.unprojected_step(local(p), local(grad), state, slots, group)

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
