"""The models of the demonstration and the benchmarks, each with its data and its loss: a :class:`Workload`.

Precisions: ``"bf16"`` (weights and adapters in bfloat16), ``"autocast"`` (float32 weights, ``torch.autocast``
to bfloat16) and ``"fp32"``. Modes: ``"full"`` fine-tuning, LoRA on the query and value projections (``"qv"``)
or on all linears of the blocks (``"all"``), rank 8, no dropout. Dropout of the models is off unless it is
asked for, so that gradients can be compared.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.demo import data, weights
from lowmem_compile.demo.data import Batch
from lowmem_compile.demo.packages import quiet, require
from lowmem_compile.errors import LowMemError

Precision = Literal["bf16", "autocast", "fp32"]
Mode = Literal["full", "qv", "all"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
MODES: tuple[Mode, ...] = get_args(Mode)

_LLAMA_LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
_VISION_LINEARS = "q_proj|k_proj|v_proj|o_proj|fc1|fc2"


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
    loss: Callable[[Any, Batch], Tensor] = own_loss


@dataclass
class Workload:
    """A model in training mode, its batches (all of one shape) and its loss.

    ``unit_bytes``: the model's smallest hidden states [tokens, hidden], in bfloat16.
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


def load(
    name: str,
    *,
    precision: Precision = "bf16",
    mode: Mode = "full",
    layers: int | None = None,
    rows: int | None = None,
    length: int | None = None,
    batches: int = 1,
    keep_dropout: bool = False,
) -> Workload:
    """Build a model with its data.

    Args:
        name: a key of :data:`MODELS`.
        precision: see the module.
        mode: see the module.
        layers: how many blocks; the spec's default where None, the whole model where 0.
        rows: sequences or images in a batch; the spec's default where None.
        length: tokens a sequence, or pixels a side.
        batches: how many batches.
        keep_dropout: leave the model's dropout rates as they are.

    Raises:
        LowMemError: an unknown model, precision or mode (the valid ones are listed).
        MissingPackageError: a package is not installed.
    """
    _check("model", name, MODELS)
    _check("precision", precision, PRECISIONS)
    _check("mode", mode, MODES)
    spec = MODELS[name]
    rows, length = rows or spec.rows, length or spec.length
    layers = spec.layers if layers is None else layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spec.build(layers=layers or None, keep_dropout=keep_dropout)
        if mode != "full":
            model = add_lora(model, spec.query_value if mode == "qv" else spec.linears, head=spec.head)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    made = spec.batches(rows=rows, length=length, count=batches)
    config: Any = model.config
    width = getattr(config, "embed_dim", None) or config.hidden_size
    tokens = rows * (spec.tokens_per_row or length)
    return Workload(
        name=name,
        title=spec.title,
        model=model.to(dtype).train(),
        batches=tuple({k: v.to(dtype) if v.is_floating_point() else v for k, v in b.items()} for b in made),
        loss_fn=spec.loss,
        precision=precision,
        mode=mode,
        activation=spec.activation,
        tokens=tokens,
        pretrained=spec.pretrained,
        unit_bytes=int(2 * tokens * width * spec.unit_share),
    )


def add_lora(model: nn.Module, targets: str, *, head: str | None = None, rank: int = 8) -> nn.Module:
    """PEFT LoRA of ``rank`` on the linears whose name matches ``targets``; no dropout, alpha = rank.

    B starts at N(0, 0.01²) in place of 0: with B = 0 the gradient of A is 0 and could not be compared.
    """
    peft = require("peft")
    with quiet():
        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=rf".*\.({targets})", lora_dropout=0.0
        )
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


def _random(
    model_class: str, config_class: str, layers_key: str = "num_hidden_layers", **settings: Any
) -> Any:
    """A builder of a model with random weights."""

    def build(*, layers: int | None, keep_dropout: bool) -> nn.Module:
        transformers = require("transformers")
        config = getattr(transformers, config_class)(**settings)
        if layers is not None:
            setattr(config, layers_key, layers)
        if not keep_dropout:
            weights.without_dropout(config)
        with quiet():
            model: nn.Module = getattr(transformers, model_class)(config)
        return model

    return build


def _images(*, rows: int, length: int, count: int) -> list[Batch]:
    return data.digit_batches(rows=rows, size=length, count=count)


def _byte_lm(*, rows: int, length: int, count: int) -> list[Batch]:
    return data.causal_lm_batches(data.ByteTokenizer(), rows=rows, length=length, count=count)


def _small_decoder(title: str, family: str, activation: str, **settings: Any) -> ModelSpec:
    shape = {
        "vocab_size": 256,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "use_cache": False,
    }
    return ModelSpec(
        title=title,
        activation=activation,
        pretrained=False,
        build=_random(f"{family}ForCausalLM", f"{family}Config", **(shape | settings)),
        batches=_byte_lm,
        query_value="q_proj|v_proj",
        linears=_LLAMA_LINEARS,
        rows=4,
        length=256,
    )


MODELS: Mapping[str, ModelSpec] = {
    "minilm": ModelSpec(
        title="MiniLM",
        activation="GELU",
        pretrained=True,
        build=weights.minilm,
        batches=lambda **size: data.text_pair_batches(weights.minilm_tokenizer(), **size),
        query_value="query|value",
        linears="query|key|value|dense",
        rows=16,
        length=128,
        loss=contrastive_loss,
    ),
    "smollm2": ModelSpec(
        title="SmolLM2-135M",
        activation="SwiGLU",
        pretrained=True,
        build=weights.smollm2,
        batches=lambda **size: data.causal_lm_batches(weights.smollm2_tokenizer(), **size),
        query_value="q_proj|v_proj",
        linears=_LLAMA_LINEARS,
        rows=4,
        length=256,
        layers=6,
    ),
    "albert": ModelSpec(
        title="ALBERT (reactions)",
        activation="GELU",
        pretrained=True,
        build=weights.albert,
        batches=lambda **size: data.masked_smiles_batches(weights.albert_vocabulary(), **size),
        query_value="query|value",
        linears="query|key|value|attention.dense|ffn|ffn_output",
        rows=8,
        length=128,
    ),
    "dinov2": ModelSpec(
        title="DINOv2 ViT-S/14",
        activation="GELU",
        pretrained=True,
        build=weights.dinov2,
        batches=_images,
        query_value="q_proj|v_proj",
        linears=_VISION_LINEARS,
        rows=4,
        length=224,
        layers=4,
        head="classifier",
        tokens_per_row=257,
    ),
    "roberta": ModelSpec(
        title="RoBERTa-base shape",
        activation="GELU",
        pretrained=False,
        build=_random(
            "RobertaForSequenceClassification",
            "RobertaConfig",
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        ),
        batches=lambda **size: data.classified_text_batches(data.ByteTokenizer(), **size),
        query_value="query|value",
        linears="query|key|value|(attention.output|intermediate|output).dense",
        rows=8,
        length=128,
        layers=4,
        head="classifier",
    ),
    "vit": ModelSpec(
        title="ViT-B/16 shape",
        activation="GELU",
        pretrained=False,
        build=_random("ViTForImageClassification", "ViTConfig", num_labels=10),
        batches=_images,
        query_value="q_proj|v_proj",
        linears=_VISION_LINEARS,
        rows=6,
        length=224,
        layers=4,
        head="classifier",
        tokens_per_row=197,
    ),
    "swin": ModelSpec(
        title="Swin-T shape",
        activation="GELU",
        pretrained=False,
        build=_random("SwinForImageClassification", "SwinConfig", depths=[2, 2, 2, 2], num_labels=10),
        batches=_images,
        query_value="q_proj|v_proj",
        linears=_VISION_LINEARS,
        rows=2,
        length=224,
        head="classifier",
        tokens_per_row=3136,
        unit_share=1 / 8,
    ),
    "llama": _small_decoder("LLaMA, small", "Llama", "SwiGLU"),
    "qwen3": _small_decoder("Qwen3, small", "Qwen3", "SwiGLU"),
    "gemma": _small_decoder("Gemma, small", "Gemma", "GeGLU"),
}


def _check(what: str, value: str, valid: Any) -> None:
    if value not in valid:
        raise LowMemError(f"unknown {what} {value!r}; the valid ones are {', '.join(valid)}")
