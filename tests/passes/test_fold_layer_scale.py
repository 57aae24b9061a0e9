"""fold_layer_scale: a vector that scales a linear's output moves into the linear, whose output is not kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.passes.fold_layer_scale import FoldLayerScale
from tests.helpers import (
    TOLERANCE,
    Graphs,
    apply,
    assert_same,
    check_gradients,
    compile_graphs,
    dynamo_graph,
    error,
    run,
    run_double,
    targets,
)

NAME = "fold_layer_scale"
PASS = FoldLayerScale()
D, ROWS = 16, 12
FP32 = TOLERANCE[torch.float32]


class Scaled(nn.Module):
    """A linear and its LayerScale, after an activation that is kept anyway."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.inner, self.linear, self.scale = nn.Linear(D, D), nn.Linear(D, D, bias=bias), nn.Parameter(torch.rand(D) + 0.5)

    def hidden(self, x: Tensor) -> Tensor:
        h: Tensor = torch.tanh(self.inner(x))
        return h

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.hidden(x)) * self.scale


def rows(count: int = ROWS) -> Tensor:
    return torch.randn(count, D, requires_grad=True)


def checked(model: nn.Module, x: Tensor | None = None, **options: Any) -> Graphs:
    """Compile, run, and compare forward and every gradient with float64."""
    graphs = compile_graphs(model, gradients="exact", **options)
    check_gradients(graphs, model, [rows() if x is None else x])
    return graphs


def same_as_eager(model: nn.Module, x: Tensor, tolerance: float = FP32, autocast: torch.dtype | None = None) -> Graphs:
    graphs = compile_graphs(model, gradients="exact")
    got, want = run(graphs, model, [x], autocast=autocast), run(model, model, [x], autocast=autocast)
    assert_same(got, want, tolerance)
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in want.items()}
    return graphs


class OnTheLeft(Scaled):
    def forward(self, x: Tensor) -> Any:
        return torch.mul(self.scale, self.linear(self.hidden(x)))


class IdleDropout(Scaled):
    def forward(self, x: Tensor) -> Any:
        return x + F.dropout(self.linear(self.hidden(x)), 0.0, self.training) * self.scale


class Computed(Scaled):
    """The scale is an expression of a parameter."""

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.hidden(x)) * self.scale.exp()


class Zero(Scaled):
    """Nothing is divided by the scale."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.scale)


@pytest.mark.parametrize("model", [Scaled, lambda: Scaled(bias=False), OnTheLeft, IdleDropout, Computed, Zero])
def test_fires_once_and_matches_float64(model: Callable[[], nn.Module]) -> None:
    assert checked(model()).codes(NAME) == ["LM100"]


@pytest.mark.parametrize("shape", [(3, 4, D), (2, 3, 2, D)])
def test_any_rank(shape: tuple[int, ...]) -> None:
    assert checked(Scaled(), torch.randn(shape, requires_grad=True)).rewritten(NAME) == 1


def test_float64() -> None:
    graphs = same_as_eager(Scaled().double(), rows().detach().double().requires_grad_(), TOLERANCE[torch.float64])
    assert graphs.rewritten(NAME) == 1


def test_autocast() -> None:
    model, x = Scaled(), rows()
    graphs = compile_graphs(model, gradients="exact")
    assert_same(run(graphs, model, [x], autocast=torch.bfloat16), run_double(model, [x]), TOLERANCE[torch.bfloat16])
    assert graphs.rewritten(NAME) == 1


def test_every_gradient_by_hand() -> None:
    """dW = diag(λ)·G', db = λ∘d, dλ = row sums of W∘G' + b∘d, with G' = dzᵀ a and d = column sums of dz."""

    class Bare(Scaled):
        def hidden(self, x: Tensor) -> Tensor:
            return x

    model, a, dz = Bare(), rows(), torch.randn(ROWS, D)
    graphs = compile_graphs(model, gradients="exact")
    graphs(a).backward(dz)
    w, b, scale, wide = (t.detach().double() for t in (model.linear.weight, model.linear.bias, model.scale, a))
    g, d = dz.double().t() @ wide, dz.double().sum(0)
    want = {"W": scale[:, None] * g, "b": scale * d, "λ": (w * g).sum(1) + b * d, "a": (dz.double() * scale) @ w}
    found = {"W": model.linear.weight.grad, "b": model.linear.bias.grad, "λ": model.scale.grad, "a": a.grad}
    assert_same({k: v for k, v in found.items() if v is not None}, want, FP32)
    assert graphs.rewritten(NAME) == 1


def test_the_output_of_the_linear_is_not_kept() -> None:
    model = Scaled()
    with_pass, without = checked(model).chosen, checked(model, disable=[NAME]).chosen
    assert without.saved_bytes() - with_pass.saved_bytes() == ROWS * D * 4
    assert [t.nbytes for t in with_pass.saved_tensors()] == [ROWS * D * 4], "tanh alone"


def test_the_report_counts_the_bytes() -> None:
    (site,) = checked(Scaled()).sites(NAME)
    assert site.bytes_before - site.bytes_after == ROWS * D * 4


class UsedElsewhere(Scaled):
    def forward(self, x: Tensor) -> Any:
        y = self.linear(self.hidden(x))
        return y * self.scale + torch.tanh(y)


class Returned(Scaled):
    def forward(self, x: Tensor) -> Any:
        y = self.linear(self.hidden(x))
        return y * self.scale, y


class TwoScales(Scaled):
    def forward(self, x: Tensor) -> Any:
        y = self.linear(self.hidden(x))
        return y * self.scale, y * self.scale.exp()


class ChangedInPlace(Scaled):
    """The linear's output is changed before it is scaled."""

    def forward(self, x: Tensor) -> Any:
        y = self.linear(self.hidden(x))
        y.add_(1.0)
        return y * self.scale


class OneElement(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1))


class OneOutput(Scaled):
    """The product is wider than the linear's output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, 1)


class Frozen(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.scale.requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "codes"),
    [
        (UsedElsewhere, ["LM206"]),
        (Returned, ["LM206"]),
        (TwoScales, ["LM206", "LM206"]),
        (ChangedInPlace, ["LM206"]),
        (OneElement, ["LM206"]),
        (OneOutput, ["LM206"]),
        (Frozen, ["LM308"]),
    ],
)
def test_declines(model: Callable[[], nn.Module], codes: list[str]) -> None:
    assert checked(model()).codes(NAME) == codes


@pytest.mark.parametrize(("count", "code"), [(2, "LM306"), (3, "LM100")])
def test_a_small_output_declines(count: int, code: str) -> None:
    assert checked(Scaled(), rows(count)).codes(NAME) == [code]


def test_inference_declines() -> None:
    model, x = Scaled(), rows()
    graphs = compile_graphs(model)
    with torch.no_grad():
        assert error(graphs(x), model(x)) <= FP32
    assert graphs.codes(NAME) == ["LM303"]


def test_another_dtype_declines() -> None:
    model = Scaled().bfloat16()
    model.scale = nn.Parameter(model.scale.detach().float())
    graphs = same_as_eager(model, rows().detach().bfloat16().requires_grad_(), TOLERANCE[torch.bfloat16])
    assert graphs.codes(NAME) == ["LM205"]


class Matrix(Scaled):
    """One factor for each element."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(ROWS, D))


class ActiveDropout(Scaled):
    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.linear(self.hidden(x)), 0.4) * self.scale


class Number(Scaled):
    def forward(self, x: Tensor) -> Any:
        return self.linear(self.hidden(x)) * 3.0 + self.scale


class Between(Scaled):
    def forward(self, x: Tensor) -> Any:
        return torch.tanh(self.linear(self.hidden(x))) * self.scale


@pytest.mark.parametrize("model", [Matrix, ActiveDropout, Number, Between])
def test_near_miss(model: type[Scaled]) -> None:
    graphs = compile_graphs(net := model(), gradients="exact", inductor={"fallback_random": True})
    run(graphs, net, [rows()])
    assert graphs.sites(NAME) == []


class Tied(Scaled):
    """One weight, scaled and unscaled."""

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return self.linear(h) * self.scale + F.linear(h, self.linear.weight)


class TiedTwice(Scaled):
    """One linear and one scale, used twice."""

    def forward(self, x: Tensor) -> Any:
        return self.linear(torch.tanh(self.linear(self.hidden(x)) * self.scale)) * self.scale


class OneScaleOfTwo(Scaled):
    """Two linears, one scale."""

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.hidden(x)) * self.scale + self.inner(x * 2) * self.scale


class Residual(Scaled):
    def forward(self, x: Tensor) -> Any:
        return x + self.linear(self.hidden(x)) * self.scale


class ScaleFromALinear(Scaled):
    """The scale is a scaled linear itself."""

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.hidden(x)) * (self.inner(x[0]) * self.scale)


@pytest.mark.parametrize(
    ("model", "count"), [(Tied, 1), (TiedTwice, 2), (OneScaleOfTwo, 2), (Residual, 1), (ScaleFromALinear, 1)]
)
def test_other_users(model: type[Scaled], count: int) -> None:
    assert checked(model()).rewritten(NAME) == count


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_with_a_folded_norm(norm: type[nn.Module]) -> None:
    """Both folds on one linear."""

    class Model(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm(D)
            for p in self.norm.parameters():
                nn.init.normal_(p, 0.7, 0.3)

        def hidden(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.inner(x))
            return y

    graphs = checked(Model(), fold_norm_affine="always")
    assert graphs.rewritten(NAME) == 1
    assert graphs.rewritten("fold_norm_affine") == 1


@pytest.mark.parametrize("part", ["linear", "inner", "linear.weight", "linear.bias"])
def test_frozen_linears(part: str) -> None:
    """The scale alone needs a gradient, and gets it through the product of W and G'."""
    model = Scaled()
    (model.get_parameter(part) if "." in part else model.get_submodule(part)).requires_grad_(False)
    graphs = checked(model)
    assert graphs.rewritten(NAME) == 1


def test_idempotent() -> None:
    gm, inputs = dynamo_graph(model := Scaled(), x := rows())
    sites, done = apply(PASS, gm)
    assert [s.code for s in sites] == ["LM100"]
    assert len(done) == 1
    before = targets(gm.graph)
    assert apply(PASS, gm) == ([], []), "not idempotent"
    assert targets(gm.graph) == before
    assert error(gm(*inputs)[0], model(x)) <= FP32


def test_dynamic_dimension() -> None:
    model = Scaled()
    graphs = compile_graphs(model, gradients="exact")
    for count in (6, 9):
        check_gradients(graphs, model, [rows(count)], mark=0)
    assert len(graphs.entries) == 1
    assert graphs.rewritten(NAME) == 1


def test_changed_parameters_are_honoured() -> None:
    """An optimizer step, and then a loaded state dict, which never shows the folded weight."""
    model = Scaled()
    keys = list(model.state_dict())
    graphs = checked(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    check_gradients(graphs, model, [rows()])
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
    check_gradients(graphs, model, [rows()])
    assert list(model.state_dict()) == keys
    assert len(graphs.entries) == 1


def test_one_graph_for_two_modules() -> None:
    first, second, x = Scaled(), Scaled(), rows()
    graphs = compile_graphs(lambda module, x: module(x), gradients="exact")
    for module in (first, second, first):
        assert error(graphs(module, x), module(x)) <= FP32


class WithoutGrad(Scaled):
    """The linear is constant for autograd; its product with the scale is not."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            y = self.linear(self.hidden(x))
        return y * self.scale


class InputChanged(Scaled):
    """The linear's input is changed after the linear has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        h = x * 1.0
        y = self.linear(h)
        h.add_(1.0)
        return y * self.scale + h


@pytest.mark.parametrize("model", [WithoutGrad, InputChanged])
def test_the_linear_stays_where_it_is(model: type[Scaled]) -> None:
    same_as_eager(model(), rows())


class Float32Linear(Scaled):
    """The linear is kept out of autocast."""

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            y = self.linear(x)
        return y * self.scale


class Float32Product(Scaled):
    """The product is kept out of autocast."""

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        with torch.autocast("cpu", enabled=False):
            return y * self.scale


@pytest.mark.parametrize("model", [Float32Linear, Float32Product])
def test_the_edge_of_autocast(model: type[Scaled]) -> None:
    """AOTAutograd traces the backward pass of both under autocast, whatever the backend, so gradients are bf16's."""
    made, x = model(), rows()
    same_as_eager(made, x, TOLERANCE[torch.bfloat16], autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert compile_graphs(made)(x).dtype == made(x).dtype
