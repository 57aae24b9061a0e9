"""What a model under LoQT holds, in bytes, known before the first step.

For a weight with the dimensions m <= n (the shorter and the longer side; P on the side of m), rank r, element size e:

    weights      nf4(m·n) of W_q + nf4(m·r) of P + e·n·r of B        nf4(k) = 36·ceil(k/64): 4.5 bits a value
    gradients    e·n·r
    states       two moments of B: 2·e·n·r, or 2·(n·r + 4·ceil(n·r/256)) in 8 bits

against e·m·n of weights and of gradients and 2·e·m·n of states for AdamW on the whole weight. With ``side="input"`` m is the
input side. Parameters may lie on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lowmem_compile.errors import OptionError
from lowmem_compile.optim.loqt.linear import FULL, PROJECTOR, TABLES, WEIGHT, LoQTLinear
from lowmem_compile.optim.moments import adam_slots
from lowmem_compile.optim.settings import BITS, COMMON
from lowmem_compile.optim.slots import total_bytes
from lowmem_compile.reporting.units import format_bytes, format_change, format_shape, plural, visible


@dataclass(frozen=True)
class LayerRow:
    """One LoQT layer.

    Attributes:
        name: of the layer.
        shape: of its weight.
        dtype: of B, as in "bfloat16".
        side: of P.
        rank: r.
        merged: whether it is in this form already; until its first merge it holds the whole weight.
        weight_bytes: of W_q, codes and scales.
        projector_bytes: of P.
        factor_bytes: of B.
        gradient_bytes: of the gradient of B.
        state_bytes: of Adam's two moments of B.
        whole_bytes: of the whole weight in B's dtype.
        whole_state_bytes: of Adam's two moments of the whole weight, stored alike.
        kept_per_token: elements that backward keeps of each token for the gradient of B: r, or all inputs.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    side: str
    rank: int
    merged: bool
    weight_bytes: int
    projector_bytes: int
    factor_bytes: int
    gradient_bytes: int
    state_bytes: int
    whole_bytes: int
    whole_state_bytes: int
    kept_per_token: int

    @property
    def held_bytes(self) -> int:
        """Weights: W_q, P and B."""
        return self.weight_bytes + self.projector_bytes + self.factor_bytes

    def __str__(self) -> str:
        parts = f"weight {format_bytes(self.weight_bytes)}, P {format_bytes(self.projector_bytes)}"
        trained = f"B {format_bytes(self.factor_bytes)}, gradient {format_bytes(self.gradient_bytes)}"
        text = f"{self.name}  {format_shape(self.shape)} {self.dtype}  {self.side}, rank {self.rank}  {parts}, {trained}, "
        waiting = "" if self.merged else "; whole until its first merge"
        return visible(f"{text}state {format_bytes(self.state_bytes)} (whole weight {format_bytes(self.whole_bytes)}{waiting})")


@dataclass(frozen=True)
class LoQTReport:
    """The rows of all layers, and their sums with the rest of the model.

    Attributes:
        rows: the LoQT layers in the model's order.
        left_out: the reason for each linear that was not converted.
        rest_bytes: other parameters and buffers, frozen ones included.
        rest_gradient_bytes: gradients of the other trained parameters.
        rest_state_bytes: Adam's moments of them.
        largest_gradient_bytes: of one parameter: all that per-layer updates hold in eager mode.
    """

    rows: tuple[LayerRow, ...]
    left_out: Mapping[str, str]
    rest_bytes: int
    rest_gradient_bytes: int
    rest_state_bytes: int
    largest_gradient_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Weights of the whole model."""
        return self.rest_bytes + sum(row.held_bytes for row in self.rows)

    @property
    def gradient_bytes(self) -> int:
        """Gradients of the whole model, without per-layer updates."""
        return self.rest_gradient_bytes + sum(row.gradient_bytes for row in self.rows)

    @property
    def state_bytes(self) -> int:
        """Adam's moments of the whole model."""
        return self.rest_state_bytes + sum(row.state_bytes for row in self.rows)

    @property
    def total_bytes(self) -> int:
        """Weights, gradients and moments."""
        return self.weight_bytes + self.gradient_bytes + self.state_bytes

    @property
    def per_layer_bytes(self) -> int:
        """The same with per-layer updates in eager mode, which hold one gradient at a time."""
        return self.weight_bytes + self.largest_gradient_bytes + self.state_bytes

    @property
    def adamw_bytes(self) -> int:
        """The same for AdamW on the whole model, with moments stored alike."""
        rest = self.rest_bytes + self.rest_gradient_bytes + self.rest_state_bytes
        return rest + sum(2 * row.whole_bytes + row.whole_state_bytes for row in self.rows)

    def __str__(self) -> str:
        change = format_change(self.total_bytes, self.adamw_bytes)
        sums = f"weights {format_bytes(self.weight_bytes)}, gradients {format_bytes(self.gradient_bytes)}"
        head = f"LoQT: {plural(len(self.rows), 'layer')}; {sums}, state {format_bytes(self.state_bytes)}; together "
        head += f"{format_bytes(self.total_bytes)}, AdamW's would be {format_bytes(self.adamw_bytes)} ({change})"
        rest = f"  other parameters {format_bytes(self.rest_bytes)}, gradients {format_bytes(self.rest_gradient_bytes)}, "
        rest += f"state {format_bytes(self.rest_state_bytes)}"
        kept = [visible(f"  {name}: not converted, {reason}") for name, reason in self.left_out.items()]
        return "\n".join([head, *(f"  {row}" for row in self.rows), rest, *kept])


def report_of(model: nn.Module, layers: Mapping[str, LoQTLinear], left_out: Mapping[str, str], bits: int | None) -> LoQTReport:
    """See the module.

    Raises:
        OptionError: ``bits`` is not ``None``, 8 or 32.
    """
    if bits not in BITS:
        raise OptionError(f"report: bits={bits!r}; moments are stored in the parameter's dtype (None), 8 or 32 bits.")
    ours = {id(t) for layer in layers.values() for t in (layer.B, *_weight_buffers(layer))}
    rest = {id(p): p for p in model.parameters() if id(p) not in ours}
    buffers = {id(b): b for name, b in model.named_buffers() if id(b) not in ours and f"{TABLES}_" not in name}
    trained = [p for p in rest.values() if p.requires_grad]
    rows = tuple(_row(name, layer, bits) for name, layer in layers.items())
    return LoQTReport(
        rows=rows,
        left_out=dict(left_out),
        rest_bytes=sum(t.nbytes for t in (*rest.values(), *buffers.values())),
        rest_gradient_bytes=sum(p.nbytes for p in trained),
        rest_state_bytes=sum(_adam_bytes(p, tuple(p.shape), bits) for p in trained),
        largest_gradient_bytes=max([p.nbytes for p in trained] + [row.gradient_bytes for row in rows]),
    )


def _row(name: str, layer: LoQTLinear, bits: int | None) -> LayerRow:
    B, shape = layer.B, (layer.out_features, layer.in_features)
    return LayerRow(
        name=name,
        shape=shape,
        dtype=str(B.dtype).removeprefix("torch."),
        side=layer.side,
        rank=layer.rank,
        merged=layer.merged,
        weight_bytes=layer.formats[WEIGHT].nbytes,
        projector_bytes=layer.formats[PROJECTOR].nbytes,
        factor_bytes=B.nbytes,
        gradient_bytes=B.nbytes,
        state_bytes=_adam_bytes(B, tuple(B.shape), bits),
        whole_bytes=math.prod(shape) * B.element_size(),
        whole_state_bytes=_adam_bytes(B, shape, bits),
        kept_per_token=layer.rank if layer.side == "right" else layer.in_features,
    )


def _adam_bytes(p: Tensor, shape: tuple[int, ...], bits: int | None) -> int:
    return total_bytes(adam_slots(shape, p.dtype, {**COMMON, "bits": bits}))


def _weight_buffers(layer: LoQTLinear) -> list[Tensor]:
    names = (FULL, f"{WEIGHT}_", f"{PROJECTOR}_")
    return [b for name, b in layer.named_buffers() if name.startswith(names)]
