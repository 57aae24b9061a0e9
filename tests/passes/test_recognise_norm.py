"""recognise_norm: LayerNorm and RMSNorm, from the library or by hand, become ``lowmem::normalize``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.passes.recognise_norm import RecogniseNorm
from tests.helpers import (
    TOLERANCE,
    apply,
    assert_same,
    compile_graphs,
    dynamo_graph,
    error,
    run,
    run_double,
    targets,
)

NAME = "recognise_norm"
PASS = RecogniseNorm()
EPS = 1e-6
D = 24


def llama(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    dtype = x.dtype
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + EPS)
    return w * h.to(dtype)


def t5(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + EPS))


def gemma(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1.0 + w.float())).type_as(x)


def quotient(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * w


def power(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * (x.square().mean(dim=-1, keepdim=True) + EPS) ** -0.5)


def layer_norm_by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    centered = x - mean
    variance = (centered * centered).mean(-1, keepdim=True)
    return w * (centered / torch.sqrt(variance + EPS)) + b


def layer_norm_with_var(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance = x.var(-1, keepdim=True, unbiased=False)
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + EPS) * w + b


NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "F.layer_norm": lambda x, w, b: F.layer_norm(x, (D,), w, b, EPS),
    "F.layer_norm, no affine": lambda x, w, b: F.layer_norm(x, (D,)),
    "F.layer_norm, no bias": lambda x, w, b: F.layer_norm(x, (D,), weight=w, eps=EPS),
    "F.rms_norm": lambda x, w, b: F.rms_norm(x, (D,), w, EPS),
    "F.rms_norm, no eps": lambda x, w, b: F.rms_norm(x, (D,), w),
    "Llama": llama,
    "T5": t5,
    "Gemma": gemma,
    "quotient": quotient,
    "power": power,
    "LayerNorm by hand": layer_norm_by_hand,
    "LayerNorm with var": layer_norm_with_var,
}


class Block(nn.Module):
    """A norm between a float32 linear and a linear under autocast: the place where the rewrite is made."""

    def __init__(self, norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.inner = nn.Linear(D, D)
        self.w = nn.Parameter(torch.rand(D) + 0.5)
        self.b = nn.Parameter(torch.randn(D))
        self.out = nn.Linear(D, 7)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.inner(x)
        y: Tensor = self.out(self.norm(h, self.w, self.b))
        return y


@pytest.mark.parametrize("spelling", NORMS)
def test_fires_once_and_keeps_value_and_gradients(spelling: str) -> None:
    model, x = Block(NORMS[spelling]), torch.randn(3, 5, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        gm, _ = dynamo_graph(model, x)
        sites, done = apply(PASS, gm)
    assert [s.action for s in sites] == ["rewritten"], sites
    assert len(done) == 1
    assert targets(gm.graph).count("normalize.default") == 1
    assert not {"layer_norm", "rms_norm", "rsqrt", "sqrt", "pow", "mean", "var"} & set(targets(gm.graph))
    assert apply(PASS, gm) == ([], []), "not idempotent"


@pytest.mark.parametrize("spelling", NORMS)
def test_against_float64(spelling: str) -> None:
    """Without autocast, forced by fold_norm_affine='always', so that the comparison is sharp."""
    model, x = Block(NORMS[spelling]), torch.randn(3, 5, D, requires_grad=True)
    gm, inputs = dynamo_graph(model, x)
    sites, _ = apply(PASS, gm, fold_norm_affine="always")
    assert [s.action for s in sites] == ["rewritten"], sites
    positions = [i for i, v in enumerate(inputs) if v is x]

    def call(x: Tensor) -> Tensor:
        out: tuple[Tensor] = gm(*[x if i in positions else v for i, v in enumerate(inputs)])
        return out[0]

    assert_same(run(call, model, [x]), run_double(model, [x]), TOLERANCE[torch.float32])


def mean_over_the_batch_too(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean((0, 2), keepdim=True) + EPS))


def unbiased(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS))


def eps_outside(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + EPS))


def l2(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS))


def over_tokens(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS))


def statistics_of_another(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.roll(1, 0).pow(2).mean(-1, keepdim=True) + EPS))


def changed_between(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    x = x * 2
    scale = torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + EPS)
    x += 1
    return w * (x * scale)


@pytest.mark.parametrize(
    "norm",
    [mean_over_the_batch_too, unbiased, eps_outside, l2, over_tokens, statistics_of_another, changed_between],
)
def test_another_function_is_left_alone(norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    model, x = Block(norm), torch.randn(3, 5, D)
    with torch.autocast("cpu", torch.bfloat16):
        gm, _ = dynamo_graph(model, x)
        _, done = apply(PASS, gm)
    assert not done
    assert "normalize.default" not in targets(gm.graph)


@pytest.mark.parametrize("shape", [(9, D), (2, 3, 2, D)])
def test_any_rank(shape: tuple[int, ...]) -> None:
    model, x = Block(llama), torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        gm, _ = dynamo_graph(model, x)
        sites, _ = apply(PASS, gm)
    assert [s.action for s in sites] == ["rewritten"]


def library_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(F.layer_norm(x, (D,), eps=1e-5), (D,), w, b, 1e-5)


def by_hand_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * w


@pytest.mark.parametrize("norm", [library_twice, by_hand_twice])
def test_a_norm_of_a_norm(norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Rewriting the first replaces the tensor that the second was found with."""

    model, x = Block(norm), torch.randn(3, 5, D, requires_grad=True)
    gm, inputs = dynamo_graph(model, x)
    sites, _ = apply(PASS, gm, fold_norm_affine="always")
    assert [s.action for s in sites] == ["rewritten", "rewritten"]
    assert error(gm(*inputs)[0], model(x)) <= TOLERANCE[torch.float32]


def test_an_epsilon_known_only_at_run_time_is_left_alone() -> None:
    gm, _ = dynamo_graph(Block(NORMS["F.layer_norm"]), torch.randn(3, 5, D), dynamic=True)
    assert "layer_norm" in targets(gm.graph)
    assert apply(PASS, gm, fold_norm_affine="always") == ([], [])


def test_equal_dtypes_decline() -> None:
    gm, _ = dynamo_graph(Block(llama), torch.randn(3, 5, D))
    sites, done = apply(PASS, gm)
    assert [s.code for s in sites] == ["LM301"]
    assert not done


def test_no_linear_declines() -> None:
    class Model(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.inner(x), self.w, self.b) * 2

    gm, _ = dynamo_graph(Model(llama), torch.randn(3, 5, D))
    sites, _ = apply(PASS, gm)
    assert [s.code for s in sites] == ["LM304"]


def test_inference_declines() -> None:
    model = Block(llama)
    graphs = compile_graphs(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(3, 5, D)
        assert torch.equal(graphs(x), model(x))
    assert graphs.codes(NAME) == ["LM303"]


def test_the_statistics_may_be_used_elsewhere() -> None:
    def shared(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return w * (x * scale) + scale

    model, x = Block(shared), torch.randn(3, 5, D, requires_grad=True)
    graphs = compile_graphs(model)
    got = run(graphs, model, [x], autocast=torch.bfloat16)
    assert_same(got, run_double(model, [x]), TOLERANCE[torch.bfloat16])


def test_dynamic_dimension() -> None:
    model = Block(NORMS["F.layer_norm"])
    graphs = compile_graphs(model)
    for rows in (6, 9):
        x = torch.randn(rows, 5, D, requires_grad=True)
        got, want = run(graphs, model, [x], autocast=torch.bfloat16, mark=0), run_double(model, [x])
        assert_same(got, want, TOLERANCE[torch.bfloat16])
    assert len(graphs.entries) == 1
    assert graphs.rewritten(NAME) == 1


def test_forward_is_the_models_own() -> None:
    """The rewrite changes what is kept; the output differs from eager's by rounding alone."""
    model, x = Block(llama), torch.randn(3, 5, D)
    graphs = compile_graphs(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(graphs(x), model(x)) <= 2**-7
    assert graphs.rewritten(NAME) == 1
