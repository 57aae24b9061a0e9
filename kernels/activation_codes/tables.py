"""The step-gradient tables: checked-in digits, read without torch or sympy.

A table replaces h'(x) in backward by `levels[s]`, where the code s of x is the number of thresholds strictly
below x. The digits are those of `derived.py`, or of the publication named in `source`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import isfinite
from typing import Literal, get_args

from lowmem_compile.kernels.activation_codes.derived import DERIVED

Kind = Literal["primitive", "derivative"]


@dataclass(frozen=True)
class StepTable:
    """A step function that stands for an activation's derivative. Numerics class: APPROXIMATE.

    Attributes:
        activation: name of the activation, e.g. "gelu".
        kind: "primitive" fits the integral of the steps to h, "derivative" fits the steps to h'.
        bits: bits a code takes.
        thresholds: 2**bits - 1 increasing numbers c_1 < c_2 < …; the code of x counts those with x > c.
        levels: 2**bits gradients, one a code.
        source: where the digits come from.

    Raises:
        ValueError: on construction, if the numbers do not make such a table.
    """

    activation: str
    kind: Kind
    bits: int
    thresholds: tuple[float, ...]
    levels: tuple[float, ...]
    source: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be between 1 and 8, not {self.bits}")
        if len(self.levels) != 2**self.bits or len(self.thresholds) != 2**self.bits - 1:
            raise ValueError(
                f"{self.bits} bits need {2**self.bits} levels and {2**self.bits - 1} thresholds, "
                f"not {len(self.levels)} and {len(self.thresholds)}"
            )
        if not all(map(isfinite, (*self.thresholds, *self.levels))):
            raise ValueError(f"thresholds and levels must be finite: {self.thresholds}, {self.levels}")
        if not all(low < high for low, high in pairwise(self.thresholds)):
            raise ValueError(f"thresholds must increase: {self.thresholds}")


_REGELU2 = "ReGELU2, LowMemoryBP, ICML 2024 (PMLR 235:56357-56381)"
_RESILU2 = "ReSiLU2, LowMemoryBP, ICML 2024 (PMLR 235:56357-56381)"

# (activation, kind, bits): (thresholds, levels, source)
PUBLISHED: dict[tuple[str, Kind, int], tuple[tuple[float, ...], tuple[float, ...], str]] = {
    ("gelu", "primitive", 2): (
        (-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
        (0.0, -0.04922261145617846, 1.0487405950855513, 1.0),
        _REGELU2,
    ),
    ("silu", "primitive", 2): (
        (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
        (0.0, -0.04060357190528599, 1.0403218566243821, 1.0),
        _RESILU2,
    ),
}


def table_names() -> list[str]:
    """Every checked-in table as "activation/kind/bits", sorted."""
    return sorted(f"{activation}/{kind}/{bits}" for activation, kind, bits in {**PUBLISHED, **DERIVED})


@lru_cache(maxsize=64)
def step_table(activation: str, kind: str, bits: int = 2) -> StepTable:
    """The checked-in table of an activation.

    Args:
        activation: "gelu" (erf form), "gelu_tanh", "silu", "mish", "softplus" (beta 1) or "log_sigmoid".
        kind: "primitive" or "derivative".
        bits: bits a code takes: 2, or of "derivative" also 4 and 5.

    Raises:
        ValueError: there is no such table; the message lists those there are.
    """
    for (name, fit, width), (thresholds, levels, source) in {**PUBLISHED, **DERIVED}.items():
        if (name, fit, width) == (activation, kind, bits):
            return StepTable(name, fit, width, thresholds, levels, source)
    valid = ", ".join(table_names())
    raise ValueError(f"no step table {activation}/{kind}/{bits} (activation/kind/bits); there are {valid}")
