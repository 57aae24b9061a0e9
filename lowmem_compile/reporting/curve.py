"""The curve of bytes against time of a graph, lowmem's budgets beside Inductor's own, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from lowmem_compile.reporting.model import CurvePoint, GraphReport
from lowmem_compile.reporting.summary import CONTENDER_NAMES
from lowmem_compile.reporting.units import format_bytes

WIDTH, HEIGHT = 1000, 330
LEFT, RIGHT, TOP, BOTTOM = 90, 60, 20, 46
LINES = 4
NEAR_X, NEAR_Y = 40, 14
"""Points nearer than this to each other would have labels on top of each other."""


def budget_curve(graph: GraphReport) -> Markup:
    """Bytes kept (up) against estimated extra time (right), one line a contender; empty without a curve."""
    if not graph.curve:
        return Markup("")
    most = max(1, *(p.saved for p in graph.curve))
    slowest, fastest = max(0.01, *(p.time for p in graph.curve)), min(0.0, *(p.time for p in graph.curve))

    def place(point: CurvePoint) -> tuple[float, float]:
        across = (point.time - fastest) / (slowest - fastest)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - point.saved / most * (HEIGHT - TOP - BOTTOM)

    parts = _grid(most, fastest, slowest)
    for name in ("inductor", "lowmem"):
        points = sorted((p for p in graph.curve if p.contender == name), key=lambda p: -p.saved)
        if points:
            places = [place(p) for p in points]
            parts.append(_line(name, places))
            labels = _labels([asked(p) for p in points], places)
            labels[0] = f"{CONTENDER_NAMES[name]} {labels[0]}"
            parts += [_dot(p, *at, label) for p, at, label in zip(points, places, labels, strict=True)]
    label = "Bytes kept for the backward pass against estimated extra time"
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )


def _grid(most: int, fastest: float, slowest: float) -> list[Markup]:
    parts = []
    line = Markup(
        '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
        '<text class="axis" x="{3}" y="{4:.1f}" text-anchor="end">{5}</text>'
    )
    for i in range(LINES + 1):
        y = HEIGHT - BOTTOM - i / LINES * (HEIGHT - TOP - BOTTOM)
        parts.append(line.format(LEFT, WIDTH - RIGHT, y, LEFT - 8, y + 4, format_bytes(most * i // LINES)))
        x = LEFT + i / LINES * (WIDTH - LEFT - RIGHT)
        share = fastest + i / LINES * (slowest - fastest)
        text = Markup('<text class="axis" x="{:.1f}" y="{}" text-anchor="middle">{:+.1f} %</text>')
        parts.append(text.format(x, HEIGHT - BOTTOM + 18, 100 * share))
    title = Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">estimated time against Inductor\u2019s step</text>')
    return [*parts, title.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8)]


def _line(name: str, places: Sequence[tuple[float, float]]) -> Markup:
    return Markup('<path class="curve who-{}" d="{}"/>').format(name, "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places))


def asked(point: CurvePoint) -> str:
    """The budget of a point, in words."""
    return "default" if point.budget is None else f"{point.budget:g}"


def _labels(words: Sequence[str], places: Sequence[tuple[float, float]]) -> list[str]:
    """A label a point; points too near to have one each share that of the first."""
    labels = list(words)
    first = 0
    for i in range(1, len(labels)):
        (x, y), (x0, y0) = places[i], places[first]
        if abs(x - x0) < NEAR_X and abs(y - y0) < NEAR_Y:
            labels[first] += f", {labels[i]}"
            labels[i] = ""
        else:
            first = i
    return labels


def _dot(point: CurvePoint, x: float, y: float, words: str) -> Markup:
    title = (
        f"{CONTENDER_NAMES[point.contender]}, {asked(point)}: {format_bytes(point.saved)} kept, peak {format_bytes(point.peak)}, "
        f"time {100 * point.time:+.1f} %, gradient error {100 * point.error:.2f} %"
    )
    dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4"/>').format(x, y)
    label = Markup('<text class="axis" x="{:.1f}" y="{:.1f}">{}</text>').format(x + 7, y - 6, words)
    return Markup('<g class="rung who-{}">{}{}<title>{}</title></g>').format(point.contender, dot, label, title)
