"""Bytes that are there at every moment of training: weights, and optimizer state; and the gradients.

Known from the parameters' shapes alone, of the whole model on the meta device. State of an optimizer, for a parameter of n
elements of s bytes:

    sgd            0
    momentum       n·s
    adamw          2·n·s                     fused: no scratch memory
    adamw-foreach  2·n·s                     a step takes n·s more
    adamw-8bit     2·n + 8·ceil(n/256)       bitsandbytes; 8·n below 4096 elements
    coap ...       lowmem_compile.optim.report
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowmem_compile import optim
from lowmem_compile.errors import OptionError
from lowmem_compile.optim.report import report as optimizer_report

LOW_RANK: dict[str, Any] = {
    "coap": optim.COAP,
    "galore": optim.GaLore,
    "fira": optim.Fira,
    "flora": optim.Flora,
    "apollo": optim.APOLLO,
}


def _eight_bit(numel: int, _size: int) -> int:
    return 8 * numel if numel < 4096 else 2 * numel + 8 * -(-numel // 256)


PLAIN: dict[str, Callable[[int, int], int]] = {
    "none": lambda _numel, _size: 0,
    "sgd": lambda _numel, _size: 0,
    "momentum": lambda numel, size: numel * size,
    "adamw": lambda numel, size: 2 * numel * size,
    "adamw-foreach": lambda numel, size: 2 * numel * size,
    "adamw-8bit": _eight_bit,
}
OPTIMIZERS = (*PLAIN, *LOW_RANK)


@dataclass(frozen=True)
class OptimizerSpec:
    """The optimizer of a plan.

    Attributes:
        name: one of :data:`OPTIMIZERS`.
        rank: of the low-rank ones.
        options: further options of a low-rank optimizer, such as ``{"bits": 8}``.
        include: patterns of the names of the weights to project; all linears of the repeated layers if empty.
    """

    name: str = "adamw"
    rank: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    include: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise OptionError(f"--optimizer {self.name!r} must be one of {', '.join(OPTIMIZERS)}")
        if self.name in LOW_RANK and self.rank is None:
            raise OptionError(f"--optimizer {self.name} needs --rank, such as a quarter of the hidden size")
        if self.name not in LOW_RANK and (self.rank is not None or self.options or self.include):
            raise OptionError(f"--rank, --bits and --include are for {', '.join(LOW_RANK)}, not for --optimizer {self.name}")

    def __str__(self) -> str:
        more = [f"rank {self.rank}"] if self.rank is not None else []
        more += [f"{key} {value}" for key, value in self.options.items()]
        return self.name + (f" ({', '.join(more)})" if more else "")


@dataclass(frozen=True)
class Fixed:
    """Bytes.

    Attributes:
        parameters: how many numbers the model has.
        trained: how many of them are trained.
        weights: parameters and buffers.
        gradients: of the trained parameters.
        state: of the optimizer.
        adamw: what AdamW's two moments would take in the parameters' dtypes.
        scratch: what an optimizer step takes for its own time.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    state: int
    adamw: int
    scratch: int


def fixed_bytes(model: nn.Module, stack: str | None, spec: OptimizerSpec) -> Fixed:
    """Weights, gradients and optimizer state of a model, which may lie on the meta device.

    Args:
        model: in the dtype that it is trained in.
        stack: name of the list of repeated layers, whose linears a low-rank optimizer projects.
        spec: the optimizer.

    Raises:
        OptionError: a low-rank optimizer finds nothing to project.
    """
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    if spec.name in PLAIN:
        state = sum(PLAIN[spec.name](p.numel(), p.element_size()) for p in trained)
    else:
        state = _low_rank(model, stack, spec)
    return Fixed(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        weights=sum(t.numel() * t.element_size() for t in (*parameters, *model.buffers())),
        gradients=gradients,
        state=state,
        adamw=2 * gradients,
        scratch=gradients if spec.name == "adamw-foreach" else 0,
    )


def _low_rank(model: nn.Module, stack: str | None, spec: OptimizerSpec) -> int:
    include: Sequence[str] = spec.include or ((f"{stack}.*",) if stack else ("*",))
    groups = optim.split(model, rank=spec.rank, include=include).groups
    return optimizer_report(LOW_RANK[spec.name](groups, lr=1e-3, **spec.options)).state_bytes


def in_dtype(model: nn.Module, precision: str) -> nn.Module:
    """The model in the dtype of its weights under a precision."""
    return model.to(torch.bfloat16) if precision == "bf16" else model
