"""The ``lowmem plan`` command: read what was asked, plan, print and write."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from lowmem_compile.errors import OptionError
from lowmem_compile.memory_plan.cards import card_bytes
from lowmem_compile.memory_plan.fixed import OptimizerSpec
from lowmem_compile.memory_plan.make import Request, plan_memory
from lowmem_compile.memory_plan.page import write_plan
from lowmem_compile.memory_plan.result import MemoryPlan
from lowmem_compile.memory_plan.subject import Adaptation
from lowmem_compile.memory_plan.text import print_plan
from lowmem_compile.memory_plan.trace import Setting
from lowmem_compile.planner.budget import budget_of

PRECISIONS = ("bf16", "autocast", "fp32")
DEVICES = ("cuda", "cpu")


def run_plan(
    model: str,
    *,
    batch: int | None,
    sequence: int | None,
    precision: str,
    optimizer: str,
    rank: int | None,
    state: Mapping[str, int | None],
    include: tuple[str, ...],
    card: str | None,
    reserve: str,
    budgets: tuple[float, ...],
    adaptation: Adaptation,
    fused_backward: bool,
    loss_only: bool,
    exact: bool,
    device: str,
    json_path: Path | None,
    html_path: Path | None,
) -> MemoryPlan:
    """Plan, print the tables, and write the files that were asked for.

    Raises:
        OptionError: an unknown value; before anything is traced.
        LowMemError: the model cannot be made or traced.
    """
    for name, value, valid in (("precision", precision, PRECISIONS), ("device", device, DEVICES)):
        if value not in valid:
            raise OptionError(f"--{name} {value!r} must be one of {', '.join(valid)}")
    for budget in budgets:
        budget_of(budget)
    request = Request(
        model=model,
        batch=batch,
        sequence=sequence,
        setting=Setting(precision, budgets, loss_only=loss_only, device=device, fused_backward=fused_backward),
        optimizer=OptimizerSpec(optimizer, rank, {k: v for k, v in state.items() if v is not None}, include),
        card=card,
        reserve=card_bytes(reserve),
        exact=exact,
        adaptation=adaptation,
    )
    console = Console()
    with _quiet(), Console(stderr=True).status("planning") as status:
        plan = plan_memory(request, status.update)
    print_plan(plan, console)
    if json_path is not None:
        json_path.write_text(plan.to_json(indent=1), encoding="utf-8")
        console.print(f"JSON: {json_path}")
    if html_path is not None:
        write_plan(plan, html_path)
        console.print(f"HTML: {html_path}")
    return plan


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the deprecation warnings of libraries while they trace, in this context only."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
