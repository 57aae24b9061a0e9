"""The layer against its equations: forward, every gradient, what eager mode keeps, dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem_compile
from lowmem_compile.demo.measure import resident_tensors, saved_bytes
from lowmem_compile.errors import LowMemError
from lowmem_compile.optim.loqt import LoQTLinear
from lowmem_compile.optim.loqt.linear import PROJECTOR, WEIGHT
from tests.optim.loqt.common import D, H, Mixer, N, R, batch, loss_of, under_loqt

FORMS: list[dict[str, Any]] = [{}, {"double_quantise": True, "block": 32}, {"quantise": False}]
SHAPES = [(48, 20), (20, 48), (32, 32)]


def layer_of(shape: tuple[int, int], *, bias: bool = True, **options: Any) -> LoQTLinear:
    """A merged layer [O, I] with a B that is not zero."""
    O, I = shape
    model = nn.Sequential(nn.Linear(I, O, bias=bias))
    training = lowmem_compile.loqt(model, 4, **options)
    x = torch.randn(30, I)
    training.merge(lambda: model(x).pow(3).sum())
    layer = model[0]
    assert isinstance(layer, LoQTLinear)
    with torch.no_grad():
        layer.B.copy_(torch.randn_like(layer.B))
    return layer


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("side", ["std", "input"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape: tuple[int, int], side: Any, options: dict[str, Any]) -> None:
    """y = x deq(W_q)ᵀ + s·(x P) Bᵀ + b, or s·(x Bᵀ) Pᵀ; G_B = s·G P or s·Pᵀ G; dX = dY Wᵀ: from the whole weight."""
    layer = layer_of(shape, side=side, scale=0.7, **options)
    assert layer.side == ("right" if side == "input" or shape[0] >= shape[1] else "left")
    Wq, P = (layer.decoded(what, torch.float32) for what in (WEIGHT, PROJECTOR))
    B = layer.B.detach()
    W = (Wq + 0.7 * (B @ P.T if layer.side == "right" else P @ B)).requires_grad_()
    assert torch.allclose(layer.weight, W, atol=1e-6)
    x = torch.randn(3, 5, shape[1], requires_grad=True)
    weights = torch.randn(3, 5, shape[0])
    y = layer(x)
    want = F.linear(x, W, layer.bias)
    assert torch.allclose(y, want, atol=2e-5)
    assert layer.bias is not None
    got = torch.autograd.grad((y * weights).sum(), [x, layer.B, layer.bias])
    dX, G, db = torch.autograd.grad((want * weights).sum(), [x, W, layer.bias])
    wanted = dX, 0.7 * (G @ P if layer.side == "right" else P.T @ G), db
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))


def test_no_gradient_where_none_is_wanted() -> None:
    layer = layer_of((48, 20))
    layer.requires_grad_(False)
    x = torch.randn(3, 20, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.B.grad is None
    assert not layer(x.detach()).requires_grad
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.detach()))


def test_eager_mode_keeps_x_p_and_no_decoded_weight() -> None:
    """Of the up projection x P [N, r] alone; of the left-hand one x [N, H]; no [O, I] tensor."""
    model, _ = under_loqt()
    x, _ = batch()
    made = saved_bytes(lambda: model(x).sum(), exclude=resident_tensors(model, [x]))
    shapes = [s.shape for s in made.storages]
    assert all(s not in shapes for s in [(D, D), (H, D), (D, H), (D, R), (R, D)])
    assert shapes.count((N, R)) == 2  # x P of both right-hand layers
    assert shapes.count((N, H)) == 2  # GELU's input, and down's x
    assert shapes.count((N, D)) == 1  # the norm's input: up's own, the norm's output, is not kept


def test_scales_stay_float32_in_another_dtype() -> None:
    model, _ = under_loqt(double_quantise=True)
    before = {k: v.clone() for k, v in model.up.named_buffers()}
    whole = model.up.weight
    model.to(torch.bfloat16)
    assert model.up.B.dtype == torch.bfloat16
    for key, value in model.up.named_buffers():
        assert torch.equal(value, before[key])
        assert value.dtype == before[key].dtype
    assert model.up.weight.dtype == torch.bfloat16
    assert (model.up.weight.float() - whole).abs().max() < 0.01 * whole.abs().max()
    loss_of(model, dtype=torch.bfloat16).backward()


def test_bfloat16_and_autocast() -> None:
    model, training = under_loqt(dtype=torch.bfloat16)
    assert all(layer.B.dtype == torch.bfloat16 for layer in training.layers.values())
    loss_of(model, dtype=torch.bfloat16).backward()
    assert model.up.B.grad is not None
    assert model.up.B.grad.dtype == torch.bfloat16

    torch.manual_seed(0)
    wide = Mixer()
    training = lowmem_compile.loqt(wide, R)

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(wide)

    training.merge(closure)
    loss = closure()
    loss.backward()
    B = training.layers["up"].B
    assert B.grad is not None
    narrow = B.grad.clone()
    wide.zero_grad()
    loss_of(wide).backward()
    assert (narrow - B.grad).norm() < 0.05 * B.grad.norm()


def test_training_before_the_first_merge_is_an_error() -> None:
    model, training = under_loqt(merge=False)
    with pytest.raises(LowMemError, match=r"before its first merge.*call before_step"):
        loss_of(model)
    with torch.no_grad():
        loss_of(model)
    model.eval()
    assert torch.equal(loss_of(model), loss_of(model))
    model.train()
    training.merge(lambda: loss_of(model))
    loss_of(model)


def test_print_and_copy() -> None:
    model, _ = under_loqt()
    assert "in_features=64, out_features=192, bias=True, rank=8, side=right, scale=0.5, merged" in repr(model.up)
    x, _ = batch()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
