"""Step tables: published digits, constraints, optimality, refusals. All in float64 or 30-digit arithmetic."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import sympy as sp
import torch
from scipy.optimize import minimize
from torch.nn import functional as F

import lowmem_compile.kernels.activation_codes as package
from lowmem_compile.kernels.activation_codes.derive import EXPRESSIONS, KINDS, X, derive, measure, source
from lowmem_compile.kernels.activation_codes.derived import DERIVED
from lowmem_compile.kernels.activation_codes.fit_derivative import derivative_gradient, derivative_levels
from lowmem_compile.kernels.activation_codes.fit_primitive import primitive_gradient, primitive_objective
from lowmem_compile.kernels.activation_codes.smooth import WINDOW, Array, smooth_activation
from lowmem_compile.kernels.activation_codes.tables import PUBLISHED, Kind, StepTable, step_table

README = Path(package.__path__[0]) / "README.md"
NAMES = sorted(EXPRESSIONS)
# Primitive tables of GELU and SiLU are the published ones, near the optimum but not at it.
OPTIMA: list[tuple[str, Kind]] = [(name, kind) for name in NAMES for kind in KINDS]

# Thresholds and levels of FewBit's tables, outer borders ±100 left out (SkoltechAI/fewbit, arXiv 2202.00441).
FEWBIT = {
    ("gelu", 2): (
        (-0.4535943509682957, 9.989794678179874e-06, 0.45360788676101765),
        (-0.0014811741797339684, 0.32506426288118356, 0.6749483148061111, 1.0014811963802677),
    ),
    ("silu", 2): (
        (-0.7432754121981399, 2.8676771883898183e-05, 0.743317994765398),
        (-0.0024134282347542803, 0.3222951733427406, 0.6777278401862188, 1.0024134978846462),
    ),
    ("gelu", 3): (
        (-2.41658116954005, -0.7100080298552438, -0.3258405605020555, 0.00010694218776556477,
         0.32605716706210624, 0.7102408662564467, 2.414478888735787),
        (-0.00019399123669408362, -0.0882791290678004, 0.12568383354985802, 0.3723144154907068,
         0.6278513678266602, 0.8744505179754452, 1.0883480468965179, 1.0001949404007118),
    ),
    ("silu", 3): (
        (-4.6004048319160775, -1.2530336465646235, -0.7155969172897209, -0.29067550583509133,
         0.10143024691747264, 0.5044164080468019, 0.9722268409411096),
        (-0.00047970823417926747, -0.06949612692776304, 0.08078631593941292, 0.26031542606926306,
         0.45305919527301797, 0.6482033796782727, 0.8356162841015382, 1.0026943440294824),
    ),
}  # fmt: skip


def optimum(name: str, kind: Kind, bits: int = 2) -> StepTable:
    return derive(EXPRESSIONS[name], X, kind, bits, name)


def objective(table: StepTable) -> float:
    """The integral that the table's kind minimises, by quadrature (not by the formulas of the fit)."""
    errors = measure(EXPRESSIONS[table.activation], X, table)
    return errors.integral if errors.primitive_integral is None else errors.primitive_integral


def knots_and_values(table: StepTable) -> Array:
    """The free parameters of a primitive fit: knots, and the surrogate's values at the inner knots."""
    c, levels = np.array(table.thresholds), np.array(table.levels)
    function = smooth_activation(EXPRESSIONS[table.activation], X)
    values = function.left_line(c[0]) + np.cumsum(np.diff(c) * levels[1:-1])
    return np.concatenate([c, values[:-1]])


def feasible_table(table: StepTable, z: Array) -> StepTable:
    """The primitive table with the free parameters `z` (the constraints hold by construction)."""
    function = smooth_activation(EXPRESSIONS[table.activation], X)
    c = z[: len(table.thresholds)]
    y = [float(function.left_line(c[0])), *z[len(c) :], float(function.right_line(c[-1]))]
    levels = (table.levels[0], *(np.diff(y) / np.diff(c)).tolist(), table.levels[-1])
    return replace(table, thresholds=tuple(c.tolist()), levels=levels)


def line_error(h: Any, at: Any, value: Any, slope: Any, power: int, x: Any) -> Any:
    """(h(x) - line(x))·x**power for the line of this slope through (at, value), in mpmath's numbers."""
    return (h(x) - value - slope * (x - at)) * x**power


def test_tables_need_neither_torch_nor_sympy() -> None:
    code = (
        "import sys; from lowmem_compile.kernels.activation_codes import step_table;"
        "step_table('gelu', 'primitive');"
        "print([m for m in ('torch', 'sympy', 'numpy', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_every_expression_has_both_tables() -> None:
    assert {key[:2] for key in (*PUBLISHED, *DERIVED)} == {(name, kind) for name in NAMES for kind in KINDS}
    assert not set(PUBLISHED) & set(DERIVED)
    for name, kind in OPTIMA:
        table = step_table(name, kind)
        assert (table.activation, table.kind, table.bits) == (name, kind, 2)


@pytest.mark.parametrize(
    ("activation", "kind", "bits"),
    [("relu", "primitive", 2), ("gelu", "forward", 2), ("gelu", "derivative", 7)],
)
def test_unknown_names_list_the_valid_ones(activation: str, kind: str, bits: int) -> None:
    with pytest.raises(ValueError, match=rf"{activation}/{kind}/{bits} .* gelu/derivative/2, .*softplus/primitive/2"):
        step_table(activation, kind, bits)


GOOD = StepTable("gelu", "derivative", 1, (0.0,), (0.0, 1.0), "made up")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "exact"}, "kind"),
        ({"bits": 0}, "bits"),
        ({"bits": 2}, "4 levels and 3 thresholds"),
        ({"levels": (0.0,)}, "2 levels"),
        ({"thresholds": ()}, "1 thresholds"),
        ({"thresholds": (math.nan,)}, "finite"),
        ({"levels": (0.0, math.inf)}, "finite"),
        ({"bits": 2, "thresholds": (0.0, 2.0, 1.0), "levels": (0.0,) * 4}, "increase"),
        ({"bits": 2, "thresholds": (0.0, 1.0, 1.0), "levels": (0.0,) * 4}, "increase"),
    ],
)
def test_inconsistent_tables_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GOOD, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("silu", F.silu),
        ("mish", F.mish),
        ("softplus", lambda x: F.softplus(x, threshold=50.0)),
        ("log_sigmoid", F.logsigmoid),
    ],
)
def test_expressions_are_the_activations_of_torch(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    ours = smooth_activation(EXPRESSIONS[name], X)
    torch.testing.assert_close(torch.from_numpy(ours.value(x.numpy())), function(x), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "a", "c"),
    [
        (
            "gelu",
            (-0.04922261145617846, 1.0979632065417297, -0.048740595085551286),
            (-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
        ),
        (
            "silu",
            (-0.04060357190528599, 1.080925428529668, -0.040321856624382146),
            (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
        ),
    ],
)
def test_primitive_tables_of_gelu_and_silu_are_the_published_ones(name: str, a: tuple[float, ...], c: tuple[float, ...]) -> None:
    table = step_table(name, "primitive")
    assert table.thresholds == c
    np.testing.assert_allclose(table.levels, [0.0, *np.cumsum(a)], rtol=0, atol=3e-16)
    assert "LowMemoryBP" in table.source


@pytest.mark.parametrize(("name", "excess"), [("gelu", 3e-4), ("silu", 1e-4)])
def test_published_primitive_tables_are_near_our_optimum(name: str, excess: float) -> None:
    """Simulated annealing stopped within 0.03 % of the least objective, on a flat valley floor.

    So the outer thresholds agree to 0.02, the middle one to 0.002 and the levels to 0.001, no better.
    """
    published, ours = step_table(name, "primitive"), optimum(name, "primitive")
    assert objective(ours) < objective(published) < (1 + excess) * objective(ours)
    assert np.abs(np.subtract(published.thresholds, ours.thresholds)).max() < 0.02
    assert abs(published.thresholds[1] - ours.thresholds[1]) < 0.002
    assert np.abs(np.subtract(published.levels, ours.levels)).max() < 0.001


@pytest.mark.parametrize(("name", "digits"), [("gelu", 2e-5), ("silu", 3e-5)])
def test_derivative_tables_agree_with_fewbit(name: str, digits: float) -> None:
    """The optimum is so flat that digits off by 1e-5 cost less than 1e-10 of the objective."""
    thresholds, levels = FEWBIT[name, 2]
    ours = step_table(name, "derivative")
    np.testing.assert_allclose(ours.thresholds, thresholds, rtol=0, atol=digits)
    np.testing.assert_allclose(ours.levels, levels, rtol=0, atol=digits)
    theirs = objective(replace(ours, thresholds=thresholds, levels=levels))
    assert 0 < theirs - objective(ours) < 1e-10


@pytest.mark.parametrize(("name", "low", "high"), [("gelu", 1.0, 1.0001), ("silu", 1.5, 1.6)])
def test_three_bit_derivative_fits_are_no_worse_than_fewbit(name: str, low: float, high: float) -> None:
    """FewBit's 3-bit GELU is at the optimum, its 3-bit SiLU has more than 1.5 times the least objective."""
    thresholds, levels = FEWBIT[name, 3]
    ours = optimum(name, "derivative", 3)
    theirs = objective(replace(ours, thresholds=thresholds, levels=levels))
    assert low < theirs / objective(ours) < high


@pytest.mark.parametrize(
    ("name", "kind", "rms", "largest", "integral", "primitive"),
    [
        ("gelu", "primitive", 0.241, 0.55, 0.1568, 0.00951),
        ("silu", "primitive", 0.290, 0.54, 0.2375, 0.03994),
        ("gelu", "derivative", 0.0949, 0.175, None, None),
        ("silu", "derivative", 0.0914, 0.178, None, None),
    ],
)
def test_errors_of_the_published_tables(
    name: str, kind: str, rms: float, largest: float, integral: float | None, primitive: float | None
) -> None:
    errors = measure(EXPRESSIONS[name], X, step_table(name, kind))
    assert errors.rms_normal == pytest.approx(rms, abs=5e-4)
    assert errors.max_abs == pytest.approx(largest, abs=5e-3)
    if integral is not None:
        assert errors.integral == pytest.approx(integral, abs=5e-5)
    if primitive is None:
        assert errors.primitive_integral is None
    else:
        assert errors.primitive_integral == pytest.approx(primitive, abs=5e-6)


@pytest.mark.parametrize("name", NAMES)
def test_primitive_tables_share_the_asymptotes(name: str) -> None:
    table, function = step_table(name, "primitive"), smooth_activation(EXPRESSIONS[name], X)
    turns = np.diff(table.levels)
    assert table.levels[0] == function.left[0]
    assert table.levels[-1] == function.right[0]
    assert turns.sum() == pytest.approx(function.right[0] - function.left[0], abs=1e-15)
    assert -turns @ np.array(table.thresholds) == pytest.approx(function.right[1] - function.left[1], abs=1e-12)


def test_the_checked_in_digits_are_what_derive_prints() -> None:
    module: dict[str, Any] = {}
    exec(source(), module)
    printed = module["DERIVED"]
    assert set(printed) == set(DERIVED)
    for key, (thresholds, levels, origin) in printed.items():
        np.testing.assert_allclose(DERIVED[key][0], thresholds, rtol=0, atol=1e-11)
        np.testing.assert_allclose(DERIVED[key][1], levels, rtol=0, atol=1e-11)
        assert DERIVED[key][2] == origin


@pytest.mark.parametrize(("name", "kind"), OPTIMA)
def test_optima_are_stationary_in_30_digit_arithmetic(name: str, kind: Kind) -> None:
    table = optimum(name, kind)
    h = sp.lambdify(X, EXPRESSIONS[name], modules="mpmath")
    dh = sp.lambdify(X, sp.diff(EXPRESSIONS[name], X), modules="mpmath")
    with mpmath.workdps(30):
        c, levels = [mpmath.mpf(t) for t in table.thresholds], [mpmath.mpf(v) for v in table.levels]
        if kind == "derivative":
            edges = [mpmath.mpf(-WINDOW), *c, mpmath.mpf(WINDOW)]
            residuals = [level - (h(b) - h(a)) / (b - a) for level, (a, b) in zip(levels, pairwise(edges), strict=True)]
            residuals += [dh(t) - (below + above) / 2 for t, (below, above) in zip(c, pairwise(levels), strict=True)]
        else:
            start = smooth_activation(EXPRESSIONS[name], X).left_line(table.thresholds[0])
            value, residuals = mpmath.mpf(float(start)), []
            for (a, b), slope in zip(pairwise(c), levels[1:-1], strict=True):
                error = partial(line_error, h, a, value, slope)
                residuals += [mpmath.quad(partial(error, p), [a, (a + b) / 2, b]) for p in (0, 1)]
                value += slope * (b - a)
        assert max(abs(r) for r in residuals) < 1e-11


@pytest.mark.parametrize(("name", "kind"), OPTIMA)
@pytest.mark.parametrize("step", [1e-2, 1e-4])
def test_moving_any_parameter_raises_the_objective(name: str, kind: Kind, step: float) -> None:
    table = optimum(name, kind)
    least = objective(table)
    if kind == "primitive":
        z = knots_and_values(table)
        moved = [feasible_table(table, z + d) for d in (*(step * np.eye(len(z))), *(-step * np.eye(len(z))))]
    else:
        steps = (*(step * np.eye(7)), *(-step * np.eye(7)))
        z = np.array([*table.thresholds, *table.levels])
        moved = [replace(table, thresholds=tuple((z + d)[:3].tolist()), levels=tuple((z + d)[3:].tolist())) for d in steps]
    assert all(objective(other) > least for other in moved)


@pytest.mark.parametrize("name", NAMES)
def test_random_starts_find_no_better_primitive(name: str) -> None:
    function, best = smooth_activation(EXPRESSIONS[name], X), optimum(name, "primitive")
    least = primitive_objective(function, knots_and_values(best))
    assert least == pytest.approx(objective(best), rel=1e-12)
    rng = np.random.default_rng(0)
    for scale in (1.0, 2.0, 4.0, 6.0):
        c = np.sort(rng.normal(size=3)) * scale
        found = minimize(
            lambda z: (primitive_objective(function, z), primitive_gradient(function, z)),
            np.append(c, function.value(c[1])),
            jac=True,
            method="BFGS",
            options={"maxiter": 60},
        )
        assert found.fun > least * (1 - 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_random_starts_find_no_better_derivative(name: str) -> None:
    function, best = smooth_activation(EXPRESSIONS[name], X), step_table(name, "derivative")

    def gain(c: Array) -> float:
        """∫h'² - J, the levels being the best ones."""
        widths = np.diff(np.concatenate([[-WINDOW], c, [WINDOW]]))
        return float(derivative_levels(function, c) ** 2 @ widths)

    most = gain(np.array(best.thresholds))
    rng = np.random.default_rng(0)
    trials = [np.sort(rng.normal(size=3)) * rng.choice([0.5, 1.0, 2.0, 5.0]) for _ in range(500)]
    assert max(gain(c) for c in trials) < most
    assert np.abs(derivative_gradient(function, np.array(best.thresholds))).max() < 1e-12


@pytest.mark.parametrize("name", ["gelu", "log_sigmoid"])
def test_primitive_gradient_is_the_derivative_of_its_objective(name: str) -> None:
    function = smooth_activation(EXPRESSIONS[name], X)
    z, step = np.array([-2.0, 0.3, 1.5, 0.7]), 1e-5
    numeric = [
        (primitive_objective(function, z + d) - primitive_objective(function, z - d)) / (2 * step) for d in step * np.eye(4)
    ]
    np.testing.assert_allclose(primitive_gradient(function, z), numeric, rtol=1e-7, atol=1e-9)


def test_a_scaled_activation_has_scaled_knots() -> None:
    """Quick GELU is SiLU(1.702 x)/1.702: same slopes, thresholds divided by 1.702."""
    k = sp.Rational(1702, 1000)
    quick = derive(EXPRESSIONS["silu"].subs(X, k * X) / k, X, "primitive")
    silu = optimum("silu", "primitive")
    np.testing.assert_allclose(quick.levels, silu.levels, rtol=0, atol=1e-12)
    np.testing.assert_allclose(quick.thresholds, np.array(silu.thresholds) / 1.702, rtol=0, atol=1e-12)
    assert "1.702" in quick.activation or "851" in quick.activation


@pytest.mark.parametrize("kind", KINDS)
def test_a_reflected_activation_has_reflected_steps(kind: Kind) -> None:
    """-softplus(-x) = log_sigmoid(x), whose slope at -inf is 1."""
    there, here = step_table("softplus", kind), step_table("log_sigmoid", kind)
    np.testing.assert_allclose(here.thresholds, [-t for t in reversed(there.thresholds)], rtol=0, atol=1e-12)
    np.testing.assert_allclose(here.levels, there.levels[::-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", ["tanh(t)", "atan(t)", "sqrt(t**2 + 1)", "t - tanh(t)"])
def test_other_activations_with_any_symbol(text: str) -> None:
    """Flat, slanted and equal asymptotes, and tails that fall only like 1/x."""
    t = sp.Symbol("t")
    expr = sp.sympify(text, locals={"t": t})
    primitive, steps = derive(expr, t, "primitive"), derive(expr, t, "derivative")
    assert primitive.activation == steps.activation == text
    function = smooth_activation(expr, t)
    assert (primitive.levels[0], primitive.levels[-1]) == (function.left[0], function.right[0])
    assert (primitive.thresholds[0], primitive.thresholds[-1]) != (-WINDOW, WINDOW)
    # Each fit is the better one by its own measure; the derivative fit also beats one with half the levels.
    assert measure(expr, t, steps).integral < measure(expr, t, primitive).integral
    assert measure(expr, t, steps).integral < measure(expr, t, derive(expr, t, "derivative", 1)).integral


def test_one_bit_primitive_is_the_corner_of_the_asymptotes() -> None:
    table = derive(sp.log(1 + sp.exp(X - 2)), X, "primitive", bits=1)
    assert table.thresholds == pytest.approx((2.0,), abs=1e-12)
    assert table.levels == (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("Max(x, 0)", "derivative", "not smooth"),
        ("Abs(x)", "primitive", "not smooth"),
        ("x**2", "derivative", "no straight asymptote at -inf: its mean slope tends to -oo"),
        ("exp(x)", "primitive", r"no straight asymptote at \+inf"),
        ("sin(x)", "derivative", "no straight asymptote"),
        ("sqrt(sqrt(x**2 + 1))", "primitive", "intercept tends to oo"),
        ("(x**2 + 1)**Rational(-1, 4)", "primitive", "slower than 1/x"),
        ("3*x + 1", "primitive", "straight line"),
        ("x*y", "primitive", "alone"),
        ("1/(x - Rational(3, 10))", "derivative", "pole or detail too fine"),
        ("tanh(10**4*x)", "derivative", "pole or detail too fine"),
        ("log(x**2)/(x**2 + 1)", "derivative", "not finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_the_reason(text: str, kind: Kind, message: str) -> None:
    expr = sp.sympify(text, locals={"x": X})
    with pytest.raises(ValueError, match=message):
        derive(expr, X, kind)


def test_derive_refuses_unknown_kinds_widths_and_impossible_fits() -> None:
    with pytest.raises(ValueError, match="primitive, derivative"):
        derive(EXPRESSIONS["silu"], X, "integral")
    with pytest.raises(ValueError, match="1 to 5 bits"):
        derive(EXPRESSIONS["silu"], X, "derivative", 6)
    with pytest.raises(ValueError, match="parallel"):
        derive(sp.tanh(X), X, "primitive", 1)


@pytest.mark.parametrize(("name", "kind"), OPTIMA)
def test_the_readme_states_the_measured_errors(name: str, kind: Kind) -> None:
    e = measure(EXPRESSIONS[name], X, step_table(name, kind))
    primitive = "–" if e.primitive_integral is None else f"{e.primitive_integral:.5f}"
    row = f"| {name} | {kind} | {e.rms_normal:.4f} | {e.max_abs:.4f} | {e.integral:.4f} | {primitive} |"
    assert row in README.read_text(encoding="utf-8")


def test_the_example_of_the_readme_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["errors"].rms_normal < 0.1
