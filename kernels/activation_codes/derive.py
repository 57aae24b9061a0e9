"""Derive step tables from sympy expressions, measure them, and print `derived.py`.

    python -m lowmem_compile.kernels.activation_codes.derive

The two objectives are in `fit_primitive.py` and `fit_derivative.py`; README.md compares their results.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from textwrap import fill

import numpy as np
import sympy as sp

from lowmem_compile.kernels.activation_codes.fit_derivative import fit_derivative
from lowmem_compile.kernels.activation_codes.fit_primitive import fit_primitive
from lowmem_compile.kernels.activation_codes.smooth import (
    WINDOW,
    Array,
    SmoothActivation,
    nodes,
    search_grid,
    smooth_activation,
    tidy,
)
from lowmem_compile.kernels.activation_codes.tables import PUBLISHED, Kind, StepTable

X = sp.Symbol("x", real=True)
"""The symbol of `EXPRESSIONS`."""

EXPRESSIONS: dict[str, sp.Expr] = {
    "gelu": X * (1 + sp.erf(X / sp.sqrt(2))) / 2,
    "gelu_tanh": X * (1 + sp.tanh(sp.sqrt(2 / sp.pi) * (X + sp.Rational(44715, 10**6) * X**3))) / 2,
    "silu": X / (1 + sp.exp(-X)),
    "mish": X * sp.tanh(sp.log(1 + sp.exp(X))),
    "softplus": sp.log(1 + sp.exp(X)),
    "log_sigmoid": -sp.log(1 + sp.exp(-X)),
}
"""h(x) of every activation that has a checked-in table."""

KINDS: tuple[Kind, Kind] = ("primitive", "derivative")
CHECKED_IN: tuple[tuple[Kind, int], ...] = (("primitive", 2), ("derivative", 2), ("derivative", 4), ("derivative", 5))
"""The kinds and bits of the tables in `derived.py`."""


@dataclass(frozen=True)
class StepErrors:
    """How far a step table is from the activation h, with d = h' - step.

    Attributes:
        rms_normal: sqrt(E d²), x ~ N(0, 1).
        bias_normal: E d, x ~ N(0, 1).
        max_abs: largest |d| on [-100, 100].
        integral: ∫ d² dx over [-100, 100].
        primitive_integral: ∫ (h - h̃)² dx over [-100, 100], h̃ being the integral of the steps that starts
            on h's left asymptote; None for the derivative kind: its outer levels are not h's outer slopes.
    """

    rms_normal: float
    bias_normal: float
    max_abs: float
    integral: float
    primitive_integral: float | None


@lru_cache(maxsize=64)
def derive(expr: sp.Expr, x: sp.Symbol, kind: Kind, bits: int = 2, name: str | None = None) -> StepTable:
    """Fit a step table to a smooth elementwise activation. Float64; digits good to about 1e-12.

    Args:
        expr: h as a function of `x`: smooth, with straight asymptotes at both ends, and with its features at
            the scale of 1 (they are searched for on [-100, 100]; rescale x otherwise).
        x: the only free symbol of `expr`.
        kind: "primitive" minimises ∫ (h - h̃)² over R for a continuous piecewise-linear h̃ that shares h's
            asymptotes; "derivative" minimises ∫ (h' - step)² over [-100, 100].
        bits: bits a code takes, 1 to 5. A primitive fit of 3 bits takes seconds, of 4 bits minutes.
        name: the table's `activation`; the expression itself if left out.

    Raises:
        ValueError: the expression is refused (see `smooth_activation`), or kind or bits are out of range.
        RuntimeError: no minimum was found.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if not 1 <= bits <= 5:
        raise ValueError(f"tables of 1 to 5 bits are fitted, not of {bits}")
    function = smooth_activation(expr, x)
    fit, source = {
        "primitive": (fit_primitive, "derived: least ∫(h - h̃)² over R"),
        "derivative": (fit_derivative, f"derived: least ∫(h' - step)² over [-{WINDOW:g}, {WINDOW:g}]"),
    }[kind]
    thresholds, levels = (tuple(tidy(part).tolist()) for part in fit(function, bits))
    return StepTable(name or str(expr), kind, bits, thresholds, levels, source)


def measure(expr: sp.Expr, x: sp.Symbol, table: StepTable) -> StepErrors:
    """Errors of `table` against the activation `expr`, by quadrature between thresholds (float64)."""
    function = smooth_activation(expr, x)
    edges = np.array([-WINDOW, *table.thresholds, WINDOW])
    square = bias = integral = largest = 0.0
    for low, high, level in zip(edges[:-1], edges[1:], table.levels, strict=True):
        at, weight = nodes(low, high)
        error = function.slope(at) - level
        density = np.exp(-at * at / 2) / np.sqrt(2 * np.pi) * weight
        square += float(error**2 @ density)
        bias += float(error @ density)
        integral += float(error**2 @ weight)
        largest = max(largest, float(np.abs(function.slope(_dense(low, high)) - level).max()))
    primitive = _primitive_integral(function, table) if table.kind == "primitive" else None
    return StepErrors(square**0.5, bias, largest, integral, primitive)


def _dense(low: float, high: float) -> Array:
    """Points of [low, high], ends included, 5e-4·(1 + |x|) apart: a smooth peak's height to 1e-6."""
    grid = search_grid(20001)
    return np.concatenate([[low], grid[(grid > low) & (grid < high)], [high]])


def _primitive_integral(function: SmoothActivation, table: StepTable) -> float:
    """∫ (h - h̃)² over the window; h̃ starts on the left asymptote and turns by the level differences."""
    knots, turns = np.array(table.thresholds), np.diff(table.levels)

    def surrogate(at: Array) -> Array:
        total: Array = function.left_line(at) + np.maximum(at[:, None] - knots, 0.0) @ turns
        return total

    edges = [-WINDOW, *table.thresholds, WINDOW]
    total = 0.0
    for low, high in pairwise(edges):
        at, weight = nodes(low, high)
        total += float((function.value(at) - surrogate(at)) ** 2 @ weight)
    return total


def source() -> str:
    """`derived.py`: every table that is not a published one."""
    lines = [HEAD]
    for name, (kind, bits) in product(EXPRESSIONS, CHECKED_IN):
        if (name, kind, bits) not in PUBLISHED:
            table = derive(EXPRESSIONS[name], X, kind, bits, name)
            digits = (f"({', '.join(map(repr, part))})," for part in (table.thresholds, table.levels))
            parts = (*digits, f'"{table.source}",')
            lines += [f'    ("{name}", "{kind}", {bits}): (']
            lines += [fill(part, 130, initial_indent=" " * 8, subsequent_indent=" " * 9) for part in parts]
            lines += ["    ),"]
    return "\n".join([*lines, "}", ""])


HEAD = '''"""The derived step tables, as `python -m lowmem_compile.kernels.activation_codes.derive` prints them."""
# fmt: off

from __future__ import annotations

from typing import Literal

DERIVED: dict[tuple[str, Literal["primitive", "derivative"], int], tuple[tuple[float, ...], tuple[float, ...], str]] = {'''


if __name__ == "__main__":
    sys.stdout.write(source())
