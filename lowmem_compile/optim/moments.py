"""The base updates: Adam's moments and Adafactor's factored second moment, as pure functions and as steps on stored state.

R is the gradient an update sees: projected, or whole for a parameter that is not. t counts from 1.

    adamw       m ← β₁m + (1-β₁)R,  v ← β₂v + (1-β₂)R²,  N = m/(√v + ε),  η = lr·√(1-β₂ᵗ)/(1-β₁ᵗ)
                W ← W - η·up(N),  then W ← W - lr·wd·W
    adafactor   β₂ₜ = 1 - t^decay_rate,  row ← β₂ₜ row + (1-β₂ₜ) mean_cols(R² + ε₁),  col likewise over rows
                u = R/√(row colᵀ/mean(row)),  u ← u/max(1, RMS(u)/clip),  α = lr·max(ε₂, RMS(W)),  m ← β₁m + (1-β₁)αu
                W ← W - α·wd·W,  then W ← W - up(m)

The first is AdamW as GaLore, Fira, COAP and APOLLO release it, which is not torch.optim.AdamW: v is not corrected before ε is
added, and decay comes last. The second is Adafactor (Shazeer & Stern 2018, arXiv:1804.04235, algorithm 4) as COAP and GaLore
use it; with β₁ = 0 there is no m, and tensors of fewer than two dimensions keep an unfactored second moment.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_compile.optim.slots import Slot, State, compute_dtype, moment_slot


class Update(NamedTuple):
    """What a base update asks for: W loses ``size``·up(``direction``), and ``decay``·W before or after that."""

    direction: Tensor
    size: float | Tensor
    decay: float | Tensor
    decay_first: bool


class Rates(NamedTuple):
    """The numbers of one step that change from step to step; 0-dimensional tensors where they are inputs of a graph.

    Attributes:
        lr: the learning rate.
        size: η of ``"adamw"``.
        beta2: β₂ₜ of ``"adafactor"``.
    """

    lr: float | Tensor
    size: float | Tensor
    beta2: float | Tensor


def rates_of(group: dict[str, Any], t: int) -> Rates:
    """The rates of a group at step t, from 1."""
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    if group["base"] == "adamw":
        return Rates(lr, adam_size(lr, beta1, beta2, t), beta2)
    return Rates(lr, lr, 1 - t ** group["decay_rate"])


def advance_moments(m: Tensor, v: Tensor, R: Tensor, beta1: float, beta2: float) -> None:
    """Advance m and v, in place."""
    m.mul_(beta1).add_(R, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(R, R, value=1 - beta2)


def adam_direction(m: Tensor, v: Tensor, eps: float) -> Tensor:
    """N = m/(√v + ε)."""
    return m / v.sqrt().add_(eps)


def adam_size(lr: float, beta1: float, beta2: float, t: int) -> float:
    """η = lr·√(1-β₂ᵗ)/(1-β₁ᵗ)."""
    return float(lr * math.sqrt(1 - beta2**t) / (1 - beta1**t))


def factored_moments(row: Tensor, col: Tensor, R: Tensor, beta2: float | Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The new row and column means of R² over its last two dimensions."""
    square = R * R + eps
    return row * beta2 + square.mean(-1) * (1 - beta2), col * beta2 + square.mean(-2) * (1 - beta2)


def factored_direction(row: Tensor, col: Tensor, R: Tensor) -> Tensor:
    """R/√(row colᵀ/mean(row))."""
    inverse: Tensor = (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2) * R
    return inverse


def clip_rms(u: Tensor, threshold: float) -> Tensor:
    """U/max(1, RMS(u)/threshold)."""
    return u / (rms(u) / threshold).clamp(min=1)


def rms(x: Tensor) -> Tensor:
    """Root mean square, a scalar tensor."""
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm / math.sqrt(max(x.numel(), 1))


def adam_slots(shape: tuple[int, ...], dtype: torch.dtype, group: State) -> tuple[Slot, ...]:
    """m and v."""
    return moment_slot("exp_avg", shape, dtype, group), moment_slot("exp_avg_sq", shape, dtype, group, root=True)


def factored_slots(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Slot, ...]:
    """The factored second moment in at least float32: row and column means, or all of it below two dimensions."""
    wide = compute_dtype(dtype)
    if len(shape) < 2:
        return (Slot("exp_avg_sq", shape, wide),)
    return Slot("exp_avg_sq_row", shape[:-1], wide), Slot("exp_avg_sq_col", shape[:-2] + shape[-1:], wide)


def moment_slots(shape: tuple[int, ...], dtype: torch.dtype, group: State) -> tuple[Slot, ...]:
    """The moments that the group's base update keeps for a gradient of this shape."""
    if group["base"] == "adamw":
        return adam_slots(shape, dtype, group)
    first = (moment_slot("exp_avg", shape, dtype, group),) if group["betas"][0] > 0 else ()
    return (*first, *factored_slots(shape, dtype))


def take_step(
    state: State, slots: tuple[Slot, ...], R: Tensor, W: Tensor, group: dict[str, Any], rates: Rates | None = None
) -> Update:
    """Advance the moments by one gradient and return the update, in the shape of R.

    Args:
        state: of the parameter; ``state["step"]`` already counts this step.
        slots: as :func:`moment_slots` gave them.
        R: gradient in the dtype that updates are computed in.
        W: the parameter.
        group: its parameter group.
        rates: those of this step, if not from ``state["step"]`` and the group.
    """
    by_key = {slot.key: slot for slot in slots}
    beta1, beta2 = group["betas"]
    rates = rates_of(group, state["step"]) if rates is None else rates
    if group["base"] == "adamw":
        first, second = by_key["exp_avg"], by_key["exp_avg_sq"]
        m, v = first.load(state), second.load(state)
        advance_moments(m, v, R, beta1, beta2)
        first.save(state, m)
        second.save(state, v)
        return Update(adam_direction(m, v, group["eps"]), rates.size, decay_of(rates.lr, group), False)
    alpha = factored_rate(W, group, rates)
    u = clip_rms(factored_step(state, slots, R, group, rates), group["clip_threshold"]) * alpha
    if "exp_avg" in by_key:
        u = by_key["exp_avg"].load(state) * beta1 + u * (1 - beta1)
        by_key["exp_avg"].save(state, u)
    return Update(u, 1.0, decay_of(alpha, group), True)


def decay_of(rate: float | Tensor, group: dict[str, Any]) -> float | Tensor:
    """The share of W that decays at this rate."""
    return rate * group["weight_decay"] if group["weight_decay"] else 0.0


def factored_rate(W: Tensor, group: dict[str, Any], rates: Rates) -> float | Tensor:
    """Adafactor's α: the learning rate, times max(ε₂, RMS(W)) if the group asks for it."""
    if not group["scale_parameter"]:
        return rates.lr
    return rms(W.to(compute_dtype(W.dtype))).clamp(min=group["min_scale"]) * rates.lr


def factored_step(state: State, slots: tuple[Slot, ...], R: Tensor, group: dict[str, Any], rates: Rates) -> Tensor:
    """Advance the second moment by R and return R divided by its root."""
    by_key = {slot.key: slot for slot in slots}
    beta2 = rates.beta2
    if "exp_avg_sq" in by_key:
        v = by_key["exp_avg_sq"].load(state) * beta2 + (R * R + group["factored_eps"]) * (1 - beta2)
        by_key["exp_avg_sq"].save(state, v)
        root: Tensor = v.rsqrt()
        return root * R
    row_slot, col_slot = by_key["exp_avg_sq_row"], by_key["exp_avg_sq_col"]
    row, col = factored_moments(row_slot.load(state), col_slot.load(state), R, beta2, group["factored_eps"])
    row_slot.save(state, row)
    col_slot.save(state, col)
    return factored_direction(row, col, R)


def apply_update(W: Tensor, direction: Tensor, update: Update) -> None:
    """Change W in place by an update whose direction has been brought to W's shape; computed in the direction's dtype."""
    wide = W.to(direction.dtype)
    if update.decay_first and decays(update):
        wide.sub_(wide * update.decay)
    if isinstance(update.size, Tensor):
        wide.sub_(direction * update.size)
    else:
        wide.sub_(direction, alpha=update.size)
    if not update.decay_first and decays(update):
        wide.sub_(wide * update.decay)
    if wide is not W:
        W.copy_(wide)


def decays(update: Update) -> bool:
    """Whether there is a decay; a tensor is always taken for one, so that nothing waits for the device."""
    return isinstance(update.decay, Tensor) or update.decay != 0
