"""A :class:`Workload`: a model with its data and its loss, in one precision and one way of fine-tuning.

Precisions: ``"bf16"`` (weights and adapters in bfloat16), ``"autocast"`` (float32 weights, ``torch.autocast``
to bfloat16) and ``"fp32"``. Modes: ``"full"`` fine-tuning, LoRA on the query and value projections (``"qv"``)
or on all linears of the blocks (``"all"``), rank 8, no dropout.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.demo.data import Batch
from lowmem_compile.demo.packages import quiet, require
from lowmem_compile.errors import LowMemError

Precision = Literal["bf16", "autocast", "fp32"]
Mode = Literal["full", "qv", "all"]
Name = TypeVar("Name", bound=str)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
MODES: tuple[Mode, ...] = get_args(Mode)


def own_loss(output: Any, _batch: Batch) -> Tensor:
    """The loss that a Hugging Face model computes from its labels."""
    loss = output.loss
    assert isinstance(loss, Tensor)
    return loss


def contrastive_loss(output: Any, batch: Batch) -> Tensor:
    """Cross-entropy over cosine similarities of mean-pooled pairs (temperature 0.05), in float32."""
    mask = batch["attention_mask"].unsqueeze(-1).float()
    pooled = (output.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
    first, second = F.normalize(pooled, dim=-1).chunk(2)
    return F.cross_entropy(20 * first @ second.T, torch.arange(len(first)))


@dataclass(frozen=True)
class ModelSpec:
    """One model: how to build it, its data, and which linears LoRA adapts.

    ``layers``, ``rows`` and ``length`` are the defaults of the benchmarks; ``layers=None`` is the whole
    model. ``length`` is tokens a row, or the side of an image in pixels. ``query_value``, ``linears`` and
    ``head`` are regular expressions over module names; the head, if any, is trained in full under LoRA.
    ``tokens_per_row`` overrides ``length`` in counting tokens, ``unit_share`` is the size of the smallest
    hidden states over that of the first.
    """

    title: str
    activation: str
    pretrained: bool
    build: Callable[..., nn.Module]
    batches: Callable[..., list[Batch]]
    query_value: str
    linears: str
    rows: int
    length: int
    layers: int | None = None
    head: str | None = None
    tokens_per_row: int | None = None
    unit_share: float = 1.0
    whole_layers: int | None = None
    loss: Callable[[Any, Batch], Tensor] = own_loss


@dataclass
class Workload:
    """A model in training mode, its batches (all of one shape) and its loss.

    ``unit_bytes``: the model's smallest hidden states [tokens, hidden], in bfloat16. ``whole_layers``: the
    blocks of a pretrained model before it was cut, if it was.
    """

    name: str
    title: str
    model: nn.Module
    batches: tuple[Batch, ...]
    loss_fn: Callable[[Any, Batch], Tensor]
    precision: Precision
    mode: Mode
    activation: str
    tokens: int
    pretrained: bool
    unit_bytes: int
    whole_layers: int | None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision's context for a forward pass."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "autocast")

    def forward(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss, and the output that variants are compared on, of ``model``, which may be compiled."""
        with self.autocast():
            output = model(**batch)
            return self.loss_fn(output, batch), _main_output(output)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}


def add_lora(model: nn.Module, targets: str, *, head: str | None = None, rank: int = 8) -> nn.Module:
    """PEFT LoRA of ``rank`` on the linears whose name matches ``targets``; no dropout, alpha = rank.

    B starts at N(0, 0.01²) in place of 0: with B = 0 the gradient of A is 0 and could not be compared.
    """
    peft = require("peft")
    with quiet():
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=rf".*\.({targets})", lora_dropout=0.0)
        adapted: nn.Module = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
        if head is not None and re.search(rf"\b({head})\b", name):
            parameter.requires_grad_(True)
    return adapted


def _main_output(output: Any) -> Tensor:
    value = getattr(output, "logits", None)
    value = output.last_hidden_state if value is None else value
    assert isinstance(value, Tensor)
    return value


def one_of(what: str, value: str, valid: Iterable[Name]) -> Name:
    """``value``, typed as one of ``valid``.

    Raises:
        LowMemError: it is none of them; they are listed.
    """
    for name in valid:
        if name == value:
            return name
    raise LowMemError(f"unknown {what} {value!r}; the valid ones are {', '.join(valid)}")
