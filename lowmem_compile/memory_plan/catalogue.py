"""Well-known models as ``transformers`` configurations with the published numbers; no weights, nothing is downloaded.

llama-60m to llama-7b are the pre-training shapes of GaLore (arXiv:2403.03507, table 5), which Fira and COAP use too; positions
as in LLaMA 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Known:
    """A model: its configuration, its class, and a batch that is usual for it.

    Attributes:
        config: name of the configuration class in ``transformers``.
        model: name of the model class.
        settings: fields of the configuration that differ from its defaults.
        batch: rows.
        sequence: tokens a row; ``None`` for images.
    """

    config: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1
    sequence: int | None = 2048


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> Known:
    shape = {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 4096,
    }
    return Known("LlamaConfig", "LlamaForCausalLM", {**shape, **more})


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool) -> Known:
    return Known(
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": tied,
        },
    )


def _vit(hidden: int, layers: int, heads: int, patch: int = 16) -> Known:
    return Known(
        "ViTConfig",
        "ViTForImageClassification",
        {
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "patch_size": patch,
            "num_labels": 1000,
        },
        batch=32,
        sequence=None,
    )


def _bert(hidden: int, layers: int, heads: int) -> Known:
    shape = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return Known("BertConfig", "BertForMaskedLM", shape, batch=16, sequence=512)


def _gpt2(hidden: int, layers: int, heads: int) -> Known:
    return Known("GPT2Config", "GPT2LMHeadModel", {"n_embd": hidden, "n_layer": layers, "n_head": heads}, batch=4, sequence=1024)


KNOWN: Mapping[str, Known] = {
    "llama-60m": _llama(512, 1376, 8, 8),
    "llama-130m": _llama(768, 2048, 12, 12),
    "llama-350m": _llama(1024, 2736, 24, 16),
    "llama-1b": _llama(2048, 5461, 24, 32),
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama3-8b": _llama(4096, 14336, 32, 32, vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192),
    "mistral-7b": Known(
        "MistralConfig",
        "MistralForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": None,
        },
    ),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "bert-base": _bert(768, 12, 12),
    "bert-large": _bert(1024, 24, 16),
    "vit-b": _vit(768, 12, 12),
    "vit-l": _vit(1024, 24, 16),
    "vit-h": _vit(1280, 32, 16, patch=14),
}
