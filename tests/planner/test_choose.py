"""The integer programme of the planner against enumeration of every combination of choices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_compile.planner.choices import Choice, Item
from lowmem_compile.planner.choose import ERROR, GAP, TIME, choose, error_of, relative_errors

STEP = 1000.0


def tensor(
    root: str, gain2: float = 1.0, sources: Sequence[str] = (), size: int = 16, cost: float = 5.0, kind: str = "ordinary"
) -> Item:
    """Exact, 8 and 4 bits (not if its kind is exact), and recomputation where it has sources."""
    choices = [Choice("exact", size)]
    if kind != "exact":
        choices += [Choice("int8", size // 2, 0.006, 1.0), Choice("int4", size // 4, 0.11, 2.0)]
    if sources:
        choices.append(Choice("recompute", 0, 0.0, cost))
    return Item(root, tuple(choices), gain2 if kind != "exact" else 0.0, frozenset(sources), kind=kind)


def allowed(items: Sequence[Item], cap: int | None) -> Iterator[dict[str, str]]:
    """Every combination of choices that keeps the rules."""
    for names in itertools.product(*([c.name for c in item.choices] for item in items)):
        decisions = {item.root: name for item, name in zip(items, names, strict=True)}
        chosen = {item.root: item.choice(decisions[item.root]) for item in items}
        again = [item for item in items if decisions[item.root] == "recompute"]
        if any(decisions[s] == "recompute" for item in again for s in item.sources):
            continue
        if any(chosen[s].relative for item in again if item.kind == "exact" for s in item.sources):
            continue
        if cap is None or sum(c.nbytes for c in chosen.values()) <= cap:
            yield decisions


def objective(items: Sequence[Item], decisions: dict[str, str]) -> float:
    time = sum(item.choice(decisions[item.root]).cost for item in items)
    return error_of(items, decisions) ** 2 / ERROR**2 + time / (TIME * STEP)


def test_a_query_is_no_better_than_what_it_is_computed_from() -> None:
    """With the input of the projection in 8 bits, computing the query again saves no error: it is kept in 8 bits itself."""
    query = tensor("q", gain2=40.0, sources=["x"], cost=20.0)
    items = [tensor("x", gain2=0.1), query]
    decisions = {"x": "int8", "q": "recompute"}
    assert relative_errors(items, decisions) == {"x": 0.006, "q": 0.006}
    assert error_of(items, decisions) == pytest.approx(0.006 * 40.1**0.5)
    assert choose(items, STEP, 24) == {"x": "int8", "q": "exact"}
    assert choose(items, STEP, 16) == {"x": "exact", "q": "recompute"}
    assert choose(items, STEP, 8) == {"x": "int8", "q": "recompute"}


def test_what_has_to_be_exact_is_not_computed_from_codes() -> None:
    items = [tensor("x", gain2=0.1), tensor("statistics", sources=["x"], kind="exact")]
    assert choose(items, STEP, 16) == {"x": "exact", "statistics": "recompute"}
    assert choose(items, STEP, 15) is None
    assert choose(items, STEP, None) == {"x": "exact", "statistics": "recompute"}


def test_nothing_crosses() -> None:
    assert choose([], STEP, 0) == {}


@st.composite
def problems(draw: st.DrawFn) -> list[Item]:
    """Up to five tensors, each with sources among the earlier ones."""
    items: list[Item] = []
    for i in range(draw(st.integers(1, 5))):
        sources = draw(st.lists(st.sampled_from([item.root for item in items]), unique=True, max_size=2)) if items else []
        kind = draw(st.sampled_from(["ordinary", "ordinary", "ordinary", "exact"]))
        gain2, size, cost = draw(st.floats(0, 50)), draw(st.sampled_from([16, 32, 64])), draw(st.floats(0, 60))
        items.append(tensor(f"t{i}", gain2, sources, size, cost, kind))
    return items


@given(problems(), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_no_combination_is_better(items: list[Item], share: float) -> None:
    cap = int(share * sum(item.choices[0].nbytes for item in items))
    best = min((objective(items, d) for d in allowed(items, cap)), default=None)
    found = choose(items, STEP, cap)
    if best is None:
        assert found is None
        return
    assert found in list(allowed(items, cap))
    assert objective(items, found) <= best / (1 - GAP) + 1e-6


@given(problems())
@settings(max_examples=40, deadline=None)
def test_the_least_is_the_least(items: list[Item]) -> None:
    def kept(decisions: dict[str, str]) -> int:
        return sum(item.choice(decisions[item.root]).nbytes for item in items)

    found = choose(items, STEP, None)
    assert found is not None
    assert kept(found) == min(kept(d) for d in allowed(items, None))
