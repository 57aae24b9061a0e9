"""Gradients of a variant against exact ones: float32, eager, the same weights and batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowmem_compile.demo.workload import Workload

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class GradientError:
    """Difference of two sets of gradients.

    ``cosine`` and ``relative_error`` (norm of the difference over the norm of the exact ones) treat all
    gradients as one vector. ``worst_cosine`` is the lowest of a single parameter, ``worst`` its name, among
    those that hold at least a millionth of the squared norm.
    """

    cosine: float
    relative_error: float
    worst_cosine: float
    worst: str


def gradients_of(model: nn.Module) -> Gradients:
    """Copies of the gradients of the trained parameters, in float32; a missing gradient counts as zero."""
    return {
        name: torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.detach().float().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def exact_gradients(workload: Workload) -> Gradients:
    """Gradients of the first batch's loss: the workload's weights widened to float32, eager, no autocast."""
    model = nn.Module.float(copy.deepcopy(workload.model))  # past a guard of models loaded from GGUF
    batch = {k: v.float() if v.is_floating_point() else v for k, v in workload.batches[0].items()}
    workload.loss_fn(model(**batch), batch).backward()
    return gradients_of(model)


def compare(measured: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> GradientError:
    """Compare two sets of gradients of the same parameters. NaN in either gives NaN figures.

    Raises:
        ValueError: the parameters differ.
    """
    if measured.keys() != exact.keys():
        raise ValueError(f"gradients of different parameters: {sorted(measured.keys() ^ exact.keys())}")
    dots = {k: (float((measured[k].double() * g.double()).sum())) for k, g in exact.items()}
    measured_sq = {k: float(g.double().square().sum()) for k, g in measured.items()}
    exact_sq = {k: float(g.double().square().sum()) for k, g in exact.items()}
    dot, m2, e2 = sum(dots.values()), sum(measured_sq.values()), sum(exact_sq.values())
    relevant = {k: _cosine(dots[k], measured_sq[k], exact_sq[k]) for k in exact if not exact_sq[k] < 1e-6 * e2}
    worst = min(relevant, key=lambda k: -math.inf if math.isnan(relevant[k]) else relevant[k])
    difference = sum(float((measured[k].double() - g.double()).square().sum()) for k, g in exact.items())
    return GradientError(_cosine(dot, m2, e2), math.sqrt(difference / e2) if e2 else math.nan, relevant[worst], worst)


def _cosine(dot: float, a_squared: float, b_squared: float) -> float:
    norms = math.sqrt(a_squared * b_squared)
    return dot / norms if norms else math.nan
