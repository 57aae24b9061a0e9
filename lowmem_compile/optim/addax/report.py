"""What Addax holds for each parameter, in bytes, known before the first step; after one, which parts of it moved the parameter.

For a parameter of n elements of e bytes:

    state       0                       AdamW: 2·n·e
    gradient    n·e while its update is made, then 0; that of all parameters together never exists
    direction   4·b for one block of b elements of z (:mod:`lowmem_compile.optim.addax.noise`); AdamW has none

Parameters may lie on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowmem_compile.optim.addax.noise import block_rows, rows_of
from lowmem_compile.reporting.units import format_bytes, format_shape, plural, visible

FLOAT32 = 4


@dataclass(frozen=True)
class AddaxRow:
    """One parameter.

    Attributes:
        name: of the parameter, or its place.
        shape: of the parameter.
        dtype: of the parameter, as in "bfloat16".
        trained: whether it needs a gradient; others are left alone.
        first_order: whether a gradient moved it in the last step; ``None`` before the first step.
        zeroth_order: whether z moved it in the last step; ``None`` before the first step.
        block_bytes: of the block of z that is drawn at once, float32; 0 where alpha is 0.
        gradient_bytes: of its gradient, which lives until its own update; 0 where alpha is 1.
        adamw_bytes: of AdamW's two moments in the parameter's dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    first_order: bool | None
    zeroth_order: bool | None
    block_bytes: int
    gradient_bytes: int
    adamw_bytes: int

    def __str__(self) -> str:
        head = f"{self.name}  {format_shape(self.shape)} {self.dtype}"
        if not self.trained:
            return visible(f"{head}  frozen")
        last = ""
        if self.first_order is not None:
            parts = [word for word, moved in (("its gradient", self.first_order), ("z", self.zeroth_order)) if moved]
            last = f"; last step by {' and '.join(parts) or 'nothing'}"
        sizes = f"gradient {format_bytes(self.gradient_bytes)} for a moment, z {format_bytes(self.block_bytes)} at once"
        return visible(f"{head}  state 0, {sizes}{last}")


@dataclass(frozen=True)
class AddaxReport:
    """The rows of all parameters.

    Attributes:
        alpha: weight of the zeroth-order part.
        rows: in the optimizer's order.
    """

    alpha: float
    rows: tuple[AddaxRow, ...]

    @property
    def trained(self) -> tuple[AddaxRow, ...]:
        """Those that are trained."""
        return tuple(row for row in self.rows if row.trained)

    @property
    def largest_gradient(self) -> int:
        """Bytes of the largest gradient: the most that one update inside the backward pass needs."""
        return max((row.gradient_bytes for row in self.trained), default=0)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients, which never exist together."""
        return sum(row.gradient_bytes for row in self.trained)

    @property
    def adamw_bytes(self) -> int:
        """Bytes that AdamW's moments would take."""
        return sum(row.adamw_bytes for row in self.trained)

    def __str__(self) -> str:
        head = (
            f"Addax, alpha {self.alpha:g}: {plural(len(self.trained), 'parameter')} trained; state 0, AdamW's would be "
            f"{format_bytes(self.adamw_bytes)}; largest gradient {format_bytes(self.largest_gradient)}, "
            f"all would be {format_bytes(self.gradient_bytes)}"
        )
        return "\n".join([head, *(f"  {row}" for row in self.rows)])


def block_bytes(p: Tensor) -> int:
    """Bytes of a block of z, float32; the last block may be shorter, and a parameter of one block has all of it in that."""
    p = rows_of(p)
    return FLOAT32 * min(block_rows(p), p.shape[0]) * p.shape[1:].numel()
