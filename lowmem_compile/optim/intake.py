"""Gradients as a projected optimizer takes them: whole, already projected, or from the taps of a compiled model."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem_compile._torch import Gathered
from lowmem_compile.errors import GradientError
from lowmem_compile.optim.gradient import projected_gradient, whole_gradient
from lowmem_compile.optim.pieces import project
from lowmem_compile.optim.projector import Factors
from lowmem_compile.optim.sharded import is_finite, is_sharded
from lowmem_compile.optim.state import ProjectedState
from lowmem_compile.optim.taps import Tap, make_refresh_tap, make_tap
from lowmem_compile.optim.units import Group, Unit


class GradientIntake(ProjectedState):
    """What the next step needs of each parameter, and what it is given."""

    _pending: dict[Tensor, Tensor]
    _taps: dict[Tensor, tuple[Tensor | None, Tap]]
    _refreshing: dict[Tensor, Tap]

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

    def tap(self, param: Tensor, dtype: torch.dtype | None = None, gathered: Gathered | None = None) -> Tap | str:
        """What a compiled graph needs to give this parameter's next gradient projected, or the reason why it must be whole.

        The tap is the same object until the basis changes.

        Args:
            param: one of the optimizer's parameters.
            dtype: that the graph reads it in; the parameter's own if ``None``.
            gathered: how FSDP reduces the gradient of a parameter that it shards.
        """
        dtype = param.dtype if dtype is None else dtype
        group, unit = self.unit_of(param)
        plan = unit.plan
        if isinstance(plan, str):
            return f"not projected: {plan}"
        if is_sharded(param) and gathered is None:
            return "the parameter is sharded over ranks"
        if self.needs_full_gradient:
            return f"{type(self).__name__} needs the whole gradient at every step"
        if plan.side not in ("right", "left"):
            return "convolutions are projected in the optimizer"
        first = self.state.get(unit.params[0], {})
        t = first.get("basis_step", 0)
        generation, stored = t // group["update_interval"], first.get("projector")
        if self.refresh_needs_gradient and self.due(group, unit):
            if not group["refresh_in_backward"] or len(unit.params) > 1 or gathered is not None:
                return "this step makes a new basis from the whole gradient"
            tap = self._refreshing.get(param)
            if tap is None or tap.generation != generation:
                tap = make_refresh_tap(self, param, plan.side, plan.low_shape(tuple(param.shape)), generation)
                self._refreshing[param] = tap
            return tap
        known = self._taps.get(param)
        if known is None or known[0] is not stored or known[1].generation != generation or known[1].basis.dtype != dtype:
            others = [self._taps[p] for p in unit.params if p in self._taps]
            basis = next((t.basis for of, t in others if of is stored and t.generation == generation), None)
            if basis is None and stored is not None and stored.dtype == dtype:
                basis = stored
            if basis is None or basis.dtype != dtype:
                basis = self.factors(group, unit, plan, t)[0].to(dtype)
            tap = make_tap(param, plan.side, basis, plan.low_shape(tuple(param.shape)), generation, gathered)
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
