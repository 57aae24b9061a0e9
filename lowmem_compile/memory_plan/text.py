"""A plan as tables for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem_compile.memory_plan.result import Contender, Largest, MemoryPlan
from lowmem_compile.reporting.summary import CONTENDER_NAMES, collapse_modules
from lowmem_compile.reporting.units import format_bytes, format_change, plural, visible

MOST_LAYERS = 12


def title_of(name: str) -> str:
    """What a contender is called: "lowmem, budget 0.25" for "lowmem 0.25"."""
    known = CONTENDER_NAMES.get(name)
    return known if known is not None else f"lowmem, budget {name.removeprefix('lowmem ')}"


def heading(plan: MemoryPlan) -> str:
    """One line: model, size, batch, precision, optimizer."""
    layers = f", {plural(plan.layers, 'layer')}" if plan.layers is not None else ""
    trained = f", {plan.trained / 1e6:,.1f} million trained" if plan.trained != plan.parameters else ""
    rows = f"batch {plan.batch}" + (f" x {plan.sequence} tokens" if plan.sequence is not None else "")
    size = f"{plan.parameters / 1e9:.2f} billion parameters" if plan.parameters >= 1e9 else (
        f"{plan.parameters / 1e6:.1f} million parameters"
    )  # fmt: skip
    return f"{plan.model} ({plan.title}): {size}{trained}{layers}; {rows}, {plan.precision}, {plan.optimizer}"


def print_plan(plan: MemoryPlan, console: Console) -> None:
    """Print a plan: what is there all the time, a line a contender, saved bytes by kind and by layer, notes."""
    console.print(Text(visible(heading(plan)), style="bold"))
    console.print(
        f"weights {format_bytes(plan.weights)} · gradients {format_bytes(plan.gradients)} · "
        f"optimizer state {format_bytes(plan.optimizer_state)}{_against_adamw(plan)}"
    )
    console.print(_summary(plan))
    console.print(_kinds(plan))
    console.print(_layers(plan))
    for name, reason in plan.refused.items():
        console.print(Text(f"{title_of(name)}: {visible(reason)}"))
    for note in plan.notes:
        console.print(Text(f"- {visible(note)}", style="dim"))
    console.print(Text(f"{plan.seconds:.0f} s; {'; '.join(plan.traces)}", style="dim"))


def _against_adamw(plan: MemoryPlan) -> str:
    change = format_change(plan.optimizer_state, plan.adamw_state)
    same = plan.optimizer_state == plan.adamw_state or not plan.adamw_state
    return "" if same else f" ({format_bytes(plan.adamw_state)} with AdamW: {change})"


def _summary(plan: MemoryPlan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("kept for backward", "peak of a step", "in all"):
        table.add_column(name, justify="right")
    if plan.card_bytes is not None:
        table.add_column(f"fits {plan.card}")
        table.add_column("largest batch", justify="right")
        if plan.sequence is not None:
            table.add_column("longest sequence", justify="right")
    table.add_column("off at 4 layers" if any(c.peak_off is not None for c in plan.contenders) else "", justify="right")
    for c in plan.contenders:
        row = [title_of(c.name), format_bytes(c.saved), format_bytes(c.peak), format_bytes(c.total)]
        if plan.card_bytes is not None:
            row += ["yes" if c.total + plan.reserve <= plan.card_bytes else "no", size_of(c.largest_batch)]
            row += [size_of(c.longest_sequence)] if plan.sequence is not None else []
        table.add_row(*row, off_of(c))
    return table


def size_of(found: Largest | None) -> str:
    """A size that was searched: "16", "~24" if estimated, "4096 (limit)", "none"."""
    if found is None:
        return ""
    if not found.size:
        return "none"
    return {"estimated": f"~{found.size}", "limit": f"{found.size} (limit)"}.get(found.how, str(found.size))


def off_of(contender: Contender) -> str:
    """How far the repetition of layers was from the trace of four: peak and saved bytes."""
    if contender.peak_off is None or contender.saved_off is None:
        return "" if contender.traced else "not checked"
    return "0" if not contender.peak_off and not contender.saved_off else format_bytes(contender.peak_off)


def _kinds(plan: MemoryPlan) -> Table:
    kinds = list(dict.fromkeys(kind for c in plan.contenders for kind in c.by_kind))
    table = Table(title="kept for backward, by kind", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for c in plan.contenders:
        table.add_row(title_of(c.name), *(format_bytes(c.by_kind.get(kind, 0)) for kind in kinds))
    return table


def layer_rows(plan: MemoryPlan) -> list[tuple[str, list[int]]]:
    """Bytes kept in each layer by every contender; layers that are alike for all are drawn together (bytes of one)."""
    layers = list(dict.fromkeys(layer for c in plan.contenders for layer in c.by_layer))
    rows = [(layer, tuple(c.by_layer.get(layer, 0) for c in plan.contenders)) for layer in layers]
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for layer, sizes in rows:
        family = ".".join("*" if part.isdecimal() else part for part in layer.split("."))
        groups.setdefault((family, sizes), []).append(layer)
    found = []
    for (_, sizes), members in groups.items():
        named = collapse_modules(members)[0][0]
        found.append((named + (f", each of {len(members)}" if len(members) > 1 else ""), list(sizes)))
    return found


def _layers(plan: MemoryPlan) -> Table:
    rows = layer_rows(plan)
    table = Table(title="kept for backward, by layer", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for c in plan.contenders:
        table.add_column(title_of(c.name), justify="right")
    for name, sizes in rows[:MOST_LAYERS]:
        table.add_row(Text(visible(name)), *(format_bytes(size) for size in sizes))
    if len(rows) > MOST_LAYERS:
        table.add_row(f"and {plural(len(rows) - MOST_LAYERS, 'row')} more: --json, --html")
    return table
