"""Every method against an independent restatement of its paper or package: float32, 25 steps, both sides, three shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_compile.optim import APOLLO, COAP, Fira, Flora, GaLore
from lowmem_compile.optim.bases import gaussian, mix
from tests.optim import restatement
from tests.optim.common import gradients, run, weight

STEPS, TOLERANCE, TOLERANCE_DOUBLE = 25, 1e-6, 1e-10
SHAPES = [(48, 32), (32, 48), (40, 40)]
SIDES = ["std", "input"]
LR, DECAY, RANK = 0.01, 0.1, 6


def check(ours: Tensor, theirs: Tensor, start: Tensor) -> None:
    assert (theirs - start).abs().max() > 0.01
    assert (ours - theirs).abs().max() <= (TOLERANCE if start.dtype == torch.float32 else TOLERANCE_DOUBLE)


def precision(restore: bool, base: str) -> torch.dtype:
    """float64 where the update itself amplifies rounding: a restored v can come out near zero, and m/(√v + ε) large.

    In float32 two ways to write the same step then differ by up to 1e-5 (for weights that move by 0.3).
    """
    return torch.float64 if restore and base == "adamw" else torch.float32


def draws(shape: tuple[int, int], side: str, rank: int, seed: int) -> restatement.Draw:
    """The random projectors of the first parameter of an optimizer, by number."""
    n = shape[1] if side == "input" or shape[0] >= shape[1] else shape[0]
    return lambda k: gaussian(n, rank, mix(mix(seed, 0), k), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_galore(shape: tuple[int, int], side: str) -> None:
    grads, W = gradients(shape, STEPS), weight(shape)
    start = W.detach().clone()
    theirs = restatement.galore(start, grads, rank=RANK, gap=7, lr=LR, scale=0.25, wd=DECAY, side=side)
    ours = run(GaLore([W], LR, rank=RANK, update_interval=7, scale=0.25, weight_decay=DECAY, side=side), W, grads)
    check(ours, theirs, start)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fira(shape: tuple[int, int], side: str, scale: float) -> None:
    grads, W = gradients(shape, STEPS), weight(shape)
    start = W.detach().clone()
    theirs = restatement.fira(start, grads, rank=RANK, gap=7, lr=LR, scale=scale, wd=DECAY, side=side)
    ours = run(Fira([W], LR, rank=RANK, update_interval=7, scale=scale, weight_decay=DECAY, side=side), W, grads)
    check(ours, theirs, start)


@pytest.mark.parametrize("base", ["adamw", "adafactor"])
@pytest.mark.parametrize("restore", [False, True], ids=["", "restored"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_coap(shape: tuple[int, int], side: str, restore: bool, base: str) -> None:
    """Init, steps on the projector at 3, 6, 12, …, recalibration at 9 and 18."""
    dtype = precision(restore, base)
    grads, W = [G.to(dtype) for G in gradients(shape, STEPS)], weight(shape, dtype)
    start = W.detach().clone()
    same: dict[str, Any] = {"rank": RANK, "lr": LR, "scale": 0.5, "side": side}
    theirs = restatement.coap(start, grads, every=3, factor=3, wd=DECAY, restore=restore, adafactor=base == "adafactor", **same)
    same |= {"restore_state": restore, "base": base}
    optimizer = COAP([W], update_interval=3, reproject_factor=3, weight_decay=DECAY, **same)
    check(run(optimizer, W, grads), theirs, start)


@pytest.mark.parametrize("base", ["adamw", "adafactor"])
@pytest.mark.parametrize("restore", [False, True], ids=["", "restored"])
@pytest.mark.parametrize("shape", [(40, 32, 3, 3), (32, 40, 3, 3), (128, 96, 1, 1)])
def test_coap_convolutions(shape: tuple[int, ...], restore: bool, base: str) -> None:
    dtype = precision(restore, base)
    grads, W = [G.to(dtype) for G in gradients(shape, STEPS)], weight(shape, dtype)
    start = W.detach().clone()
    theirs = restatement.coap_convolution(
        start, grads, ratio=4.0, every=3, factor=3, lr=LR, adafactor=base == "adafactor", restore=restore
    )
    ours = run(COAP([W], LR, rank_ratio=4.0, update_interval=3, reproject_factor=3, base=base, restore_state=restore), W, grads)
    check(ours, theirs, start)


@pytest.mark.parametrize("base", ["adafactor", "sgd"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_flora(shape: tuple[int, int], side: str, base: str) -> None:
    grads, W = gradients(shape, STEPS), weight(shape)
    start = W.detach().clone()
    draw = draws(shape, side, RANK, seed=5)
    theirs = restatement.flora(start, grads, draw=draw, kappa=7, lr=LR, beta=0.9, sgd=base == "sgd", side=side)
    check(run(Flora([W], LR, rank=RANK, update_interval=7, base=base, side=side, seed=5), W, grads), theirs, start)


@pytest.mark.parametrize("rank", [1, 6])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_apollo(shape: tuple[int, int], side: str, rank: int) -> None:
    """Rank 1 is APOLLO-Mini: one factor for the matrix, scale √128."""
    grads, W = gradients(shape, STEPS), weight(shape)
    start, lr = W.detach().clone(), LR if rank > 1 else LR / 10
    draw, scale = draws(shape, side, rank, seed=5), 1.0 if rank > 1 else 128**0.5
    theirs = restatement.apollo(start, grads, draw=draw, gap=7, lr=lr, scale=scale, wd=DECAY, mini=rank == 1, side=side)
    check(run(APOLLO([W], lr, rank=rank, update_interval=7, weight_decay=DECAY, side=side, seed=5), W, grads), theirs, start)


def test_unprojected_parameters_get_the_base_update() -> None:
    """Adam with ε beside √v, decay last; a vector gets an unfactored Adafactor."""
    W, grads = weight((10, 7)), gradients((10, 7), STEPS)
    start = W.detach().clone()
    expected, adam = start.clone(), restatement.Adam(LR)
    for G in grads:
        N = adam.direction(G)
        expected = (expected - adam.size() * N) * (1 - LR * DECAY)
    check(run(COAP([{"params": [W], "rank": None}], LR, weight_decay=DECAY), W, grads), expected, start)

    b, grads = weight((50,)), gradients((50, 1), STEPS)
    start = b.detach().clone()
    expected, v, m = start.clone(), torch.zeros(50), torch.zeros(50)
    for t, G in enumerate(grads, start=1):
        beta2 = 1 - t**-0.8
        v = beta2 * v + (1 - beta2) * (G[:, 0] ** 2 + 1e-30)
        u = G[:, 0] / v.sqrt()
        u = u / max(1.0, float(u.pow(2).mean().sqrt()))
        m = 0.9 * m + 0.1 * LR * u * max(1e-3, float(expected.pow(2).mean().sqrt()))
        expected = expected - m
    check(run(COAP([b], LR, rank=4, base="adafactor"), b, [G[:, 0] for G in grads]), expected, start)
