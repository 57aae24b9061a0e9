"""The same measures on compiled functions, and the configuration of the variants where Inductor reads it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from lowmem_compile import _torch
from lowmem_compile.demo.measure import peak_bytes, resident_tensors, saved_bytes
from lowmem_compile.demo.variants import VARIANTS, Variant

pytestmark = pytest.mark.e2e
N, D = 512, 64


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return y.square().sum()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> object:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _saved(variant: Variant) -> tuple[int, int, list[dict[str, object]]]:
    """Bytes saved, bytes allocated after forward, and the configuration at each graph that was compiled."""
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(N, D)
    seen: list[dict[str, object]] = []

    def observe() -> None:
        seen.append(
            {
                "budget": _torch.functorch_config.activation_memory_budget,
                "ban": _torch.functorch_config.ban_recompute_materialized_backward,
                "fp8": "activation_quantization_aten_pass" in _torch.inductor_config.post_grad_fusion_options,
            }
        )

    variant = variant.fitted(N * D * 2)
    with _torch.many_variants(), variant.active():
        call = variant.prepare(model, observe)
        call(x).backward()
        model.zero_grad(set_to_none=True)
        kept = saved_bytes(lambda: call(x), exclude=resident_tensors(model, [x])).total
        return kept, peak_bytes(lambda: call(x)).after_forward, seen


def test_saved_bytes_of_the_default_and_of_the_one_flag_counted_by_hand() -> None:
    hidden, out = N * 4 * D * 4, N * D * 4
    default, after, _ = _saved(VARIANTS["inductor"])
    assert default == 2 * hidden + out  # pre-activation, activation, output of the last linear
    assert after == default + 4  # and the loss
    flag, after, _ = _saved(VARIANTS["one_flag"])
    assert flag == hidden + out  # the activation is recomputed
    assert after == flag + 4


def test_two_variants_do_not_share_code() -> None:
    """Both are compiled in one process without a reset in between."""
    x = torch.randn(N, D)
    kept = []
    with _torch.many_variants():
        for name in ("inductor", "one_flag"):
            model = Mlp()
            with VARIANTS[name].active():
                call = VARIANTS[name].prepare(model)
                call(x).backward()
                forward = functools.partial(call, x)
                kept.append(saved_bytes(forward, exclude=resident_tensors(model, [x])).total)
    assert kept[1] < kept[0]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("budget_0.5", "budget", 0.5),
        ("one_flag", "ban", False),
        ("fp8", "fp8", True),
        ("inductor", "fp8", False),
    ],
)
def test_configuration_is_active_in_the_forward_and_in_the_backward_compile(name: str, key: str, value: object) -> None:
    _, _, seen = _saved(VARIANTS[name])
    assert [s[key] for s in seen] == [value, value]
    assert _torch.functorch_config.activation_memory_budget == 1.0


def test_fp8_takes_a_quarter_of_float32() -> None:
    hidden, out = N * 4 * D * 4, N * D * 4
    kept, _, _ = _saved(VARIANTS["fp8"])
    scales = 3 * N * 4
    assert kept == (2 * hidden + out) // 4 + scales
