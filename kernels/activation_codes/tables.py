"""The step-gradient tables: checked-in digits, read without torch or sympy.

A table replaces h'(x) in backward by `levels[s]`, where the code s of x is the number of thresholds strictly
below x. The digits come from `derive.py`, or from the publication named in `source`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import isfinite
from typing import Literal, get_args

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
_Digits = tuple[tuple[float, ...], tuple[float, ...], str]
PUBLISHED: dict[tuple[str, Kind, int], _Digits] = {
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
# Printed by `python -m lowmem_compile.kernels.activation_codes.derive`.
DERIVED: dict[tuple[str, Kind, int], _Digits] = {
    ("gelu", "derivative", 2): (
        (-0.453601118607, 0.0, 0.453601118607),
        (-0.0014811852797, 0.3250579741198, 0.6749420258802, 1.0014811852797),
        "derived: least ∫(h' - step)² over [-100, 100]",
    ),
    ("gelu", "derivative", 4): (
        (
            -2.7056258815185,
            -2.0587672558899,
            -0.93126645273,
            -0.6831063049704,
            -0.4872774633677,
            -0.3151260555008,
            -0.1549651224023,
            0.0,
            0.1549651224023,
            0.3151260555008,
            0.4872774633677,
            0.6831063049704,
            0.93126645273,
            2.0587672558899,
            2.7056258815185,
        ),
        (
            -9.47938772e-05,
            -0.0486269595024,
            -0.1091731910788,
            -0.0207166386648,
            0.0836378401796,
            0.1971552691971,
            0.3162558592629,
            0.4384244066945,
            0.5615755933055,
            0.6837441407371,
            0.8028447308029,
            0.9163621598204,
            1.0207166386648,
            1.1091731910788,
            1.0486269595024,
            1.0000947938772,
        ),
        "derived: least ∫(h' - step)² over [-100, 100]",
    ),
    ("gelu_tanh", "primitive", 2): (
        (-3.1628800666059, 0.0, 3.1628800666059),
        (0.0, -0.0497861330578, 1.0497861330578, 1.0),
        "derived: least ∫(h - h̃)² over R",
    ),
    ("gelu_tanh", "derivative", 2): (
        (-0.4537843421263, 0.0, 0.4537843421263),
        (-0.0014816068631, 0.3250186104286, 0.6749813895714, 1.0014816068631),
        "derived: least ∫(h' - step)² over [-100, 100]",
    ),
    ("gelu_tanh", "derivative", 4): (
        (
            -2.7021227530949,
            -2.0642172731973,
            -0.9332289588127,
            -0.6841656287182,
            -0.4878713926754,
            -0.3154460379416,
            -0.1551051771607,
            0.0,
            0.1551051771607,
            0.3154460379416,
            0.4878713926754,
            0.6841656287182,
            0.9332289588127,
            2.0642172731973,
            2.7021227530949,
        ),
        (
            -9.08073099e-05,
            -0.049004555951,
            -0.1093521363333,
            -0.0209759486933,
            0.083364937957,
            0.1969225201418,
            0.3161012669919,
            0.4383704080646,
            0.5616295919354,
            0.6838987330081,
            0.8030774798582,
            0.916635062043,
            1.0209759486933,
            1.1093521363333,
            1.049004555951,
            1.0000908073099,
        ),
        "derived: least ∫(h' - step)² over [-100, 100]",
    ),
    ("silu", "derivative", 2): (
        (-0.7432967014742, 0.0, 0.7432967014742),
        (-0.0024134630573, 0.3222836669701, 0.6777163330299, 1.0024134630573),
        "derived: least ∫(h' - step)² over [-100, 100]",
    ),
    ("silu", "derivative", 4): (
        (
            -5.5384593443952,
            -3.8139717803871,
            -1.5048410863455,
            -1.0843112402073,
            -0.7654820145672,
            -0.491929313036,
            -0.241074604647,
            0.0,
            0.241074604647,
            0.491929313036,
            0.7654820145672,
            1.0843112402073,
            1.5048410863454,
            3.8139717803871,
            5.5384593443952,
        ),
        (
            -0.0002296714791,
            -0.0351562521738,
            -0.0827648737255,
            -0.0013296643275,
            0.0971927919861,
            0.2059952580997,
            0.3212187366404,
            0.4400215483277,
            0.5599784516723,
            0.6787812633596,
            0.7940047419003,
            0.9028072080139,
            1.0013296643275,
            1.0827648737255,
            1.0351562521738,
            1.0002296714791,
        ),
        "derived: least ∫(h' - step)² over [-100, 100]",
    ),
    ("mish", "primitive", 2): (
        (-5.666258736678, -0.209827252571, 4.341481326425),
        (0.0, -0.0569891006806, 1.0222199547401, 1.0),
        "derived: least ∫(h - h̃)² over R",
    ),
    ("mish", "derivative", 2): (
        (-0.760461035631, -0.1679637600981, 0.3965637950339),
        (-0.0028028250387, 0.3146683251958, 0.6693532923128, 1.001108459315),
        "derived: least ∫(h' - step)² over [-100, 100]",
    ),
    ("mish", "derivative", 4): (
        (
            -5.3725078767074,
            -3.6364202723728,
            -1.4483279330993,
            -1.0876296560842,
            -0.8186549640009,
            -0.5924779789925,
            -0.3894452818797,
            -0.1985751123577,
            -0.0119702889443,
            0.1777378521815,
            0.3796868255152,
            0.6092543129711,
            0.9045910787041,
            2.3053089456199,
            3.2105293550585,
        ),
        (
            -0.0002629662083,
            -0.0401255162408,
            -0.0944442595265,
            -0.0169106768709,
            0.0774522472021,
            0.1826501584921,
            0.2952185392942,
            0.4125444454115,
            0.5323332985365,
            0.6523316052475,
            0.7700930275745,
            0.8826559722054,
            0.9858669408121,
            1.0721463231526,
            1.0308974067961,
            1.000099574739,
        ),
        "derived: least ∫(h' - step)² over [-100, 100]",
    ),
    ("softplus", "primitive", 2): (
        (-2.5068174049705, 0.0, 2.5068174049705),
        (0.0, 0.2363233779449, 0.7636766220551, 1.0),
        "derived: least ∫(h - h̃)² over R",
    ),
    ("softplus", "derivative", 2): (
        (-1.6893098383388, 0.0, 1.6893098383388),
        (0.0017235640289, 0.3100096852912, 0.6899903147088, 0.9982764359711),
        "derived: least ∫(h' - step)² over [-100, 100]",
    ),
    ("softplus", "derivative", 4): (
        (
            -4.0345421858556,
            -2.7498745148818,
            -2.0236371657485,
            -1.4952310878382,
            -1.0636849922336,
            -0.6853354090404,
            -0.3361341107818,
            0.0,
            0.3361341107818,
            0.6853354090404,
            1.0636849922336,
            1.4952310878382,
            2.0236371657485,
            2.7498745148819,
            4.0345421858556,
        ),
        (
            0.0001827643667,
            0.0345895396236,
            0.0855979353633,
            0.1478889118557,
            0.218386823383,
            0.2948249324324,
            0.3753181411582,
            0.4581795635326,
            0.5418204364674,
            0.6246818588418,
            0.7051750675676,
            0.781613176617,
            0.8521110881443,
            0.9144020646367,
            0.9654104603764,
            0.9998172356333,
        ),
        "derived: least ∫(h' - step)² over [-100, 100]",
    ),
    ("log_sigmoid", "primitive", 2): (
        (-2.5068174049705, 0.0, 2.5068174049705),
        (1.0, 0.7636766220551, 0.2363233779449, 0.0),
        "derived: least ∫(h - h̃)² over R",
    ),
    ("log_sigmoid", "derivative", 2): (
        (-1.6893098383388, 0.0, 1.6893098383388),
        (0.9982764359711, 0.6899903147088, 0.3100096852912, 0.0017235640289),
        "derived: least ∫(h' - step)² over [-100, 100]",
    ),
    ("log_sigmoid", "derivative", 4): (
        (
            -4.0345421858556,
            -2.7498745148818,
            -2.0236371657485,
            -1.4952310878382,
            -1.0636849922336,
            -0.6853354090404,
            -0.3361341107818,
            0.0,
            0.3361341107818,
            0.6853354090404,
            1.0636849922336,
            1.4952310878382,
            2.0236371657485,
            2.7498745148818,
            4.0345421858556,
        ),
        (
            0.9998172356333,
            0.9654104603764,
            0.9144020646367,
            0.8521110881443,
            0.781613176617,
            0.7051750675676,
            0.6246818588418,
            0.5418204364674,
            0.4581795635326,
            0.3753181411582,
            0.2948249324324,
            0.218386823383,
            0.1478889118557,
            0.0855979353633,
            0.0345895396236,
            0.0001827643667,
        ),
        "derived: least ∫(h' - step)² over [-100, 100]",
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
        bits: bits a code takes; 2 is checked in.

    Raises:
        ValueError: there is no such table; the message lists those there are.
    """
    for (name, fit, width), (thresholds, levels, source) in {**PUBLISHED, **DERIVED}.items():
        if (name, fit, width) == (activation, kind, bits):
            return StepTable(name, fit, width, thresholds, levels, source)
    valid = ", ".join(table_names())
    raise ValueError(f"no step table {activation}/{kind}/{bits} (activation/kind/bits); there are {valid}")
