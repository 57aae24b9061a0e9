"""Numbers and names as people read them. Shared by the text and the HTML report."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(count: int) -> str:
    """Return `count` bytes in three digits and a binary unit: "0 B", "1.50 KiB", "23.0 MiB", "812 GiB"."""
    sign, value, unit = ("-" if count < 0 else ""), float(abs(count)), 0
    while value >= 1023.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    if unit == 0:
        return f"{sign}{abs(count)} B"
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{sign}{value:.{decimals}f} {_UNITS[unit]}"


def exact_bytes(count: int) -> str:
    """Return `count` with all its digits: "24,117,248 bytes"."""
    return f"{count:,} byte" if abs(count) == 1 else f"{count:,} bytes"


def format_change(new: int, base: int) -> str:
    """Return the relative change from `base` to `new`: "-38 %", "+0.4 %", "0 %"; empty for a base of zero."""
    if base == 0:
        return "" if new else "0 %"
    percent = 100 * (new - base) / base
    if percent == 0:
        return "0 %"
    if abs(percent) < 0.05:
        return "about 0 %"
    whole = round(percent)
    if abs(percent) < 1 or (whole == -100 and new):
        return f"{max(percent, -99.9):+.1f} %"
    return f"{whole:+d} %"


def format_seconds(seconds: float) -> str:
    """Return a duration: "0.4 ms", "38 ms", "1.92 s", "75 s"."""
    if seconds < 0.00995:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:,.0f} s"


def format_shape(shape: Sequence[int | str]) -> str:
    """Return a shape as "16 x 128 x 384"; "scalar" without dimensions."""
    return " x ".join(str(size) for size in shape) or "scalar"


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return "1 site", "2 sites"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def visible(text: str) -> str:
    r"""Return `text` with what does not print (controls, bidi marks, surrogates) spelt out: \x1b, \u202e."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
