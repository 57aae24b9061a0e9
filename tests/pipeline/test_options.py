"""Options: validated before tracing; each one is part of the cache identity."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowmem_compile import backend
from lowmem_compile.backend import Partitioner, decompositions, identity, lowmem
from lowmem_compile.errors import LowMemError, OptionError
from lowmem_compile.options import Options
from lowmem_compile.pipeline import PASSES, pass_names

OTHER: Mapping[str, Any] = {
    "gradients": "exact",
    "table": "primitive",
    "code_bits": 2,
    "slope_bits": 4,
    "recompute": "inductor",
    "fold_norm_affine": "never",
    "chunked_loss": "never",
    "codec": "int4",
    "codec_group": 32,
    "rounding": "stochastic",
    "memory_budget": 0.5,
    "calibrate": True,
    "launches": "shared",
    "keep_exact": ["lm_head"],
    "disable": ["pack_masks"],
    "strict": True,
    "report": False,
    "check": "off",
    "dump": "folder",
    "inductor": {"max_autotune": True},
}
NAMES = [f.name for f in dataclasses.fields(Options)]


def test_every_option_is_flipped_below() -> None:
    assert set(OTHER) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_changes_the_identity(name: str) -> None:
    default, other = Options.from_dict({}), Options.from_dict({name: OTHER[name]})
    assert getattr(default, name) != getattr(other, name)
    assert identity(default) != identity(other)
    assert Partitioner(default, "cpu", None).uuid() != Partitioner(other, "cpu", None).uuid()
    assert pickle.dumps(decompositions(default)) != pickle.dumps(decompositions(other))


def test_the_identity_is_stable_and_never_empty() -> None:
    assert identity(Options()) == identity(Options.from_dict({"disable": [], "keep_exact": []}))
    assert Partitioner(Options(), "cpu", None).uuid()


def test_the_identity_covers_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lowmem_compile.kernels
    import lowmem_compile.passes

    for package in (lowmem_compile, lowmem_compile.kernels, lowmem_compile.passes):
        folder = tmp_path / package.__name__
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "code.py").write_text("x = 1\n")
        monkeypatch.setattr(package, "__path__", [str(folder)])
    seen = set()
    for name in ("", ".kernels", ".passes"):
        backend.sources_hash.cache_clear()
        seen.add(identity(Options()))
        (tmp_path / f"lowmem_compile{name}" / "sub" / "code.py").write_text("x = 2\n")
    backend.sources_hash.cache_clear()
    seen.add(identity(Options()))
    monkeypatch.undo()
    backend.sources_hash.cache_clear()
    assert len(seen) == 4


def test_the_identity_covers_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(Options())
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert identity(Options()) != before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient": "exact"}, ["'gradient'", "did you mean 'gradients'", *NAMES]),
        ({"xyzzy": 1}, ["'xyzzy'", *NAMES]),
        ({"tables": 1, "stric": 2}, ["'tables'", "'stric'", "'table'", "'strict'"]),
        ({"gradients": "rough"}, ["gradients", "'approximate'", "'exact'", "'rough'"]),
        ({"gradients": True}, ["gradients", "True"]),
        ({"code_bits": 3}, ["code_bits", "2", "4", "5", "3"]),
        ({"code_bits": "4"}, ["code_bits", "'4'"]),
        ({"slope_bits": 3}, ["slope_bits", "4", "8", "3"]),
        ({"codec": "int2"}, ["codec", "'auto'", "'none'", "'bf16'", "'int8'", "'int3'", "'int2'"]),
        ({"codec": None}, ["codec", "'none'", "None"]),
        ({"codec_group": 7}, ["codec_group", "8 or more", "7"]),
        ({"codec_group": 64.0}, ["codec_group", "64.0"]),
        ({"codec_group": True}, ["codec_group", "True"]),
        ({"rounding": "down"}, ["rounding", "'nearest'", "'stochastic'", "'down'"]),
        ({"keep_exact": "lm_head"}, ["keep_exact", "list of module names"]),
        ({"keep_exact": [""]}, ["keep_exact"]),
        ({"keep_exact": [1]}, ["keep_exact"]),
        ({"strict": "yes"}, ["strict", "'yes'", "True or False"]),
        ({"strict": 1}, ["strict", "1"]),
        ({"disable": "pack_masks"}, ["disable", "list of pass names"]),
        ({"disable": ["pack_mask"]}, ["disable", "pack_mask", *pass_names()]),
        ({"disable": [1]}, ["disable"]),
        ({"dump": 3}, ["dump", "folder"]),
        ({"inductor": ["max_autotune"]}, ["inductor", "dict"]),
        ({"inductor": {1: 2}}, ["inductor"]),
    ],
)
def test_a_wrong_option_is_refused_before_tracing(options: dict[str, Any], words: list[str]) -> None:
    calls = []

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return x + 1

    with pytest.raises(OptionError) as caught:
        lowmem(torch.fx.symbolic_trace(Model()), [torch.ones(1)], options=options)
    traced = len(calls)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert isinstance(caught.value, (ValueError, LowMemError))
    assert traced == 1, "the symbolic trace above is the only one"


def test_torch_compile_raises_what_the_backend_raises() -> None:
    model = torch.compile(nn.Linear(2, 2), backend="lowmem", options={"gradient": "exact"})
    with pytest.raises(Exception, match="did you mean 'gradients'"):
        model(torch.ones(1, 2))


def test_an_unknown_mode_lists_the_modes() -> None:
    with pytest.raises(OptionError, match="max-autotune"):
        lowmem(torch.fx.symbolic_trace(nn.Identity()), [torch.ones(1)], mode="fastest")


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().strict = True  # type: ignore[misc]


def test_the_order_of_the_passes() -> None:
    assert pass_names() == [
        "recognise_activation",
        "recognise_norm",
        "fold_norm_affine",
        "fold_layer_scale",
        "unfold_patches",
        "chunk_loss",
        "projection_taps",
        "attention_backward",
        "norm_from_output",
        "approximate_activation",
        "accumulate_sums",
        "update_in_backward",
        "embedding_gradient",
        "recompute_saved",
        "pack_masks",
        "narrow_integers",
        "encode_saved",
        "compute_once",
        "launch_together",
        "flatten_saved_inputs",
    ]
    order = ["dynamo", "joint", "backward", "saved"]
    stages = [order.index(p.stage.value) for p in PASSES]
    assert stages == sorted(stages)


def test_names_are_unique_and_none_is_part_of_another() -> None:
    """Inductor's off switch is a substring test."""
    names = pass_names()
    assert not [(a, b) for i, a in enumerate(names) for j, b in enumerate(names) if i != j and a in b]


def test_every_reason_code_that_is_issued_is_explained() -> None:
    import re

    import lowmem_compile.passes
    from lowmem_compile.reporting.codes import REASONS

    (folder,) = lowmem_compile.passes.__path__
    sources = [*Path(folder).glob("*.py"), Path(lowmem_compile.__path__[0]) / "pipeline.py"]
    issued = {c for p in sources for c in re.findall(r'"(LM\d{3})"', p.read_text(encoding="utf-8"))}
    assert issued
    assert issued <= set(REASONS)
