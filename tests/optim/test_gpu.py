"""The optimizers on a GPU: the same path as on the CPU where nothing is random, and exact resume there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.optim.common import METHODS, build, gradients, run, weight

RANDOM = ("Flora", "Flora SGD", "APOLLO", "APOLLO-Mini", "GaLore randomised")
"""Methods whose projectors are drawn on the parameter's device, and so are others there."""


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in RANDOM and "COAP" not in name])
def test_the_path_is_that_of_the_cpu(name: str, shape: tuple[int, int]) -> None:
    """In one basis: singular vectors may differ in sign, which matters only where moments outlive a basis."""
    here, there = weight(shape), nn.Parameter(weight(shape).detach().cuda())
    grads = gradients(shape, 6)
    expected = run(build(name, [here], update_interval=100), here, grads)
    found = run(build(name, [there], update_interval=100), there, [G.cuda() for G in grads])
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
@pytest.mark.parametrize("name", METHODS)
def test_resume_on_the_gpu(name: str, shape: tuple[int, int], bits: int | None) -> None:
    grads = [G.cuda().bfloat16() for G in gradients(shape, 7)]
    whole = nn.Parameter(weight(shape).detach().cuda().bfloat16())
    first = build(name, [whole], bits=bits, quantise_from=16)
    kept = nn.Parameter(run(first, whole, grads[:3]))
    state = copy.deepcopy(first.state_dict())
    second = build(name, [kept], bits=bits, quantise_from=16)
    second.load_state_dict(state)
    assert all(v.is_cuda for v in second.state[kept].values() if isinstance(v, torch.Tensor))
    expected, found = run(first, whole, grads[3:]), run(second, kept, grads[3:])
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_the_peak_stays_below_that_of_adamw() -> None:
    """State after a step, and peak bytes of a step, of a projected 4096 x 4096 weight in bfloat16."""
    figures = []
    for method in ("AdamW", "GaLore"):
        torch.cuda.empty_cache()
        W = nn.Parameter(torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16))
        optimizer = torch.optim.AdamW([W], foreach=False) if method == "AdamW" else build(method, [W], rank=512, svd="randomised")
        G = torch.randn_like(W)
        run(optimizer, W, [G])
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(optimizer, W, [G])
        figures.append((start, torch.cuda.max_memory_allocated()))
        del W, optimizer, G
    assert figures[1][0] < figures[0][0]
    assert figures[1][1] < figures[0][1]
