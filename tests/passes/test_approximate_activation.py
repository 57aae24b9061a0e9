"""approximate_activation: a code of a few bits an element is kept in place of the activation's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.contract import Context
from lowmem_compile.kernels.activation_codes.tables import StepTable
from lowmem_compile.options import Options
from lowmem_compile.passes.approximate_activation import SLOPE_RANGE, apply_levels, pack, poison, table_of
from tests.helpers import TOLERANCE, Graphs, assert_same, run, run_double
from tests.helpers import compile_graphs as compile_any

NAME = "approximate_activation"
D, WIDE, ROWS = 16, 48, 10

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "log_sigmoid": F.logsigmoid,
}
TABLES: list[dict[str, Any]] = [
    {"table": "derivative", "code_bits": 5},
    {"table": "derivative", "code_bits": 4},
    {"table": "derivative", "code_bits": 2},
    {"table": "primitive"},
]


def compile_graphs(model: Callable[..., Any], **options: Any) -> Graphs:
    """With step codes, unless the options say otherwise."""
    return compile_any(model, **{"table": "derivative", **options})


class Stepped(torch.autograd.Function):
    """The definition: forward f, backward the level of the table, thresholds compared in float32."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, fn: Callable[[Tensor], Tensor], table: StepTable) -> Tensor:
        ctx.save_for_backward(h)
        ctx.table = table
        return fn(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (h,) = ctx.saved_tensors
        code = torch.bucketize(h.float(), torch.tensor(ctx.table.thresholds))
        return grad * torch.tensor(ctx.table.levels, dtype=grad.dtype)[code], None, None


class Mlp(nn.Module):
    """linear, activation, frozen linear: nothing but the activation needs its input."""

    def __init__(self, act: Callable[[Tensor], Tensor], wide: int = WIDE) -> None:
        super().__init__()
        self.act = act
        self.up, self.down = nn.Linear(D, wide), nn.Linear(wide, D).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.act(self.up(x)))


def table(name: str, **options: Any) -> StepTable:
    return table_of(name, Context(Options.from_dict({"table": "derivative", **options})))


class Sloped(torch.autograd.Function):
    """The definition of slope codes: f'(h) rounded to 2^bits - 1 equal steps over its range."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, fn: Callable[[Tensor], Tensor], span: tuple[float, float], bits: int) -> Tensor:
        with torch.enable_grad():
            wide = h.detach().requires_grad_()
            (slope,) = torch.autograd.grad(fn(wide).sum(), wide)
        low, high = span
        step = (high - low) / (2**bits - 1)
        ctx.save_for_backward(torch.round((slope - low) / step) * step + low)
        return fn(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None


def stepped(model: Mlp, name: str, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """Every gradient in float64 with the step function in place of the derivative."""
    exact = model.act
    model.act = lambda h: Stepped.apply(h, exact, table(name, **options))  # type: ignore[no-untyped-call]
    try:
        return run_double(model, [x])
    finally:
        model.act = exact


def keeps_h(graphs: Graphs, elements: int = ROWS * WIDE) -> bool:
    """Whether a floating-point tensor of the size of the activation's input is kept."""
    kept = (n.meta["val"] for n in graphs.chosen.kept())
    return any(v.dtype.is_floating_point and v.numel() >= elements for v in kept)


@pytest.mark.parametrize("options", TABLES, ids=["5 bits", "4 bits", "2 bits", "primitive"])
@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_fires_once_and_matches_its_formula(name: str, options: dict[str, Any]) -> None:
    model, x = Mlp(ACTIVATIONS[name]), torch.randn(ROWS, D, requires_grad=True) * 2
    x = x.detach().requires_grad_()
    graphs = compile_graphs(model, **options)
    assert_same(run(graphs, model, [x]), stepped(model, name, x, **options), TOLERANCE[torch.float32])
    assert graphs.rewritten(NAME) == 1
    assert not keeps_h(graphs)
    codes = ROWS * WIDE * table(name, **options).bits // 8
    assert graphs.chosen.saved_bytes() == codes + 4 * ROWS


@pytest.mark.parametrize("name", ["gelu_tanh", "mish", "softplus", "log_sigmoid"])
def test_other_activations(name: str) -> None:
    model, x = Mlp(ACTIVATIONS[name]), torch.randn(ROWS, D, requires_grad=True)
    graphs = compile_graphs(model)
    assert_same(run(graphs, model, [x]), stepped(model, name, x), TOLERANCE[torch.float32])
    assert graphs.rewritten(NAME) == 1


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slope_codes(name: str, bits: int) -> None:
    exact = ACTIVATIONS[name]
    model, x = Mlp(exact), (torch.randn(ROWS, D) * 2).requires_grad_()
    graphs = compile_any(model, slope_bits=bits)
    got = run(graphs, model, [x])
    model.act = lambda h: Sloped.apply(h, exact, SLOPE_RANGE[name], bits)  # type: ignore[no-untyped-call]
    want = run_double(model, [x])
    # An element on the border of two codes may fall on either side in float32: one step for a few elements.
    for key, value in want.items():
        assert (got[key].double() - value).norm() <= 0.02 * 2.0 ** (4 - bits) * value.norm(), key
    model.act = exact
    for key, value in run_double(model, [x]).items():
        assert (got[key].double() - value).norm() <= 1.5 * 2.0**-bits * value.norm(), key
    assert graphs.rewritten(NAME) == 1
    assert not keeps_h(graphs)
    assert graphs.chosen.saved_bytes() == ROWS * WIDE * bits // 8 + 4 * ROWS


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_slope_codes_of_a_row_of_odd_length(bits: int) -> None:
    model, x = Mlp(F.gelu, wide=37), torch.randn(ROWS, D, requires_grad=True)
    graphs = compile_any(model, slope_bits=bits)
    got = run(graphs, model, [x])
    for key, value in run_double(model, [x]).items():
        assert (got[key].double() - value).norm() <= 1.5 * 2.0**-bits * value.norm(), key
    assert graphs.rewritten(NAME) == 1


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slope_range(name: str) -> None:
    """The range holds every slope and is no wider than a thousandth."""
    h = torch.linspace(-30, 30, 600001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ACTIVATIONS[name](h).sum(), h)
    low, high = SLOPE_RANGE[name]
    assert low <= slope.min() <= low + 1e-3
    assert high - 1e-3 <= slope.max() <= high


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_reaches_the_gradient_of_slope_codes(value: float) -> None:
    model, x = Mlp(F.gelu), torch.randn(ROWS, D)
    x[3, 0] = value
    x.requires_grad_()
    graphs = compile_any(model)
    graphs(x).sum().backward()
    assert x.grad is not None
    assert x.grad[3].isnan().any()
    assert x.grad[4].isfinite().all()


def test_the_forward_pass_is_exact() -> None:
    model, x = Mlp(F.gelu), torch.randn(ROWS, D)
    outputs = [compile_graphs(model, gradients=g)(x) for g in ("approximate", "exact")]
    assert torch.equal(*outputs)


def test_exact_gradients_decline() -> None:
    model, x = Mlp(F.gelu), torch.randn(ROWS, D, requires_grad=True)
    graphs = compile_graphs(model, gradients="exact")
    assert_same(run(graphs, model, [x]), run_double(model, [x]), TOLERANCE[torch.float32])
    assert graphs.codes(NAME) == ["LM201"]


def test_codes_are_never_recomputed() -> None:
    """No threshold is compared in the backward graph, by ``>``: it would have to keep or recompute h."""
    model, x = Mlp(F.gelu), torch.randn(ROWS, D, requires_grad=True)
    graphs = compile_graphs(model)
    run(graphs, model, [x])
    compared = {
        side: [n.args[1] for n in graph.graph.nodes if n.target is torch.ops.aten.gt.Scalar]
        for side, graph in (("forward", graphs.chosen.forward), ("backward", graphs.chosen.backward))
    }
    assert compared == {"forward": list(table("gelu").thresholds), "backward": []}
    codes = [n for n in graphs.chosen.saved_nodes() if n.meta["val"].dtype == torch.uint8]
    assert [n.meta["val"].numel() for n in codes] == [ROWS * WIDE // 2, ROWS * WIDE // 8]


def test_a_trained_consumer_declines() -> None:
    """dW of `down` needs the activation's output: it is rebuilt from h, so codes would come on top."""
    model, x = Mlp(F.gelu), torch.randn(ROWS, D, requires_grad=True)
    model.down.requires_grad_(True)
    graphs = compile_graphs(model)
    assert_same(run(graphs, model, [x]), run_double(model, [x]), TOLERANCE[torch.float32])
    assert graphs.codes(NAME) == ["LM300"]


def test_another_user_of_the_input_declines() -> None:
    class Model(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            out: Tensor = self.down(self.act(h) + h.sin())
            return out

    model, x = Model(F.gelu), torch.randn(ROWS, D, requires_grad=True)
    graphs = compile_graphs(model)
    assert_same(run(graphs, model, [x]), run_double(model, [x]), TOLERANCE[torch.float32])
    assert graphs.codes(NAME) == ["LM300"]


def test_a_graph_input_declines() -> None:
    model, x = Mlp(F.gelu), torch.randn(ROWS, WIDE, requires_grad=True)
    graphs = compile_graphs(lambda h: model.down(F.gelu(h)))
    graphs(x).sum().backward()
    assert graphs.codes(NAME) == ["LM302"]


@pytest.mark.parametrize("act", [lambda h: F.softplus(h, beta=2.0), lambda h: F.softplus(h, threshold=5.0)])
def test_arguments_without_a_table_decline(act: Callable[[Tensor], Tensor]) -> None:
    model, x = Mlp(act), torch.randn(ROWS, D, requires_grad=True)
    graphs = compile_graphs(model)
    assert_same(run(graphs, model, [x]), run_double(model, [x]), TOLERANCE[torch.float32])
    assert graphs.codes(NAME) == ["LM202"]


def test_float64_declines() -> None:
    model, x = Mlp(F.gelu).double(), torch.randn(ROWS, D, dtype=torch.float64, requires_grad=True)
    graphs = compile_graphs(model)
    assert_same(run(graphs, model, [x]), run_double(model, [x]), TOLERANCE[torch.float64])
    assert graphs.codes(NAME) == ["LM203"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    model, x = Mlp(F.silu).to(dtype), torch.randn(ROWS, D, dtype=dtype, requires_grad=True)
    graphs = compile_graphs(model)
    got, exact = run(graphs, model, [x]), run_double(model, [x])
    assert graphs.rewritten(NAME) == 1
    # A threshold may fall between h and its rounding: one element then takes the neighbouring level.
    assert_same(got, {**stepped(model, "silu", x), "output 0": exact["output 0"]}, 4 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_activation_reaches_the_gradient(value: float) -> None:
    model = Mlp(F.gelu)
    x = torch.randn(ROWS, D)
    x[3, 5] = value
    x.requires_grad_()
    graphs = compile_graphs(model)
    graphs(x).sum().backward()
    assert graphs.rewritten(NAME) == 1
    assert x.grad is not None
    assert torch.isnan(x.grad[3]).all()
    others = [i for i in range(ROWS) if i != 3]
    assert torch.isfinite(x.grad[others]).all()
    assert model.up.bias.grad is not None
    assert torch.isnan(model.up.bias.grad).any()


def test_each_site_is_judged_by_itself() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Mlp(F.gelu), Mlp(F.gelu, 2 * WIDE)
            self.second.down.requires_grad_(True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x))
            return y

    model, x = Two(), torch.randn(ROWS, D, requires_grad=True)
    graphs = compile_graphs(model)
    run(graphs, model, [x])
    assert sorted(graphs.codes(NAME)) == ["LM100", "LM300"]


def test_non_contiguous_input() -> None:
    class Turned(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x).transpose(0, 1)
            out: Tensor = self.down(self.act(h).transpose(0, 1))
            return out

    model, x = Turned(F.gelu), torch.randn(3, 5, D, requires_grad=True)
    graphs = compile_graphs(model)
    assert_same(run(graphs, model, [x]), stepped(model, "gelu", x), TOLERANCE[torch.float32])
    assert graphs.rewritten(NAME) == 1


def test_dynamic_dimension() -> None:
    model = Mlp(F.gelu)
    graphs = compile_graphs(model)
    for rows in (ROWS, ROWS + 3):
        x = torch.randn(rows, D, requires_grad=True)
        assert_same(run(graphs, model, [x], mark=0), stepped(model, "gelu", x), TOLERANCE[torch.float32])
    assert len(graphs.entries) == 1
    assert graphs.rewritten(NAME) == 1


@pytest.mark.parametrize("bits", [2, 4, 5])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 9), (0, 4), (4, 0)])
def test_codes_of_any_shape(bits: int, shape: tuple[int, ...]) -> None:
    steps = table("gelu", code_bits=bits)
    h, grad = torch.randn(shape), torch.randn(shape)
    packed = pack(h, steps.thresholds)
    assert {plane.dtype for plane in packed} == {torch.uint8}
    assert sum(plane.numel() for plane in packed) == (5 * -(-h.numel() // 8) if bits == 5 else -(-h.numel() * bits // 8))
    got = apply_levels(grad, packed, poison(h), steps.levels)
    code = torch.bucketize(h, torch.tensor(steps.thresholds))
    torch.testing.assert_close(got, grad * torch.tensor(steps.levels)[code], rtol=1e-6, atol=0)


def test_each_of_two_like_sites_is_judged_by_itself() -> None:
    model = nn.Sequential(Mlp(F.gelu), Mlp(F.gelu))
    model[1].down.requires_grad_(True)
    graphs = compile_graphs(model)
    run(graphs, model, [torch.randn(ROWS, D, requires_grad=True)])
    assert sorted(graphs.codes(NAME)) == ["LM100", "LM300"]
