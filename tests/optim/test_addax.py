"""Addax: the step against a plain restatement, the perturbed forward pass, the length partition, and every error."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.errors import BudgetError, GradientError, OptionError
from lowmem_compile.optim import Addax, LengthPartition
from lowmem_compile.optim.addax import step_peaks
from lowmem_compile.optim.addax.noise import block_rows, draw, move, rows_of
from lowmem_compile.optim.addax.perturbation import Perturbation
from lowmem_compile.optim.bases import mix
from tests.helpers import compile_graphs

V, D = 5000, 32


class Net(nn.Module):
    """Embedding, linears wider than a block, a convolution, a norm, attention, a tied head, a number."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(V, D), nn.Linear(D, 2500), nn.Linear(2500, D)
        self.norm, self.conv = nn.LayerNorm(D), nn.Conv1d(D, D, 3, padding=1)
        self.matrix, self.scale = nn.Parameter(torch.randn(D, D) / 8), nn.Parameter(torch.tensor(1.1))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embedding(index)
        x = x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))
        x = x + self.conv(x.mT).mT @ self.matrix.T * self.scale + self.matrix[0]
        return F.linear(x, self.embedding.weight).logsumexp(-1).mean()


def indices(rows: int = 2, length: int = 5) -> Tensor:
    return torch.randint(V, (rows, length))


def direction(params: list[Tensor], seed: int, step: int) -> list[Tensor]:
    """z of a step, whole."""
    s = mix(seed, step)
    return [draw(rows_of(p), s, k, 0, rows_of(p).shape[0]).view(p.shape) for k, p in enumerate(params)]


def moved(model: nn.Module, zs: list[Tensor], by: float) -> nn.Module:
    """A copy at θ + by·z."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p, z in zip(model.parameters(), zs, strict=True):
            p.copy_(p.to(torch.float64) + by * z.to(torch.float64))
    return model


def restated(model: nn.Module, long: Tensor, short: Tensor, step: int, **s: float) -> None:
    """θ ← θ - η(α g0 z + (1-α) g1) - ηωθ, with everything whole and nothing clever."""
    params: list[Tensor] = list(model.parameters())
    zs = direction(params, 3, step)
    with torch.no_grad():
        plus, minus = (moved(model, zs, sign * s["eps"])(long).item() for sign in (1, -1))
    g0 = (plus - minus) / (2 * s["eps"])
    grads = torch.autograd.grad(model(short), params)
    with torch.no_grad():
        for p, z, g in zip(params, zs, grads, strict=True):
            p.copy_(p - s["lr"] * (s["alpha"] * g0 * z + (1 - s["alpha"]) * g) - s["lr"] * s["decay"] * p)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_equal_a_plain_restatement(alpha: float, decay: float) -> None:
    model = Net()
    twin = copy.deepcopy(model)
    optimizer = Addax(model.parameters(), lr=1e-3, alpha=alpha, zo_eps=1e-2, weight_decay=decay, seed=3)
    for step in range(4):
        long, short = indices(2, 9), indices(3, 4)
        closures: dict[str, Callable[[], Tensor]] = {}
        if alpha > 0:
            closures["zeroth"] = lambda: model(long)  # noqa: B023
        if alpha < 1:
            closures["first"] = lambda: model(short)  # noqa: B023
        result = optimizer.step(**closures)
        restated(twin, long, short, step, lr=1e-3, alpha=alpha, eps=1e-2, decay=decay)
        assert (result.g0 is None) == (alpha == 0)
        assert (result.first_loss is None) == (alpha == 1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # g0 is a difference of losses over 2ε: its rounding, about 1e-4, comes in times η·α·z.
        assert (p - q).abs().max().item() <= 1e-6 * max(1.0, q.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_zeroth_order_evaluations_leave_every_bit(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer, x = Addax(model.parameters(), lr=0.0, alpha=1.0, zo_eps=0.1, seed=1), indices()
    losses = []
    for _ in range(3):
        result = optimizer.step(zeroth=lambda: model(x).float())
        losses.append(result.g0)
        for p, q in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, q)
            assert not hasattr(p, "_lowmem_ordinal")
    assert len(set(losses)) == 3


@pytest.mark.parametrize("autocast", [False, True])
def test_the_perturbed_forward_pass_is_the_model_at_the_moved_parameters(autocast: bool) -> None:
    model, x = Net().double() if not autocast else Net(), indices(3, 40)
    zs = [draw(rows_of(p), 5, k, 0, rows_of(p).shape[0]).view(p.shape) for k, p in enumerate(model.parameters())]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want, plain = moved(model, zs, 0.01)(x), model(x)
        with Perturbation(dict(enumerate(model.parameters())), 5, 0.01):
            got = model(x)
    assert abs(plain - want) > 1e-3
    assert abs(got - want) <= (1e-3 if autocast else 1e-6)  # bf16 products of other sizes; z is float32


def test_other_operations_read_perturbed_parameters_and_shapes_cost_nothing() -> None:
    w = nn.Parameter(torch.randn(4, 4))
    z = draw(w, 5, 0, 0, 4)
    x = torch.randn(3, 4)
    uses: list[Callable[[Tensor], Any]] = [
        lambda w: x @ w,
        lambda w: x @ w.T,
        lambda w: torch.einsum("ti,oi->to", x, w),
        lambda w: torch.cat([w, w]),
        lambda w: w[1:3].exp(),
        lambda w: torch.addmm(x[0], x, w),
        lambda w: 1 - w,
        lambda w: w.data,
        lambda w: F.embedding(torch.tensor([1, 2]), w, max_norm=0.5),
        lambda w: F.layer_norm(x, (4,), w[0], bias=w[1]),
    ]
    with torch.no_grad():
        for use in uses:
            want = use(w + 0.1 * z)
            with Perturbation({0: w}, 5, 0.1):
                torch.testing.assert_close(use(w), want)
                assert w.shape == (4, 4)
                assert w.size(0) == w.numel() // 4 == len(w)
                assert w.requires_grad
        with Perturbation({0: w}, 5, 0.1), pytest.raises(GradientError, match="writes to a parameter in place"):
            w.mul_(2)


def test_z_does_not_depend_on_who_asks_for_which_part() -> None:
    p = torch.empty(1000, 300)
    R = block_rows(p)
    whole = draw(p, 9, 2, 0, 1000)
    assert torch.equal(whole[R : 2 * R], draw(p, 9, 2, R, 2 * R))
    assert torch.equal(whole[2 * R : 2 * R + 7], draw(p, 9, 2, 2 * R, 2 * R + 7))
    assert torch.equal(whole[4 * R :], draw(p, 9, 2, 4 * R, 1000))
    assert not torch.equal(whole, draw(p, 9, 3, 0, 1000))
    assert not torch.equal(whole, draw(p, 10, 2, 0, 1000))
    assert abs(whole.mean().item()) < 0.01
    assert abs(whole.std().item() - 1) < 0.01
    q = torch.zeros(1000, 300)
    move(q, 9, 2, -1.0, 0.0)
    assert torch.equal(q, whole)


def test_tied_parameters_have_one_direction() -> None:
    model, x = Net().double(), indices()
    assert sum(p.shape == (V, D) for p in model.parameters()) == 1
    optimizer = Addax(model.parameters(), lr=0.0, alpha=1.0, zo_eps=1e-4)
    result = optimizer.step(zeroth=lambda: model(x))
    zs = direction(list(model.parameters()), 0, 0)
    grads = torch.autograd.grad(model(x), list(model.parameters()))
    slope = sum((g * z).sum().item() for g, z in zip(grads, zs, strict=True))
    assert result.g0 == pytest.approx(slope, rel=1e-5)


def test_both_evaluations_see_the_same_dropout() -> None:
    model, x = Net(dropout=0.5).double(), indices()
    model.train()
    with torch.no_grad():
        model.scale.zero_()
    optimizer = Addax(model.parameters(), lr=0.0, alpha=1.0, zo_eps=1e-7)
    slopes = [optimizer.step(zeroth=lambda: model(x)).g0 for _ in range(3)]
    assert all(abs(g or 0) < 100 for g in slopes)  # other masks would give a difference of losses over 2e-7


def test_a_compiled_forward_pass_is_perturbed_alike() -> None:
    model, x = Net().double(), indices(3, 8)
    call = compile_graphs(model)
    parameters = dict(enumerate(model.parameters()))
    with torch.no_grad():
        plain = call(x)
        for scale in (0.01, -0.01):
            with Perturbation(parameters, 5, scale):
                torch.testing.assert_close(call(x), model(x), rtol=1e-9, atol=0)
        torch.testing.assert_close(call(x), plain, rtol=0, atol=0)
    assert [e.training for e in call.entries] == [False, False]


def test_the_scratch_memory_of_a_perturbed_forward_pass() -> None:
    """Against inference: at most 1.05 times, without counting the parameters."""
    model = nn.Sequential(nn.Embedding(20000, 128), nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128), nn.LayerNorm(128)).eval()
    x = torch.randint(20000, (16, 256))
    parameters = dict(enumerate(model.parameters()))

    @torch.no_grad()
    def perturbed() -> Any:
        with Perturbation(parameters, 1, 1e-3):
            return model(x).mean()

    @torch.no_grad()
    def plain() -> Any:
        return model(x).mean()

    def peak(forward: Callable[[], Tensor]) -> int:
        forward()
        return peak_bytes(forward, lambda _: None).peak

    ratio = peak(perturbed) / peak(plain)
    assert ratio <= 1.05


@pytest.mark.e2e
def test_with_generated_code_a_step_is_the_restated_one_and_the_forward_peak_that_of_inference() -> None:
    class Small(nn.Sequential):
        def forward(self, index: Tensor) -> Any:
            return super().forward(index).square().mean()  # type: ignore[no-untyped-call]

    model = Small(nn.Embedding(V, 64), nn.Linear(64, 1200), nn.GELU(), nn.Linear(1200, 64))
    twin = copy.deepcopy(model)
    model.compile(backend="lowmem", options={"codec": "none", "gradients": "exact", "report": False})
    optimizer = Addax(model.parameters(), lr=1e-2, alpha=0.3, zo_eps=1e-2, seed=3, gradient_norm=True)
    for step in range(2):
        long, short = indices(8, 64), indices(3, 4)
        result = optimizer.step(zeroth=lambda: model(long), first=lambda: model(short))  # noqa: B023
        grads = torch.autograd.grad(twin(short), list(twin.parameters()))
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        restated(twin, long, short, step, lr=1e-2, alpha=0.3, eps=1e-2, decay=0.0)
        assert result.gradient_norm == pytest.approx(norm, rel=1e-4)
        assert all(p.grad is None for p in model.parameters())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p - q).abs().max().item() <= 1e-6 * max(1.0, q.abs().max().item())
    parameters = dict(enumerate(model.parameters()))

    @torch.no_grad()
    def perturbed() -> Any:
        with Perturbation(parameters, 1, 1e-3):
            return model(long)

    @torch.no_grad()
    def plain() -> Any:
        return model(long)

    peaks = []
    for forward in (perturbed, plain):
        forward()
        peaks.append(peak_bytes(forward, lambda _: None).peak)
    assert peaks[0] <= 1.05 * peaks[1]


def test_resume_is_exact() -> None:
    x, y = indices(2, 9), indices()

    def steps(model: nn.Module, optimizer: Addax, schedule: Any, count: int) -> None:
        for _ in range(count):
            optimizer.step(zeroth=lambda: model(x), first=lambda: model(y))
            schedule.step()

    def made(model: nn.Module) -> tuple[Addax, Any]:
        optimizer = Addax(model.named_parameters(), lr=1e-2, alpha=0.5, seed=4)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    whole = Net()
    half = copy.deepcopy(whole)
    steps(whole, *made(whole), 4)
    optimizer, schedule = made(half)
    steps(half, optimizer, schedule, 2)
    kept = copy.deepcopy((half.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    assert kept[1]["state"] == {}
    resumed = Net()
    resumed.load_state_dict(kept[0])
    optimizer, schedule = made(resumed)
    optimizer.load_state_dict(kept[1])
    schedule.load_state_dict(kept[2])
    assert optimizer.param_groups[0]["step"] == 2
    steps(resumed, optimizer, schedule, 2)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_frozen_parameters_groups_and_gradient_norm() -> None:
    model, x = Net(), indices()
    model.embedding.weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [model.up.weight, model.embedding.weight], "lr": 0.0},
        {"params": list(model.down.parameters())},
    ]
    optimizer = Addax(groups, lr=1e-2, alpha=0.5, gradient_norm=True)
    result = optimizer.step(zeroth=lambda: model(x), first=lambda: model(x))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"down.weight", "down.bias"}
    assert result.gradient_norm is not None
    assert result.gradient_norm > 0
    model.zero_grad()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 1.5}, r"group 0 has alpha=1.5; alpha is between 0 \(in-place SGD\) and 1 \(MeZO\)"),
        ({"alpha": -0.1}, r"alpha=-0.1"),
        ({"zo_eps": 0.0}, r"zo_eps=0.0; it is above 0"),
        ({"lr": -1.0}, r"lr=-1.0"),
        ({"weight_decay": -1.0}, r"weight_decay=-1.0"),
        ({"seed": -1}, r"seed=-1"),
    ],
)
def test_settings_outside_their_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Addax([nn.Parameter(torch.ones(2))], **wrong)


def test_groups_that_disagree_or_have_an_unknown_setting() -> None:
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(OptionError, match=r"group 1 has alpha=0.2; it is one setting for all groups, and group 0 has 0.5"):
        Addax(cast("list[dict[str, Any]]", [{"params": [p]}, {"params": [q], "alpha": 0.2}]), alpha=0.5)
    with pytest.raises(OptionError, match=r"no option 'epsilon'"):
        Addax([{"params": [p], "epsilon": 0.2}])


def test_closures_that_alpha_does_not_fit() -> None:
    p = nn.Parameter(torch.ones(2))

    def loss() -> Tensor:
        return (p * p).sum()

    with pytest.raises(OptionError, match=r"weight of 0.5; pass step\(first=...\)"):
        Addax([p], alpha=0.5).step(zeroth=loss)
    with pytest.raises(OptionError, match=r"weight of 1.0; pass step\(zeroth=...\)"):
        Addax([p], alpha=1.0).step()
    with pytest.raises(OptionError, match=r"no weight; leave out step\(zeroth=...\)"):
        Addax([p], alpha=0.0).step(zeroth=loss, first=loss)


def test_what_a_step_refuses_before_it_changes_anything() -> None:
    p = nn.Parameter(torch.ones(2))
    step = Addax([p], lr=0.1, alpha=0.5).step

    def loss(factor: float = 1.0) -> Tensor:
        return (p * factor).square().sum()

    with pytest.raises(GradientError, match=r"L\(θ \+ εz\) is nan"):
        step(zeroth=partial(loss, math.nan), first=loss)
    with pytest.raises(GradientError, match=r"L\(θ\) is inf"):
        step(zeroth=loss, first=partial(loss, math.inf))
    with pytest.raises(GradientError, match=r"read no parameter of this optimizer"):
        step(zeroth=lambda: torch.ones(()), first=loss)
    with pytest.raises(GradientError, match=r"a tensor of one element"):
        step(zeroth=lambda: p * p, first=loss)
    p.grad = torch.ones(2)
    with pytest.raises(GradientError, match=r"parameter 0 has a gradient from before"):
        step(zeroth=loss, first=loss)
    assert torch.equal(p, torch.ones(2))


LENGTHS = [5, 40, 7, 100, 12, 40, 3]


def test_a_length_partition() -> None:
    part = LengthPartition.at(LENGTHS, 12)
    assert (part.zeroth, part.first, part.threshold) == ((1, 3, 5), (0, 2, 4, 6), 12)
    assert LengthPartition.whole(LENGTHS).first == LengthPartition.whole(LENGTHS).zeroth == tuple(range(7))
    stream = part.batches(2, 3, seed=1)
    drawn = [next(stream) for _ in range(6)]
    assert all(len(a) == 2 and len(b) == 3 and set(a) <= {1, 3, 5} and set(b) <= {0, 2, 4, 6} for a, b in drawn)
    assert sorted(i for a, _ in drawn[:3] for i in a) == [1, 1, 3, 3, 5, 5]
    again = part.batches(2, 3, seed=1)
    assert [next(again) for _ in range(6)] == drawn
    assert next(part.batches(0, 1))[0] == []


def test_a_threshold_from_a_budget() -> None:
    asked: list[int] = []

    def peak(length: int) -> int:
        asked.append(length)
        return 1000 * length

    part = LengthPartition.within(LENGTHS, 13_000, peak)
    assert part.threshold == 12
    assert len(asked) <= 3
    assert LengthPartition.within(LENGTHS, "40 kB", peak).threshold == 40


def test_thresholds_that_leave_a_side_empty() -> None:
    with pytest.raises(OptionError, match=r"threshold of 2 leaves the short \(first-order\) side empty; lengths are 3 to 100"):
        LengthPartition.at(LENGTHS, 2)
    with pytest.raises(OptionError, match=r"threshold of 100 leaves the long .* alpha=0"):
        LengthPartition.at(LENGTHS, 100)
    with pytest.raises(BudgetError, match=r"shortest examples \(3\) needs 3000 bytes, more than the budget of 2000"):
        LengthPartition.within(LENGTHS, 2000, lambda n: 1000 * n)
    with pytest.raises(OptionError, match=r"fit into 100000 bytes: use alpha=0"):
        LengthPartition.within(LENGTHS, 100_000, lambda n: 1000 * n)
    with pytest.raises(OptionError, match="no examples"):
        LengthPartition.whole([])


def test_the_simulated_peak_of_a_step_grows_with_the_length() -> None:
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def loss(index: Tensor) -> Any:
        return model(index).square().mean()

    peak = step_peaks(loss, lambda length: {"index": torch.zeros(4, length, dtype=torch.int64)}, {"codec": "none"})
    short, long = peak(16), peak(128)
    assert 0 < short < long
    assert peak(16) == short


def test_report_says_what_is_held_and_what_moved_each_parameter() -> None:
    torch.manual_seed(0)
    model = Net()
    model.unused = nn.Parameter(torch.ones(3))
    model.norm.requires_grad_(False)
    optimizer = Addax(model.named_parameters(), lr=1e-3, alpha=0.5)
    before = {row.name: row for row in optimizer.report().rows}
    W = model.embedding.weight
    assert before["embedding.weight"].gradient_bytes == optimizer.report().largest_gradient == max(V * D, 2500 * D) * 4
    assert before["embedding.weight"].block_bytes == block_rows(W) * D * 4 < W.nbytes
    assert before["scale"].block_bytes == 4
    assert before["up.weight"].adamw_bytes == 2 * 2500 * D * 4
    assert before["up.weight"].first_order is None
    assert not before["norm.weight"].trained
    index = indices()
    optimizer.step(zeroth=lambda: model(index), first=lambda: model(index))
    after = {row.name: row for row in optimizer.report().rows}
    assert (after["up.weight"].first_order, after["up.weight"].zeroth_order) == (True, True)
    assert (after["unused"].first_order, after["unused"].zeroth_order) == (False, True)
    assert (after["norm.weight"].first_order, after["norm.weight"].zeroth_order) == (False, False)
    text = str(optimizer.report())
    assert "unused  3 float32  state 0, gradient 12 B for a moment, z 12 B at once; last step by z" in text
    assert "norm.weight  32 float32  frozen" in text
