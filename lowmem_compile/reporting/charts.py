"""The two drawings of the HTML report, as inline SVG.

Colours are CSS classes (`kind-activation`, `who-lowmem`, ...), so light, dark and print are the style sheet's
business. All text that comes from a model is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from markupsafe import Markup

from lowmem_compile.reporting.model import KINDS, GraphReport, SavedTensor, TimelinePoint
from lowmem_compile.reporting.summary import CONTENDER_NAMES, bytes_by, measured
from lowmem_compile.reporting.units import exact_bytes, format_bytes, format_change, visible

WIDTH = 1000
_LEFT, _RIGHT = 150, 190
_PLOT = WIDTH - _LEFT - _RIGHT

_HEIGHT, _TOP, _BOTTOM = 330, 26, 34
_AXIS, _END = 74, WIDTH - 240
_MAX_BUCKETS = 400
_STRIPS = 140


def kind_class(kind: str) -> str:
    """Return the CSS class that colours a kind of saved tensor."""
    return "kind-" + kind.replace(" ", "-")


def saved_bars(graph: GraphReport) -> Markup:
    """Return one stacked bar per contender, its length the bytes kept for backward; empty without bytes."""
    names = [name for name in measured(graph) if name in graph.saved]
    longest = max((graph.saved_bytes(name) or 0 for name in names), default=0)
    if not longest:
        return Markup("")
    step, thick = 44, 28
    base = graph.saved_bytes("inductor")
    parts = []
    for row, name in enumerate(names):
        tensors, y = graph.saved[name], 4 + row * step
        total = sum(tensor.nbytes for tensor in tensors)
        middle = y + thick / 2 + 5
        strong = " strong" if name == "lowmem" else ""
        parts.append(Markup('<text class="label{}" x="{}" y="{}" text-anchor="end">{}</text>').format(
            strong, _LEFT - 12, middle, CONTENDER_NAMES[name]))  # fmt: skip
        x = float(_LEFT)
        for kind, nbytes in _by_kind(tensors):
            width = _PLOT * nbytes / longest
            parts.append(_segment(kind, nbytes, x, y, width, thick))
            x += width
        change = "" if base is None or name == "inductor" else format_change(total, base)
        parts.append(Markup('<text class="label{}" x="{:.1f}" y="{}">{}<tspan class="muted" dx="8">{}</tspan>'
                            "<title>{}</title></text>").format(
            strong, x + 10, middle, format_bytes(total), change, exact_bytes(total)))  # fmt: skip
    return _svg(parts, len(names) * step, "Bytes kept for the backward pass, by kind of tensor")


def _segment(kind: str, nbytes: int, x: float, y: float, width: float, thick: float) -> Markup:
    title = f"{kind}: {format_bytes(nbytes)} ({exact_bytes(nbytes)})"
    rect = Markup('<rect class="{}" x="{:.2f}" y="{}" width="{:.2f}" height="{}"><title>{}</title></rect>').format(
        kind_class(kind), x, y, width, thick, title
    )
    inside = f"{kind} {format_bytes(nbytes)}"
    if width < 7 * len(inside) + 12:
        return rect
    text = Markup('<text class="inside" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
    return rect + text.format(x + width / 2, y + thick / 2 + 4.5, inside)


def _by_kind(tensors: Sequence[SavedTensor]) -> list[tuple[str, int]]:
    totals = bytes_by(tensors, "kind")
    return [(kind, totals[(kind,)]) for kind in KINDS if totals.get((kind,))]


def memory_timeline(graph: GraphReport) -> Markup:
    """Return live bytes over the forward and the backward pass, one curve per contender, each peak labelled.

    Every curve's forward steps are spread evenly over the same width, and so are its backward steps: the axis
    is the order of the steps, not time. Empty without a timeline.
    """
    curves = {name: graph.timelines[name] for name in measured(graph) if graph.timelines.get(name)}
    highest = max((graph.peak(name) or 0 for name in curves), default=0)
    if not highest:
        return Markup("")
    tick, unit = _tick(highest)
    ceiling = max(highest * 1.04, tick)
    bottom = _HEIGHT - _BOTTOM

    def height(nbytes: float) -> float:
        return bottom - (bottom - _TOP) * nbytes / ceiling

    split = _split(curves.values())
    places = {name: _places(points, split) for name, points in curves.items()}
    name_of_unit = format_bytes(unit).split()[1]
    lines = [i * tick for i in range(int(ceiling / tick) + 1)]
    parts = [_grid_line(height(line), f"{line / unit:g} {name_of_unit}") for line in lines]
    parts += _phases(split, bottom)
    for name, points in curves.items():
        drawn = _drawn(points)
        line = "M" + "L".join(f"{places[name][i]:.1f} {height(points[i].live_bytes):.1f}" for i in drawn)
        if name == "lowmem":
            first, last = places[name][drawn[0]], places[name][drawn[-1]]
            area = f"{line}L{last:.1f} {bottom}L{first:.1f} {bottom}Z"
            parts.append(Markup('<path class="area who-{}" d="{}"/>').format(name, area))
        parts.append(Markup('<path class="curve who-{}" d="{}"/>').format(name, line))
    parts += _strips(curves, places, bottom)
    parts += _peaks(curves, places, height, bottom)
    return _svg(parts, _HEIGHT, "Bytes alive over the forward and the backward pass")


def _tick(highest: int) -> tuple[float, int]:
    """Return the distance of two grid lines and the unit they are labelled in, both in bytes."""
    unit = 1024 ** max(0, (max(highest, 1).bit_length() - 1) // 10)
    rough = highest / unit / 4
    power = 10.0 ** math.floor(math.log10(rough))
    nice = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return (max(nice, 1.0) if unit == 1 else nice) * unit, unit


def _split(curves: Iterable[Sequence[TimelinePoint]]) -> float:
    """Return the x at which the backward pass begins, from the mean share of forward steps."""
    shares = [_forward_steps(points) / len(points) for points in curves]
    share = sum(shares) / len(shares)
    return _AXIS + (_END - _AXIS) * (share if share in (0, 1) else min(max(share, 0.2), 0.8))


def _forward_steps(points: Sequence[TimelinePoint]) -> int:
    return sum(point.phase == "forward" for point in points)


def _places(points: Sequence[TimelinePoint], split: float) -> list[float]:
    """Return the x of each point."""
    forward = _forward_steps(points)
    backward = len(points) - forward
    return [_AXIS + (split - _AXIS) * (i + 0.5) / forward for i in range(forward)] + [
        split + (_END - split) * (i + 0.5) / backward for i in range(backward)
    ]


def _drawn(points: Sequence[TimelinePoint]) -> list[int]:
    """Return the indices to draw: all, or the lowest and the highest of each bucket where there are many."""
    if len(points) <= 2 * _MAX_BUCKETS:
        return list(range(len(points)))
    size = -(-len(points) // _MAX_BUCKETS)
    keep = {0, len(points) - 1}
    for start in range(0, len(points), size):
        bucket = range(start, min(start + size, len(points)))
        keep |= {pick(bucket, key=lambda i: points[i].live_bytes) for pick in (min, max)}
    return sorted(keep)


def _grid_line(y: float, label: str) -> Markup:
    return Markup(
        '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
        '<text class="axis" x="{3}" y="{4:.1f}" text-anchor="end">{5}</text>'
    ).format(_AXIS, _END, y, _AXIS - 8, y + 4, label)


def _phases(split: float, bottom: float) -> list[Markup]:
    parts = []
    if _AXIS < split < _END:
        line = Markup('<line class="split" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>')
        parts.append(line.format(split, _TOP - 8, bottom + 8))
    for name, left, right in (("forward pass", _AXIS, split), ("backward pass", split, _END)):
        if right > left:
            text = Markup('<text class="axis" x="{:.1f}" y="{}" text-anchor="middle">{} \u2192</text>')
            parts.append(text.format((left + right) / 2, bottom + 22, name))
    return parts


def _strips(curves: Mapping[str, Sequence[TimelinePoint]], places: Mapping[str, Sequence[float]], bottom: float) -> list[Markup]:
    """Return invisible strips whose tooltips say what is alive there: each curve's highest point within."""
    width = (_END - _AXIS) / _STRIPS
    highest: list[dict[str, TimelinePoint]] = [{} for _ in range(_STRIPS)]
    for name, points in curves.items():
        for x, point in zip(places[name], points, strict=True):
            here = highest[min(int((x - _AXIS) / width), _STRIPS - 1)]
            if name not in here or point.live_bytes > here[name].live_bytes:
                here[name] = point
    rect = Markup('<rect class="strip" x="{:.1f}" y="{}" width="{:.2f}" height="{}"><title>{}</title></rect>')
    return [
        rect.format(_AXIS + i * width, _TOP, width, bottom - _TOP, "\n".join(_alive(*it) for it in here.items()))
        for i, here in enumerate(highest)
        if here
    ]


def _alive(name: str, point: TimelinePoint) -> str:
    return f"{CONTENDER_NAMES[name]}: {format_bytes(point.live_bytes)} in {point.phase}, {visible(point.label)}"


def _peaks(
    curves: Mapping[str, Sequence[TimelinePoint]],
    places: Mapping[str, Sequence[float]],
    height: Callable[[float], float],
    bottom: float,
) -> list[Markup]:
    """Return for each curve a dot at its peak, a line to the right margin and a label there."""
    peaks = []
    for name, points in curves.items():
        sizes = [point.live_bytes for point in points]
        index = sizes.index(max(sizes))
        peaks.append((height(sizes[index]), places[name][index], name, points[index]))
    peaks.sort(key=lambda peak: peak[0])
    rows = _spread([y for y, *_ in peaks], _TOP, bottom)
    parts = [Markup('<text class="axis" x="{}" y="{:.1f}">peak</text>').format(_END + 34, rows[0] - 14)]
    for (y, x, name, point), row in zip(peaks, rows, strict=True):
        leader = Markup('<path class="leader" d="M{:.1f} {:.1f}H{}L{} {:.1f}"/>').format(x, y, _END, _END + 28, row)
        dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4"/>').format(x, y)
        words = f"{CONTENDER_NAMES[name]} {format_bytes(point.live_bytes)}"
        label = Markup('<text x="{}" y="{:.1f}">{}</text>').format(_END + 34, row + 4.5, words)
        title = f"{_alive(name, point)} ({exact_bytes(point.live_bytes)})"
        group = Markup('<g class="peak who-{}">{}<title>{}</title></g>')
        parts.append(group.format(name, leader + dot + label, title))
    return parts


def _spread(rows: Sequence[float], top: float, bottom: float, gap: float = 19) -> list[float]:
    """Move sorted label positions apart to at least `gap`, within `top` and `bottom`."""
    placed: list[float] = []
    for row in rows:
        placed.append(max(row, placed[-1] + gap) if placed else max(row, top))
    limit = bottom
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def _svg(parts: Sequence[Markup], height: float, label: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, label, Markup("").join(parts)
    )
