"""Fit a continuous piecewise-linear function to the activation: the `primitive` tables.

h̃(x) = p + q·x + sum_k a_k·ReLU(x - c_k), where q·x + p is the asymptote of h at -inf and the a_k are tied by
h̃ - h -> 0 at +inf (for GELU and SiLU: sum a = 1, sum a·c = 0). Minimise J = ∫ (h - h̃)² dx over R.

The knots c_k and the values y_k = h̃(c_k) of the inner knots are free; the first and the last value lie on the
asymptotes, which is the constraint. With e = h - h̃, s_k the slope of the cell [c_k, c_{k+1}] and φ_k the hat
function of knot k,

    ∂J/∂y_k = -2 (∫_left e φ_k + ∫_right e φ_k),     ∂J/∂c_k = 2 (s_{k-1} ∫_left e φ_k + s_k ∫_right e φ_k),

where left and right are the cells beside knot k; at the end knots y_k moves along with c_k. Since adjacent
slopes differ, a stationary point has ∫ e = ∫ e x = 0 on every inner cell: the line there is the least-squares
line of h. A search over a grid of knots and values (dynamic programming) picks the basin, a descent goes to
its bottom, and a root finder solves the conditions to float64 precision.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy.optimize import minimize, root

from lowmem_compile.kernels.activation_codes.smooth import (
    WINDOW,
    Array,
    SmoothActivation,
    cell_nodes,
    nodes,
    search_grid,
    tidy,
)

_GRID_POINTS = 161
_OFFSETS = 61


def fit_primitive(function: SmoothActivation, bits: int) -> tuple[Array, Array]:
    """Thresholds [2**bits - 1] (the knots) and levels [2**bits] (the slopes of h̃).

    Raises:
        ValueError: one knot cannot join the two asymptotes (they are parallel).
        RuntimeError: the stationary point could not be solved for.
    """
    knots = 2**bits - 1
    turn = function.right[0] - function.left[0]
    if knots == 1:
        if turn == 0:
            raise ValueError("the asymptotes are parallel, so one knot cannot join them: use more bits")
        only = np.array([(function.left[1] - function.right[1]) / turn])
        return only, np.array([function.left[0], function.right[0]])
    start = _search(function, knots)
    descent = minimize(lambda z: _objective_and_gradient(function, z), start, jac=True, method="BFGS")
    solution = root(lambda z: primitive_conditions(function, z), descent.x, options={"xtol": 1e-14})
    z = tidy(solution.x)
    residual = np.abs(primitive_conditions(function, z)).max()
    c, y = _unpack(function, z)
    if residual > 1e-12 or not (np.diff(c) > 0).all() or np.abs(c).max() >= WINDOW:
        raise RuntimeError(f"no stationary piecewise-linear function near {start}: {solution.message}")
    if primitive_objective(function, z) > primitive_objective(function, start):
        raise RuntimeError(f"the stationary piecewise-linear function at {c} is not a minimum")
    inner = np.diff(y) / np.diff(c)
    return c, np.concatenate([[function.left[0]], inner, [function.right[0]]])


def primitive_objective(function: SmoothActivation, z: Array) -> float:
    """J on the window for z = (knots c_0 … c_{n-1}, inner values y_1 … y_{n-2}); R adds a constant."""
    c, y = _unpack(function, z)
    x, w = nodes(-WINDOW, c[0])
    total = float(((function.value(x) - function.left_line(x)) ** 2) @ w)
    x, w = nodes(c[-1], WINDOW)
    total += float(((function.value(x) - function.right_line(x)) ** 2) @ w)
    for k in range(len(c) - 1):
        x, w, error = _cell_error(function, c[k : k + 2], y[k : k + 2])
        total += float((error**2) @ w)
    return total


def primitive_gradient(function: SmoothActivation, z: Array) -> Array:
    """∂J/∂z, [2n - 2], by the formulas above."""
    c, y = _unpack(function, z)
    moments = primitive_conditions(function, z).reshape(-1, 2)
    slopes = np.diff(y) / np.diff(c)
    by_c, by_y = np.zeros_like(c), np.zeros_like(y)
    for k, (at_left, at_right) in enumerate(moments):
        by_c[k] += 2 * slopes[k] * at_left
        by_c[k + 1] += 2 * slopes[k] * at_right
        by_y[k] -= 2 * at_left
        by_y[k + 1] -= 2 * at_right
    by_c[0] += function.left[0] * by_y[0]
    by_c[-1] += function.right[0] * by_y[-1]
    return np.concatenate([by_c, by_y[1:-1]])


def _objective_and_gradient(function: SmoothActivation, z: Array) -> tuple[float, Array]:
    return primitive_objective(function, z), primitive_gradient(function, z)


def primitive_conditions(function: SmoothActivation, z: Array) -> Array:
    """∫ e φ for the left and the right hat of every inner cell, [2n - 2]; all zero at a stationary point."""
    c, y = _unpack(function, z)
    moments = []
    for k in range(len(c) - 1):
        x, w, error = _cell_error(function, c[k : k + 2], y[k : k + 2])
        right_hat = (x - c[k]) / (c[k + 1] - c[k])
        moments += [(error * (1 - right_hat)) @ w, (error * right_hat) @ w]
    return np.array(moments)


def _unpack(function: SmoothActivation, z: Array) -> tuple[Array, Array]:
    """Knots [n] and values at the knots [n] from z [2n - 2]."""
    c = z[: (len(z) + 2) // 2]
    y = np.concatenate([[function.left_line(c[0])], z[len(c) :], [function.right_line(c[-1])]])
    return c, y


def _cell_error(function: SmoothActivation, c: Array, y: Array) -> tuple[Array, Array, Array]:
    """Nodes, weights and h - h̃ on one inner cell."""
    x, w = nodes(c[0], c[1])
    line = y[0] + (y[1] - y[0]) / (c[1] - c[0]) * (x - c[0])
    return x, w, function.value(x) - line


def _search(function: SmoothActivation, knots: int) -> Array:
    """The best z whose knots are grid points and whose inner values are grid offsets from h."""
    grid = search_grid(_GRID_POINTS)
    h = function.value(grid)
    to_left, to_right = function.left_line(grid) - h, function.right_line(grid) - h
    reach = 2 * np.minimum(np.abs(to_left), np.abs(to_right)).max()
    free = np.broadcast_to(np.linspace(-reach, reach, _OFFSETS), (len(grid), _OFFSETS))
    # offsets[k][i] are the values, relative to h, that knot k may take at grid point i.
    offsets = [to_left[:, None], *[free] * (knots - 2), to_right[:, None]]

    x, w = cell_nodes(grid[:-1], grid[1:])
    head = np.concatenate([[0.0], np.cumsum(((function.value(x) - function.left_line(x)) ** 2 * w).sum(-1))])
    tail = np.concatenate([[0.0], np.cumsum(((function.value(x) - function.right_line(x)) ** 2 * w).sum(-1))])
    cells = _ChordMoments(function, grid)

    best, choices = head[:, None], []
    for here, there in pairwise(offsets):
        after = np.full(there.shape, np.inf)
        choice = np.zeros(there.shape, dtype=np.int64)
        for j in range(1, len(grid)):
            total = best[:j, :, None] + cells.cost(j, here[:j], there[j])
            flat = total.reshape(-1, there.shape[1])
            choice[j] = flat.argmin(0)
            after[j] = flat.min(0)
        best = after
        choices.append(choice)

    point, slot = int((best[:, 0] + tail[-1] - tail).argmin()), 0
    c, y = [grid[point]], []
    for k in range(knots - 1, 0, -1):
        point, slot = divmod(int(choices[k - 1][point, slot]), offsets[k - 1].shape[1])
        c.append(grid[point])
        y.append(h[point] + offsets[k - 1][point, slot])
    return np.array([*c[::-1], *y[:-1][::-1]])


class _ChordMoments:
    """Squared error of a line on every grid cell [x_i, x_j], from moments of h against its chord.

    With r = h - chord and end values h_i + u, h_j + v the error is
    ∫r² - 2u ∫rφ_i - 2v ∫rφ_j + (u² + uv + v²)(x_j - x_i)/3.
    """

    def __init__(self, function: SmoothActivation, grid: Array) -> None:
        x, w = cell_nodes(grid[:-1], grid[1:])
        h = function.value(x)
        integrals = [np.concatenate([[0.0], np.cumsum((f * w).sum(-1))]) for f in (h, h * x, h * h)]
        self.grid, self.h, self.integrals = grid, function.value(grid), integrals

    def cost(self, j: int, u: Array, v: Array) -> Array:
        """[j, len(u[0]), len(v)] errors of the cells [x_i, x_j], i < j, for offsets u [j, m] and v [n]."""
        width = self.grid[j] - self.grid[:j]
        h0, h1 = self.h[:j], self.h[j]
        flat, first, square = (total[j] - total[:j] for total in self.integrals)
        rise = (first - self.grid[:j] * flat) / width  # ∫ h φ_j
        fall = flat - rise  # ∫ h φ_i
        residual = square - 2 * (h0 * fall + h1 * rise) + (h0 * h0 + h0 * h1 + h1 * h1) * width / 3
        at_i = fall - width * (h0 / 3 + h1 / 6)
        at_j = rise - width * (h0 / 6 + h1 / 3)
        residual, at_i, at_j, width = (t[:, None, None] for t in (residual, at_i, at_j, width))
        u, v = u[:, :, None], v[None, None, :]
        total: Array = residual - 2 * u * at_i - 2 * v * at_j + (u * u + u * v + v * v) * width / 3
        return total
