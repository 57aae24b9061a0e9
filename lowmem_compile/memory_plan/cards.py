"""Memory of accelerators by name, as their makers state it."""

from __future__ import annotations

from lowmem_compile.errors import OptionError
from lowmem_compile.planner.budget import budget_of

GIB = 1 << 30
CARDS = {
    "t4": 16,
    "v100": 32,
    "rtx3090": 24,
    "rtx4090": 24,
    "rtx5090": 32,
    "a10": 24,
    "l4": 24,
    "l40s": 48,
    "a6000": 48,
    "a100-40": 40,
    "a100": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
    "mi250x": 64,
    "mi300x": 192,
}
"""Gibibytes; of a card sold in several sizes the largest, a dual-chip card by the chip."""


def card_bytes(card: str) -> int:
    """Bytes of a card given by name (``"h100"``) or by size (``"24GiB"``).

    Raises:
        OptionError: neither a known name nor a size; the names are listed.
    """
    key = card.strip().lower().replace(" ", "")
    if key in CARDS:
        return CARDS[key] * GIB
    try:
        size = budget_of(card).peak
    except OptionError:
        size = None
    if size is None:
        raise OptionError(f"--card {card!r} is neither a size such as '24GiB' nor one of {', '.join(CARDS)}.")
    return size
