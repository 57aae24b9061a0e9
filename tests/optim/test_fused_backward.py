"""fused_backward: equal to the unfused optimizer, one gradient at a time, and what needs all gradients is refused."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.errors import GradientError, OptionError
from lowmem_compile.graph import nbytes, output_values
from lowmem_compile.optim import APOLLO, COAP, Fira, Flora, GaLore, LowRankOptimizer, average_gradients, split
from lowmem_compile.optim.gradient import ConsumedGradient
from tests.helpers import Graphs, compile_graphs, error

D, H, R, ROWS = 16, 40, 3, 24
TIGHT = 1e-6
PASS = "update_in_backward"


class Block(nn.Module):
    """Norm, two linears and an activation, behind a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return y


METHODS: dict[str, Callable[..., LowRankOptimizer]] = {
    "COAP": lambda g, **o: COAP(g, update_interval=4, reproject_factor=2, weight_decay=0.1, **o),
    "COAP Adafactor": lambda g, **o: COAP(g, update_interval=4, base="adafactor", **o),
    "COAP 8 bits": lambda g, **o: COAP(g, update_interval=4, bits=8, projector_bits=8, quantise_from=16, block_size=16, **o),
    "GaLore input": lambda g, **o: GaLore([{**x, "side": "input"} for x in g], update_interval=4, **o),
    "Flora": lambda g, **o: Flora(g, update_interval=4, **o),
    "Fira": lambda g, **o: Fira(g, update_interval=4, **o),
    "APOLLO": lambda g, **o: APOLLO(g, update_interval=4, **o),
}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return split(model, rank=R).groups


def setup(name: str = "COAP", model: nn.Module | None = None, *, compiled: bool = True, **options: Any) -> list[Any]:
    """A model, what to call, its fused optimizer, and the same unfused in eager."""
    model = Block() if model is None else model
    twin = copy.deepcopy(model)
    call = compile_graphs(model, gradients="exact", check="lint", **options) if compiled else model
    return [model, call, METHODS[name](groups(model), fused_backward=True), twin, METHODS[name](groups(twin))]


def batch(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, D)


def step(call: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    call(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def both(call: Any, optimizer: Any, twin: nn.Module, reference: Any, count: int) -> None:
    for _ in range(count):
        x = batch()
        step(call, optimizer, x)
        step(twin, reference, x)


def same(got: nn.Module, want: nn.Module, tolerance: float = TIGHT) -> None:
    for (name, p), q in zip(got.named_parameters(), want.parameters(), strict=True):
        assert error(p.detach(), q.detach()) <= tolerance, name


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", METHODS)
def test_compiled_equals_the_unfused_optimizer(name: str) -> None:
    """25 steps with refreshes and a schedule; one variant for the first basis, one for others, one for ordinary steps."""
    model, call, optimizer, twin, reference = setup(name)
    for t in range(25):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 1e-3 / (1 + t)
        x = batch()
        call(x).square().mean().backward()
        assert all(isinstance(p.grad, ConsumedGradient) for p in model.parameters())
        optimizer.step()
        assert all(p.grad is None for p in model.parameters())
        step(twin, reference, x)
    same(model, twin)
    assert len(call.candidates) == (1 if name in ("Flora", "APOLLO") else 3)
    assert set(call.codes(PASS)) == {"LM100"}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        mine, theirs = optimizer.state[p], reference.state[q]
        assert [mine.get(k) for k in ("step", "basis_step")] == [theirs.get(k) for k in ("step", "basis_step")]


@pytest.mark.parametrize("name", METHODS)
def test_eager_equals_the_unfused_optimizer(name: str) -> None:
    model, call, optimizer, twin, reference = setup(name, compiled=False)
    both(call, optimizer, twin, reference, 10)
    same(model, twin, 0.0)


def alive(call: Graphs, index: int, shape: tuple[int, int]) -> int:
    """Most bytes of whole gradients alive at once in a backward graph, in graph order."""
    nodes = list(call.candidates[index].compiled.backward.graph.nodes)
    place = {n: i for i, n in enumerate(nodes)}
    live = [0] * len(nodes)
    for node in nodes:
        if (
            node.target == torch.ops.aten.mm.default
            and tuple(node.meta["val"].shape) == shape
            and node.args[0].target is not None
        ):
            product = (
                "whole"
                if min(a.meta["val"].shape[0] for a in node.args) == ROWS or ROWS in node.args[0].meta["val"].shape
                else ""
            )
            for i in range(place[node], max(place[u] for u in node.users) + 1) if product else ():
                live[i] += nbytes(node)
    return max(live)


def test_ordinary_steps_form_no_whole_gradient_and_fira_holds_one_at_a_time() -> None:
    for name, ordinary in (("COAP", 0), ("Fira", 1)):
        torch.compiler.reset()
        model = nn.Sequential(*(nn.Linear(D, D, bias=False) for _ in range(4)))
        _, call, optimizer, _, _ = setup(name, model)
        for _ in range(2):
            step(call, optimizer, batch())
        assert [alive(call, i, (D, D)) for i in range(2)] == [D * D * 4, ordinary * D * D * 4]
        assert all(value is None for value in output_values(call.candidates[1].compiled.backward.graph))


def test_forward_passes_without_a_backward_pass_change_nothing() -> None:
    model, call, optimizer, twin, reference = setup()
    for t in range(6):
        before = state(model)
        call(batch())
        if t == 3:
            optimizer.step()
        unchanged(model, before)
        x = batch()
        step(call, optimizer, x)
        step(twin, reference, x)
    same(model, twin)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_second_backward_pass_is_refused(compiled: bool) -> None:
    model, call, optimizer, _, _ = setup(compiled=compiled)
    step(call, optimizer, batch())
    loss, late = call(batch()).square().mean(), call(batch()).square().mean()
    loss.backward()
    before = state(model)
    said = r"second gradient before optimizer.step\(\)" if compiled else "cannot be accumulated|modified by an inplace"
    for again in (late, call(batch()).square().mean()):
        with pytest.raises((GradientError, RuntimeError), match=said):
            again.backward()
    unchanged(model, before)
    optimizer.step()
    step(call, optimizer, batch())


@pytest.mark.parametrize("compiled", [True, False])
def test_readers_of_gradients_are_refused(compiled: bool) -> None:
    model, call, optimizer, _, _ = setup(compiled=compiled)
    call(batch()).square().mean().backward()
    with pytest.raises(GradientError, match=r"consumed by the update .* use fused_backward=False"):
        clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(GradientError, match="consumed"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    with pytest.raises(GradientError, match="consumed"):
        scaler.step(optimizer)
    model.zero_grad(set_to_none=False)
    optimizer.step()
    step(call, optimizer, batch())


def test_a_gradient_from_before_and_a_step_in_between_are_refused() -> None:
    model, call, optimizer, _, _ = setup()
    step(call, optimizer, batch())
    model.up.weight.grad = torch.zeros(H, D)
    before = state(model)
    with pytest.raises(GradientError, match=r"up\.weight has a gradient from before"):
        call(batch()).square().mean().backward()
    unchanged(model, before)
    optimizer.zero_grad()
    loss = call(batch()).square().mean()
    optimizer.step()
    with pytest.raises(GradientError, match=r"optimizer.step\(\) ran between its forward and its backward pass"):
        loss.backward()
    unchanged(model, before)


def test_reducers_over_processes_are_refused() -> None:
    model, call, optimizer, _, _ = setup()
    step(call, optimizer, batch())
    with (
        patch.object(nn.parallel.DistributedDataParallel, "_active_ddp_module", object()),
        pytest.raises(OptionError, match="from the gradient of one rank"),
    ):
        call(batch())
    with pytest.raises(OptionError, match="fused_backward=True"):
        average_gradients(optimizer)
    with pytest.raises(OptionError, match=r"fused_backward='yes'; it is True or False"):
        COAP(model.parameters(), rank_ratio=4, fused_backward="yes")  # type: ignore[arg-type]


def test_a_gradient_that_is_not_finite_makes_no_basis() -> None:
    for compiled in (True, False):
        _, call, _optimizer, _, _ = setup(compiled=compiled)
        with pytest.raises(GradientError, match="is not finite at a step that computes a basis"):
            (call(batch()).square().mean() * float("inf")).backward()


def test_switched_off_the_steps_run_after_the_backward_graph() -> None:
    model, call, optimizer, twin, reference = setup(disable=[PASS])
    both(call, optimizer, twin, reference, 6)
    same(model, twin)


def test_compiled_and_eager_uses_of_a_parameter_are_refused() -> None:
    model, call, _optimizer, _, _ = setup()
    with pytest.raises(GradientError, match="not to be trusted"):
        model(call(batch())).square().mean().backward()


def test_two_calls_in_one_backward_pass_are_refused() -> None:
    _, call, _optimizer, _, _ = setup()
    with pytest.raises(GradientError, match="twice by one, in one backward pass"):
        (call(batch()) + call(batch())).square().mean().backward()


class Attention(nn.Module):
    """Three linears that read one input, and an embedding tied to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        y: Tensor = (q @ k.mT).softmax(-1) @ v
        return y


def test_weights_that_share_a_projector() -> None:
    """Their refreshes are in step(), from whole gradients; other steps are in the graph."""
    model = Attention()
    twin = copy.deepcopy(model)

    def make(m: Attention, fused: bool) -> GaLore:
        weights = [m.q.weight, m.k.weight, m.v.weight]
        return GaLore([{"params": weights, "shared": [weights]}], rank=R, update_interval=3, fused_backward=fused)

    call, optimizer, reference = compile_graphs(model, gradients="exact"), make(model, fused=True), make(twin, fused=False)
    both(call, optimizer, twin, reference, 7)
    same(model, twin)
    assert [
        call.candidates[i].compiled.backward.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default) != []
        for i in range(2)
    ] == [False, True]


class Optional(nn.Module):
    """Its side branch runs only when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        y: Tensor = self.main(x)
        return y + self.side(x).tanh() if other else y


def test_a_parameter_without_a_gradient_makes_its_basis_later() -> None:
    model, call, optimizer, twin, reference = setup(model=Optional())
    for t in range(8):
        x = batch()
        for c, o in ((call, optimizer), (twin, reference)):
            c(x, t in (2, 3, 5)).square().mean().backward()
            o.step()
            o.zero_grad()
    same(model, twin)
    assert optimizer.state[model.side.weight]["basis_step"] == 3


def test_resume_and_dynamic_sizes() -> None:
    model, _, optimizer, twin, reference = setup()
    call = compile_graphs(model, gradients="exact", check="lint", dynamic=True)
    both(call, optimizer, twin, reference, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    for t in range(4):
        x = batch(ROWS + t)
        step(call, optimizer, x)
        step(twin, reference, x)
    same(model, twin)
    assert len(call.candidates) == 3
    resumed = METHODS["COAP"](groups(model), fused_backward=True)
    resumed.load_state_dict(saved)
    assert resumed.state[model.up.weight]["basis_step"] == 3


def test_gradients_are_whole_again_when_the_optimizer_is_gone() -> None:
    model, call, optimizer, _, _ = setup()
    step(call, optimizer, batch())
    late = call(batch()).square().mean()
    del optimizer
    gc.collect()
    with pytest.raises(GradientError, match="deleted after the forward pass"):
        late.backward()
    call(batch()).square().mean().backward()
    assert model.up.weight.grad.shape == (H, D)
    assert type(model.up.weight.grad) is Tensor


def flora(params: Any, **options: Any) -> Flora:
    return Flora(params, base="sgd", **options)


SLOW = [pytest.param(kind, least, marks=pytest.mark.slow) for kind, least in ((COAP, 1.5), (Fira, 2.5))]


@pytest.mark.e2e
@pytest.mark.parametrize(("kind", "least"), [(flora, 1.5), *SLOW])
def test_with_generated_code_the_peak_holds_no_sum_of_gradients(kind: Any, least: float) -> None:
    """Gradients together would take four times one matrix. An update is one, Fira's gradient and residual are two."""
    width = 128
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))
    options: Any = {"gradients": "exact", "codec": "none"}
    twin, call = copy.deepcopy(model), torch.compile(lambda x: model(x).square().mean(), backend="lowmem", options=options)
    optimizer = kind(model.parameters(), rank=8, update_interval=4, fused_backward=True)
    reference = kind(twin.parameters(), rank=8, update_interval=4)
    peaks = []
    for t in range(7):
        x = torch.randn(32, width)

        def one_step(x: Tensor = x) -> Tensor:
            loss: Tensor = call(x)
            loss.backward()
            optimizer.step()
            return torch.zeros(())

        peaks.append(peak_bytes(one_step, lambda _: None).peak if t > 4 else int(one_step()))
        twin(x).square().mean().backward()
        reference.step()
        reference.zero_grad()
    same(model, twin, 5e-6)
    assert max(peaks) < least * width * width * 4
