"""What is planned: a model on the meta device, cut to some layers, and a batch for it.

Given by a name of :mod:`lowmem_compile.memory_plan.catalogue`, by the ``config.json`` of a Hugging Face model, or by
``package.module:function``. The function is called with those of ``batch``, ``sequence`` and ``layers`` that it has arguments
for, on the meta device, and returns a model and its inputs (a tensor, a tuple, or a dict of arguments by name). Before it is
planned it may be adapted: LoRA, or LoQT.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem_compile.demo.packages import quiet, require
from lowmem_compile.errors import LowMemError, OptionError
from lowmem_compile.memory_plan.catalogue import KNOWN
from lowmem_compile.optim.loqt import loqt
from lowmem_compile.optim.loqt.linear import layers_of

ADAPTED = {"qv": r".*\.(q_proj|v_proj|query|value|c_attn)", "all": "all-linear"}
"""Which linears ``--lora`` adapts."""


@dataclass(frozen=True)
class Adaptation:
    """What is done to a model before it is trained.

    Attributes:
        lora: ``"qv"`` or ``"all"``: freeze the model and adapt these linears with LoRA.
        lora_rank: of LoRA.
        loqt: rank of LoQT for the linears of the repeated layers (all linears where there are none), after its first merge;
            scales in 8 bits.
    """

    lora: str | None = None
    lora_rank: int = 16
    loqt: int | None = None

    def __post_init__(self) -> None:
        if self.lora is not None and self.lora not in ADAPTED:
            raise OptionError(f"--lora {self.lora!r} must be one of {', '.join(ADAPTED)}")
        if self.lora is not None and self.loqt is not None:
            raise OptionError(f"--lora {self.lora} and --loqt {self.loqt} adapt the same linears; give one of them")

    def __str__(self) -> str:
        if self.lora is not None:
            return f"LoRA on {self.lora}, rank {self.lora_rank}"
        return f"LoQT, rank {self.loqt}" if self.loqt is not None else ""

    def of(self, model: nn.Module, layers: int | None) -> nn.Module:
        """The adapted model, which has so many repeated layers.

        Raises:
            OptionError: a rank that is not below a linear's smaller dimension; nothing to adapt.
        """
        if self.lora is not None:
            peft = require("peft")
            config = peft.LoraConfig(
                r=self.lora_rank, lora_alpha=self.lora_rank, target_modules=ADAPTED[self.lora], lora_dropout=0.0
            )
            adapted: nn.Module = peft.get_peft_model(model, config)
            return adapted
        if self.loqt is not None:
            stack = stack_of(model, layers) if layers is not None else None
            loqt(model, self.loqt, include=(f"{stack}.*" if stack else "*",), double_quantise=True)
            for _, layer in layers_of(model):
                layer.take_merged_form()
        return model


PLAIN = Adaptation()


@dataclass(frozen=True)
class Made:
    """A model on the meta device and the arguments of one call."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model that can be made in any depth, and its usual batch.

    Attributes:
        name: as the user gave it.
        title: class of the model and where its numbers are from.
        depth: layers of the whole model; ``None`` if it can only be made whole.
        batch: rows of the usual batch.
        sequence: tokens a row; ``None`` if it has no such length (images).
        longest: the most tokens a row that its positions allow, or ``None``.
        make: layers (``None``: all), batch and sequence → model and inputs.
    """

    name: str
    title: str
    depth: int | None
    batch: int
    sequence: int | None
    longest: int | None
    make: Callable[[int | None, int, int | None], Made]


def subject_of(name: str, adaptation: Adaptation = PLAIN) -> Subject:
    """The model that a name, a path or ``package.module:function`` stands for.

    Args:
        name: see the module.
        adaptation: what is done to the model before it is trained.

    Raises:
        OptionError: it is none of the three.
        LowMemError: the configuration or the function cannot be used; the message says why.
    """
    if name in KNOWN:
        known = KNOWN[name]
        transformers = require("transformers")
        config = getattr(transformers, known.config)(**known.settings)
        return _from_config(name, config, getattr(transformers, known.model), known.batch, known.sequence, adaptation)
    if name.endswith(".json") or Path(name).is_dir():
        return _from_file(name, adaptation)
    if ":" in name:
        return _from_function(name, adaptation)
    raise OptionError(
        f"{name!r} is no model that can be planned. Give one of {', '.join(KNOWN)}; the path of a config.json of a Hugging Face "
        "model; or package.module:function, a function that returns a model and its inputs."
    )


def _from_file(name: str, adaptation: Adaptation) -> Subject:
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise LowMemError(f"{path} cannot be read as a configuration: {error}") from error
    transformers = require("transformers")
    kind, classes = data.pop("model_type", None), data.get("architectures") or []
    if kind is None or not classes or not hasattr(transformers, classes[0]):
        raise LowMemError(
            f"{path} needs a 'model_type' and, under 'architectures', a model class of transformers, not {kind!r} and {classes}"
        )
    config = transformers.AutoConfig.for_model(kind, **data)
    images = hasattr(config, "image_size")
    longest = getattr(config, "max_position_embeddings", 2048)
    sequence = None if images else min(2048, longest)
    return _from_config(name, config, getattr(transformers, classes[0]), 8 if images else 1, sequence, adaptation)


def _from_config(name: str, config: Any, model_class: Any, batch: int, sequence: int | None, adaptation: Adaptation) -> Subject:
    settings = config.to_dict()
    kinds = set(settings.get("layer_types") or ())
    alike = len(kinds) <= 1 and not getattr(config, "is_encoder_decoder", False)
    depth = getattr(config, "num_hidden_layers", None) if alike else None

    def make(layers: int | None, rows: int, length: int | None) -> Made:
        fresh = type(config).from_dict(settings)
        if layers is not None:
            if kinds:
                fresh.layer_types = [next(iter(kinds))] * layers
            fresh.num_hidden_layers = layers
        if hasattr(fresh, "use_cache"):
            fresh.use_cache = False
        with quiet(), torch.device("meta"):
            model: nn.Module = adaptation.of(model_class(fresh), depth if layers is None else layers)
            return Made(model.train(), (), inputs_of(model_class.__name__, fresh, rows, length))

    longest = getattr(config, "max_position_embeddings", None) if sequence is not None else None
    return Subject(name, model_class.__name__, depth, batch, sequence, longest, make)


def inputs_of(model_class: str, config: Any, rows: int, length: int | None) -> dict[str, Any]:
    """A batch for a Hugging Face model, labels included, on the current device.

    Raises:
        LowMemError: a class of model whose labels are not known here.
    """
    if model_class.endswith("ForImageClassification"):
        size = config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        pixels = torch.empty(rows, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": pixels, "labels": torch.empty(rows, dtype=torch.long)}
    tokens = torch.empty(rows, length or 1, dtype=torch.long)
    if model_class.endswith("ForSequenceClassification"):
        return {"input_ids": tokens, "labels": torch.empty(rows, dtype=torch.long)}
    if model_class.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification")):
        return {"input_ids": tokens, "labels": torch.empty_like(tokens)}
    raise LowMemError(
        f"what a batch of {model_class} looks like is not known. Write a function that returns the model and its inputs, "
        "and plan package.module:function."
    )


def _from_function(name: str, adaptation: Adaptation) -> Subject:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise LowMemError(f"{name} cannot be imported: {error}. Write package.module:function.") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    known = inspect.signature(function).parameters
    defaults = {key: p.default for key, p in known.items() if isinstance(p.default, int)}

    def make(layers: int | None, rows: int, length: int | None) -> Made:
        given = {"layers": layers, "batch": rows, "sequence": length}
        with torch.device("meta"):
            made = function(**{k: v for k, v in given.items() if k in known and v is not None})
            if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
                raise LowMemError(f"{name} must return a model and its inputs; it returned {type(made).__name__}")
            model, inputs = made
            model = adaptation.of(model, defaults.get("layers") if layers is None else layers).train()
        if isinstance(inputs, Mapping):
            return Made(model, (), dict(inputs))
        return Made(model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})

    return Subject(name, "function", defaults.get("layers"), defaults.get("batch", 1), defaults.get("sequence"), None, make)


def stack_of(model: nn.Module, depth: int) -> str | None:
    """Name of the only list of ``depth`` modules alike; ``None`` if there is none, or several."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and len({_shape(child) for child in module}) == 1
    ]
    return found[0] if len(found) == 1 else None


def _shape(module: nn.Module) -> tuple[Any, ...]:
    return type(module), tuple((name, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters())
