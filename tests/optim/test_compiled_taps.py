"""Compiled models whose optimizer gets projected gradients: what training loops do to gradients works, or says why not."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import lowmem_compile
from lowmem_compile.errors import GradientError
from lowmem_compile.optim import COAP, Flora, GaLore, LowRankOptimizer, split
from lowmem_compile.optim.gradient import ProjectedGradient
from tests.helpers import compile_graphs, error

D, H, ROWS, R = 16, 40, 24, 3
TIGHT = 2e-6
NAME = "projection_taps"


class Block(nn.Module):
    """Norm, two linears and an activation, behind a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return y


def galore(model: nn.Module, **options: Any) -> LowRankOptimizer:
    return GaLore(split(model, rank=R).groups, update_interval=3, **options)


def pair(make: Callable[[nn.Module], LowRankOptimizer] = galore, model: nn.Module | None = None) -> list[Any]:
    """A model, its compiled graphs and optimizer, and the same in eager."""
    model = Block() if model is None else model
    twin = copy.deepcopy(model)
    return [model, compile_graphs(model, gradients="exact", check="lint"), make(model), twin, make(twin)]


def backward(call: Any, x: Tensor, share: float = 1.0) -> None:
    (call(x).square().mean() * share).backward()


def step(call: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    backward(call, x)
    optimizer.step()
    optimizer.zero_grad()


def batch(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, D)


def same(got: nn.Module, want: nn.Module, tolerance: float = TIGHT) -> None:
    for (name, p), q in zip(got.named_parameters(), want.parameters(), strict=True):
        assert error(p.detach(), q.detach()) <= tolerance, name


def is_projected(model: nn.Module, name: str = "up") -> bool:
    return isinstance(model.get_parameter(f"{name}.weight").grad, ProjectedGradient)


METHODS: dict[str, Callable[..., LowRankOptimizer]] = {
    "COAP 8 bits": lambda groups: COAP(groups, update_interval=4, bits=8, projector_bits=8, quantise_from=16, block_size=16),
    "GaLore input": lambda groups: GaLore([{**g, "side": "input"} for g in groups], update_interval=4),
    "Flora": lambda groups: Flora(groups, update_interval=4),
}


@pytest.mark.parametrize("name", METHODS)
def test_compiled_equals_eager_over_refreshes(name: str) -> None:
    model, call, optimizer, twin, reference = pair(lambda m: METHODS[name](split(m, rank=R).groups))
    projected = 0
    for _ in range(10):
        x = batch()
        backward(call, x)
        projected += is_projected(model)
        optimizer.step()
        optimizer.zero_grad()
        step(twin, reference, x)
    assert projected == (10 if name == "Flora" else 7)
    same(model, twin, 1e-3 if "8 bits" in name else TIGHT)  # 8 bits: a rounding of R may change a code


@pytest.mark.e2e
def test_the_compiled_code_equals_eager(fresh_inductor_cache: Path) -> None:
    """Twelve steps of COAP through code generation, bases made in the backward pass; then again from warm caches."""
    for cached in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Block()
        twin = copy.deepcopy(model)
        optimizers = [REFRESHING["COAP"](split(m, rank=R).groups) for m in (model, twin)]
        model.compile(backend="lowmem", options={"gradients": "exact", "strict": True})
        projected = 0
        for _ in range(12):
            x = batch()
            backward(model, x)
            projected += is_projected(model)
            optimizers[0].step()
            optimizers[0].zero_grad()
            step(twin, optimizers[1], x)
        same(model, twin)
        assert projected == 12
        graphs = lowmem_compile.report(model).graphs
        assert [g.from_cache for g in graphs] == [cached, cached]
        assert [[s.code for s in g.sites if s.pass_name == NAME] for g in graphs] == [["LM100"] * 2] * 2


def test_accumulation_adds_projected_gradients() -> None:
    model, call, optimizer, twin, reference = pair()
    for _ in range(5):
        for share in (0.25, 0.75):
            x = batch()
            backward(call, x, share)
            backward(twin, x, share)
        if is_projected(model):
            assert model.up.weight.grad.low.shape == (H, R)
        for o in (optimizer, reference):
            o.step()
            o.zero_grad()
    same(model, twin)


def test_a_global_norm_counts_the_projection() -> None:
    model, call, optimizer, _, _ = pair()
    step(call, optimizer, batch())
    backward(call, batch())
    low = model.up.weight.grad.low.clone()
    expected = torch.stack([getattr(p.grad, "low", p.grad).norm() for p in model.parameters()]).norm()
    norm = clip_grad_norm_(model.parameters(), 0.5 * float(expected))
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(model.up.weight.grad.low, 0.5 * low)
    with pytest.raises(GradientError, match="kept projected"):
        clip_grad_value_(model.parameters(), 0.1)


def test_grad_scaler_unscales_and_leaves_out_a_step() -> None:
    model, call, optimizer, twin, reference = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(6):
        x = batch()
        scaler.scale(call(x).square().mean()).backward()
        if t == 4:
            assert is_projected(model)
            model.up.weight.grad.low[0, 0] = float("inf")
        else:
            step(twin, reference, x)
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()  # of the module: the infinity must not survive
    assert scaler.get_scale() == 512
    same(model, twin)


def test_zero_grad_to_zeros() -> None:
    model, call, optimizer, twin, reference = pair()
    for _ in range(8):
        x = batch()
        backward(call, x)
        backward(twin, x)
        for o in (optimizer, reference):
            o.step()
            o.zero_grad(set_to_none=False)
    same(model, twin)


def test_an_optimizer_that_is_built_after_the_first_call() -> None:
    model = Block()
    call = compile_graphs(model, gradients="exact", check="lint")
    backward(call, batch())
    assert not is_projected(model)
    model.zero_grad()
    twin = copy.deepcopy(model)
    optimizer, reference = Flora(split(model, rank=R).groups), Flora(split(twin, rank=R).groups)
    x = batch()
    backward(call, x)
    assert is_projected(model)
    optimizer.step()
    step(twin, reference, x)
    same(model, twin)


def test_gradients_are_whole_again_when_the_optimizer_is_gone() -> None:
    model, call, optimizer, _, _ = pair()
    step(call, optimizer, batch())
    backward(call, batch())
    assert is_projected(model)
    model.zero_grad()
    del optimizer
    gc.collect()
    backward(call, batch())
    assert not is_projected(model)


def test_one_graph_serves_several_modules_each_with_its_own_basis() -> None:
    """Blocks compiled one by one: Dynamo runs the first one's graph for all."""
    model = nn.Sequential(Block(), Block(), Block())
    twin = copy.deepcopy(model)
    graphs = compile_graphs(lambda block, x: block(x), gradients="exact")

    def call(x: Tensor) -> Tensor:
        for block in model:
            x = graphs(block, x)
        return x

    optimizers = galore(model), galore(twin)
    for _ in range(5):
        x = batch()
        step(call, optimizers[0], x)
        step(twin, optimizers[1], x)
    assert len(graphs.candidates) <= 4  # one graph for the first block, whose input needs no gradient, and one for the others
    same(model, twin)


def test_resume() -> None:
    model, call, optimizer, twin, reference = pair()
    for _ in range(4):
        x = batch()
        step(call, optimizer, x)
        step(twin, reference, x)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = galore(model)
    del optimizer
    gc.collect()
    resumed.load_state_dict(saved)
    for _ in range(4):
        x = batch()
        step(call, resumed, x)
        step(twin, reference, x)
    same(model, twin)


class Optional(nn.Module):
    """Its side branch runs only when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        y: Tensor = self.main(x)
        return y + self.side(x).tanh() if both else y


def test_a_parameter_without_a_gradient_makes_its_basis_later() -> None:
    model, call, optimizer, twin, reference = pair(model=Optional())
    for t in range(8):
        x, both = batch(), t in (2, 3, 5)
        for c, o in ((call, optimizer), (twin, reference)):
            c(x, both).square().mean().backward()
            o.step()
            o.zero_grad()
        if t == 1:
            assert "basis_step" not in optimizer.state[model.side.weight]
    same(model, twin)


def test_a_basis_replaced_between_forward_and_backward() -> None:
    _, call, optimizer, _, _ = pair()
    for _ in range(2):
        step(call, optimizer, batch())
    loss = call(batch()).square().mean()
    step(call, optimizer, batch())  # step 3
    step(call, optimizer, batch())  # step 4 makes a new basis
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_kept_over_a_step_cannot_make_a_basis() -> None:
    model, call, optimizer, _, _ = pair()
    step(call, optimizer, batch())
    for _ in range(2):
        backward(call, batch())
        optimizer.step()
    before = model.up.weight.detach().clone()
    backward(call, batch())
    with pytest.raises(GradientError, match=r"needs the whole gradient of up\.weight, and a compiled model gave it projected"):
        optimizer.step()
    assert torch.equal(model.up.weight, before)


def test_other_readers_of_the_gradient() -> None:
    model, call, optimizer, _, _ = pair()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    step(call, optimizer, batch())
    backward(call, batch())
    with pytest.raises(GradientError, match="only the optimizer of"):
        other.step()
    second = galore(model)
    model.zero_grad()
    backward(call, batch())
    assert not is_projected(model)
    assert second.param_groups
    assert "two optimizers hold the parameter" in call.sites(NAME)[-1].reason or len(call.candidates) == 2


def test_hooks_see_whole_gradients() -> None:
    model, call, optimizer, _, _ = pair()
    step(call, optimizer, batch())
    seen = []
    handle = model.up.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    backward(call, batch())
    assert seen == [(H, D)]
    assert not is_projected(model)
    assert is_projected(model, "down")
    handle.remove()


def test_under_ddp_gradients_stay_whole() -> None:
    model, call, optimizer, _, _ = pair()
    step(call, optimizer, batch())
    with patch.object(nn.parallel.DistributedDataParallel, "_active_ddp_module", object()):
        backward(call, batch())
    assert not is_projected(model)


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        run: Any = torch.utils.checkpoint.checkpoint
        result: Tensor = run(super().forward, x, use_reentrant=False)
        return result


def test_inside_a_checkpoint_gradients_stay_whole_and_the_report_says_so() -> None:
    model, call, optimizer, twin, reference = pair(model=Checkpointed())
    for _ in range(3):
        x = batch()
        step(call, optimizer, x)
        step(twin, reference, x)
    assert not is_projected(model)
    same(model, twin)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        y: Tensor = (q @ k.mT).softmax(-1) @ v
        return y


def test_linears_that_share_a_projector_share_its_product() -> None:
    model = Attention()

    def make(m: Any) -> LowRankOptimizer:
        weights = [m.q.weight, m.k.weight, m.v.weight]
        return GaLore([{"params": weights, "shared": [weights]}], rank=R, update_interval=3)

    model, call, optimizer, twin, reference = pair(make, model)
    for _ in range(4):
        x = batch()
        step(call, optimizer, x)
        step(twin, reference, x)
    same(model, twin)
    graph = call.candidates[1].compiled.backward.graph
    forward = call.candidates[1].compiled.forward.graph
    products = [
        n for g in (graph, forward) for n in g.nodes if str(n.target) == "aten.mm.default" and n.meta["val"].shape == (ROWS, R)
    ]
    assert len(products) == 1


def test_operations_on_a_projected_gradient() -> None:
    low, basis = torch.randn(6, 2), torch.randn(8, 2)
    grad = ProjectedGradient(low, basis, "right", 0)
    assert grad.shape == (6, 8)
    torch.testing.assert_close(grad.whole(), low @ basis.T)
    whole = torch.randn(6, 8)
    sums: dict[str, tuple[Any, Tensor]] = {
        "2 G": (2 * grad, 2 * low),
        "G / 2": (grad / 2, low / 2),
        "G + G": (grad + grad, 2 * low),
        "H + G": (whole + grad, low + whole @ basis),
    }
    for found, expected in sums.values():
        assert isinstance(found, ProjectedGradient)
        torch.testing.assert_close(found.low, expected)
    torch.testing.assert_close(grad.norm(), low.norm())
    left = ProjectedGradient(torch.randn(2, 8), torch.randn(6, 2), "left", 0)
    assert left.whole().shape == left.shape == (6, 8)
    for wrong in (lambda: grad @ whole.T, lambda: grad * whole, lambda: grad + 1, grad.sum, lambda: grad.norm(dim=0)):
        with pytest.raises(GradientError):
            wrong()
    with pytest.raises(GradientError, match="different bases"):
        _ = grad + ProjectedGradient(low, basis, "right", 1)


REFRESHING: dict[str, Callable[..., LowRankOptimizer]] = {
    "COAP": lambda groups: COAP(groups, update_interval=4, reproject_factor=2, refresh_in_backward=True),
    "COAP restored": lambda groups: COAP(groups, update_interval=4, restore_state=True, refresh_in_backward=True),
    "GaLore input": lambda groups: GaLore([{**g, "side": "input"} for g in groups], update_interval=4, refresh_in_backward=True),
}


@pytest.mark.parametrize("name", REFRESHING)
def test_bases_made_in_the_backward_pass_equal_eager(name: str) -> None:
    model, call, optimizer, twin, reference = pair(lambda m: REFRESHING[name](split(m, rank=R).groups))
    for _ in range(10):
        x = batch()
        backward(call, x)
        assert is_projected(model)
        optimizer.step()
        optimizer.zero_grad()
        step(twin, reference, x)
    assert len(call.candidates) == 2  # the variant that makes bases, and the ordinary one
    backward_graph = call.candidates[0].compiled.backward.graph
    shapes = {(H, D), (D, H)}
    made = [
        n.name for n in backward_graph.nodes if n.op == "call_function" and tuple(getattr(n.meta["val"], "shape", ())) in shapes
    ]
    assert all("permute" in name for name in made), made  # views of the weights alone
    same(model, twin)


def test_with_accumulation_the_first_backward_pass_makes_the_basis() -> None:
    model, call, optimizer, twin, _ = pair(lambda m: galore(m, refresh_in_backward=True))
    first, second = batch(), batch()
    backward(call, first)
    backward(twin, first)
    G = twin.up.weight.grad.clone()
    expected = torch.linalg.svd(G, full_matrices=False).Vh[:R].T
    basis = optimizer.state[model.up.weight]["projector"]
    assert error((basis.T @ expected).abs(), torch.eye(R)) <= 1e-4  # up to signs
    backward(call, second)
    backward(twin, second)
    assert error(model.up.weight.grad.low, twin.up.weight.grad @ basis) <= TIGHT
    optimizer.step()
    assert optimizer.state[model.up.weight]["basis_step"] == 1


def test_two_forward_passes_before_the_backward_pass_that_makes_the_basis() -> None:
    model, call, optimizer, twin, _ = pair(lambda m: galore(m, refresh_in_backward=True))
    x, y = batch(), batch()
    (call(x).square().mean() + call(y).square().mean()).backward()
    (twin(x).square().mean() + twin(y).square().mean()).backward()
    basis = optimizer.state[model.up.weight]["projector"]
    assert error(model.up.weight.grad.low, twin.up.weight.grad @ basis) <= TIGHT
    optimizer.step()


def test_a_gradient_that_is_not_finite_makes_no_basis() -> None:
    model, call, optimizer, twin, reference = pair(lambda m: galore(m, refresh_in_backward=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for t in range(3):
        x = batch()
        factor = float("inf") if t == 0 else 1.0
        (scaler.scale(call(x).square().mean()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
        assert ("projector" in optimizer.state[model.up.weight]) == (t > 0)
        if t:
            step(twin, reference, x)
    assert scaler.get_scale() == 2
    same(model, twin)
