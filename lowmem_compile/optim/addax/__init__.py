"""Addax: zeroth-order steps on long examples, first-order steps inside the backward pass on short ones."""

from lowmem_compile.optim.addax.lengths import LengthPartition, step_peaks
from lowmem_compile.optim.addax.optimizer import Addax, AddaxStep
from lowmem_compile.optim.addax.report import AddaxReport, AddaxRow

__all__ = ["Addax", "AddaxReport", "AddaxRow", "AddaxStep", "LengthPartition", "step_peaks"]
