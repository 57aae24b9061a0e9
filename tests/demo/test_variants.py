from __future__ import annotations

import pytest
from torch import nn

from lowmem_compile import _torch
from lowmem_compile.demo.variants import BASELINE, VARIANTS, select
from lowmem_compile.errors import LowMemError


def test_names_match_their_keys() -> None:
    assert all(name == v.name for name, v in VARIANTS.items())
    assert len({v.label for v in VARIANTS.values()}) == len(VARIANTS)


def test_the_baseline_comes_first_and_is_always_there() -> None:
    assert [v.name for v in select(["lowmem", "eager"])] == [BASELINE, "eager", "lowmem"]
    assert [v.name for v in select()] == list(VARIANTS)


def test_an_unknown_variant_is_an_error_that_lists_the_valid_ones() -> None:
    with pytest.raises(LowMemError, match=r"banana.*budget_0.5"):
        select(["banana"])


def test_configuration_is_restored() -> None:
    before = _torch.functorch_config.activation_memory_budget
    with VARIANTS["budget_0.3"].active():
        assert _torch.functorch_config.activation_memory_budget == 0.3
    assert _torch.functorch_config.activation_memory_budget == before


def test_fp8_leaves_small_tensors_alone_and_sets_scaling() -> None:
    fitted = VARIANTS["fp8"].fitted(4 * 2**20)
    settings = fitted.inductor["post_grad_fusion_options"]["activation_quantization_aten_pass"]
    assert settings["size_in_mb"] == 2.0
    assert settings["use_scaling"] is True
    assert VARIANTS["inductor"].fitted(1) is VARIANTS["inductor"]


def test_a_module_without_checkpointing_is_an_error() -> None:
    with pytest.raises(LowMemError, match="Linear has no gradient checkpointing"):
        VARIANTS["checkpointing"].prepare(nn.Linear(1, 1))


def test_checkpointing_is_switched_on() -> None:
    class Model(nn.Module):
        def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, bool]) -> None:
            self.settings = activation_checkpointing_kwargs

    model = Model()
    assert VARIANTS["checkpointing"].prepare(model) is model
    assert model.settings == {"use_reentrant": False}
