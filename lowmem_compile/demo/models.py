"""The models of the demonstration and the benchmarks.

Pretrained weights come out of installed packages; the other models have their real shape and random weights.
Dropout is off unless it is asked for, so that gradients can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lowmem_compile.demo import data, weights
from lowmem_compile.demo.data import Batch
from lowmem_compile.demo.packages import quiet, require
from lowmem_compile.demo.workload import (
    MODES,
    PRECISIONS,
    Mode,
    ModelSpec,
    Precision,
    Workload,
    add_lora,
    contrastive_loss,
    one_of,
)

_LLAMA_LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
_VISION_LINEARS = "q_proj|k_proj|v_proj|o_proj|fc1|fc2"


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
    one_of("model", name, MODELS)
    one_of("precision", precision, PRECISIONS)
    one_of("mode", mode, MODES)
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
        whole_layers=spec.whole_layers if layers else None,
    )


def _random(model_class: str, config_class: str, cut: Callable[[int], dict[str, Any]], **settings: Any) -> Any:
    """A builder of a model with random weights; ``cut`` gives the settings of a model of so many layers."""

    def build(*, layers: int | None, keep_dropout: bool) -> nn.Module:
        transformers = require("transformers")
        config = getattr(transformers, config_class)(**settings, **(cut(layers) if layers is not None else {}))
        if not keep_dropout:
            weights.without_dropout(config)
        with quiet():
            model: nn.Module = getattr(transformers, model_class)(config)
        return model

    return build


def _blocks(layers: int) -> dict[str, Any]:
    return {"num_hidden_layers": layers}


def _swin_stages(layers: int) -> dict[str, Any]:
    """Swin-T cut to its first stages of two blocks each."""
    return {"depths": [2] * layers, "num_heads": [3, 6, 12, 24][:layers]}


def _images(*, rows: int, length: int, count: int) -> list[Batch]:
    return data.digit_batches(rows=rows, size=length, count=count)


def _byte_lm(*, rows: int, length: int, count: int) -> list[Batch]:
    return data.causal_lm_batches(data.ByteTokenizer(), rows=rows, length=length, count=count)


def _small_decoder(title: str, family: str, activation: str, **settings: Any) -> ModelSpec:
    shape = {
        "vocab_size": 256,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "use_cache": False,
    }
    return ModelSpec(
        title=title,
        activation=activation,
        pretrained=False,
        build=_random(f"{family}ForCausalLM", f"{family}Config", _blocks, **(shape | settings)),
        batches=_byte_lm,
        query_value="q_proj|v_proj",
        linears=_LLAMA_LINEARS,
        rows=4,
        length=256,
        layers=4,
    )


MODELS: Mapping[str, ModelSpec] = {
    "minilm": ModelSpec(
        title="MiniLM",
        activation="GELU",
        pretrained=True,
        build=weights.minilm,
        whole_layers=6,
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
        whole_layers=30,
    ),
    "albert": ModelSpec(
        title="ALBERT (reactions)",
        activation="GELU",
        pretrained=True,
        build=weights.albert,
        whole_layers=12,
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
        whole_layers=12,
        batches=_images,
        query_value="q_proj|v_proj",
        linears=_VISION_LINEARS,
        rows=4,
        length=224,
        layers=8,
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
            _blocks,
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
        build=_random("ViTForImageClassification", "ViTConfig", _blocks, num_labels=10),
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
        build=_random("SwinForImageClassification", "SwinConfig", _swin_stages, num_labels=10),
        batches=_images,
        query_value="q_proj|v_proj",
        linears=_VISION_LINEARS,
        rows=2,
        length=224,
        head="classifier",
        tokens_per_row=3136,
        unit_share=1 / 8,
        layers=4,
    ),
    "llama": _small_decoder("LLaMA, small", "Llama", "SwiGLU"),
    "qwen3": _small_decoder("Qwen3, small", "Qwen3", "SwiGLU"),
    "gemma": _small_decoder("Gemma, small", "Gemma", "GeGLU"),
}
