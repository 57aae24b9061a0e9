"""Merges: what they compute, in which order, and what they leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowmem_compile
from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.errors import GradientError, LowMemError, OptionError
from lowmem_compile.optim.loqt import LoQTLinear
from lowmem_compile.optim.loqt.linear import PROJECTOR, WEIGHT
from lowmem_compile.optim.loqt.merge import compensate
from lowmem_compile.optim.loqt.schedule import merge_steps, next_merge
from tests.optim.loqt.common import D, Mixer, N, R, batch, loss_of, train, under_loqt


def test_the_published_schedule() -> None:
    steps = merge_steps(100, 1.2)
    assert [next(steps) for _ in range(6)] == [0, 100, 201, 302, 403, 505]
    for total, merges in ((10_000, 40), (20_000, 45), (60_000, 52)):
        assert sum(1 for _ in _below(total)) == merges
    assert [next_merge(s, 100, 1.2) for s in (0, 1, 100, 101, 505, 506)] == [0, 100, 100, 201, 505, 607]
    constant = merge_steps(10, 0)
    assert [next(constant) for _ in range(5)] == [0, 10, 20, 30, 40]


def _below(total: int) -> Any:
    for step in merge_steps(100, 1.2):
        if step >= total:
            return
        yield step


def test_training_merges_when_the_schedule_says() -> None:
    model, training = under_loqt(merge=False, interval=2)
    optimizer = torch.optim.SGD(training.parameters(), lr=0.3)
    seen = []
    for step in range(8):
        assert training.next_merge == next_merge(step, 2, 1.2)
        before = training.merges
        train(model, training, optimizer, range(step, step + 1))
        seen += [step] * (training.merges - before)
    assert seen == [0, 2, 5]
    assert training.step == 8
    assert training.last is not None
    assert training.last.step == 5


@pytest.mark.parametrize("side", ["std", "input"])
@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_error_compensation(rounds: int, side: Any) -> None:
    """B is the least-squares solution for what quantisation lost, in the quantised P; more rounds never lose more."""
    model, training = under_loqt(merge=False, side=side, compensation=rounds)
    whole = {name: layer.merged_weight().clone() for name, layer in training.layers.items()}
    done = training.merge(lambda: loss_of(model))
    for name, layer in training.layers.items():
        W, P = whole[name], layer.decoded(PROJECTOR, torch.float32)
        left = W - layer.merged_weight()
        assert done.errors[name] == pytest.approx(float(left.norm() / W.norm()), rel=1e-4)
        if rounds == 0:
            assert not layer.B.any()
            assert torch.equal(layer.decoded(WEIGHT, torch.float32), layer.merged_weight())
        else:
            assert (left @ P if layer.side == "right" else P.T @ left).abs().max() < 1e-5  # nothing P could express is left
        errors = [compensate(layer, W, c).error for c in (0, 1, 2, 5, 10)]
        assert errors == sorted(errors, reverse=True)
        assert errors[1] < errors[0]


@pytest.mark.parametrize("options", [{}, {"quantise": False}, {"side": "input", "double_quantise": True}], ids=str)
def test_a_merge_keeps_the_weight(options: dict[str, Any]) -> None:
    """W before and after differ by the reported error; without quantisation by rounding."""
    model, training = under_loqt(**options)
    with torch.no_grad():
        for layer in training.layers.values():
            layer.B.add_(0.05 * torch.randn_like(layer.B))
    before = {name: layer.merged_weight() for name, layer in training.layers.items()}
    addresses = {key: b.data_ptr() for key, b in model.named_buffers()}
    projectors = {name: layer.decoded(PROJECTOR, torch.float32).clone() for name, layer in training.layers.items()}
    done = training.merge(lambda: loss_of(model, 1))
    for name, layer in training.layers.items():
        lost = float((layer.merged_weight() - before[name]).norm() / before[name].norm())
        assert lost == pytest.approx(done.errors[name], rel=1e-3, abs=1e-6)
        assert lost < (1e-6 if options.get("quantise") is False else 0.1)
        assert not torch.equal(layer.decoded(PROJECTOR, torch.float32), projectors[name])
        assert bool(layer.B.any()) is (options.get("quantise") is not False)
    assert {key: b.data_ptr() for key, b in model.named_buffers()} == addresses  # in place: a compiled model need not notice


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_the_gradient_is_of_the_whole_weight(svd: Any) -> None:
    """P spans the first singular vectors of ∂loss/∂W of the exported model, biases and norms frozen or not."""
    model, training = under_loqt(quantise=False, merge=False, svd=svd)
    plain = training.merge_and_export()
    loss_of(plain).backward()
    training.merge(lambda: loss_of(model))
    for name, layer in training.layers.items():
        G = plain.get_submodule(name).weight.grad
        assert isinstance(G, Tensor)
        P = layer.decoded(PROJECTOR, torch.float32)
        inside = torch.linalg.norm(G @ P if layer.side == "right" else P.T @ G)
        best = torch.linalg.norm(torch.linalg.svdvals(G)[:R])
        assert inside >= (0.999999 if svd == "exact" else 0.99) * best


def test_nothing_else_is_touched() -> None:
    """Gradients, requires_grad, and parameters outside the layers stay; the layers' own forward pass is back."""
    model, training = under_loqt()
    model.norm.bias.requires_grad_(False)
    model.norm.weight.grad = torch.full_like(model.norm.weight, 3.0)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    rest = {name: p.detach().clone() for name, p in model.named_parameters() if not name.endswith("B")}
    training.merge(lambda: loss_of(model))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert torch.equal(model.norm.weight.grad, torch.full_like(model.norm.weight, 3.0))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "norm.weight")
    assert all(torch.equal(p, rest[name]) for name, p in model.named_parameters() if name in rest)
    assert all(layer.intercept is None for layer in training.layers.values())


def test_one_whole_weight_and_one_gradient_at_a_time() -> None:
    """The peak of a merge does not grow with the depth: 6 layers more take less than one whole weight more."""

    def peak(depth: int) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(depth)])
        x = torch.randn(2, 128)
        training = lowmem_compile.loqt(model, 4, svd="randomised", compensation=1)
        training.merge(lambda: model(x).square().sum())
        return peak_bytes(lambda: model(x).sum(), lambda _: training.merge(lambda: model(x).square().sum())).peak

    peak(2)
    assert peak(8) - peak(2) < 4 * 128 * 128


class Shared(nn.Module):
    """One linear used three times, as in models that share weights between blocks."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.linear, self.reentrant = nn.Linear(D, D), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            if self.reentrant is None:
                x = torch.tanh(self.linear(x))
            else:
                x = checkpoint(lambda t: torch.tanh(self.linear(t)), x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("checkpointed", [None, False])
def test_a_layer_that_is_used_several_times(checkpointed: bool | None) -> None:
    """Its gradient is the sum over its uses, also where checkpointing repeats its forward pass."""
    torch.manual_seed(0)
    model = Shared(checkpointed)
    plain = Shared()
    plain.load_state_dict(model.state_dict())
    loss_of(plain).backward()
    training = lowmem_compile.loqt(model, R, quantise=False)
    training.merge(lambda: loss_of(model))
    (layer,) = training.layers.values()
    assert plain.linear.weight.grad is not None
    P = layer.decoded(PROJECTOR, torch.float32)
    wanted = torch.linalg.svd(plain.linear.weight.grad).Vh[:R].T
    assert torch.allclose(P @ P.T, wanted @ wanted.T, atol=1e-4)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_of_a_shared_layer_is_refused() -> None:
    model = Shared(checkpointed=True)
    training = lowmem_compile.loqt(model, R)
    x, _ = batch()
    with pytest.raises(GradientError, match=r"does not depend on any LoQT layer.*use_reentrant=False"):
        training.merge(lambda: model(x).square().mean())
    x.requires_grad_()
    with pytest.raises(GradientError, match="linear is used several times inside reentrant checkpointing"):
        training.merge(lambda: model(x).square().mean())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one: nn.Module = nn.Linear(D, D)
        self.two: nn.Module = nn.Linear(D, D)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        y: Tensor = self.one(x)
        if both:
            y = self.two(y)
        return y


def test_a_layer_without_a_gradient_waits() -> None:
    """It keeps its whole weight, frozen, and takes part in training; the next merge that reaches it converts it."""
    model = Experts()
    training = lowmem_compile.loqt(model, R)
    x, target = batch()
    done = training.merge(lambda: (model(x, both=False) - target).square().mean())
    assert done.untouched == ("two",)
    assert isinstance(model.two, LoQTLinear)
    assert not model.two.merged
    model(x, both=True).sum().backward()
    assert training.layers["one"].B.grad is not None
    assert training.layers["two"].B.grad is None
    assert training.merge(lambda: (model(x, both=True) - target).square().mean()).untouched == ()
    assert model.two.merged


def test_what_is_not_finite() -> None:
    model, training = under_loqt()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(GradientError, match="the loss of a merge's batch is nan; nothing has been changed"):
        training.merge(lambda: loss_of(model) * float("nan"))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def spoilt() -> Tensor:
        x, target = batch()
        hidden = model.norm(model.first(x))
        hidden.register_hook(lambda g: g * float("inf"))
        loss: Tensor = (model.down(torch.tanh(model.up(hidden))) - target).square().mean()
        return loss

    with pytest.raises(GradientError, match=r"gradient of first is not finite.*Merged: 2 of 3 layers"):
        training.merge(spoilt)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key.startswith("first"))
    assert training.merges == 1
    assert all(layer.intercept is None for layer in training.layers.values())


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, training = under_loqt()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(LowMemError, match="LoQT merges in one process only"):
        training.merge(lambda: loss_of(model))


def test_a_closure_that_gives_no_loss() -> None:
    model, training = under_loqt()
    other = Mixer()
    with pytest.raises(OptionError, match="returns the loss, a tensor of one element"):
        training.merge(lambda: model(batch()[0]))
    with pytest.raises(OptionError, match="returns the loss"):
        training.merge(lambda: None)  # type: ignore[arg-type, return-value]
    for closure in (lambda: loss_of(other), lambda: loss_of(model).detach()):
        with pytest.raises(GradientError, match="does not depend on any LoQT layer"):
            training.merge(closure)
    assert loss_of(model).requires_grad
    assert batch()[0].shape == (N, D)
