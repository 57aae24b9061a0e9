"""An elementwise activation as the fits see it: values, slopes and the two asymptotes.

Everything is float64. The fits work on the window [-WINDOW, WINDOW]; the borders ±100 are those of the
published derivative tables (FewBit, arXiv 2202.00441).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import sympy as sp

Array = npt.NDArray[np.float64]
Function = Callable[[npt.ArrayLike], Array]

WINDOW = 100.0
"""Half width of the interval on which derivative steps are fitted and errors are reported."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_PANEL_WIDTH = 0.5
_NOT_SMOOTH = (
    sp.Abs, sp.sign, sp.Max, sp.Min, sp.Piecewise, sp.Heaviside, sp.floor, sp.ceiling, sp.DiracDelta,
)  # fmt: skip


@dataclass(frozen=True)
class SmoothActivation:
    """A differentiable function with straight asymptotes.

    Attributes:
        value: h, vectorised.
        slope: h', vectorised.
        left: (slope q, intercept p) of the line q·x + p that h approaches at -inf.
        right: the same at +inf.
    """

    value: Function
    slope: Function
    left: tuple[float, float]
    right: tuple[float, float]

    def left_line(self, x: npt.ArrayLike) -> Array:
        """The asymptote at -inf, evaluated at x."""
        return self.left[0] * np.asarray(x, dtype=np.float64) + self.left[1]

    def right_line(self, x: npt.ArrayLike) -> Array:
        """The asymptote at +inf, evaluated at x."""
        return self.right[0] * np.asarray(x, dtype=np.float64) + self.right[1]


def tidy(values: Array) -> Array:
    """Round to 13 decimals, the precision to which the stationary points are solved; -0.0 becomes 0.0."""
    rounded: Array = np.round(values, 13) + 0.0
    return rounded


def search_grid(points: int) -> Array:
    """`points` increasing abscissae on [-WINDOW, WINDOW], dense near 0 (spaced evenly in asinh x)."""
    grid: Array = np.sinh(np.linspace(-1.0, 1.0, points) * np.arcsinh(WINDOW))
    grid[0], grid[-1] = -WINDOW, WINDOW
    return grid


def cell_nodes(low: Array, high: Array) -> tuple[Array, Array]:
    """Gauss-Legendre nodes and weights, one row of 24 for each cell [low, high]."""
    half = (high - low)[..., None] / 2
    return (high + low)[..., None] / 2 + half * _NODES, half * _WEIGHTS


def nodes(low: float, high: float) -> tuple[Array, Array]:
    """Gauss-Legendre nodes and weights on [low, high], in panels at most 0.5 wide."""
    panels = max(1, int(np.ceil((high - low) / _PANEL_WIDTH)))
    edges = np.linspace(low, high, panels + 1)
    x, w = cell_nodes(edges[:-1], edges[1:])
    return x.ravel(), w.ravel()


@lru_cache(maxsize=64)
def smooth_activation(expr: sp.Expr, x: sp.Symbol) -> SmoothActivation:
    """Analyse `expr`, a function of `x` alone.

    Raises:
        ValueError: the expression has other free symbols, is not smooth, is not finite on the window, is a
            straight line, or does not approach straight lines fast enough for a squared error to exist.
    """
    if expr.free_symbols != {x}:
        raise ValueError(f"{expr} must depend on {x} alone; its free symbols are {expr.free_symbols}")
    if expr.has(*_NOT_SMOOTH):
        raise ValueError(f"{expr} is not smooth: Abs, sign, Max, Min, Piecewise and steps are not fitted")
    real = sp.Symbol("x", real=True)
    h = expr.subs(x, real)
    dh = sp.diff(h, real)
    if not dh.free_symbols:
        raise ValueError(f"{expr} is a straight line: its gradient is a constant and needs no codes")
    left, right = _asymptote(h, real, -1, expr), _asymptote(h, real, 1, expr)
    function = SmoothActivation(_vectorise(h, real), _vectorise(dh, real), left, right)
    _check_on_window(function, expr)
    return function


def _asymptote(h: sp.Expr, x: sp.Symbol, sign: int, expr: sp.Expr) -> tuple[float, float]:
    """Slope and intercept of the line that h approaches as x -> sign·inf. Messages name `expr`."""
    end = "+inf" if sign > 0 else "-inf"
    outward = h.subs(x, sign * x)
    try:
        slope = sp.limit(outward / x, x, sp.oo) * sign
        if not _is_number(slope):
            raise ValueError(f"{expr} has no straight asymptote at {end}: its mean slope tends to {slope}")
        intercept = sp.limit(outward - sign * slope * x, x, sp.oo)
        if not _is_number(intercept):
            raise ValueError(f"{expr} has no straight asymptote at {end}: the intercept tends to {intercept}")
        decay = sp.limit((outward - sign * slope * x - intercept) * x, x, sp.oo)
    except NotImplementedError as error:
        raise ValueError(f"sympy cannot find the asymptote of {expr} at {end}") from error
    if not _is_number(decay):
        raise ValueError(f"{expr} approaches its asymptote at {end} slower than 1/x: the squared error may not integrate")
    return float(slope), float(intercept)


def _is_number(limit: sp.Expr) -> bool:
    """Whether a limit exists and is finite (sympy gives AccumBounds to functions that oscillate)."""
    return not limit.has(sp.AccumBounds) and bool(limit.is_real) and bool(limit.is_finite)


def _vectorise(expr: sp.Expr, x: sp.Symbol) -> Function:
    raw = sp.lambdify(x, expr, modules=["scipy", "numpy"])

    def function(at: npt.ArrayLike) -> Array:
        points = np.asarray(at, dtype=np.float64)
        return np.asarray(raw(points), dtype=np.float64)

    return function


def _check_on_window(function: SmoothActivation, expr: sp.Expr) -> None:
    """Finite values, and slopes that integrate to the values: no poles, and no detail finer than the grid."""
    grid = search_grid(801)
    x, w = cell_nodes(grid[:-1], grid[1:])
    with np.errstate(all="ignore"):
        values, slopes = function.value(grid), function.slope(x)
    if not (np.isfinite(values).all() and np.isfinite(slopes).all()):
        raise ValueError(f"{expr} or its derivative is not finite in float64 on [-{WINDOW:g}, {WINDOW:g}]")
    gap = np.abs(np.diff(values) - (slopes * w).sum(-1)).max()
    if gap > 1e-9 * max(1.0, float(np.abs(values).max())):
        raise ValueError(
            f"{expr} has a pole or detail too fine to resolve on [-{WINDOW:g}, {WINDOW:g}]: "
            f"its derivative does not integrate to its values (off by {gap:.1e})"
        )
