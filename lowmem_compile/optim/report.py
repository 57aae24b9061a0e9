"""What an optimizer does with each parameter, and how many bytes that takes: known before the first step.

    bytes of state    the slots of the method, the projector on the first parameter of those that share it
    bytes of gradient what ``param.grad`` takes, and what the projected gradient takes in the parameter's dtype

In elements for a weight O x I with rank r (section "Bytes" of each method's page says the same for the method):

    right    I·r + 2·O·r      GaLore, COAP; Fira one number more; without I·r where the projector comes from a seed
    left     O·r + 2·I·r

Parameters may lie on the meta device, so a model can be sized without memory for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lowmem_compile.optim.base import LowRankOptimizer
from lowmem_compile.reporting.units import format_bytes, format_change, format_shape, plural, visible


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        name: of the parameter, or its place.
        shape: of the parameter.
        dtype: of the parameter, as in "bfloat16".
        side: "right", "left", "both", "out"; empty if not projected.
        ranks: one a projected mode; empty if not projected.
        reason: why it is not projected; empty if it is.
        shared_with: the parameter that holds its projector, if another does.
        state_bytes: bytes of its optimizer state.
        gradient_bytes: bytes of its whole gradient.
        projected_bytes: bytes of its projected gradient; of the whole one if it is not projected.
        adamw_bytes: bytes of AdamW's two moments in the parameter's dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    side: str
    ranks: tuple[int, ...]
    reason: str
    shared_with: str
    state_bytes: int
    gradient_bytes: int
    projected_bytes: int
    adamw_bytes: int

    def __str__(self) -> str:
        what = f"{self.side}, rank {'x'.join(map(str, self.ranks))}" if self.ranks else f"not projected: {self.reason}"
        shared = f", projector of {self.shared_with}" if self.shared_with else ""
        gradient = format_bytes(self.gradient_bytes)
        if self.ranks:
            gradient += f" ({format_bytes(self.projected_bytes)} projected)"
        line = f"{self.name}  {format_shape(self.shape)} {self.dtype}  {what}{shared}"
        return visible(f"{line}  state {format_bytes(self.state_bytes)}, gradient {gradient}")


@dataclass(frozen=True)
class OptimizerReport:
    """The rows of all parameters, and their sums.

    Attributes:
        method: name of the optimizer.
        rows: in the optimizer's order.
    """

    method: str
    rows: tuple[Row, ...]

    @property
    def projected(self) -> tuple[Row, ...]:
        """The projected parameters."""
        return tuple(row for row in self.rows if row.ranks)

    @property
    def unprojected(self) -> tuple[Row, ...]:
        """The others."""
        return tuple(row for row in self.rows if not row.ranks)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        """Bytes that AdamW's moments would take in the parameters' dtypes."""
        return sum(row.adamw_bytes for row in self.rows)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all whole gradients."""
        return sum(row.gradient_bytes for row in self.rows)

    @property
    def projected_bytes(self) -> int:
        """Bytes of all gradients, projected where they are."""
        return sum(row.projected_bytes for row in self.rows)

    def __str__(self) -> str:
        change = format_change(self.state_bytes, self.adamw_bytes)
        adamw = format_bytes(self.adamw_bytes) + (f" ({change})" if change else "")
        counts = f"{len(self.projected)} of {plural(len(self.rows), 'parameter')} projected"
        head = f"{self.method}: {counts}; state {format_bytes(self.state_bytes)}, AdamW's would be {adamw}"
        return "\n".join([head, *(f"  {row}" for row in self.rows)])


def report(optimizer: LowRankOptimizer) -> OptimizerReport:
    """The report of an optimizer: which parameters are projected and which are not and why, sides, ranks and bytes."""
    return OptimizerReport(type(optimizer).__name__, tuple(_rows(optimizer)))


def _rows(optimizer: LowRankOptimizer) -> Iterable[Row]:
    for _, unit in optimizer.units():
        plan = None if isinstance(unit.plan, str) else unit.plan
        for place, (p, name) in enumerate(zip(unit.params, unit.names, strict=True)):
            shape, size = tuple(p.shape), p.dtype.itemsize
            yield Row(
                name=name,
                shape=shape,
                dtype=str(p.dtype).removeprefix("torch."),
                side="" if plan is None else plan.side,
                ranks=() if plan is None else plan.ranks,
                reason=unit.plan if isinstance(unit.plan, str) else "",
                shared_with=unit.names[0] if place else "",
                state_bytes=optimizer.state_bytes(p),
                gradient_bytes=p.numel() * size,
                projected_bytes=(p.numel() if plan is None else math.prod(plan.low_shape(shape))) * size,
                adamw_bytes=2 * p.numel() * size,
            )
