"""embedding_gradient: the gradient of an embedding is summed in float32 over the rows that occur."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from lowmem_compile.contract import Context
from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.graph import VIEW_OPS, storage_root
from lowmem_compile.options import Options
from lowmem_compile.passes.embedding_gradient import EmbeddingGradient, add_rows, sum_rows
from lowmem_compile.pipeline import Recorder, run_pass
from tests.helpers import TOLERANCE, Graphs, assert_same, check_gradients, compile_graphs, run

NAME = "embedding_gradient"
V, D, N = 256, 32, 12
SCATTER = torch.ops.aten._unsafe_masked_index_put_accumulate.default
PUT = torch.ops.aten._unsafe_index_put.default


class Embedded(nn.Module):
    """An embedding that a layer reads."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, rows: int = V, **embedding: Any) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(rows, D, **embedding), nn.Linear(D, D)
        self.to(dtype)

    def forward(self, x: Tensor) -> Any:
        return torch.tanh(self.layer(self.embedding(x)))


class Tied(Embedded):
    """The head's weight is the embedding's."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(torch.tanh(self.layer(self.embedding(x))), self.embedding.weight)


INDICES = {
    "some": torch.randint(0, V, (2, N // 2), generator=torch.Generator().manual_seed(1)),
    "one dimension": torch.arange(N),
    "repeated": torch.tensor([[5, 3, 5], [3, 5, 255]]),
    "all equal": torch.full((3, 4), 7),
    "all padding": torch.full((2, 2), 3),
    "none": torch.zeros(2, 0, dtype=torch.long),
    "a scalar": torch.tensor(9),
}


def checked(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Graphs:
    """Compile, run, and compare forward and every gradient with float64."""
    graphs = compile_graphs(model, **options)
    check_gradients(graphs, model, [x], dtype)
    return graphs


def nodes(graphs: Graphs, target: Any) -> list[fx.Node]:
    return [n for n in graphs.chosen.backward.graph.nodes if n.target == target]


def sizes(graphs: Graphs, dtype: torch.dtype) -> list[int]:
    """Elements of the values of a dtype that the backward graph computes."""
    graph = graphs.chosen.backward.graph
    found = [n.meta["val"] for n in graph.nodes if n.op == "call_function" and n.target not in VIEW_OPS]
    return [v.numel() for v in found if isinstance(v, Tensor) and v.dtype == dtype]


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("indices", INDICES)
def test_fires_once_and_matches_float64(indices: str, padding: int | None) -> None:
    graphs = checked(Embedded(padding_idx=padding), INDICES[indices])
    assert graphs.rewritten(NAME) == 1
    assert nodes(graphs, SCATTER) == []
    assert max(sizes(graphs, torch.float32)) < V * D


@pytest.mark.parametrize("indices", INDICES)
def test_a_tied_head_matches_float64(indices: str) -> None:
    graphs = checked(Tied(padding_idx=3), INDICES[indices])
    assert graphs.rewritten(NAME) == 1
    assert max(sizes(graphs, torch.float32), default=0) < V * D


def test_float16() -> None:
    model = Embedded(torch.float16)
    assert checked(model, INDICES["some"], torch.float16).rewritten(NAME) == 1


def test_a_row_of_padding_gets_no_gradient() -> None:
    model, x = Embedded(padding_idx=3), INDICES["repeated"]
    compile_graphs(model)(x).float().sum().backward()
    grad = model.embedding.weight.grad
    assert grad is not None
    assert grad.dtype == torch.bfloat16
    assert (grad != 0).any(1).nonzero().flatten().tolist() == [5, 255]


def reference(mask: Tensor, index: Tensor, rows: Tensor, other: Tensor) -> Tensor:
    total: Tensor = torch.ops.aten._unsafe_masked_index_put_accumulate(torch.zeros(V, D).double(), mask, [index], rows.double())
    return (other.double() + total).to(other.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("span", [1, 4, V, 3 * V], ids=lambda s: f"{s} values")
def test_the_sum_is_rounded_once(span: int, dtype: torch.dtype) -> None:
    """Small whole numbers, so that float32 sums are exact; indices outside are clamped, as the replaced operation does."""
    index = torch.randint(-span, span, (5, 40))
    rows, mask = torch.randint(-1000, 1000, (5, 40, D)).float(), torch.rand(5, 40, 1) > 0.2
    other, zeros = torch.randint(-1000, 1000, (V, D)).to(dtype), torch.zeros(V, D)
    want = reference(mask, index, rows, other)
    got = add_rows(mask, index, rows, zeros, other.clone())
    assert torch.equal(got, want)
    assert torch.equal(sum_rows(mask, index, rows, zeros, dtype), reference(mask, index, rows, torch.zeros_like(other)))
    wide = add_rows(mask, index, rows, zeros, other.float())
    assert torch.equal(wide, reference(mask, index, rows, other.float()))


class Narrowed(Embedded):
    """The gradient of a narrow copy of the weight is cast back to float32."""

    def forward(self, x: Tensor) -> Any:
        return torch.tanh(F.embedding(x, self.embedding.weight.bfloat16()))


NEAR_MISSES: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "small": (lambda: Embedded(rows=100), N, "LM305"),
    "as many indices as rows": (Embedded, V, "LM306"),
    "as many indices as rows, float32": (lambda: Embedded(torch.float32), V, "LM306"),
    "two thirds as many, tied": (Tied, 2 * V // 3, "LM306"),
    "widened again": (lambda: Narrowed(torch.float32), N, "LM206"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_decline(case: str) -> None:
    make, count, code = NEAR_MISSES[case]
    model = make()
    dtype = torch.bfloat16 if isinstance(model, Narrowed) else next(model.parameters()).dtype
    graphs = checked(model, torch.randint(0, 100, (count,)), dtype)
    assert graphs.codes(NAME) == [code]
    assert len(nodes(graphs, SCATTER)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("indices", INDICES)
def test_a_wide_gradient_is_made_in_one_call(indices: str, dtype: torch.dtype) -> None:
    graphs = checked(Embedded(dtype, padding_idx=3), INDICES[indices], dtype)
    assert graphs.rewritten(NAME) == 1
    assert nodes(graphs, SCATTER) == []
    (put,) = nodes(graphs, torch.ops.lowmem.scatter_rows.default)
    assert put.args[3] is True


def test_a_tied_head_in_float32_is_added_to_in_place() -> None:
    graphs = checked(Tied(torch.float32), INDICES["repeated"], torch.float32)
    assert graphs.rewritten(NAME) == 1
    (put,) = nodes(graphs, PUT)
    assert storage_root(put.args[0]).target == torch.ops.aten.mm.default  # type: ignore[arg-type]
    assert put.args[3] is True


def test_under_autocast_the_cast_of_the_heads_gradient_is_added_to_in_place() -> None:
    model, x = Tied(torch.float32), INDICES["some"]
    graphs = compile_graphs(model)
    got = run(graphs, model, [x], autocast=torch.bfloat16)
    assert_same(got, run(compile_graphs(model, disable=[NAME]), model, [x], autocast=torch.bfloat16), TOLERANCE[torch.float32])
    assert graphs.rewritten(NAME) == 1
    (put,) = nodes(graphs, PUT)
    assert put.args[3] is True
    assert sizes(graphs, torch.float32).count(V * D) == 3, "the head's gradient, the same in memory, and with the rows added"


def test_a_tied_head_needs_no_second_gradient() -> None:
    graphs = checked(Tied(), INDICES["some"])
    *_, put = nodes(graphs, PUT)
    assert storage_root(put.args[0]).target == torch.ops.aten.mm.default  # type: ignore[arg-type]
    assert sizes(graphs, torch.bfloat16).count(V * D) == 2, "the head's gradient, and the same with the rows added"


def test_another_addend_of_other_layout_is_added_as_before() -> None:
    class Transposed(Embedded):
        def __init__(self) -> None:
            super().__init__(rows=D * 8)
            self.mix = nn.Linear(D, D).bfloat16()

        def forward(self, x: Tensor) -> Any:
            return self.embedding(x).sum() + torch.tanh(self.mix.weight @ self.embedding.weight.t()).sum()

    graphs = checked(Transposed(), INDICES["some"])
    assert graphs.rewritten(NAME) == 1


def test_counts_of_indices_scale_the_rows() -> None:
    model = Embedded(scale_grad_by_freq=True)
    graphs = checked(model, INDICES["repeated"])
    assert graphs.rewritten(NAME) == 1


def test_max_norm() -> None:
    model, twin = (Embedded(max_norm=1.0) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    x = INDICES["repeated"]
    assert_same(run(compile_graphs(model), model, [x]), run(twin, twin, [x]), TOLERANCE[torch.bfloat16])


def test_two_embeddings() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(V, D, padding_idx=0), nn.Embedding(2 * V, D)
            self.bfloat16()

        def forward(self, x: Tensor) -> Any:
            return torch.tanh(self.words(x) + self.places(x + 1))

    assert checked(Two(), INDICES["some"]).rewritten(NAME) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_embedding_used_twice(dtype: torch.dtype) -> None:
    class Twice(Embedded):
        def forward(self, x: Tensor) -> Any:
            return torch.tanh(self.layer(self.embedding(x))) + torch.sin(self.embedding(x.flip(0) + 1))

    graphs = checked(Twice(dtype), INDICES["all equal"], dtype)
    assert graphs.rewritten(NAME) == 2


@pytest.mark.parametrize("kind", [Embedded, Tied])
def test_dynamic_dimension(kind: type[Embedded]) -> None:
    model = kind()
    graphs = compile_graphs(model)
    for rows in (3, 5):
        check_gradients(graphs, model, [torch.randint(0, V, (rows, 4))], torch.bfloat16, mark=0)
    assert len(graphs.entries) == 1
    assert graphs.rewritten(NAME) == 1


def test_nothing_is_left_to_find() -> None:
    graphs = checked(Tied(), INDICES["some"])
    context = Context(Options.from_dict({"strict": True, "check": "full"}))
    recorder = Recorder()
    assert run_pass(EmbeddingGradient(), graphs.chosen.backward, context, recorder) == []
    assert recorder.sites == []


def test_nothing_more_crosses() -> None:
    with_pass, without = (checked(Tied(), INDICES["some"], disable=d) for d in ([], [NAME]))
    names = [[n.name for n in g.chosen.saved_nodes()] for g in (with_pass, without)]
    assert names[0] == names[1]
    assert len(nodes(without, SCATTER)) == 1
    assert without.sites(NAME) == []


def test_whichever_partition_is_compiled() -> None:
    class Bare(Embedded):
        def forward(self, x: Tensor) -> Any:
            return self.embedding(x)

    for recompute, gradients in (("pointwise", "approximate"), ("inductor", "approximate"), ("pointwise", "exact")):
        graphs = checked(Bare(), INDICES["some"], recompute=recompute, gradients=gradients)
        assert graphs.only.chosen == "inductor"
        assert graphs.rewritten(NAME) == 1
        assert nodes(graphs, SCATTER) == []
        stock = graphs.only.partitions["inductor"].backward.graph
        assert len(stock.find_nodes(op="call_function", target=SCATTER)) == 1, "what is compared with stays Inductor's"


def test_the_report_has_the_bytes_at_once() -> None:
    for kind, saved in ((Embedded, 4 * (V - N) * D - 4 * V), (Tied, 4 * V * D - 6 * N * D - 4 * V)):
        (site,) = checked(kind(), INDICES["some"]).sites(NAME)
        assert (site.bytes_before, site.bytes_before - site.bytes_after) == (4 * V * D, saved)


def test_a_gradient_made_with_the_loss_stays_exact() -> None:
    """The chunked loss makes the head's gradient in the forward pass; adding rows to it does not make it worth encoding."""

    class Model(Embedded):
        def forward(self, x: Tensor) -> Any:
            logits = F.linear(torch.tanh(self.layer(self.embedding(x))), self.embedding.weight)
            return F.cross_entropy(logits.view(-1, V), (x.view(-1) + 1) % V)

    graphs = compile_graphs(Model(), codec="int8")
    graphs(torch.randint(0, V, (2, V // 6))).backward()
    assert graphs.rewritten("chunk_loss") == graphs.rewritten(NAME) == 1
    gradient = [s for s in graphs.sites("encode_saved") if "gradient" in s.reason]
    assert [s.code for s in gradient] == ["LM215"]
    (kept,) = graphs.chosen.backward.graph.find_nodes(op="call_function", target=torch.ops.lowmem.in_memory.default)
    assert [str(n.target) for n in kept.all_input_nodes] == ["aten.mul.Tensor"]  # Inductor writes it over what the loss made


class First(Tied):
    """The tied head reads one position, so that there are few logits."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(torch.tanh(self.layer(self.embedding(x)))[:, :1], self.embedding.weight)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Embedded, torch.bfloat16), (First, torch.float32)],
    ids=["plain", "tied, float32"],
)
def test_the_peak_falls(kind: type[Embedded], dtype: torch.dtype) -> None:
    """By the float32 gradient of the whole table, of which 100 indices need little."""
    rows, x = 20_000, torch.randint(0, 50, (2, 50))
    model = kind(dtype, rows=rows)
    peaks, grads = [], []
    for disable in ([NAME], []):
        forward = loss_of(model, x, disable)
        forward().backward()
        model.zero_grad()
        peaks.append(peak_bytes(forward).peak)
        assert model.embedding.weight.grad is not None
        grads.append(model.embedding.weight.grad)
        model.zero_grad()
    assert peaks[0] - peaks[1] > 0.9 * 4 * rows * D, peaks
    assert_same({"weight": grads[1]}, {"weight": grads[0]}, TOLERANCE[dtype])


@pytest.mark.e2e
def test_a_tied_weight_in_bfloat16() -> None:
    """The float32 gradient of the whole table is not allocated.

    Its peak is no measure: the product with the tied weight may copy it, in a precision that depends on the
    processor.
    """
    rows, x = 20_000, torch.randint(0, 50, (2, 50))
    model = First(torch.bfloat16, rows=rows)
    found, grads = [], []
    for disable in ([NAME], []):
        loss, sources = run_and_get_code(loss_of(model, x, disable))
        _, backward = run_and_get_code(loss.backward)
        found.append(f"empty_strided_cpu(({rows}, {D}), ({D}, 1), torch.float32)" in "".join(sources + backward))
        assert model.embedding.weight.grad is not None
        grads.append(model.embedding.weight.grad)
        model.zero_grad()
    assert found == [True, False]
    assert_same({"weight": grads[1]}, {"weight": grads[0]}, TOLERANCE[torch.bfloat16])


def loss_of(model: nn.Module, x: Tensor, disable: list[str]) -> Callable[[], Tensor]:
    """The compiled model's loss, without the passes of these names."""
    torch.compiler.reset()
    options: dict[str, Any] = {"strict": True, "report": False, "disable": disable}
    call = torch.compile(model, backend="lowmem", options=options)

    def forward() -> Tensor:
        loss: Tensor = call(x).float().square().sum()
        return loss

    return forward
