"""Markdown tables of measured cells, and the check of the figures asked against the figures measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowmem_compile.demo.cell import CellResult, VariantResult
from lowmem_compile.demo.variants import BASELINE, VARIANTS
from lowmem_compile.reporting.units import format_bytes

_MODES = {"full": "full", "qv": "LoRA q,v", "all": "LoRA all"}
_COLUMNS = (
    "",
    "saved",
    "of Inductor",
    "peak",
    "of Inductor",
    "step",
    "of Inductor",
    "gradient cosine",
    "relative error",
    "worst cosine",
    "output difference",
    "loss after training",
)
_RIVALS = ("one_flag", "budget_0.7", "budget_0.5", "budget_0.3", "fp8", "fp8_one_flag", "checkpointing")


@dataclass(frozen=True)
class Bar:
    """One figure that is asked for: what, of which cells, and how it is judged.

    ``measure`` gives a value of a cell, or None where it does not apply or was not measured; it is met when
    it is at most ``limit`` (at least, with ``at_least``).
    """

    asked: str
    limit: float
    measure: Callable[[CellResult], float | None]
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Whether ``value`` is good enough. NaN is not."""
        return value >= self.limit if self.at_least else value <= self.limit


def cell_name(cell: CellResult) -> str:
    """Such as ``MiniLM, 6 layers · full · bf16``."""
    return f"{cell.title}, {cell.layers} layers · {_MODES[cell.mode]} · {cell.precision}"


def cell_table(cell: CellResult) -> str:
    """All figures of one cell: a row for each variant."""
    weights = "pretrained" if cell.pretrained else "random weights"
    lines = [
        f"### {cell_name(cell)}",
        "",
        (
            f"{cell.activation}, {weights}; {cell.tokens} tokens; {cell.trained / 1e6:.2f} of "
            f"{cell.parameters / 1e6:.2f} million parameters trained; measured in {cell.seconds:.0f} s."
        ),
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---" * len(_COLUMNS) + "|",
    ]
    base = cell.variant(BASELINE)
    for v in cell.variants:
        if v.error is not None:
            lines.append(f"| {v.label} | failed: {v.error.strip().splitlines()[-1][:120]} |" + " |" * (len(_COLUMNS) - 2))
            continue
        columns = (
            v.label,
            _bytes(v.saved),
            _ratio(v.saved, base.saved if base else None),
            _bytes(v.peak),
            _ratio(v.peak, base.peak if base else None),
            _step(v),
            _step_ratio(v),
            _number(v.cosine, 5),
            _number(v.relative_error, 4),
            _number(v.worst_cosine, 4),
            _small(v.output_difference),
            _number(v.losses[-1] if v.losses else None, 4),
        )
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def overview(cells: Sequence[CellResult], title: str, show: Callable[[CellResult, VariantResult], str]) -> str:
    """One figure of all cells: a row for each cell, a column for each variant that any cell has."""
    present = [v for v in VARIANTS.values() if any(c.variant(v.name) for c in cells)]
    lines = [
        f"### {title}",
        "",
        "| | " + " | ".join(v.label for v in present) + " |",
        "|---" * (len(present) + 1) + "|",
    ]
    for cell in cells:
        figures = (cell.variant(v.name) for v in present)
        shown = ("" if f is None else "failed" if f.error else show(cell, f) for f in figures)
        lines.append(f"| {cell_name(cell)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def overviews(cells: Sequence[CellResult]) -> str:
    """Bytes saved, peak, step time, gradients and losses of all cells."""
    return "\n\n".join(
        (
            overview(cells, "Bytes saved for backward, of Inductor's", lambda c, v: _of_base(c, v, "saved")),
            overview(cells, "Peak bytes of a step (allocator), of Inductor's", lambda c, v: _of_base(c, v, "peak")),
            overview(
                cells,
                "Step time, of Inductor's: median of paired ratios [90 % interval]",
                lambda _, v: _step_ratio(v),
            ),
            overview(
                cells,
                "Gradient cosine / relative error against float32, eager",
                lambda _, v: f"{_number(v.cosine, 5)} / {_number(v.relative_error, 4)}",
            ),
            overview(cells, "Loss after training", lambda _, v: _number(v.losses[-1] if v.losses else None, 4)),
        )
    )


def one_line_each(cells: Sequence[CellResult]) -> str:
    """Eager, the one flag, lowmem and its budget of each cell in one row; bytes and times as shares of Inductor's."""
    measured = {v.name for cell in cells for v in cell.variants}
    ways = [name for name in ("lowmem", "lowmem_0.25") if name in measured]
    shown = ["eager", "one_flag", *ways]
    names = " | ".join(VARIANTS[name].label for name in shown)
    cosines = " | ".join(VARIANTS[name].label for name in ways)
    lines = [
        f"| | saved: Inductor | {names} | peak: Inductor | {names} | step: {names} | gradient cosine: {cosines} |",
        "|---" * (3 + 3 * len(shown) + len(ways)) + "|",
    ]
    for cell in cells:
        base = cell.variant(BASELINE)
        if base is None or cell.variant("lowmem") is None:
            continue
        row = [cell_name(cell)]
        for name in ("saved", "peak"):
            found = (cell.variant(v) for v in shown)
            row += [_of_base(cell, base, name), *("" if f is None else _of_base(cell, f, name) for f in found)]
        row += ["" if (f := cell.variant(v)) is None else _step_ratio(f) for v in shown]
        row += ["" if (f := cell.variant(v)) is None else _number(f.cosine, 5) for v in ways]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def bars() -> list[Bar]:
    """What lowmem must reach."""
    swiglu, gelu = {"SwiGLU", "GeGLU"}, {"GELU"}
    return [
        Bar("saved, GELU, full, bf16: at most 0.66 of Inductor", 0.66, _saved(gelu, {"full"}, "bf16")),
        Bar("saved, GELU, LoRA, bf16: at most 0.64 of Inductor", 0.64, _saved(gelu, {"qv", "all"}, "bf16")),
        Bar("saved, SwiGLU, full, bf16: at most 0.71 of Inductor", 0.71, _saved(swiglu, {"full"}, "bf16")),
        Bar("saved, SwiGLU, LoRA, bf16: at most 0.85 of Inductor", 0.85, _saved(swiglu, {"qv", "all"}, "bf16")),
        Bar("saved, autocast: at most 0.60 of Inductor", 0.60, _saved(gelu | swiglu, set(_MODES), "autocast")),
        Bar("peak: below Inductor", 0.99999, lambda c: _against(c, "peak", BASELINE)),
        Bar("peak: below eager", 0.99999, lambda c: _against(c, "peak", "eager")),
        Bar("step time: at most 1.02 of Inductor", 1.02, lambda c: _figure(c, "lowmem", "ratio")),
        Bar("saved: at most the one flag", 1.0, lambda c: _against(c, "saved", "one_flag")),
        Bar("peak: at most the one flag", 1.0, lambda c: _against(c, "peak", "one_flag")),
        Bar(
            "gradient cosine, default: at least 0.999",
            0.999,
            lambda c: _figure(c, "lowmem", "cosine"),
            at_least=True,
        ),
        Bar(
            "gradient cosine, derivative table: at least 0.999",
            0.999,
            lambda c: _figure(c, "lowmem_derivative", "cosine"),
            at_least=True,
        ),
        Bar(
            "gradient cosine, primitive table: at least 0.99",
            0.99,
            lambda c: _figure(c, "lowmem_primitive", "cosine"),
            at_least=True,
        ),
    ]


def check(cells: Sequence[CellResult], asked: Sequence[Bar] | None = None) -> str:
    """Asked against measured: the worst cell of each figure, how many cells reach it, and which do not."""
    lines = ["### Asked and measured", "", "| asked | worst | cells | missed in |", "|---|---|---|---|"]
    for bar in bars() if asked is None else asked:
        values = [(cell, value) for cell in cells if (value := bar.measure(cell)) is not None]
        if not values:
            lines.append(f"| {bar.asked} | not measured | 0 | |")
            continue
        missed = [(cell, value) for cell, value in values if not bar.met(value)]
        figures = [value for _, value in values]
        worst = math.nan if any(map(math.isnan, figures)) else (min if bar.at_least else max)(figures)
        where = "; ".join(f"{cell.key} ({value:.4g})" for cell, value in missed)
        lines.append(f"| {bar.asked} | {worst:.4g} | {len(values) - len(missed)} of {len(values)} | {where} |")
    return "\n".join(lines)


def rivals_ahead(cells: Sequence[CellResult]) -> str:
    """Where a rival keeps fewer bytes, or has a lower peak, than lowmem, and what its step costs."""
    lines = [
        "### Where a rival needs less memory than lowmem",
        "",
        "Equal step time: its interval of step-time ratios reaches down to lowmem's upper bound.",
        "Error: relative, of the gradients.",
        "",
        "| cell | rival | saved, of lowmem | peak, of lowmem | step, of Inductor | equal step time | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        ours = cell.variant("lowmem")
        if ours is None or ours.error:
            continue
        for name in _RIVALS:
            rival = cell.variant(name)
            if rival is None or rival.error or not (_less(rival.saved, ours.saved) or _less(rival.peak, ours.peak)):
                continue
            equal = rival.ratio_low is not None and rival.ratio_low <= (ours.ratio_high or 0)
            row = (
                cell.key,
                rival.label,
                _ratio(rival.saved, ours.saved),
                _ratio(rival.peak, ours.peak),
                _step_ratio(rival),
                "yes" if equal else "no",
                _number(rival.relative_error, 4),
            )
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _saved(activations: set[str], modes: set[str], precision: str) -> Callable[[CellResult], float | None]:
    def measure(cell: CellResult) -> float | None:
        if cell.activation not in activations or cell.mode not in modes or cell.precision != precision:
            return None
        return _against(cell, "saved", BASELINE)

    return measure


def _figure(cell: CellResult, variant: str, name: str) -> float | None:
    """A variant's figure; NaN, which reaches no bar, if the variant failed."""
    result = cell.variant(variant)
    if result is None:
        return None
    value: float | None = getattr(result, name)
    return math.nan if result.error else value


def _against(cell: CellResult, name: str, rival: str) -> float | None:
    """lowmem's figure over the rival's; None where the rival failed."""
    ours, theirs = _figure(cell, "lowmem", name), _figure(cell, rival, name)
    return None if ours is None or not theirs or math.isnan(theirs) else ours / theirs


def _less(a: int | None, b: int | None) -> bool:
    return a is not None and b is not None and a < b


def _of_base(cell: CellResult, variant: VariantResult, name: str) -> str:
    base = cell.variant(BASELINE)
    value: int | None = getattr(variant, name)
    if variant.name == BASELINE:
        return _bytes(value)
    return _ratio(value, None if base is None else getattr(base, name))


def _bytes(value: int | None) -> str:
    return "" if value is None else format_bytes(value)


def _ratio(value: int | None, base: int | None) -> str:
    return "" if value is None or not base else f"{value / base:.3f}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def _step(variant: VariantResult) -> str:
    return f"{sorted(variant.seconds)[len(variant.seconds) // 2]:.2f} s" if variant.seconds else ""


def _step_ratio(variant: VariantResult) -> str:
    if variant.ratio is None:
        return ""
    if variant.name == BASELINE:
        return "1"
    return f"{variant.ratio:.2f} [{variant.ratio_low:.2f}, {variant.ratio_high:.2f}]"
