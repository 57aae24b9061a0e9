"""LoQT without quantisation is GaLore: the gradient of B is the projected gradient, and Adam on B is GaLore with α = s."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowmem_compile
from lowmem_compile.optim import GaLore
from lowmem_compile.optim.bases import singular_vectors
from lowmem_compile.optim.loqt import AdamW, LoQTLinear
from lowmem_compile.optim.loqt.linear import PROJECTOR
from lowmem_compile.optim.projector import choose_side, down

SHAPES = [(48, 32), (32, 48), (40, 40)]
RANK, GAP, STEPS, LR, EPS = 6, 15, 40, 0.005, 1e-3
MOVED = 0.02
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


def data(shape: tuple[int, int], number: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    x, target = torch.randn(64, shape[1], generator=generator), torch.randn(64, shape[0], generator=generator)
    x = x * 0.9 ** torch.arange(shape[1])  # gaps between the singular values of the gradient
    return x.to(dtype), target.to(dtype)


def loss_of(model: nn.Module, shape: tuple[int, int], number: int) -> torch.Tensor:
    x, target = data(shape, number % 3, next(model.parameters()).dtype)
    return F.mse_loss(model(x), target, reduction="sum")


@pytest.mark.parametrize("side", ["std", "input"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantise", [False, True])
def test_the_gradient_of_b_is_the_projected_gradient(shape: tuple[int, int], side: str, quantise: bool) -> None:
    """G_B = s·down(G) with GaLore's down map, G being the gradient of the whole weight on the same batch."""
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    training = lowmem_compile.loqt(model, RANK, scale=0.25, side=side, quantise=quantise)  # type: ignore[arg-type]
    training.merge(lambda: loss_of(model, shape, 0))
    layer = model[0]
    assert isinstance(layer, LoQTLinear)
    loss_of(model, shape, 1).backward()
    whole = training.merge_and_export()
    loss_of(whole, shape, 1).backward()
    (G,) = (p.grad for p in whole.parameters())
    assert G is not None
    P = layer.decoded(PROJECTOR, torch.float32)
    wanted = 0.25 * down(G, (P,), choose_side(shape, side))
    assert layer.B.grad is not None
    assert (layer.B.grad - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_the_basis_is_galores() -> None:
    """P: the first singular vectors of the gradient, on the shorter side."""
    for shape in SHAPES:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
        loss_of(model, shape, 0).backward()
        (G,) = (p.grad for p in model.parameters())
        assert G is not None
        training = lowmem_compile.loqt(model, RANK, quantise=False)
        training.merge(lambda: loss_of(model, shape, 0))  # noqa: B023
        (layer,) = training.layers.values()
        wanted = singular_vectors(G, RANK, choose_side(shape, "std"))
        P = layer.decoded(PROJECTOR, torch.float32)
        assert torch.allclose(P @ P.T, wanted @ wanted.T, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scale", [0.25, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_forty_adam_steps_equal_galore(shape: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    """Weights agree to 1e-6 (float64: 1e-13) over 40 steps and three bases: Adam on B at ε·s, against GaLore with α = s at ε.

    B's gradient is s times GaLore's, so m/(√v + ε) is the same only if ε is s times its own. Two things amplify float32's
    rounding: bases between nearly equal singular values, and gradients near zero, which Adam normalises. So the singular values
    have gaps and ε is 1e-5 of the gradients; with neither, two seeds of twelve differ by 1.2e-6 to 1.5e-6.
    """
    runs = []
    for kind in ("galore", "loqt"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, dtype=dtype))
        start = next(model.parameters()).detach().clone()
        if kind == "galore":
            optimizer: torch.optim.Optimizer = GaLore(
                model.parameters(), LR, rank=RANK, update_interval=GAP, scale=scale, eps=EPS
            )
        else:
            training = lowmem_compile.loqt(model, RANK, scale=scale, quantise=False)
            optimizer = AdamW(training.parameters(), LR, eps=EPS * scale)
        for step in range(STEPS):
            if kind == "loqt" and step % GAP == 0:
                training.merge(lambda: loss_of(model, shape, step))  # noqa: B023
            loss_of(model, shape, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        final = model if kind == "galore" else training.merge_and_export()
        (W,) = (p.detach() for p in final.parameters())
        assert (W - start).abs().max() > MOVED
        runs.append(W)
    assert (runs[0] - runs[1]).abs().max() <= TOLERANCE[dtype]
