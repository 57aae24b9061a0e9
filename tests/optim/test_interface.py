"""The optimizers as ordinary torch.optim.Optimizers: groups, schedulers, closures, resume."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_compile.optim import COAP, Fira, GaLore, LowRankOptimizer, report
from lowmem_compile.optim.pieces import LARGEST
from tests.optim.common import METHODS, build, feed, gradients, run, weight

SHAPES = [(24, 16), (16, 24), (20,)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [weight(shape, dtype) for shape in SHAPES]


def steps(count: int, seed: int = 0) -> list[list[Tensor]]:
    columns = [gradients(shape, count, seed=seed + i) for i, shape in enumerate(SHAPES[:2])]
    columns.append([G[:, 0] for G in gradients((20, 1), count, seed=seed + 2)])
    return [list(row) for row in zip(*columns, strict=True)]


def tensors_of(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from tensors_of(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_of(inner)
    else:
        yield value


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize(("bits", "dtype"), [(None, torch.float32), (8, torch.bfloat16), (32, torch.bfloat16)])
@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bitwise(name: str, at: int, bits: int | None, dtype: torch.dtype) -> None:
    """Saved right after the first step, and before or after a refresh; the rest is the same to the last bit."""
    options = {"bits": bits, "quantise_from": 16, "projector_bits": bits if bits == 8 else None}
    whole, work = parameters(dtype), steps(7)
    first = build(name, whole, **options)
    feed(first, whole, work[:at])
    kept = [p.detach().clone() for p in whole]
    state = saved_and_loaded(first.state_dict())
    feed(first, whole, work[at:])

    resumed = [nn.Parameter(p) for p in kept]
    second = build(name, resumed, **options)
    torch.manual_seed(123)
    second.load_state_dict(state)
    feed(second, resumed, work[at:])
    for ours, theirs in zip(resumed, whole, strict=True):
        assert torch.equal(ours, theirs)
    assert str(second.state_dict()["state"].keys()) == str(first.state_dict()["state"].keys())


@pytest.mark.parametrize("name", METHODS)
def test_the_state_holds_tensors_and_whole_numbers(name: str) -> None:
    params = parameters()
    optimizer = build(name, params, bits=8, quantise_from=16)
    feed(optimizer, params, steps(4))
    for state in optimizer.state.values():
        assert all(isinstance(value, (Tensor, int)) for value in state.values())
    groups = optimizer.state_dict()["param_groups"]
    assert all(isinstance(value, (int, float, str, bool, type(None))) for value in tensors_of(groups))


@pytest.mark.parametrize("name", METHODS)
def test_randomness_is_the_optimizers_own(name: str) -> None:
    """The global generator is neither read nor moved."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        params, before = parameters(), torch.get_rng_state()
        feed(build(name, params), params, steps(4))
        assert torch.equal(torch.get_rng_state(), before)
        results.append(params)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_seeds_give_other_projectors() -> None:
    results = []
    for seed in (0, 0, 1):
        W = weight((24, 16))
        results.append(run(build("Flora", [W], seed=seed), W, gradients((24, 16), 3)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    params = [weight((24, 16)), weight((24, 16))]
    feed(build("Flora", params), params, [[G, G] for G in gradients((24, 16), 3)])
    assert not torch.equal(*params)  # each parameter has its own


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(name: str, how: Any) -> None:
    params, work = parameters(), steps(6)
    optimizer = build(name, params)
    feed(optimizer, params, work[:3])
    twin: LowRankOptimizer = how(optimizer)
    copies = [p for group in twin.param_groups for p in group["params"]]
    feed(optimizer, params, work[3:])
    feed(twin, copies, work[3:])
    for a, b in zip(params, copies, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_parameters(name: str) -> None:
    """State in the parameter's dtype; the path stays near float32's."""
    narrow, wide = parameters(torch.bfloat16), parameters()
    start = [p.detach().clone() for p in wide]
    for params in (narrow, wide):
        feed(
            build(name, params, lr=0.2 if "Adafactor" in name else 0.02),
            params,
            [[G.bfloat16().float() for G in row] for row in steps(5)],
        )
    for n, w, s in zip(narrow, wide, start, strict=True):
        assert n.dtype == torch.bfloat16
        moved = w.detach() - s
        assert ((n.detach().float() - s) - moved).norm() / moved.norm() < 0.35


def test_float16_parameters_have_float32_moments() -> None:
    """The square of a small gradient is zero in float16."""
    W = weight((24, 16), torch.float16)
    optimizer = GaLore([W], rank=4)
    run(optimizer, W, [1e-4 * G for G in gradients((24, 16), 3)])
    assert optimizer.state[W]["exp_avg_sq"].dtype == torch.float32
    assert (optimizer.state[W]["exp_avg_sq"] > 0).all()


def test_schedulers_and_groups() -> None:
    """The learning rate of each group counts at each step: scheduled steps are those of an optimizer made for that rate."""
    W, twin, grads = weight((24, 16)), weight((24, 16)), gradients((24, 16), 6)
    optimizer = GaLore([{"params": [W], "lr": 0.1}], rank=4, update_interval=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    other = GaLore([twin], rank=4, update_interval=2)
    for epoch, G in enumerate(grads):
        run(optimizer, W, [G])
        scheduler.step()
        other.param_groups[0]["lr"] = 0.1 * 0.5**epoch
        run(other, twin, [G])
    assert torch.equal(W, twin)
    assert scheduler.get_last_lr()[0] == pytest.approx(0.1 * 0.5**6)
    warm = torch.optim.lr_scheduler.OneCycleLR(Fira([weight((24, 16))], rank=4), max_lr=0.1, total_steps=4)
    assert warm.get_last_lr()[0] > 0


def test_a_learning_rate_may_be_a_tensor() -> None:
    a, b = weight((24, 16)), weight((24, 16))
    grads = gradients((24, 16), 3)
    run(GaLore([a], torch.tensor(0.25).item(), rank=4), a, grads)
    optimizer = GaLore([b], rank=4)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    run(optimizer, b, grads)
    assert torch.equal(a, b)


def test_rank_side_and_interval_per_group() -> None:
    shapes = [(24, 16), (16, 24), (32, 20), (16, 24)]
    params = [weight(shape) for shape in shapes]
    groups: list[dict[str, Any]] = [
        {"params": [params[0]], "rank": 3},
        {"params": [params[1]], "rank_ratio": 4, "update_interval": 1, "side": "input"},
        {"params": [params[2]]},
        {"params": [params[3]], "rank": None},
    ]
    optimizer = GaLore(groups, rank=5)
    feed(optimizer, params, [[gradients(s, 1)[0] for s in shapes]])
    shapes_of = [tuple(optimizer.state[p]["exp_avg"].shape) for p in params]
    assert shapes_of == [(24, 3), (16, 4), (32, 5), (16, 24)]
    assert [row.side for row in report(optimizer).rows] == ["right", "right", "right", ""]


def test_closures() -> None:
    W = weight((24, 16))
    x = torch.randn(40, 16)
    optimizer = GaLore([W], 0.05, rank=4)
    calls = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = (x @ W.T).square().mean()
        loss.backward()
        calls.append(loss.item())
        return calls[-1]

    assert optimizer.step(closure) == calls[0]
    assert optimizer.step(closure) == calls[1]
    assert len(calls) == 2
    assert calls[1] < calls[0]
    assert optimizer.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    W = weight((24, 16))
    optimizer = GaLore([W], rank=4)
    run(optimizer, W, gradients((24, 16), 1))
    optimizer.zero_grad(set_to_none=set_to_none)
    assert (W.grad is None) == set_to_none
    if W.grad is not None:
        assert not W.grad.any()


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_of_zero_does_no_harm(name: str) -> None:
    W, grads = weight((24, 16)), gradients((24, 16), 6)
    start = W.detach().clone()
    optimizer = build(name, [W], lr=0.05)
    run(optimizer, W, [torch.zeros(24, 16), grads[0], torch.zeros(24, 16), torch.zeros(24, 16), *grads[1:]])
    assert W.isfinite().all()
    assert (W.detach() - start).abs().max() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_a_parameter_without_gradient_is_left_alone(name: str) -> None:
    """Also at a refresh: its basis is made with its next gradient, as if the step had not been."""
    a, b = parameters(), parameters()
    work = steps(6)
    with_gap, without = build(name, a), build(name, b)
    feed(with_gap, a, work[:2])
    before = [p.detach().clone() for p in a]
    for p in a:
        p.grad = None
    with_gap.step()
    assert all(torch.equal(p, q) for p, q in zip(a, before, strict=True))
    feed(with_gap, a, work[2:])
    feed(without, b, work)
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)


def test_named_parameters() -> None:
    model = nn.Linear(16, 24)
    optimizer = GaLore(model.named_parameters(), rank=4)
    assert [row.name for row in report(optimizer).rows] == ["weight", "bias"]


def test_groups_can_be_added_later() -> None:
    W, late = weight((24, 16)), weight((40, 30))
    optimizer = COAP([W], rank=4)
    run(optimizer, W, gradients((24, 16), 2))
    optimizer.add_param_group({"params": [late], "rank": 7})
    run(optimizer, late, gradients((40, 30), 1))
    assert optimizer.state[late]["exp_avg"].shape == (40, 7)


def test_the_users_groups_are_not_changed() -> None:
    group = {"params": [weight((24, 16))], "rank": 4}
    GaLore([group])
    assert set(group) == {"params", "rank"}


@pytest.mark.parametrize("bits", [None, 8])
def test_large_unprojected_parameters_are_updated_in_pieces(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result."""
    grads = gradients((70, 33), 4)
    results = []
    for largest in (LARGEST, 1000):
        monkeypatch.setattr("lowmem_compile.optim.pieces.LARGEST", largest)
        W = weight((70, 33), torch.bfloat16)
        results.append(run(GaLore([{"params": [W], "rank": None}], bits=bits, quantise_from=1, weight_decay=0.1), W, grads))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 33), (33, 70)])
@pytest.mark.parametrize("name", ["COAP", "GaLore Adafactor", "Flora"])
def test_large_projected_parameters_go_by_blocks_of_rows(
    name: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same result, up to the order in which float32 sums are taken."""
    grads = [G.to(dtype) for G in gradients(shape, 4)]
    results = []
    for largest in (LARGEST, 300, 1):
        monkeypatch.setattr("lowmem_compile.optim.pieces.LARGEST", largest)
        W = weight(shape, dtype)
        results.append(run(build(name, [W], weight_decay=0.1, update_interval=10), W, grads).float())
    unit = 1e-6 if dtype == torch.float32 else 2**-7
    for other in results[1:]:
        assert (other - results[0]).abs().max() <= unit


def test_gradient_scaling() -> None:
    """torch.amp.GradScaler unscales, and leaves a step with an infinite gradient out."""
    W, twin, grads = weight((24, 16)), weight((24, 16)), gradients((24, 16), 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    optimizer, other = GaLore([W], rank=4, update_interval=1), GaLore([twin], rank=4, update_interval=1)
    for t, G in enumerate(grads):
        optimizer.zero_grad()
        scaler.scale((W * (G if t != 1 else G * torch.inf)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    run(other, twin, [grads[0], grads[2]])
    torch.testing.assert_close(W, twin, rtol=0, atol=1e-6)
