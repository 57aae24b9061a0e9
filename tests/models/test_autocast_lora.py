"""The defaults under bfloat16 autocast, fine-tuned whole and with LoRA, without code generation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from tests.helpers import compile_graphs
from tests.models.architectures import ARCHITECTURES, Architecture

# Dozens of roundings of 2⁻⁹; norms and recomputed values are rounded in other places than in eager.
COSINE_EXACT = 0.9995
# With codes for the slope of GELU and SiLU.
COSINE_APPROXIMATE = 0.999

# CLIP's loss multiplies cosines by 14: eager's own, under autocast, is off by more than 1 % of float32's.
LOSS = 1e-2

# One for each way of writing norm, activation and MLP.
WHOLE = ["llama", "gemma", "olmo2", "cohere", "gpt2", "bert", "whisper", "clip"]
ADAPTED = ["llama", "qwen3", "gemma", "modernbert", "bert", "dinov2"]


def chosen(names: list[str]) -> list[Architecture]:
    return [a for a in ARCHITECTURES if a.name in names]


@pytest.fixture(autouse=True)
def _no_failed_pass() -> Iterator[None]:
    """A warning of lowmem is a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lowmem")
        yield


def one_layer(architecture: Architecture) -> Any:
    """The model with one layer in every stack."""
    config = architecture.config()
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for name in ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
            if hasattr(part, name):
                setattr(part, name, 1)
    return architecture.model(config).train()


def step(call: Callable[..., Any], model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Loss and every gradient."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = call(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Cosine of two gradients of the whole model."""
    assert a.keys() == b.keys()
    x = torch.cat([a[k].flatten().double() for k in a])
    y = torch.cat([b[k].flatten().double() for k in a])
    return torch.nn.functional.cosine_similarity(x, y, dim=0).item()


def check_against_eager(model: Any, batch: dict[str, Any]) -> None:
    """Loss and gradients are eager's, norms are recognised, and fewer bytes are kept than Inductor keeps."""
    loss, gradients = step(model, model, batch)
    graphs = compile_graphs(model, check="lint")
    our_loss, ours = step(graphs, model, batch)
    assert our_loss == pytest.approx(loss, rel=LOSS)
    approximate = graphs.rewritten("approximate_activation") > 0
    assert cosine(ours, gradients) >= (COSINE_APPROXIMATE if approximate else COSINE_EXACT)
    assert graphs.rewritten("recognise_norm") > 0
    assert graphs.candidates
    for graph in graphs.candidates:
        assert 0 < graph.compiled.saved_bytes() < graph.partitions["inductor"].saved_bytes()


@pytest.mark.parametrize("architecture", chosen(WHOLE), ids=lambda a: a.name)
def test_whole(architecture: Architecture) -> None:
    check_against_eager(one_layer(architecture), architecture.batch())


@pytest.mark.parametrize("architecture", chosen(ADAPTED), ids=lambda a: a.name)
def test_with_adapters(architecture: Architecture) -> None:
    """LoRA on the attention's linears: only the adapters are trained."""
    config = peft.LoraConfig(r=2, target_modules=list(architecture.adapted), init_lora_weights=False)
    model = peft.get_peft_model(one_layer(architecture), config)
    check_against_eager(model, architecture.batch())
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if "lora_" in n}
