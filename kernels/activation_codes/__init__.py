"""Step-gradient activations: 2-bit codes in place of the saved input. See README.md in this folder.

The tables import without torch; `reference` needs torch, `derive` needs sympy and scipy.
"""

from lowmem_compile.kernels.activation_codes.tables import StepTable, step_table

__all__ = ["StepTable", "step_table"]
