"""Addax (arXiv:2410.06441, ICLR 2025): zeroth-order on long examples, in-place SGD on short ones; MeZO and IP-SGD at its ends.

A step, η the learning rate, ω the decay, z ~ N(0, I) from the step's seed, B₀ and B₁ the two batches:

    g0 = (L(θ + εz; B₀) - L(θ - εz; B₀)) / (2ε)            two forward passes; θ itself is not changed, z not stored
    for each parameter, inside the backward pass on B₁:     θ ← θ·(1 - ηω) - η(1-α)·∇L(θ; B₁)
    θ ← θ - η·α·g0·z                                        z again from the seed

together θ ← θ - η(α g0 z + (1-α) g1) - ηωθ, g0 and g1 both at the old θ. α = 1 is MeZO (arXiv:2305.17333), α = 0 in-place SGD.
Where a parameter has no first-order gradient in a step, the decay comes with the last line. Written from the papers' equations.

Why θ is not perturbed in place: θ + εz - 2εz + εz does not return to θ. In bfloat16 it drifts by 0.4 % of its RMS a step.

State: none. The number of the step, the seed and the settings stand in the parameter groups, so ``state_dict`` resumes exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowmem_compile.errors import GradientError, OptionError
from lowmem_compile.in_backward import Update, backward_with_updates
from lowmem_compile.optim.addax import operations
from lowmem_compile.optim.addax.noise import move
from lowmem_compile.optim.addax.perturbation import Perturbation
from lowmem_compile.optim.addax.report import AddaxReport, AddaxRow, block_bytes
from lowmem_compile.optim.bases import mix
from lowmem_compile.optim.settings import FOREIGN, ParamsLike, check_names

Closure = Callable[[], Tensor]
WHOLE = ("alpha", "zo_eps", "seed", "step", "gradient_norm")
"""Settings that all groups share: g0 is one number."""


@dataclass(frozen=True)
class AddaxStep:
    """What a step measured; ``None`` where the step had no such part.

    Attributes:
        zeroth_loss: mean of the two losses on B₀.
        g0: the slope along z.
        first_loss: the loss on B₁.
        gradient_norm: ‖g1‖₂ over all parameters of the optimizer, with ``gradient_norm=True``.
    """

    zeroth_loss: float | None = None
    g0: float | None = None
    first_loss: float | None = None
    gradient_norm: float | None = None


class Addax(Optimizer):
    """Zeroth-order and in-place first-order steps mixed.

    Args:
        params: parameters, named parameters or groups; those that need no gradient are left alone.
        lr: η; may differ between groups, and schedulers may change it.
        alpha: weight of the zeroth-order part, 0 (in-place SGD alone) to 1 (MeZO alone).
        zo_eps: ε of the two evaluations.
        weight_decay: ω, decoupled, in units of the learning rate; may differ between groups.
        seed: of all directions z.
        gradient_norm: report ‖g1‖; costs a read of each gradient.

    Gradients are consumed as they are made: ``param.grad`` stays ``None``; accumulation, ``clip_grad_norm_`` and ``GradScaler``
    have nothing to work on. Parameters that the loss does not depend on are moved by z like all others, as in MeZO.

    Raises:
        OptionError: a setting outside its range, or groups that disagree on what all share.
    """

    def __init__(
        self,
        params: ParamsLike,
        lr: float = 1e-4,
        *,
        alpha: float = 1e-3,
        zo_eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        gradient_norm: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "zo_eps": zo_eps,
            "seed": seed,
            "step": 0,
            "gradient_norm": gradient_norm,
        }
        self._last: tuple[set[int], bool] | None = None  # the last step: ids of what gradients moved, whether z moved all
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in any optimizer.

        Raises:
            OptionError: see the class.
        """
        where = f"group {len(self.param_groups)}"
        check_names(param_group, [*self.defaults, *FOREIGN], f"Addax: {where}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["step"] = self.param_groups[0]["step"]
        try:
            self._check_group(group, where)
        except OptionError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any], where: str) -> None:
        def require(name: str, allowed: bool, what: str) -> None:
            if not allowed:
                raise OptionError(f"Addax: {where} has {name}={group[name]!r}; {what}.")

        require("lr", float(group["lr"]) >= 0, "a learning rate is 0 or more")
        require("alpha", 0 <= group["alpha"] <= 1, "alpha is between 0 (in-place SGD) and 1 (MeZO)")
        require("zo_eps", group["zo_eps"] > 0, "it is above 0")
        require("weight_decay", group["weight_decay"] >= 0, "it is 0 or more")
        require("seed", isinstance(group["seed"], int) and group["seed"] >= 0, "a seed is a whole number from 0")
        for name in WHOLE:
            shared = self.param_groups[0][name]
            require(name, group[name] == shared, f"it is one setting for all groups, and group 0 has {shared!r}")

    def step(  # type: ignore[override]
        self, zeroth: Closure | None = None, first: Closure | None = None
    ) -> AddaxStep:
        """One step.

        Args:
            zeroth: returns the loss on B₀ (long examples); called twice, without gradients, from one state of the random
                generators. Needed unless alpha is 0.
            first: returns the loss on B₁ (short examples), and does not call ``backward``. Needed unless alpha is 1.

        Raises:
            OptionError: a closure is missing, or one is given that alpha leaves no part.
            GradientError: a loss or g0 is not finite, a parameter has a gradient already, or the forward pass read no parameter
                of this optimizer. Nothing has been changed then. For errors out of the backward pass see
                :func:`lowmem_compile.in_backward.backward_with_updates`.
        """
        settings = self.param_groups[0]
        alpha, seed = float(settings["alpha"]), mix(settings["seed"], settings["step"])
        self._check_closures(alpha, zeroth, first)
        loss0 = g0 = loss1 = norm = None
        done: set[int] = set()
        if zeroth is not None:
            loss0, g0 = self._slope(zeroth, seed)
        if first is not None:
            loss1, norm, done = self._first_order(first, 1 - alpha)
        for group in self.param_groups:
            lr = float(group["lr"])
            for ordinal, p in self._trained(group):
                decay = 0.0 if id(p) in done else lr * group["weight_decay"]
                if g0 is not None or decay:
                    move(p, seed, ordinal, lr * alpha * (g0 or 0.0), decay)
            group["step"] += 1
        self._last = done, g0 is not None
        return AddaxStep(loss0, g0, loss1, norm)

    def report(self) -> AddaxReport:
        """What each parameter takes, known before the first step, and what moved it in the last one."""
        alpha, names = float(self.param_groups[0]["alpha"]), self._names()
        rows = []
        for p in names:
            trained, size = p.requires_grad, p.numel() * p.element_size()
            rows.append(
                AddaxRow(
                    name=names[p],
                    shape=tuple(p.shape),
                    dtype=str(p.dtype).removeprefix("torch."),
                    trained=trained,
                    first_order=None if self._last is None else id(p) in self._last[0],
                    zeroth_order=None if self._last is None else trained and self._last[1],
                    block_bytes=block_bytes(p) if trained and alpha > 0 else 0,
                    gradient_bytes=size if trained and alpha < 1 else 0,
                    adamw_bytes=2 * size if trained else 0,
                )
            )
        return AddaxReport(alpha, tuple(rows))

    def _check_closures(self, alpha: float, zeroth: Closure | None, first: Closure | None) -> None:
        for name, closure, weight in (("zeroth", zeroth, alpha), ("first", first, 1 - alpha)):
            if closure is None and weight > 0:
                raise OptionError(
                    f"Addax: alpha={alpha} gives the {name}-order part a weight of {weight}; pass step({name}=...)."
                )
            if closure is not None and weight == 0:
                raise OptionError(f"Addax: alpha={alpha} leaves the {name}-order part no weight; leave out step({name}=...).")

    def _trained(self, group: dict[str, Any] | None = None) -> Iterable[tuple[int, Tensor]]:
        """Ordinals and parameters that need a gradient, of one group or of all; frozen ones keep their ordinal."""
        ordinal = 0
        for g in self.param_groups:
            for p in g["params"]:
                if p.requires_grad and (group is None or g is group):
                    yield ordinal, p
                ordinal += 1

    @torch.no_grad()
    def _slope(self, closure: Closure, seed: int) -> tuple[float, float]:
        """Mean loss and g0; the parameters and, but for one evaluation, the random generators stay as they are."""
        eps = float(self.param_groups[0]["zo_eps"])
        trained = dict(self._trained())
        before = operations.runs
        state = _random_state(trained.values())
        plus = _finite(self._evaluate(closure, trained, seed, eps), "L(θ + εz)")
        if operations.runs == before:
            raise GradientError(
                "the zeroth-order closure read no parameter of this optimizer that could be perturbed. It has to call the model "
                "that the parameters belong to, as Python code or through torch.compile."
            )
        _set_random_state(state)
        minus = _finite(self._evaluate(closure, trained, seed, -eps), "L(θ - εz)")
        return (plus + minus) / 2, (plus - minus) / (2 * eps)

    def _evaluate(self, closure: Closure, trained: dict[int, Tensor], seed: int, scale: float) -> Tensor:
        with Perturbation(trained, seed, scale):
            return closure()

    def _first_order(self, closure: Closure, weight: float) -> tuple[float, float | None, set[int]]:
        """In-place SGD on ``weight`` times the loss; loss, norm of the gradient, ids of what was updated."""
        log_norm = bool(self.param_groups[0]["gradient_norm"])
        updates: dict[Tensor, Update] = {}
        squares: dict[torch.device, Tensor] = {}
        for group in self.param_groups:
            lr = float(group["lr"])
            scalars: dict[torch.device, tuple[Tensor, ...]] = {}
            for _, p in self._trained(group):
                tensors = scalars.setdefault(p.device, _scalars(p.device, lr * weight, lr * group["weight_decay"]))
                if log_norm:
                    total = squares.setdefault(p.device, torch.zeros((), dtype=torch.float32, device=p.device))
                    updates[p] = Update("sgd_norm", (total, *tensors))
                elif group["weight_decay"]:
                    updates[p] = Update("sgd_decay", tensors)
                else:
                    updates[p] = Update("sgd", tensors[:1])
        loss, done = backward_with_updates(closure, updates, names=self._names(), check=lambda loss: _finite(loss, "L(θ)"))
        norm = math.sqrt(sum(float(s) for s in squares.values())) if log_norm else None
        return float(loss.detach()), norm, done

    def _names(self) -> dict[Tensor, str]:
        names: dict[Tensor, str] = {}
        for i, group in enumerate(self.param_groups):
            given = group.get("param_names") or [f"group {i}, parameter {k}" for k in range(len(group["params"]))]
            names.update(zip(group["params"], given, strict=True))
        return names


def _finite(loss: object, what: str) -> float:
    """The loss as a number.

    Raises:
        GradientError: it is no scalar, or not finite.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise GradientError(f"a closure of Addax returns the loss, a tensor of one element, not {type(loss).__name__}.")
    value = float(loss.detach())
    if not math.isfinite(value):
        raise GradientError(f"{what} is {value}; no parameter was changed. Lower the learning rate or zo_eps.")
    return value


def _scalars(device: torch.device, *values: float) -> tuple[Tensor, ...]:
    """0-dimensional float64 tensors: inputs of the compiled backward graph, so that a schedule does not recompile."""
    return tuple(torch.tensor(value, dtype=torch.float64, device=device) for value in values)


def _random_state(parameters: Iterable[Tensor]) -> tuple[Tensor, dict[torch.device, Tensor]]:
    """The state of the global generators: both evaluations draw the same dropout masks."""
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    return torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}


def _set_random_state(state: tuple[Tensor, dict[torch.device, Tensor]]) -> None:
    torch.set_rng_state(state[0])
    for device, value in state[1].items():
        torch.cuda.set_rng_state(value, device)
