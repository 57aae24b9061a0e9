"""recognise_activation: hand-written GELU and SiLU become the library's operation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.passes.recognise_activation import RecogniseActivation
from tests.helpers import (
    TOLERANCE,
    apply,
    assert_same,
    check_gradients,
    compile_graphs,
    dynamo_graph,
    run,
    run_double,
    targets,
)

NAME = "recognise_activation"
PASS = RecogniseActivation()
ROOT = math.sqrt(2 / math.pi)


def in_place(x: Tensor) -> Tensor:
    """Code after the activation sees what the product wrote into its first factor."""
    h = x + 1
    alias = h
    h *= torch.sigmoid(h)
    return alias + h


def changed_between(x: Tensor) -> Tensor:
    h = x + 1
    s = torch.sigmoid(h)
    h.add_(1)
    return h * s


SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "gelu (BERT)": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu"),
    "gelu (methods)": (lambda x: 0.5 * x * (1 + (x * 2**-0.5).erf()), "gelu"),
    "gelu (product last)": (lambda x: torch.mul(torch.add(torch.erf(x / 2**0.5), 1), x * 0.5), "gelu"),
    "gelu (tanh, GPT-2)": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
        "gelu",
    ),
    "gelu (tanh, fast)": (
        lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608028654 * (1 + 0.044715 * x * x))),
        "gelu",
    ),
    "silu": (lambda x: x * torch.sigmoid(x), "silu"),
    "silu (method)": (lambda x: x.sigmoid() * x, "silu"),
    "quick gelu (CLIP)": (lambda x: x * torch.sigmoid(1.702 * x), "silu"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fires_once_and_keeps_value_and_gradient(spelling: str) -> None:
    fn, name = SPELLINGS[spelling]
    x = torch.linspace(-8, 8, 77).view(7, 11).requires_grad_()
    gm, inputs = dynamo_graph(lambda x: fn(x + 0.5), x)
    sites, done = apply(PASS, gm)
    assert [s.action for s in sites] == ["rewritten"]
    assert len(done) == 1
    assert targets(gm.graph).count(name) == 1
    assert not {"erf", "tanh", "sigmoid", "pow"} & set(targets(gm.graph))
    (out,) = gm(*inputs)
    (got,) = torch.autograd.grad(out.sum(), x)
    wide = x.detach().double().requires_grad_()
    want = fn(wide + 0.5)
    (slope,) = torch.autograd.grad(want.sum(), wide)
    assert_same({"y": out, "dx": got}, {"y": want, "dx": slope}, TOLERANCE[torch.float32])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_is_idempotent(spelling: str) -> None:
    fn, _ = SPELLINGS[spelling]
    gm, _ = dynamo_graph(lambda x: fn(torch.cos(x)), torch.randn(3, 8, requires_grad=True))
    assert len(apply(PASS, gm)[1]) == 1
    code = gm.code
    sites, done = apply(PASS, gm)
    assert (sites, done) == ([], [])
    assert gm.code == code


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * torch.sigmoid(1.5 * x),
        lambda x: 0.5 * x * (1.0 + torch.erf(x / 1.5)),
        lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.05 * x**3))),
        lambda x: x * torch.tanh(x),
        lambda x: x * torch.sigmoid(-x),
        lambda x: 1.001 * x * torch.sigmoid(x),
        lambda x: F.softplus(x) * x,
    ],
    ids=["slope 1.5", "erf of x/1.5", "cubic 0.05", "x tanh x", "sigmoid(-x)", "scaled", "softplus"],
)
def test_another_function_is_left_alone(fn: Callable[[Tensor], Tensor]) -> None:
    gm, _ = dynamo_graph(lambda x: fn(x + 0.5), torch.randn(3, 8, requires_grad=True))
    code = gm.code
    assert apply(PASS, gm) == ([], [])
    assert gm.code == code


@pytest.mark.parametrize("fn", [in_place, changed_between])
def test_in_place_operations_are_left_alone(fn: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 8)
    gm, inputs = dynamo_graph(fn, x)
    _, done = apply(PASS, gm)
    assert not done
    assert torch.equal(gm(*inputs)[0], fn(x))


def test_a_product_of_two_tensors_is_left_alone() -> None:
    gm, _ = dynamo_graph(lambda x, y: x * torch.sigmoid(y), torch.randn(4, 8), torch.randn(4, 8))
    assert apply(PASS, gm) == ([], [])


def test_a_cast_inside_declines() -> None:
    gm, inputs = dynamo_graph(lambda x: (x.float() * torch.sigmoid(x.float())).to(torch.bfloat16), torch.randn(4, 8).bfloat16())
    sites, done = apply(PASS, gm)
    assert all(s.code == "LM205" for s in sites)
    assert not done or targets(gm.graph).count("silu") == 1
    torch.testing.assert_close(gm(*inputs)[0].float(), F.silu(inputs[0].float()), rtol=2**-8, atol=0)


def test_an_intermediate_used_elsewhere_declines() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(x)
        return x * s, s

    gm, inputs = dynamo_graph(fn, torch.randn(4, 8))
    code = gm.code
    sites, done = apply(PASS, gm)
    assert [(s.action, s.code) for s in sites] == [("declined", "LM206")]
    assert not done
    gm.recompile()
    assert gm.code == code
    assert torch.equal(gm(*inputs)[1], torch.sigmoid(inputs[0]))


def test_the_input_may_be_used_elsewhere() -> None:
    gm, inputs = dynamo_graph(lambda x: (x * torch.sigmoid(x) + x, x - 1), torch.randn(4, 8))
    sites, _ = apply(PASS, gm)
    assert [s.action for s in sites] == ["rewritten"]
    y, z = gm(*inputs)
    torch.testing.assert_close(y, F.silu(inputs[0]) + inputs[0])
    assert torch.equal(z, inputs[0] - 1)


def test_two_activations_in_a_chain_both_fire() -> None:
    def fn(x: Tensor) -> Tensor:
        h = x * torch.sigmoid(x)
        return 0.5 * h * (1.0 + torch.erf(h / math.sqrt(2.0)))

    gm, inputs = dynamo_graph(fn, torch.randn(4, 8))
    sites, _ = apply(PASS, gm)
    assert [s.action for s in sites] == ["rewritten", "rewritten"]
    torch.testing.assert_close(gm(*inputs)[0], F.gelu(F.silu(inputs[0])))


def test_dynamic_dimension() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.up(x)
            return h * torch.sigmoid(h)

    model = Model()
    graphs = compile_graphs(model, gradients="exact")
    for rows in (6, 9):
        check_gradients(graphs, model, [torch.randn(rows, 8, requires_grad=True)], mark=0)
    assert len(graphs.entries) == 1
    assert graphs.rewritten(NAME) == 1


def test_hand_written_saves_no_more_than_the_library() -> None:
    class Model(nn.Module):
        def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.up, self.act = nn.Linear(8, 32), act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.up(x))

    kept = []
    for act in (SPELLINGS["gelu (BERT)"][0], F.gelu):
        model = Model(act)
        graphs = compile_graphs(model, gradients="exact")
        inputs = [torch.randn(5, 8)]
        assert_same(run(graphs, model, inputs), run_double(model, inputs), TOLERANCE[torch.float32])
        kept.append(graphs.chosen.saved_bytes())
    assert kept == [5 * 32 * 4, 5 * 32 * 4]
