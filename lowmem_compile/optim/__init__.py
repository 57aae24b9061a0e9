"""Optimizers that keep their state in a projected space (COAP, GaLore, Fira, Flora, APOLLO), and Addax, which keeps none.

Ordinary ``torch.optim.Optimizer``s: parameter groups, closures, schedulers, ``state_dict``. :func:`split` makes groups of a
model, :func:`report` says what is projected, what is not and why, and the bytes of both. :func:`average_gradients` and
:func:`projected_allreduce` average over processes.
"""

from lowmem_compile.optim.addax import Addax, AddaxStep, LengthPartition
from lowmem_compile.optim.apollo import APOLLO
from lowmem_compile.optim.base import LowRankOptimizer
from lowmem_compile.optim.coap import COAP
from lowmem_compile.optim.distributed import average_gradients, projected_allreduce
from lowmem_compile.optim.fira import Fira
from lowmem_compile.optim.flora import Flora
from lowmem_compile.optim.galore import GaLore
from lowmem_compile.optim.report import OptimizerReport, Row, report
from lowmem_compile.optim.split import Split, split

__all__ = [
    "APOLLO",
    "COAP",
    "Addax",
    "AddaxStep",
    "Fira",
    "Flora",
    "GaLore",
    "LengthPartition",
    "LowRankOptimizer",
    "OptimizerReport",
    "Row",
    "Split",
    "average_gradients",
    "projected_allreduce",
    "report",
    "split",
]
