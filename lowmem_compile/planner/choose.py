"""Which choice to take for each tensor that crosses, so that a cap on the bytes is met at the least error and time.

    minimise    Σ error² / ERROR² + Σ time / (TIME · step)
    subject to  Σ bytes ≤ cap
                one choice a tensor
                what a recomputed tensor reads is not recomputed itself
                a recomputed tensor has the errors of what it reads; one that has to be exact reads exact tensors only

An integer linear programme with a few hundred binary variables, solved by HiGHS (``scipy.optimize.milp``). What a recomputed
tensor t inherits from a source u is a product of two choices. With u's codecs in order of their error, e_1 < e_2 < ..., it is
linear in one continuous variable for each codec:

    s_t² Σ_k (e_k² − e_{k−1}²) w_k,    w_k ≥ Σ_{c≥k} x_uc + r_t − 1,    w_k ≥ 0

with x_uc = 1 where u is kept in codec c, r_t = 1 where t is computed again, s_t² the gain of t.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from lowmem_compile.planner.choices import Item

ERROR, TIME = 0.03, 0.05
"""A relative gradient error of 3 % (cosine 0.99955) weighs as much as 5 % of the step time."""
SECONDS, GAP = 20.0, 1e-2
"""The solver stops after so long, or this near the optimum (relative): the error model is no more exact than that."""

Row = tuple[dict[int, float], float, float]
"""Coefficients by column, lower and upper bound."""


def choose(items: Sequence[Item], step: float, cap: int | None) -> dict[str, str] | None:
    """The name of each item's choice.

    Args:
        items: the tensors that cross.
        step: time of a step, in the unit of the choices' ``cost``.
        cap: bytes that may be kept; ``None`` for as few as can be.

    Returns:
        By root; ``None`` where the cap cannot be met.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    columns = [(item.root, choice) for item in items for choice in item.choices]
    if not columns:
        return {}
    gain2 = {item.root: item.gain2 for item in items}
    cost = [gain2[root] * c.relative**2 / ERROR**2 + c.cost / (TIME * step) for root, c in columns]
    sizes = np.array([float(c.nbytes) for _, c in columns])
    of_item: dict[str, dict[str, int]] = defaultdict(dict)
    for j, (root, choice) in enumerate(columns):
        of_item[root][choice.name] = j
    rows: list[Row] = [(dict.fromkeys(js.values(), 1.0), 1.0, 1.0) for js in of_item.values()]
    if cap is not None:
        rows.append((dict(enumerate(sizes)), 0.0, float(cap)))
    for item in items:
        again = of_item[item.root].get("recompute")
        for source in item.sources if again is not None else ():
            assert again is not None
            if "recompute" in of_item[source]:
                rows.append(({again: 1.0, of_item[source]["recompute"]: 1.0}, 0.0, 1.0))
            coded = {j: columns[j][1].relative ** 2 for j in of_item[source].values() if columns[j][1].relative}
            if item.kind == "exact":
                rows.append(({again: 1.0, **dict.fromkeys(coded, 1.0)}, 0.0, 1.0))
            elif item.gain2:
                by_error, below = sorted(coded, key=coded.__getitem__), 0.0
                for k, j in enumerate(by_error):
                    rows.append(({len(cost): 1.0, again: -1.0, **dict.fromkeys(by_error[k:], -1.0)}, -1.0, np.inf))
                    cost.append(item.gain2 * (coded[j] - below) / ERROR**2)
                    below = coded[j]
    entries = [(r, j, v) for r, (row, _, _) in enumerate(rows) for j, v in row.items()]
    at, which, values = zip(*entries, strict=True)
    matrix = csr_array((values, (at, which)), shape=(len(rows), len(cost)))
    choosing = np.arange(len(cost)) < len(columns)
    weights, kept = np.array(cost), np.pad(sizes, (0, len(cost) - len(sizes)))
    result = milp(
        kept + 1e-6 * weights if cap is None else weights + 1e-12 * kept,
        constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
        integrality=choosing,
        bounds=Bounds(0, np.where(choosing, 1.0, np.inf)),
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    if result.x is None:
        return None
    return {root: c.name for (root, c), x in zip(columns, result.x[: len(columns)], strict=True) if x > 0.5}


def error_of(items: Sequence[Item], decisions: Mapping[str, str]) -> float:
    """Estimated relative error of the gradient: of codes, and of what is computed again from codes."""
    found = relative_errors(items, decisions)
    return float(sum(item.gain2 * found[item.root] ** 2 for item in items) ** 0.5)


def relative_errors(items: Sequence[Item], decisions: Mapping[str, str]) -> dict[str, float]:
    """Estimated relative error of each tensor as the backward pass reads it, by root."""
    own = {item.root: item.choice(decisions[item.root]).relative for item in items}
    again = {item.root: item.sources if decisions[item.root] == "recompute" else () for item in items}
    return {root: float((own[root] ** 2 + sum(own[s] ** 2 for s in again[root])) ** 0.5) for root in own}
