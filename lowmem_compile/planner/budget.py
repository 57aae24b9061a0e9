"""What ``options["memory_budget"]`` says: a share of the bytes Inductor saves, or a peak in bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowmem_compile.errors import OptionError

UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?b)?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """One of the two is given.

    Attributes:
        share: saved bytes, as a share of what Inductor would save for the same graph.
        peak: bytes alive at once in forward and backward beyond parameters, buffers and inputs.
    """

    share: float | None = None
    peak: int | None = None


def budget_of(value: float | str) -> Budget:
    """Read the option.

    Raises:
        OptionError: not a share above 0 and at most 1, nor a size such as ``"6GiB"`` or ``"800 MB"``.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        size = int(float(match[1]) * UNITS[(match[2] or "").lower()]) if match else 0
        if not match or size <= 0 or not match[2]:
            raise OptionError(f"options['memory_budget'] = {value!r} is no size; write it as '6GiB', '800MiB' or '6.5 GB'")
        return Budget(peak=size)
    if isinstance(value, bool) or not 0 < value <= 1:
        raise OptionError(
            f"options['memory_budget'] = {value!r} must be a share of Inductor's saved bytes above 0 and at most 1, "
            "or a peak such as '6GiB'"
        )
    return Budget(share=float(value))
