"""Block-wise 8-bit storage, and the optimizers on it."""

from __future__ import annotations

import math

import pytest
import torch

from lowmem_compile.optim import COAP, Fira, Flora, GaLore, LowRankOptimizer
from lowmem_compile.optim.quantise import decode, dynamic_map, encode, encoded_bytes
from tests.optim.common import METHODS, build, gradients, run, weight

SIGNED = [True, False]


@pytest.mark.parametrize("signed", SIGNED)
def test_the_map(signed: bool) -> None:
    levels = dynamic_map(signed=signed)
    assert levels.shape == (256,)
    assert (levels.diff() > 0).all()
    assert 0.0 in levels
    assert levels[-1] == 1
    assert (levels.min() < -0.9) == signed
    large = levels[levels > 1e-5]
    assert (large.diff() / large[1:]).max() < (0.71 if signed else 0.51)
    assert (levels[levels > 0.1].diff() < 0.015).all()


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize(
    ("shape", "block"), [((300,), 64), ((7, 33), 256), ((2, 3, 64), 64), ((1,), 256), ((0,), 256), ((5,), 1)]
)
def test_every_value_gets_the_nearest_level(shape: tuple[int, ...], block: int, signed: bool) -> None:
    x = torch.randn(shape) if signed else torch.rand(shape)
    code, scale = encode(x, signed=signed, block=block)
    assert code.shape == x.shape
    assert code.dtype == torch.uint8
    assert code.nbytes + scale.nbytes == encoded_bytes(x.numel(), block)
    found = decode(code, scale, signed=signed, block=block)
    levels = dynamic_map(signed=signed)
    for start in range(0, x.numel(), block):
        piece = x.reshape(-1)[start : start + block]
        largest = piece.abs().max()
        assert scale[start // block] == largest
        nearest = (piece[:, None] / largest - levels).abs().amin(1) * largest
        away = (found.reshape(-1)[start : start + block] - piece).abs()
        assert (away <= nearest + 1e-6 * largest).all()


def test_small_magnitudes_do_not_become_zero() -> None:
    x = torch.tensor([0.0, 1e-12, 1e-8, 1.0])
    assert (decode(*encode(x, signed=False, block=4), signed=False, block=4)[1:] > 0).all()
    assert decode(*encode(x, signed=False, block=4), signed=False, block=4)[0] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("signed", SIGNED)
def test_a_bad_value_poisons_its_block_alone(signed: bool, bad: float) -> None:
    x = torch.rand(100)
    x[40] = bad
    found = decode(*encode(x, signed=signed, block=32), signed=signed, block=32)
    assert not found[32:64].isfinite().any()
    assert found[:32].isfinite().all()
    assert found[64:].isfinite().all()


def test_a_block_of_zeros() -> None:
    assert torch.equal(decode(*encode(torch.zeros(70), signed=True, block=32), signed=True, block=32), torch.zeros(70))


def movement(optimizer: LowRankOptimizer, W: torch.nn.Parameter, grads: list[torch.Tensor]) -> torch.Tensor:
    start = W.detach().clone()
    return run(optimizer, W, grads) - start


@pytest.mark.parametrize("name", [name for name in METHODS if name != "APOLLO-Mini"])
@pytest.mark.parametrize("shape", [(160, 96), (96, 160)])
def test_eight_bits_follow_the_exact_moments(name: str, shape: tuple[int, int]) -> None:
    grads = gradients(shape, 12)
    exact, coded = weight(shape), weight(shape)
    options = {"rank": 16, "quantise_from": 256}
    expected = movement(build(name, [exact], **options), exact, grads)
    optimizer = build(name, [coded], bits=8, **options)
    found = movement(optimizer, coded, grads)
    assert optimizer.state[coded]["exp_avg"].dtype == torch.uint8
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.06


@pytest.mark.parametrize("restore", [False, True], ids=["", "restored"])
@pytest.mark.parametrize("projector_bits", [None, 8])
@pytest.mark.parametrize("base", ["adamw", "adafactor"])
@pytest.mark.parametrize("shape", [(160, 96), (64, 48, 3, 3)])
def test_coap_in_all_storages(shape: tuple[int, ...], base: str, projector_bits: int | None, restore: bool) -> None:
    """AdamW and Adafactor in 8 bits, moments restored or not, with an 8-bit projector too, over all kinds of refresh."""
    W = weight(shape)
    optimizer = COAP(
        [W], rank=16, base=base, bits=8, projector_bits=projector_bits, quantise_from=256, update_interval=2, reproject_factor=2,
        restore_state=restore,
    )  # fmt: skip
    moved = movement(optimizer, W, gradients(shape, 9))
    assert moved.isfinite().all()
    assert moved.norm() > 0.01
    assert optimizer.state[W]["exp_avg"].dtype == torch.uint8
    factor = optimizer.state[W]["projector" if len(shape) == 2 else "projector_1"]
    assert (factor.dtype == torch.uint8) == (projector_bits == 8)


@pytest.mark.parametrize("shape", [(160, 96), (96, 160)])
def test_an_eight_bit_projector_is_close(shape: tuple[int, int]) -> None:
    """In one basis; a recalibration may turn singular vectors of near equal values into others."""
    grads, exact, coded = gradients(shape, 12), weight(shape), weight(shape)
    expected = movement(COAP([exact], rank=16, update_interval=100), exact, grads)
    found = movement(COAP([coded], rank=16, update_interval=100, projector_bits=8), coded, grads)
    assert 0 < (found - expected).norm() / expected.norm() < 0.06


def test_small_tensors_stay_exact() -> None:
    W, b = weight((128, 64)), weight((64,))
    optimizer = GaLore([W, b], rank=40, bits=8)
    run(optimizer, W, [torch.randn(128, 64)])
    run(optimizer, b, [torch.randn(64)])
    assert optimizer.state[W]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[b]["exp_avg"].dtype == torch.float32


def test_thirty_two_bits_for_bfloat16_parameters() -> None:
    """A second moment in bfloat16 stops moving where a step changes it by less than half a unit in the last place."""
    W = [weight((32, 24), torch.bfloat16) for _ in range(2)]
    wide, narrow = (Fira([w], rank=4, bits=bits, update_interval=1000) for w, bits in zip(W, (32, None), strict=True))
    grads = [torch.full((32, 24), 1.0), *[torch.full((32, 24), 1.2)] * 60]
    for optimizer, w in ((wide, W[0]), (narrow, W[1])):
        run(optimizer, w, grads)
    assert wide.state[W[0]]["exp_avg_sq"].dtype == torch.float32
    assert narrow.state[W[1]]["exp_avg_sq"].dtype == torch.bfloat16
    kept, stuck = (o.state[w]["exp_avg_sq"].float().sum() for o, w in ((wide, W[0]), (narrow, W[1])))
    assert kept > 0
    assert stuck / kept != pytest.approx(1, rel=1e-3)


def test_flora_keeps_its_momentum_in_eight_bits() -> None:
    W = weight((128, 64))
    optimizer = Flora([W], rank=40, bits=8)
    run(optimizer, W, [torch.randn(128, 64)])
    assert {k: v.dtype for k, v in optimizer.state[W].items() if isinstance(v, torch.Tensor)} == {
        "exp_avg": torch.uint8,
        "exp_avg_scale": torch.float32,
        "exp_avg_sq_row": torch.float32,
        "exp_avg_sq_col": torch.float32,
    }
