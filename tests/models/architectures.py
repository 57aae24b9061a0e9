"""Tiny models of Hugging Face architectures with random weights, and what lowmem has to recognise in each.

The counts are worked out from the architecture, with two layers (or two encoder and two decoder layers)
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 64
_CORE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_DECODER: dict[str, Any] = {
    **_CORE, **_TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 32, "attention_dropout": 0.0,
    "use_cache": False,
}  # fmt: skip
_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER: dict[str, Any] = {**_CORE, **_NO_DROPOUT, "max_position_embeddings": 32, "pad_token_id": 0}
_BUCKETS: dict[str, Any] = {"position_buckets": 8, "norm_rel_ebd": "layer_norm"}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0,
    "use_cache": False,
    "decoder_start_token_id": 1, **_TOKENS,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0,
    "use_cache": False, "decoder_start_token_id": 0,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def _text(length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY - 1, (2, length))
    return {"input_ids": ids, "labels": ids.clone()}


def _images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}


def _speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 32), "labels": _text()["labels"]}


def _clip_batch() -> dict[str, Any]:
    return {"input_ids": _text()["input_ids"], "pixel_values": _images()["pixel_values"], "return_loss": True}


def _clip() -> tf.CLIPConfig:
    text = {**_CORE, **_TOKENS, "max_position_embeddings": 16, "projection_dim": 16}
    return tf.CLIPConfig(text_config=text, vision_config={**_VISION, "projection_dim": 16}, projection_dim=16)


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    ``norms``, ``activations``: LayerNorms and RMSNorms,
    GELUs and SiLUs in a forward pass; ``by_hand``: how many
    of those activations the model spells out with elementary operations. ``where`` says where the counts come
    from. ``adapted``: the linears that LoRA adapts, query and value.
    """

    name: str
    model: type[PreTrainedModel]
    config: Callable[[], Any]
    norms: int
    activations: int
    by_hand: int
    where: str
    adapted: tuple[str, ...] = ("q_proj", "v_proj")
    batch: Callable[[], dict[str, Any]] = _text

    def build(self) -> Any:
        """A new model in training mode; the weights follow torch's seed."""
        return self.model(self.config()).train()


_QUERY_VALUE = ("query", "value")
_PRE = "two in each layer, one at the end"
_POST = "after the embeddings, two in each layer, one in the head"

ARCHITECTURES = (
    Architecture("llama", tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**_DECODER), 5, 2, 0, _PRE),
    Architecture("mistral", tf.MistralForCausalLM, lambda: tf.MistralConfig(**_DECODER, sliding_window=8),
        5, 2, 0, _PRE),
    Architecture("qwen2", tf.Qwen2ForCausalLM, lambda: tf.Qwen2Config(**_DECODER), 5, 2, 0, _PRE),
    Architecture(
        "qwen3", tf.Qwen3ForCausalLM, lambda: tf.Qwen3Config(**_DECODER, head_dim=8), 9, 2, 0,
        "two, and those of q and k, in each layer, one at the end",
    ),
    Architecture("gemma", tf.GemmaForCausalLM, lambda: tf.GemmaConfig(**_DECODER, head_dim=8), 5, 2, 0, _PRE),
    Architecture(
        "gemma2", tf.Gemma2ForCausalLM, lambda: tf.Gemma2Config(**_DECODER, head_dim=8), 9, 2, 0,
        "before and after attention and MLP in each layer, one at the end",
    ),
    Architecture(
        "gemma3", tf.Gemma3ForCausalLM, lambda: tf.Gemma3TextConfig(**_DECODER, head_dim=8), 13, 2, 0,
        "as Gemma 2, and those of q and k",
    ),
    Architecture("phi3", tf.Phi3ForCausalLM, lambda: tf.Phi3Config(**_DECODER), 5, 2, 0, _PRE, ("qkv_proj",)),
    Architecture(
        "phi", tf.PhiForCausalLM, lambda: tf.PhiConfig(**_DECODER), 3, 2, 2,
        "one in each layer, for attention and MLP both, one at the end; gelu_new",
    ),
    Architecture(
        "olmo2", tf.Olmo2ForCausalLM, lambda: tf.Olmo2Config(**_DECODER), 9, 2, 0,
        "after attention and MLP, and those of q and k, in each layer, one at the end",
    ),
    Architecture(
        "cohere", tf.CohereForCausalLM, lambda: tf.CohereConfig(**_DECODER), 3, 2, 0,
        "a LayerNorm by hand in each layer, one at the end",
    ),
    Architecture("starcoder2", tf.Starcoder2ForCausalLM,
        lambda: tf.Starcoder2Config(**_DECODER, residual_dropout=0.0, embedding_dropout=0.0), 5, 2, 0, _PRE,
    ),
    Architecture(
        "gpt2", tf.GPT2LMHeadModel,
        lambda: tf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=1, eos_token_id=1,
        ),
        5, 2, 2, f"{_PRE}; gelu_new", ("c_attn",),
    ),
    Architecture(
        "gpt_neox", tf.GPTNeoXForCausalLM,
        lambda: tf.GPTNeoXConfig(**_CORE, **_TOKENS, max_position_embeddings=32, use_cache=False), 5, 2, 0,
        _PRE,
        ("query_key_value",),
    ),
    Architecture(
        "bloom", tf.BloomForCausalLM,
        lambda: tf.BloomConfig(
            vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cache=False, **_TOKENS,
        ),
        6, 0, 0,
        "after the embeddings, two in each layer, one at the end; its GELU has a hand-written backward",
        ("query_key_value",),
    ),
    Architecture(
        "opt", tf.OPTForCausalLM,
        lambda: tf.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            use_cache=False,
            max_position_embeddings=32, dropout=0.0, word_embed_proj_dim=32,
        ),
        5, 0, 0, f"{_PRE}; ReLU",
    ),
    Architecture("bert", tf.BertForMaskedLM, lambda: tf.BertConfig(**_ENCODER), 6, 3, 0, _POST, _QUERY_VALUE),
    Architecture("roberta", tf.RobertaForMaskedLM, lambda: tf.RobertaConfig(**_ENCODER), 6, 3, 0, _POST,
        _QUERY_VALUE),
    Architecture(
        "modernbert", tf.ModernBertForMaskedLM,
        lambda: tf.ModernBertConfig(
            **_CORE, **_TOKENS, max_position_embeddings=32, local_attention=8, cls_token_id=1, sep_token_id=1
        ),
        6, 3, 0,
        "after the embeddings, one in the first layer, two in the second, one at the end, one in the head",
        ("Wqkv",),
    ),
    Architecture(
        "deberta_v2", tf.DebertaV2ForMaskedLM,
        lambda: tf.DebertaV2Config(
            **_ENCODER, **_BUCKETS, relative_attention=True, pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
        ),
        7, 3, 0, f"{_POST}, one of the relative positions", ("query_proj", "value_proj"),
    ),
    Architecture(
        "albert", tf.AlbertForMaskedLM,
        lambda: tf.AlbertConfig(**_ENCODER, embedding_size=16, classifier_dropout_prob=0.0), 6, 3, 3,
        f"{_POST}; gelu_new", _QUERY_VALUE,
    ),
    Architecture(
        "electra", tf.ElectraForMaskedLM, lambda: tf.ElectraConfig(**_ENCODER, embedding_size=16), 6, 3, 0,
        _POST,
        _QUERY_VALUE,
    ),
    Architecture(
        "distilbert", tf.DistilBertForMaskedLM,
        lambda: tf.DistilBertConfig(
            vocab_size=VOCABULARY, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=32,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        6, 3, 0, _POST, ("q_lin", "v_lin"),
    ),
    Architecture(
        "t5", tf.T5ForConditionalGeneration, lambda: tf.T5Config(**_T5), 12, 0, 0,
        "two in each encoder layer, three in each decoder layer, one at the end of both; ReLU", ("q", "v"),
    ),
    Architecture(
        "t5_v1_1", tf.T5ForConditionalGeneration, lambda: tf.T5Config(**_T5,
        feed_forward_proj="gated-gelu"), 12, 4, 4,
        "as T5; gelu_new", ("q", "v"),
    ),
    Architecture(
        "bart", tf.BartForConditionalGeneration,
        lambda: tf.BartConfig(**_SEQ2SEQ, max_position_embeddings=32, forced_eos_token_id=1), 12, 4, 0,
        "after both embeddings, two in each encoder layer, three in each decoder layer",
    ),
    Architecture(
        "whisper", tf.WhisperForConditionalGeneration,
        lambda: tf.WhisperConfig(
            **_SEQ2SEQ, num_mel_bins=8, max_source_positions=16, max_target_positions=16, suppress_tokens=[],
            begin_suppress_tokens=[],
        ),
        12, 6, 0, "as T5; a GELU after each of two convolutions", batch=_speech,
    ),
    Architecture(
        "vit", tf.ViTForImageClassification, lambda: tf.ViTConfig(**_VISION, **_NO_DROPOUT), 5, 2, 0, _PRE,
        batch=_images
    ),
    Architecture(
        "dinov2", tf.Dinov2ForImageClassification,
        lambda: tf.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
            mlp_ratio=2, **_NO_DROPOUT
        ),
        5, 2, 0, _PRE, batch=_images,
    ),
    Architecture(
        "swin", tf.SwinForImageClassification,
        lambda: tf.SwinConfig(
            image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
            mlp_ratio=2.0,
            drop_path_rate=0.0, **_NO_DROPOUT,
        ),
        11, 4, 0, "after the embeddings, two in each of four layers, one between the stages, one at the end",
        batch=_images,
    ),
    Architecture(
        "convnext", tf.ConvNextForImageClassification,
        lambda: tf.ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, image_size=16, drop_path_rate=0.0
        ),
        5, 2, 0, "after the embeddings, one in each of two layers, one between the stages, one at the end",
        ("pwconv1", "pwconv2"), batch=_images,
    ),
    Architecture(
        "clip", tf.CLIPModel, _clip, 11, 4, 4,
        "two in each layer of both towers, one before the images, one at the end of both",
        batch=_clip_batch,
    ),
)  # fmt: skip
