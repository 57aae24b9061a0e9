"""Fit a step function to the derivative: the `derivative` tables.

Minimise, over thresholds c_1 < … < c_m and levels l_0 … l_m, with c_0 = -100 and c_{m+1} = 100,

    J = sum_i ∫_{c_i}^{c_{i+1}} (h'(x) - l_i)² dx.

The integral of h' over a cell is a difference of h, so the best levels need no quadrature:

    l_i = (h(c_{i+1}) - h(c_i)) / (c_{i+1} - c_i),     ∂J/∂c_i = (l_i - l_{i-1}) (2 h'(c_i) - l_{i-1} - l_i).

A stationary point has h'(c_i) = (l_{i-1} + l_i)/2 at every threshold (Lloyd's conditions). h' is not
monotone, so there are many of them: an exact segmentation of a grid (dynamic programming, global over the
grid's points) picks the basin, and a root finder then solves the conditions to float64 precision.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import root

from lowmem_compile.kernels.activation_codes.smooth import (
    WINDOW,
    Array,
    SmoothActivation,
    cell_nodes,
    search_grid,
    tidy,
)

_GRID_POINTS = 801


def fit_derivative(function: SmoothActivation, bits: int) -> tuple[Array, Array]:
    """Thresholds [2**bits - 1] and levels [2**bits] of the best step function for h'.

    Raises:
        RuntimeError: the stationary point could not be solved for, or is not a minimum.
    """
    start = _segment(function, 2**bits)
    solution = root(lambda c: derivative_conditions(function, c), start, options={"xtol": 1e-14})
    thresholds = tidy(solution.x)
    residual = np.abs(derivative_conditions(function, thresholds)).max()
    if residual > 1e-12 or not (np.diff(thresholds) > 0).all():
        raise RuntimeError(f"no stationary step function near {start}: {solution.message}")
    if _curvature(function, thresholds) <= 0:
        raise RuntimeError(f"the stationary step function at {thresholds} is not a minimum")
    return thresholds, derivative_levels(function, thresholds)


def derivative_levels(function: SmoothActivation, thresholds: Array) -> Array:
    """Mean of h' over each cell, [m] thresholds to [m + 1] levels; the outer cells end at ±WINDOW."""
    edges = np.concatenate([[-WINDOW], thresholds, [WINDOW]])
    levels: Array = np.diff(function.value(edges)) / np.diff(edges)
    return levels


def derivative_conditions(function: SmoothActivation, thresholds: Array) -> Array:
    """h'(c_i) - (l_{i-1} + l_i)/2 at each threshold [m]; all zero at a stationary point."""
    levels = derivative_levels(function, thresholds)
    conditions: Array = function.slope(thresholds) - (levels[1:] + levels[:-1]) / 2
    return conditions


def derivative_gradient(function: SmoothActivation, thresholds: Array) -> Array:
    """∂J/∂c_i [m], the levels being the best ones."""
    steps = np.diff(derivative_levels(function, thresholds))
    return 2 * steps * derivative_conditions(function, thresholds)


def _curvature(function: SmoothActivation, thresholds: Array) -> float:
    """Smallest eigenvalue of the Hessian of J (central differences of the gradient)."""
    step = 1e-5
    shifts = step * np.eye(len(thresholds))
    ahead = np.array([derivative_gradient(function, thresholds + shift) for shift in shifts])
    behind = np.array([derivative_gradient(function, thresholds - shift) for shift in shifts])
    hessian = (ahead - behind) / (2 * step)
    return float(np.linalg.eigvalsh((hessian + hessian.T) / 2)[0])


def _segment(function: SmoothActivation, cells: int) -> Array:
    """The thresholds [cells - 1] that minimise J among the points of a grid."""
    grid = search_grid(_GRID_POINTS)
    x, w = cell_nodes(grid[:-1], grid[1:])
    squares = np.concatenate([[0.0], np.cumsum((function.slope(x) ** 2 * w).sum(-1))])
    values = function.value(grid)
    width = grid[None, :] - grid[:, None]
    cost = np.full_like(width, np.inf)
    ahead = width > 0
    cost[ahead] = (
        (squares[None, :] - squares[:, None])[ahead]
        - (values[None, :] - values[:, None])[ahead] ** 2 / width[ahead]
    )  # fmt: skip
    best, choices = cost[0], []
    for _ in range(cells - 1):
        total = best[:, None] + cost
        choices.append(total.argmin(0))
        best = total.min(0)
    at, path = len(grid) - 1, []
    for choice in reversed(choices):
        at = choice[at]
        path.append(grid[at])
    return np.array(path[::-1])
