"""update_in_backward: parameters change inside the backward graph, and no gradient of them comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.errors import GradientError, OptionError
from lowmem_compile.graph import nbytes, output_values
from lowmem_compile.in_backward import RULES, Rule, Update, backward_with_updates, register_rule
from tests.helpers import TOLERANCE, Graphs, assert_same, compile_graphs

NAME = "update_in_backward"
COPY = torch.ops.aten.copy_.default
V, D = 200, 16
RATE = 0.5


class Net(nn.Module):
    """An embedding, a block that may be used more than once, a norm, and a head; returns the loss."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, tied: bool = False, uses: int = 1) -> None:
        super().__init__()
        self.uses = uses
        self.embedding, self.up, self.down = nn.Embedding(V, D), nn.Linear(D, 3 * D), nn.Linear(3 * D, D)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.to(dtype)

    def forward(self, index: Tensor) -> Any:
        x = self.embedding(index)
        for _ in range(self.uses):
            x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x).float().logsumexp(-1).mean()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def sgd_for(model: nn.Module, rate: float = RATE) -> dict[Tensor, Update]:
    tensor = scalar(rate)
    return {p: Update("sgd", (tensor,)) for p in model.parameters()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain_sgd(model: nn.Module, *args: Tensor, rate: float = RATE, decay: float = 0.0) -> dict[str, Tensor]:
    """What a copy of the model holds after a step that needs no library."""
    model = copy.deepcopy(model)
    model(*args).backward()
    return {name: p.detach() * (1 - decay) - rate * p.grad for name, p in model.named_parameters() if p.grad is not None}


def index(rows: int = 3, length: int = 5) -> Tensor:
    return torch.randint(V, (rows, length))


def graphs_of(model: Callable[..., Any], **options: Any) -> Graphs:
    """Compiled up to the partition; the full check of every graph is for :func:`test_a_step_is_sgd`."""
    return compile_graphs(model, check="lint", **options)


def gradients(graph: fx.Graph) -> list[Any]:
    """The gradients that the backward graph returns."""
    return [v for v in output_values(graph) if v is not None]


@pytest.mark.parametrize(
    ("dtype", "tied", "compiled"),
    [
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
        (torch.float32, True, False),
        (torch.bfloat16, False, False),
    ],
)
def test_a_step_is_sgd(dtype: torch.dtype, tied: bool, compiled: bool) -> None:
    model, x = Net(dtype, tied=tied, uses=2), index()
    call: Callable[..., Tensor] = compile_graphs(model) if compiled else model
    for _ in range(2):
        want = plain_sgd(model, x)
        loss, done = backward_with_updates(lambda: call(x), sgd_for(model))
        assert_same(state(model), want, TOLERANCE[dtype])
        assert done == {id(p) for p in model.parameters()}
        assert all(p.grad is None for p in model.parameters())
        assert loss.isfinite()
    if isinstance(call, Graphs):
        count = len(list(model.parameters()))
        assert call.rewritten(NAME) == count
        assert gradients(call.chosen.backward.graph) == []


def test_elsewhere_the_model_has_its_ordinary_graphs() -> None:
    model, x = Net(), index()
    call = graphs_of(model)
    call(x).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    before = state(model)
    backward_with_updates(lambda: call(x), sgd_for(model))
    assert not torch.equal(before["up.weight"], model.up.weight)
    after = state(model)
    call(x).backward()
    assert_same(state(model), after, 0.0)
    assert all(p.grad is not None for p in model.parameters())
    assert len(call.candidates) == 2


def test_a_schedule_compiles_nothing_anew() -> None:
    model, x = Net(), index()
    call = graphs_of(model)
    for rate in (0.5, 0.25, 0.125):
        want = plain_sgd(model, x, rate=rate)
        backward_with_updates(lambda: call(x), sgd_for(model, rate))
        assert_same(state(model), want, TOLERANCE[torch.float32])
    assert len(call.candidates) == 1


def test_no_two_large_gradients_are_alive_at_once() -> None:
    """In graph order: from where a gradient is made to where it is consumed."""
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    call = graphs_of(lambda x: model(x).square().mean())
    backward_with_updates(lambda: call(torch.randn(4, 32)), sgd_for(model))
    nodes = list(call.chosen.backward.graph.nodes)
    place = {n: i for i, n in enumerate(nodes)}
    live = [0] * len(nodes)
    large = [n for n in nodes if n.target == torch.ops.aten.mm.default and tuple(n.meta["val"].shape) == (32, 32)]
    assert len(large) == 6
    for node in large:
        for i in range(place[node], max(place[u] for u in node.users) + 1):
            live[i] += nbytes(node)
    assert max(live) == 32 * 32 * 4


def test_an_update_stands_behind_the_last_reader_of_the_old_value() -> None:
    model, x = Net(), index()
    call = graphs_of(model)
    backward_with_updates(lambda: call(x), sgd_for(model))
    order = {n: i for i, n in enumerate(call.chosen.backward.graph.nodes)}
    for write in (n for n in order if n.target == COPY):
        readers = [order[u] for u in write.args[0].users if u is not write]
        assert all(i < order[write] for i in readers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_changes_by_rows(dtype: torch.dtype) -> None:
    model, x = Net(dtype), torch.tensor([[1, 7, 7], [7, 0, 1]])
    call, before = graphs_of(model), state(model)
    backward_with_updates(lambda: call(x), sgd_for(model))
    whole = [n for n in call.chosen.backward.graph.nodes if n.op == "call_function" and n.meta["val"].shape == (V, D)]
    table = [n for n in whole if n.target == torch.ops.aten._unsafe_index_put.default]
    assert len(table) == 1
    assert [u.target for u in table[0].users] == [COPY]
    assert torch.ops.aten._unsafe_masked_index_put_accumulate.default not in {n.target for n in whole}
    unread = [i for i in range(V) if i not in (0, 1, 7)]
    assert torch.equal(model.embedding.weight[unread], before["embedding.weight"][unread])


def test_an_embedding_with_a_padding_index_and_one_that_is_smaller_than_the_batch() -> None:
    for rows in (V, 4):
        model = nn.Embedding(rows, D, padding_idx=1)
        x = torch.randint(4, (3, 5))

        def loss(x: Tensor, model: nn.Module = model) -> Any:
            return model(x).square().sum(-1).sqrt().sum()

        call = graphs_of(loss)
        want = plain_loss_step(loss, model, x)
        backward_with_updates(lambda: call(x), sgd_for(model))  # noqa: B023
        assert_same(state(model), want, TOLERANCE[torch.float32])


def plain_loss_step(loss: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss(x), list(named.values()))
    return {name: (p - RATE * g).detach() for (name, p), g in zip(named.items(), grads, strict=True)}


def test_sizes_may_be_dynamic() -> None:
    model = Net()
    call = graphs_of(model, dynamic=True)
    for shape in ((3, 5), (2, 7), (4, 6)):
        x = index(*shape)
        want = plain_sgd(model, x)
        backward_with_updates(lambda: call(x), sgd_for(model))  # noqa: B023
        assert_same(state(model), want, TOLERANCE[torch.float32])
    assert len(call.candidates) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_rules_with_decay_and_with_a_state(compiled: bool) -> None:
    model, x = Net(), index()
    call: Callable[..., Tensor] = graphs_of(model) if compiled else model
    for _ in range(2):
        squares, rate, decay = torch.zeros(()), scalar(RATE), scalar(0.1)
        want = plain_sgd(model, x, decay=0.1)
        twin = copy.deepcopy(model)
        twin(x).backward()
        norm = torch.stack([p.grad.square().sum() for p in twin.parameters() if p.grad is not None]).sum()
        backward_with_updates(lambda: call(x), {p: Update("sgd_norm", (squares, rate, decay)) for p in model.parameters()})
        assert_same(state(model), want, TOLERANCE[torch.float32])
        torch.testing.assert_close(squares, norm, rtol=1e-5, atol=0)


@pytest.fixture
def momentum() -> Iterator[str]:
    def apply(p: Tensor, g: Tensor, m: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        new = 0.9 * m + g
        return (p - rate * new).to(p.dtype), new

    yield register_rule(Rule("momentum", apply, states=1)).name
    del RULES["momentum"]


@pytest.mark.parametrize("compiled", [False, True])
def test_any_rule_with_states_of_its_own(momentum: str, compiled: bool) -> None:
    model, x = Net(), index()
    call: Callable[..., Tensor] = graphs_of(model) if compiled else model
    twin = copy.deepcopy(model)
    reference = torch.optim.SGD(twin.parameters(), lr=RATE, momentum=0.9)
    states = {p: torch.zeros_like(p, requires_grad=False) for p in model.parameters()}
    for _ in range(3):
        rate = scalar(RATE)
        backward_with_updates(lambda: call(x), {p: Update(momentum, (m, rate)) for p, m in states.items()})
        reference.zero_grad()
        twin(x).backward()
        reference.step()
    assert_same(state(model), state(twin), TOLERANCE[torch.float32])


def test_parameters_without_a_rule_get_a_gradient() -> None:
    model, x = Net(), index()
    model.norm.weight.requires_grad_(False)
    call = graphs_of(model)
    updates = sgd_for(model)
    del updates[model.up.bias], updates[model.norm.weight]
    backward_with_updates(lambda: call(x), updates)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"up.bias"}


def test_switched_off_the_rule_runs_after_the_backward_graph() -> None:
    model, x = Net(), index()
    call = graphs_of(model, disable=[NAME])
    want = plain_sgd(model, x)
    backward_with_updates(lambda: call(x), sgd_for(model))
    assert_same(state(model), want, TOLERANCE[torch.float32])
    assert len(gradients(call.chosen.backward.graph)) == len(list(model.parameters()))


def test_another_backend_gives_the_same() -> None:
    model, x = Net(), index()
    call = torch.compile(model, backend="aot_eager")
    want = plain_sgd(model, x)
    backward_with_updates(lambda: call(x), sgd_for(model))
    assert_same(state(model), want, TOLERANCE[torch.float32])


class Shrinking(nn.Module):
    """The forward pass writes to a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.w.mul_(0.5)
        return ((x @ self.w).tanh() @ self.v).square().sum()


def test_a_parameter_that_the_forward_pass_writes_to_is_declined_and_updated_afterwards() -> None:
    model, x = Shrinking(), torch.randn(3, 4)
    twin, call = copy.deepcopy(model), graphs_of(model)
    twin(x).backward()
    torch.optim.SGD(twin.parameters(), lr=RATE).step()
    backward_with_updates(lambda: call(x), sgd_for(model))
    assert call.codes(NAME) == ["LM214", "LM100"]
    assert_same(state(model), state(twin), TOLERANCE[torch.float32])


def test_bytes_are_those_of_the_gradient() -> None:
    model = nn.Linear(12, 7)
    call = graphs_of(lambda x: model(x).square().sum())
    backward_with_updates(lambda: call(torch.randn(3, 12)), sgd_for(model))
    assert sorted(s.bytes_before - s.bytes_after for s in call.sites(NAME)) == [7 * 4, 7 * 12 * 4]


class Broken(nn.Module):
    """Two graphs."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.a = nn.Linear(D, D)
        self.b = self.a if shared else nn.Linear(D, D)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x).tanh()
        torch._dynamo.graph_break()
        return self.b(x).square().sum()


def test_two_graphs_with_parameters_of_their_own() -> None:
    model, x = Broken(shared=False), torch.randn(4, D)
    call = graphs_of(model)
    want = plain_sgd(model, x)
    backward_with_updates(lambda: call(x), sgd_for(model))
    assert_same(state(model), want, TOLERANCE[torch.float32])
    assert call.rewritten(NAME) == 4


def test_two_graphs_that_share_a_parameter_are_refused_before_anything_changes() -> None:
    model, x = Broken(shared=True), torch.randn(4, D)
    call, before = graphs_of(model), state(model)
    with pytest.raises(GradientError, match="two compiled graphs"):
        backward_with_updates(lambda: call(x), sgd_for(model))
    assert_same(state(model), before, 0.0)


def test_compiled_and_eager_uses_of_a_parameter_are_refused() -> None:
    model, x = nn.Linear(D, D), torch.randn(4, D)
    call = graphs_of(lambda x: model(x).tanh())
    with pytest.raises(GradientError, match="not to be trusted"):
        backward_with_updates(lambda: model(call(x)).square().sum(), sgd_for(model))


def test_accumulation_is_refused() -> None:
    model, x = Net(), index()
    model(x).backward()
    before = state(model)
    names: Mapping[Tensor, str] = {p: name for name, p in model.named_parameters()}
    with pytest.raises(GradientError, match=r"embedding.weight has a gradient from before.*neither accumulated nor clipped"):
        backward_with_updates(lambda: model(x), sgd_for(model), names=names)
    assert_same(state(model), before, 0.0)


def test_a_closure_that_calls_backward_is_refused() -> None:
    model, x = Net(), index()

    def closure() -> Any:
        loss = model(x)
        loss.backward(retain_graph=True)
        return loss

    with pytest.raises(GradientError, match="let it return the loss"):
        backward_with_updates(closure, sgd_for(model))
    with pytest.raises(OptionError, match=r"unknown update rule 'adam'; the rules are .*sgd"):
        backward_with_updates(closure, {p: Update("adam") for p in model.parameters()})


def test_a_name_is_given_once() -> None:
    with pytest.raises(OptionError, match="'sgd' already"):
        register_rule(Rule("sgd", lambda p, g: (p - g,)))


@pytest.mark.e2e
def test_with_generated_code_the_peak_holds_no_sum_of_gradients() -> None:
    layers, width = 6, 128
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    twin, x = copy.deepcopy(model), torch.randn(4, width)

    def peak(model: nn.Module, *, updates: bool) -> int:
        def loss(x: Tensor) -> Any:
            return model(x).square().mean()

        call = torch.compile(loss, backend="lowmem")
        if not updates:
            call(x).backward()
            model.zero_grad()
            return peak_bytes(lambda: call(x)).peak
        backward_with_updates(lambda: call(x), sgd_for(model))
        made = sgd_for(model)
        return peak_bytes(lambda: backward_with_updates(lambda: call(x), made)[0], lambda _: None).peak

    want = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for _ in range(2):
        grads = torch.autograd.grad(twin(x).square().mean(), list(twin.parameters()))
        with torch.no_grad():
            for p, g in zip(twin.parameters(), grads, strict=True):
                p.sub_(RATE * g)
    want = state(twin)
    matrix = width * width * 4
    assert peak(model, updates=True) < 1.5 * matrix
    assert_same(state(model), want, TOLERANCE[torch.float32])
    assert peak(model, updates=False) > layers * matrix


class Branches(nn.Module):
    """Two linears read what a third one makes, as queries and keys do: the gradient of that is a sum of two products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return (torch.tanh(self.left(y)) * torch.tanh(self.right(y))).square().mean()


@pytest.mark.e2e
def test_generated_code_reads_a_weight_before_it_writes_to_it() -> None:
    """Inductor makes one ``addmm`` of such a sum, at the place of the addition: it must not move it behind a write."""
    torch.manual_seed(0)
    model, x = Branches().double(), torch.randn(16, 32, dtype=torch.float64)
    want = plain_sgd(model, x, rate=20.0)
    compiled = torch.compile(model, backend="lowmem", options={"gradients": "exact", "report": False, "strict": True})
    backward_with_updates(lambda: compiled(x), sgd_for(model, rate=20.0))
    assert_same(state(model), want, TOLERANCE[torch.float64])


def test_no_node_says_in_which_region_between_writes_it_was() -> None:
    graphs = graphs_of(model := Branches())
    backward_with_updates(lambda: graphs(torch.randn(16, 32)), sgd_for(model))
    nodes = [n for module in (graphs.chosen.forward, graphs.chosen.backward) for n in module.graph.nodes]
    assert any(n.target is COPY for n in nodes)
    assert not [n for n in nodes if "mutation_region_id" in n.meta]
