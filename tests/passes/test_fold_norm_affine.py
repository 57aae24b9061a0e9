"""fold_norm_affine: γ and β of a norm move into the linears that read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.passes.fold_norm_affine import FoldNormAffine
from lowmem_compile.passes.recognise_norm import RecogniseNorm
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

NAME = "fold_norm_affine"
PASS = FoldNormAffine()
D, ROWS = 16, 12
FP32 = TOLERANCE[torch.float32]


class Gemma(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return h * (1.0 + self.weight)


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(D),
    "LayerNorm, no bias": lambda: nn.LayerNorm(D, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(D, eps=1e-6),
    "Llama": Llama,
    "Gemma": Gemma,
}


class Block(nn.Module):
    """A norm between two linears, its affine away from the identity."""

    def __init__(self, norm: nn.Module | None = None, bias: bool = True, frozen: bool = False) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(D, D), norm or nn.LayerNorm(D)
        self.a, self.b = nn.Linear(D, D, bias=bias), nn.Linear(D, D, bias=False)
        for p in self.norm.parameters():
            nn.init.normal_(p, 0.7, 0.3)
        if frozen:
            for part in (self.norm, self.a, self.b):
                part.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.a(self.norm(self.inner(x)))


def rows(count: int = ROWS) -> Tensor:
    return torch.randn(count, D, requires_grad=True)


def folding(model: Callable[..., Any], **options: Any) -> Graphs:
    return compile_graphs(model, **{"gradients": "exact", "fold_norm_affine": "always", **options})


def checked(model: nn.Module, x: Tensor | None = None, **options: Any) -> Graphs:
    """Compile, run, and compare forward and every gradient with float64."""
    graphs = folding(model, **options)
    check_gradients(graphs, model, [rows() if x is None else x])
    return graphs


def same_as_eager(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> Graphs:
    graphs = folding(model, **options)
    assert_same(run(graphs, model, [x]), run(model, model, [x]), TOLERANCE[dtype])
    return graphs


def follows(graphs: Graphs, model: nn.Module) -> None:
    x = rows()
    assert_same(run(graphs, model, [x]), run_double(model, [x]), FP32)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("norm", NORMS)
def test_fires_once_and_matches_float64(norm: str, bias: bool) -> None:
    graphs = checked(Block(NORMS[norm](), bias))
    assert graphs.codes(NAME) == ["LM100"]


@pytest.mark.parametrize("shape", [(D,), (2, 3, D), (2, 1, 4, D)])
def test_any_rank(shape: tuple[int, ...]) -> None:
    assert checked(Block(), torch.randn(shape, requires_grad=True)).rewritten(NAME) == 1


def test_float64() -> None:
    """As exact as the model's own dtype."""
    graphs = same_as_eager(Block().double(), rows().detach().double().requires_grad_(), torch.float64)
    assert graphs.rewritten(NAME) == 1


def test_float64_frozen() -> None:
    graphs = same_as_eager(Block(frozen=True).double(), rows().detach().double().requires_grad_(), torch.float64)
    assert graphs.rewritten(NAME) == 1


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_autocast(frozen: bool) -> None:
    model, x = Block(frozen=frozen), rows()
    graphs = folding(model)
    assert_same(run(graphs, model, [x], autocast=torch.bfloat16), run_double(model, [x]), TOLERANCE[torch.bfloat16])
    assert graphs.rewritten(NAME) == 1


def test_every_gradient_by_hand() -> None:
    """dW = G'·diag(γ) + d βᵀ, dγ = column sums of W∘G', dβ = Wᵀ d, with G' = dZᵀ xhat and d = column sums of dZ."""
    model, h = Block(), torch.randn(ROWS, D)
    linear, norm = model.a, model.norm
    assert isinstance(norm, nn.LayerNorm)
    graphs = folding(nn.Sequential(norm, linear))
    dz = torch.randn(ROWS, D)
    graphs(h).backward(dz)
    xhat = F.layer_norm(h.double(), (D,))
    g, d = dz.double().t() @ xhat, dz.double().sum(0)
    gamma, beta, w = (p.detach().double() for p in (norm.weight, norm.bias, linear.weight))
    want = {"W": g * gamma + torch.outer(d, beta), "b": d, "γ": (w * g).sum(0), "β": w.t() @ d}
    found = {"W": linear.weight.grad, "b": linear.bias.grad, "γ": norm.weight.grad, "β": norm.bias.grad}
    assert_same({k: v for k, v in found.items() if v is not None}, want, FP32)
    assert graphs.rewritten(NAME) == 1


def test_auto_folds_where_it_saves_bytes() -> None:
    """The backward pass of the defaults rebuilds the affine; under Inductor's rule folding frees one tensor."""
    model = Block()
    declined = checked(model, fold_norm_affine="auto")
    assert declined.rewritten(NAME) == 0
    assert set(declined.codes("recognise_norm")) == {"LM301"}
    folded = checked(model, fold_norm_affine="auto", recompute="inductor")
    assert folded.codes(NAME) == ["LM100"]
    plain = checked(model, fold_norm_affine="never", recompute="inductor")
    assert plain.chosen.saved_bytes() - folded.chosen.saved_bytes() >= ROWS * D * 4


def recognised(model: nn.Module, *, autocast: bool = False, **options: Any) -> list[str]:
    """The pass's codes on the graph that recognise_norm leaves."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        gm, _ = dynamo_graph(model, rows())
        apply(RecogniseNorm(), gm, **({} if autocast else {"fold_norm_affine": "always"}))
        assert "normalize.default" in targets(gm.graph)
        return [s.code for s in apply(PASS, gm, **options)[0]]


@pytest.mark.parametrize(("option", "code"), [("never", "LM200"), ("auto", "LM307"), ("always", "LM100")])
def test_option(option: str, code: str) -> None:
    assert recognised(Block(), fold_norm_affine=option) == [code]


def test_auto_declines_under_autocast() -> None:
    assert recognised(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)), autocast=True) == ["LM307"]


def test_no_affine_declines() -> None:
    assert checked(Block(nn.LayerNorm(D, elementwise_affine=False))).codes(NAME) == ["LM210"]


class Activated(Block):
    """An elementwise function, and no linear, reads the norm."""

    def forward(self, x: Tensor) -> Any:
        return self.a(torch.tanh(self.norm(self.inner(x))))


class Matmul(Block):
    """The linear's weight, not its input, comes from the norm."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.norm(self.inner(x)))


class Squared(Block):
    """The norm is both operands of the linear."""

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.inner(x))
        return F.linear(y, y)


class SumOfTwo(Block):
    """A matrix, not a vector, is added."""

    def forward(self, x: Tensor) -> Any:
        return self.a(F.layer_norm(self.inner(x), (D,)) + x)


@pytest.mark.parametrize(("model", "code"), [(Activated, "LM304"), (Matmul, "LM304"), (Squared, "LM304"), (SumOfTwo, "LM210")])
def test_near_miss(model: type[Block], code: str) -> None:
    assert checked(model()).codes(NAME) in ([code], [])


def test_inference_is_left_alone() -> None:
    model, x = Block(), rows()
    graphs = folding(model)
    with torch.no_grad():
        assert error(graphs(x), model(x)) <= FP32
    assert graphs.sites(NAME) == []


class Dropped(Block):
    def forward(self, x: Tensor) -> Any:
        return self.a(F.dropout(self.norm(self.inner(x)), 0.4))


def test_dropout_between_declines() -> None:
    model = Dropped()
    graphs = folding(model)
    run(graphs, model, [rows()])
    assert graphs.codes(NAME) == ["LM209"]


def test_dropout_beside_a_linear() -> None:
    """The linear that reads the norm itself is folded, the one below the dropout is not."""

    class Beside(Block):
        def forward(self, x: Tensor) -> Any:
            y = self.norm(self.inner(x))
            return self.a(y) + self.b(F.dropout(y, 0.0))

    assert checked(Beside()).codes(NAME) == ["LM100"]


class Two(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.inner(x))
        return self.a(y) * 2 + self.b(y)


class PostNorm(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.inner(x))
        return y + torch.tanh(self.a(y))


class Returned(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.inner(x))
        return self.a(y), y


class Tied(Block):
    """One weight, below the norm and beside it."""

    def forward(self, x: Tensor) -> Any:
        return self.a(self.norm(self.inner(x))) + F.linear(x, self.a.weight)


class Twice(Block):
    """One norm and one linear, used twice."""

    def forward(self, x: Tensor) -> Any:
        return self.a(self.norm(self.a(self.norm(self.inner(x)))))


class ComputedScale(Block):
    """The scale of a norm comes from a linear that is folded too."""

    def forward(self, x: Tensor) -> Any:
        scale = self.b(self.norm(x[0]))
        return self.a(F.layer_norm(self.inner(x), (D,)) * scale)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("model", "count"), [(Two, 1), (PostNorm, 1), (Returned, 1), (Tied, 1), (Twice, 2), (ComputedScale, 2)])
def test_readers(model: type[Block], count: int, frozen: bool) -> None:
    assert checked(model(frozen=frozen)).rewritten(NAME) == count


def test_all_linears_of_a_norm_read_the_normalised_value() -> None:
    gm, inputs = dynamo_graph(Two(), x := rows())
    apply(RecogniseNorm(), gm, fold_norm_affine="always")
    apply(PASS, gm, fold_norm_affine="always")
    xhat = next(n for n in gm.graph.nodes if n.name == "getitem" or "getitem" in n.name)
    linears = [n for n in gm.graph.nodes if n.target is torch._C._nn.linear and n.args[0] is xhat]
    assert len(linears) == 2
    assert set(xhat.users) == set(linears), "the affine itself is gone"
    assert gm(*inputs)[0].shape == x.shape


@pytest.mark.parametrize("model", [Block, Two, PostNorm])
def test_idempotent(model: type[Block]) -> None:
    gm, _ = dynamo_graph(model(), rows())
    apply(RecogniseNorm(), gm, fold_norm_affine="always")
    _, done = apply(PASS, gm, fold_norm_affine="always")
    assert len(done) == 1
    before = targets(gm.graph)
    sites, done = apply(PASS, gm, fold_norm_affine="always")
    assert [s.code for s in sites] == ["LM210"]
    assert not done
    assert targets(gm.graph) == before


def test_dynamic_dimension() -> None:
    model = Block()
    graphs = folding(model)
    for count in (6, 9):
        check_gradients(graphs, model, [rows(count)], mark=0)
    assert len(graphs.entries) == 1
    assert graphs.rewritten(NAME) == 1


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_the_state_dict_never_shows_it(frozen: bool) -> None:
    model = Block(frozen=frozen)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graphs = checked(model)
    assert graphs.rewritten(NAME) == 1
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not dict(model.named_buffers())


def test_a_training_step_is_honoured() -> None:
    model = Block()
    graphs = checked(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    follows(graphs, model)
    assert len(graphs.entries) == 1


def test_a_folded_weight_is_not_saved() -> None:
    """W' is recomputed in the backward pass from W and γ."""
    saved = checked(Two()).chosen.saved_tensors()
    assert sorted(t.nbytes for t in saved)[-2:] == [ROWS * 4, ROWS * D * 4], saved


@pytest.mark.parametrize("part", ["norm", "a"])
def test_half_frozen(part: str) -> None:
    """Folded in every step unless all of W, b, γ and β are frozen."""
    model = Block()
    getattr(model, part).requires_grad_(False)
    graphs = checked(model)
    assert graphs.rewritten(NAME) == 1


def test_a_folded_frozen_weight_is_not_saved() -> None:
    """W' is made again in the backward pass."""
    graphs = checked(Two(frozen=True))
    assert max(t.nbytes for t in graphs.chosen.saved_tensors()) <= ROWS * D * 4


def step_of(model: Block) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def loaded(model: Block) -> None:
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})


def assigned(model: Block) -> None:
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True)
    for part in (model.norm, model.a, model.b):
        part.requires_grad_(False)


def replaced(model: Block) -> None:
    model.a.weight = nn.Parameter(torch.randn(D, D), requires_grad=False)


def set_data(model: Block) -> None:
    model.a.weight.data = torch.randn(D, D)


def changed_in_data(model: Block) -> None:
    model.a.weight.data.mul_(2)


def changed_shift(model: Block) -> None:
    with torch.no_grad():
        assert isinstance(model.norm, nn.LayerNorm)
        model.norm.bias.add_(1)


@pytest.mark.parametrize("change", [step_of, loaded, assigned, replaced, set_data, changed_in_data, changed_shift])
def test_a_change_of_frozen_weights_is_honoured(change: Callable[[Block], None]) -> None:
    model = Block(frozen=True)
    graphs = checked(model)
    change(model)
    follows(graphs, model)


def test_one_graph_for_two_frozen_modules() -> None:
    """Dynamo may run the same compiled code with the parameters of another module."""
    first, second = Block(frozen=True), Block(frozen=True)
    graphs = folding(lambda module, x: module(x))
    x = rows()
    for module in (first, second, first):
        assert error(graphs(module, x), module(x)) <= FP32


class ScaleOfOne(Block):
    """γ and β of one element."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__(frozen=frozen)
        self.gamma, self.beta = (nn.Parameter(torch.randn(1), requires_grad=not frozen) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        return self.a(F.layer_norm(self.inner(x), (D,)) * self.gamma + self.beta)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_an_affine_of_one_element(frozen: bool) -> None:
    checked(ScaleOfOne(frozen))


class Alpha(Block):
    """β is added with a factor."""

    def forward(self, x: Tensor) -> Any:
        assert isinstance(self.norm, nn.LayerNorm)
        return self.a(torch.add(F.layer_norm(self.inner(x), (D,), self.norm.weight), self.norm.bias, alpha=2))


class InPlace(Block):
    """The norm's output is changed before the linear reads it."""

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.inner(x))
        y.add_(1.0)
        return self.a(y)


class Masked(Block):
    """Rows of the norm's output are replaced before the linear reads it."""

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.inner(x))
        y[0] = self.a.bias
        return self.a(y)


class ThroughAView(Block):
    """The change is made through a view."""

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.inner(x))
        y[1:3].mul_(2.0)
        return self.a(y)


@pytest.mark.parametrize("model", [Alpha, InPlace, Masked, ThroughAView])
def test_the_linear_reads_another_value(model: type[Block]) -> None:
    checked(model())


class NormWithoutGrad(Block):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            y = self.norm(self.inner(x))
        return self.a(y)


class LinearWithoutGrad(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.inner(x))
        with torch.no_grad():
            z = self.a(y)
        return y * z


@pytest.mark.parametrize("model", [NormWithoutGrad, LinearWithoutGrad])
def test_no_gradient_where_eager_has_none(model: type[Block]) -> None:
    same_as_eager(model(), rows())
