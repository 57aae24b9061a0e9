"""projection_taps: the graph gives the projected gradient, and no tensor of the weight's shape is made on the way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lowmem_compile import registry
from lowmem_compile.graph import output_values, storage_root, tensor_of
from lowmem_compile.optim import APOLLO, COAP, Fira, Flora, GaLore, LowRankOptimizer
from lowmem_compile.optim.gradient import ProjectedGradient
from lowmem_compile.optim.projector import down
from tests.helpers import Graphs, compile_graphs, error

NAME = "projection_taps"
D, H, ROWS, R = 16, 40, 24, 3
TIGHT = 2e-6


class Plain(nn.Module):
    """Two linears of which nothing but the weight gradient of the second needs the tensor between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(self.norm(x)))
        return y


def flora(params: Any, **options: Any) -> Flora:
    """A method that never needs the whole gradient: tapped from the first step."""
    return Flora(params, rank=R, **options)


def step(call: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    loss: Tensor = call(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def same(got: nn.Module, want: nn.Module, tolerance: float = TIGHT) -> None:
    for (name, p), q in zip(got.named_parameters(), want.parameters(), strict=True):
        assert error(p.detach(), q.detach()) <= tolerance, name


def made_of_shape(graph: fx.Graph, shapes: set[tuple[int, ...]]) -> list[str]:
    """Tensors that the graph computes in one of these shapes, or transposed; views of inputs are not computed."""
    wanted = shapes | {tuple(reversed(s)) for s in shapes}
    return [
        n.name
        for n in graph.nodes
        if n.op == "call_function"
        and (v := tensor_of(n)) is not None
        and tuple(v.shape) in wanted
        and storage_root(n).op != "placeholder"
    ]


@pytest.mark.parametrize("side", ["std", "input"])
def test_the_gradient_is_the_projection_and_nothing_else_changes(side: str) -> None:
    model, x = Plain(), torch.randn(ROWS, D)
    twin = copy.deepcopy(model)
    optimizer = flora(model.parameters(), side=side)
    graphs = compile_graphs(model, gradients="exact")
    graphs(x).square().mean().backward()
    twin(x).square().mean().backward()
    assert graphs.rewritten(NAME) == 2
    for name, p in model.named_parameters():
        G = twin.get_parameter(name).grad
        assert p.grad is not None
        assert G is not None
        if not name.endswith(("up.weight", "down.weight")):
            assert error(p.grad, G) <= TIGHT
            continue
        assert isinstance(p.grad, ProjectedGradient)
        plan_side = "left" if side == "std" and p.shape[0] < p.shape[1] else "right"
        assert p.grad.side == plan_side
        assert p.grad.low.numel() * p.shape[1 if plan_side == "right" else 0] == R * p.numel()  # r/I, r/O of the bytes
        assert error(p.grad.low, down(G, optimizer.factors_of(p), plan_side)) <= TIGHT


@pytest.mark.parametrize("side", ["std", "input"])
def test_the_backward_graph_makes_no_tensor_of_a_projected_weights_shape(side: str) -> None:
    model = Plain()
    optimizer = flora(model.parameters(), side=side)
    graphs = compile_graphs(model, gradients="exact")
    step(graphs, optimizer, torch.randn(ROWS, D))
    assert made_of_shape(graphs.chosen.backward.graph, {(H, D)}) == []
    gradients = [
        tuple(v.shape) for n in output_values(graphs.chosen.backward.graph) if n is not None and (v := tensor_of(n)) is not None
    ]
    low = {(H, R), (D, R)} if side == "input" else {(H, R), (R, H)}
    assert low <= set(gradients)
    plain = compile_graphs(Plain(), gradients="exact")
    plain(torch.randn(ROWS, D)).sum().backward()
    assert made_of_shape(plain.chosen.backward.graph, {(H, D)}), "the check finds a whole gradient where there is one"


def test_the_input_is_not_kept_where_the_input_side_is_projected() -> None:
    kept = {}
    for side in ("std", "input"):
        model = Plain()
        optimizer = flora(model.parameters(), side=side)
        graphs = compile_graphs(model, gradients="exact")
        step(graphs, optimizer, torch.randn(ROWS, D))
        kept[side] = [tuple(v.shape) for n in graphs.chosen.kept() if (v := tensor_of(n)) is not None]
    assert (ROWS, H) in kept["std"]  # down: [D, H] is projected on its output side, which needs x
    assert (ROWS, H) not in kept["input"]
    assert (ROWS, R) in kept["input"]


def test_only_weights_of_such_an_optimizer_are_matched() -> None:
    model = Plain()
    torch.optim.SGD(model.parameters())
    graphs = compile_graphs(model)
    graphs(torch.randn(ROWS, D)).sum().backward()
    assert graphs.sites(NAME) == []
    assert not isinstance(model.up.weight.grad, ProjectedGradient)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(H, D), nn.Linear(D, D), nn.Linear(D, H, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.inner(self.embedding(ids)))
        return y


def test_a_tied_weight_is_left_whole() -> None:
    model, ids = Tied(), torch.randint(0, H, (ROWS,))
    twin = copy.deepcopy(model)
    optimizers = flora(model.parameters()), flora(twin.parameters())
    graphs = compile_graphs(model, gradients="exact")
    for _ in range(3):
        step(graphs, optimizers[0], ids)
        step(twin, optimizers[1], ids)
    assert sorted(s.code for s in graphs.sites(NAME)) == ["LM100", "LM218"]
    same(model, twin)


class Twice(nn.Module):
    """One module called twice: its gradient is a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(torch.tanh(self.inner(x)))
        return y


def test_a_module_that_is_called_twice_has_one_projected_gradient() -> None:
    model, x = Twice(), torch.randn(ROWS, D)
    twin = copy.deepcopy(model)
    optimizers = flora(model.parameters()), flora(twin.parameters())
    graphs = compile_graphs(model, gradients="exact")
    for _ in range(2):
        step(graphs, optimizers[0], x)
        step(twin, optimizers[1], x)
    assert graphs.codes(NAME) == ["LM100"]
    same(model, twin)


def test_in_place_changes_and_frozen_weights() -> None:
    class Clamped(Plain):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.up.weight.clamp_(-1, 1)
            return super().forward(x)

    model = Clamped()
    model.down.weight.requires_grad_(False)
    optimizer = flora(model.parameters())
    graphs = compile_graphs(model, gradients="exact")
    graphs(torch.randn(ROWS, D)).sum().backward()
    assert optimizer.param_groups
    assert set(graphs.codes(NAME)) <= {"LM214", "LM218"}
    assert graphs.codes(NAME)
    assert not isinstance(model.up.weight.grad, ProjectedGradient)


@pytest.mark.parametrize("method", [Fira, APOLLO])
def test_methods_that_need_the_whole_gradient_say_so(method: type[LowRankOptimizer]) -> None:
    model = Plain()
    twin = copy.deepcopy(model)
    make: Any = method
    optimizers = make(model.parameters(), rank=R), make(twin.parameters(), rank=R)
    graphs = compile_graphs(model, gradients="exact")
    x = torch.randn(ROWS, D)
    for _ in range(3):
        step(graphs, optimizers[0], x)
        step(twin, optimizers[1], x)
    assert graphs.codes(NAME) == ["LM217", "LM217"]
    assert "at every step" in graphs.sites(NAME)[0].reason
    same(model, twin)


def test_the_report_says_side_rank_and_bytes() -> None:
    model = Plain()
    optimizer = GaLore(model.parameters(), rank=R, update_interval=10)
    graphs = compile_graphs(model, gradients="exact", report=True)
    for _ in range(2):
        step(graphs, optimizer, torch.randn(ROWS, D))
    whole, tapped = [e.report() for e in graphs.entries]
    assert [s.reason for s in whole.sites if s.pass_name == NAME] == ["this step makes a new basis from the whole gradient"] * 2
    reasons = [s.reason for s in tapped.sites if s.pass_name == NAME]
    assert reasons[0] == "right side, rank 3: gradient 2.50 KiB → 480 B, state 1.12 KiB; its input (1.50 KiB) is no longer kept"
    assert reasons[1].startswith("left side, rank 3: gradient 2.50 KiB → 480 B, state")
    assert tapped.saved["inductor"]  # counted for the graph without taps
    assert len(registry.ENTRIES) == 2


def test_the_report_says_which_inputs_are_no_longer_kept() -> None:
    """`down` alone needs what is between the linears; with the input side projected it needs the projection of that. The
    input of `last` is a gate's factor too."""

    class Gated(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            gated: Tensor = self.last(y) * y
            return gated

    model = Gated()
    optimizer = flora(model.parameters(), side="input")
    graphs = compile_graphs(model, gradients="exact", report=True)
    step(graphs, optimizer, torch.randn(ROWS, D))
    (entry,) = graphs.entries
    report = entry.report()
    reasons = {s.module: s.reason for s in report.sites if s.pass_name == NAME}
    assert reasons["down"].endswith(f"; its input ({ROWS * H * 4 / 1024:.2f} KiB) is no longer kept")
    assert reasons["last"].endswith(f"; its input ({ROWS * D * 4 / 1024:.2f} KiB) is kept for others")
    sizes = {name: [t.nbytes for t in tensors] for name, tensors in report.saved.items()}
    assert ROWS * H * 4 in sizes["inductor"]
    assert ROWS * H * 4 not in sizes["lowmem"]


def test_a_dynamic_batch_keeps_one_variant_for_all_sizes() -> None:
    model = Plain()
    twin = copy.deepcopy(model)
    optimizers = [GaLore(m.parameters(), rank=R, update_interval=4) for m in (model, twin)]
    graphs = compile_graphs(model, gradients="exact", dynamic=True)
    for rows in (ROWS, 10, 7, 12, 9, 8):
        x = torch.randn(rows, D)
        step(graphs, optimizers[0], x)
        step(twin, optimizers[1], x)
    assert len(graphs.candidates) == 2
    same(model, twin)


def test_switched_off_by_name() -> None:
    model = Plain()
    optimizer = flora(model.parameters())
    graphs = compile_graphs(model, gradients="exact", disable=[NAME])
    step(graphs, optimizer, torch.randn(ROWS, D))
    assert graphs.sites(NAME) == []


def test_autocast() -> None:
    dtype = torch.bfloat16
    model, x = Plain(), torch.randn(ROWS, D)
    twin = copy.deepcopy(model)
    optimizer = flora(model.parameters(), side="input")
    graphs = compile_graphs(model, gradients="exact")
    with torch.autocast("cpu", dtype):
        graphs(x).float().square().mean().backward()
        twin(x).float().square().mean().backward()
    for name in ("up", "down"):
        grad, G = model.get_submodule(name).weight.grad, twin.get_submodule(name).weight.grad
        assert isinstance(grad, ProjectedGradient)
        assert grad.dtype == grad.low.dtype == torch.float32
        assert isinstance(G, Tensor)
        (A,) = optimizer.factors_of(model.get_submodule(name).weight)  # type: ignore[arg-type]
        assert error(grad.low, G @ A) <= 0.03  # x, A and x A rounded in the narrow dtype


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(D, D), nn.Linear(D, 64 * D, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.inner(x)), target)


def test_a_head_whose_loss_is_chunked_keeps_its_whole_gradient() -> None:
    model = Head()
    optimizer = flora(model.parameters())
    graphs = compile_graphs(model, gradients="exact")
    assert optimizer.param_groups
    graphs(torch.randn(64 * D, D), torch.randint(0, 64 * D, (64 * D,))).backward()
    assert graphs.rewritten("chunk_loss") == 1
    assert sorted(s.code for s in graphs.sites(NAME)) in (["LM100"], ["LM100", "LM218"])
    assert isinstance(model.inner.weight.grad, ProjectedGradient)
    assert not isinstance(model.head.weight.grad, ProjectedGradient)


def test_folding_a_norm_leaves_tapped_linears_alone() -> None:
    model = Plain()
    twin = copy.deepcopy(model)
    optimizers = flora(model.parameters()), flora(twin.parameters())
    graphs = compile_graphs(model, gradients="exact", fold_norm_affine="always")
    x = torch.randn(ROWS, D)
    for _ in range(2):
        step(graphs, optimizers[0], x)
        step(twin, optimizers[1], x)
    assert graphs.rewritten(NAME) == 2
    assert graphs.codes("fold_norm_affine") == ["LM219"]
    same(model, twin)


def calls(graphs: Graphs) -> int:
    return len(graphs.candidates)


def test_coap_ten_steps_over_refreshes() -> None:
    """The graphs without code generation; the compiled code is in tests/optim/test_compiled_taps.py."""
    model = Plain()
    twin = copy.deepcopy(model)
    optimizers = [COAP(m.parameters(), rank=R, update_interval=3, reproject_factor=2) for m in (model, twin)]
    graphs = compile_graphs(model, gradients="exact")
    for t in range(10):
        x = torch.randn(ROWS, D)
        assert error(step(graphs, optimizers[0], x), step(twin, optimizers[1], x)) <= TIGHT, t
    assert calls(graphs) == 2  # with whole gradients, and with projected ones
    same(model, twin)
