"""Each method trains: least squares, and a small convolutional network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem_compile.optim import COAP, report, split
from tests.optim.common import METHODS, build

# Learning rates; Adam's moves each entry by about as much a step, SGD's is in units of the loss.
RATES = {"Flora SGD": 1.0}


@pytest.mark.parametrize(("shape", "bits"), [((24, 16), None), ((16, 24), None), ((24, 16), 8)])
@pytest.mark.parametrize("name", METHODS)
def test_least_squares(name: str, shape: tuple[int, int], bits: int | None) -> None:
    """A target of rank 3 and a projection to rank 4: the loss falls below a quarter within 200 steps."""
    x = torch.randn(128, shape[1])
    target = torch.randn(shape[0], 3) @ torch.randn(3, shape[1]) / 3**0.5
    W = nn.Parameter(torch.zeros(*shape))
    optimizer = build(
        name, [W], lr=RATES.get(name, 0.1), bits=bits, quantise_from=16, update_interval=25, scale=1.0, scale_parameter=False
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=200)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = ((W - target) @ x.T).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_a_convolutional_network() -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.GELU(), nn.Conv2d(40, 40, 3), nn.GELU(), nn.Flatten(), nn.Linear(640, 10))
    x, y = torch.randn(64, 3, 8, 8), torch.randint(0, 10, (64,))
    optimizer = COAP(split(model, rank_ratio=4.0, convolutions=True).groups, 3e-3, update_interval=4)
    assert {row.side for row in report(optimizer).projected} == {"both", "left"}
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
