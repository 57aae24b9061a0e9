"""Gradients that arrive already projected, and projectors that several parameters share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_compile.errors import GradientError
from lowmem_compile.optim import APOLLO, COAP, Fira, Flora, GaLore
from lowmem_compile.optim.projector import down
from tests.optim.common import METHODS, build, feed, gradients, weight
from tests.optim.restatement import Adam, rsvd

TAPPED = [name for name in METHODS if name not in ("Fira", "APOLLO", "APOLLO-Mini")]


@pytest.mark.parametrize("side", ["std", "input"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("name", TAPPED)
def test_a_projected_gradient_serves_as_well(name: str, shape: tuple[int, int], side: str) -> None:
    """Whole gradients only where one is due; in two parts, as with gradient accumulation."""
    whole, tapped = weight(shape), weight(shape)
    first, second = build(name, [whole], side=side), build(name, [tapped], side=side)
    given = 0
    for G in gradients(shape, 9):
        feed(first, [whole], [[G]])
        second.zero_grad()
        if second.full_gradient_due(tapped):
            tapped.grad = G.clone()
        else:
            factors = second.factors_of(tapped)
            plan_side = "right" if side == "input" or shape[0] >= shape[1] else "left"
            for part in (0.25, 0.75):
                second.give_projected(tapped, down(part * G, factors, plan_side))  # type: ignore[arg-type]
            given += 1
        second.step()
        torch.testing.assert_close(tapped, whole, rtol=0, atol=1e-6)
    assert given == (9 if "Flora" in name else 4 if "COAP" in name else 6)


def test_whole_and_projected_parts_add_up() -> None:
    whole, mixed = weight((24, 16)), weight((24, 16))
    first, second = GaLore([whole], rank=4), GaLore([mixed], rank=4)
    for t, G in enumerate(gradients((24, 16), 3)):
        feed(first, [whole], [[G]])
        mixed.grad = G.clone() if t == 0 else 0.5 * G
        if t:
            second.give_projected(mixed, 0.5 * G @ second.factors_of(mixed)[0])
        second.step()
    torch.testing.assert_close(mixed, whole, rtol=0, atol=1e-6)


def test_what_cannot_be_given() -> None:
    W, b, grads = weight((24, 16)), weight((24,)), gradients((24, 16), 1)
    optimizer = GaLore([W, b], rank=4, update_interval=2)
    with pytest.raises(GradientError, match="comes from its next whole gradient"):
        optimizer.factors_of(W)
    with pytest.raises(GradientError, match="needs the whole gradient"):
        optimizer.give_projected(W, torch.zeros(24, 4))
    with pytest.raises(GradientError, match="not projected: 1-dimensional"):
        optimizer.factors_of(b)
    feed(optimizer, [W], [grads])
    assert not optimizer.full_gradient_due(W)
    with pytest.raises(GradientError, match=r"has shape \(24, 4\), not \(4, 16\)"):
        optimizer.give_projected(W, torch.zeros(4, 16))
    for other in (Fira([W], rank=4), APOLLO([W], rank=4)):
        assert other.full_gradient_due(W)
        with pytest.raises(GradientError, match="needs the whole gradient"):
            other.give_projected(W, torch.zeros(24, 4))


def test_zero_grad_forgets_projected_gradients() -> None:
    W = weight((24, 16))
    optimizer = Flora([W], rank=4)
    optimizer.give_projected(W, torch.ones(24, 4))
    optimizer.zero_grad()
    before = W.detach().clone()
    optimizer.step()
    assert torch.equal(W, before)


def coap_stacked(weights: list[Tensor], grads: list[list[Tensor]], rank: int) -> list[Tensor]:
    """COAP with one right projector from the gradients stacked along O, and moments of each part."""
    O = [W.shape[0] for W in weights]
    W, adam = torch.cat(weights), Adam(1e-3)
    P = torch.empty(0)
    for t, parts in enumerate(grads):
        G = torch.cat(parts)
        if t % 2 == 0:
            generator = torch.Generator().manual_seed(3407)
            P = rsvd(G, P if t else torch.randn(G.shape[1], rank, generator=generator))
        W = W - adam.direction(G @ P) @ P.T * adam.size()
    return list(W.split(O))


@pytest.mark.parametrize("in_group", [False, True])
def test_linears_that_read_one_input_share_a_projector(in_group: bool) -> None:
    shapes = [(16, 24), (8, 24), (4, 24)]
    params = [weight(shape) for shape in shapes]
    start = [p.detach().clone() for p in params]
    work = [list(parts) for parts in zip(*(gradients(s, 7, seed=i) for i, s in enumerate(shapes)), strict=True)]
    options: dict[str, Any] = {"rank": 6, "update_interval": 2, "reproject_factor": 1}
    optimizer = (
        COAP([{"params": params, "shared": [params]}], **options) if in_group else COAP(params, shared=[params], **options)
    )
    feed(optimizer, params, work)
    assert ["projector" in optimizer.state[p] for p in params] == [True, False, False]
    assert optimizer.state[params[2]]["exp_avg"].shape == (4, 6)  # a rank above its own O
    for found, expected in zip(params, coap_stacked(start, work, 6), strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-6)
    (factor,) = optimizer.factors_of(params[1])
    assert factor.shape == (24, 6)


@pytest.mark.parametrize("name", METHODS)
def test_shared_projectors_in_every_method(name: str) -> None:
    """Also where one of the parameters has no gradient for a while."""
    params = [weight((16, 24)), weight((8, 24))]
    optimizer = build(name, params, shared=[params])
    for t, row in enumerate(zip(gradients((16, 24), 8), gradients((8, 24), 8, seed=1), strict=True)):
        before = params[0].detach().clone()
        for p, G in zip(params, row, strict=True):
            p.grad = G.clone()
        if t % 3 == 0:
            params[0].grad = None
        optimizer.step()
        assert torch.equal(params[0], before) == (t % 3 == 0)
    assert all(p.isfinite().all() for p in params)
    twin = build(name, [nn.Parameter(p.detach().clone()) for p in params], shared=())
    with pytest.raises(ValueError, match="shared="):
        twin.load_state_dict(optimizer.state_dict())
