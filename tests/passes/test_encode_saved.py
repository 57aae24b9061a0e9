"""encode_saved: floating-point tensors cross into the backward pass as group-wise codes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowmem_compile import partition
from lowmem_compile.contract import Context, Match
from lowmem_compile.kernels.group_codes import CODECS, codec_named
from lowmem_compile.options import Options
from lowmem_compile.passes.encode_saved import SMALLEST, EncodeSaved
from lowmem_compile.pipeline import Recorder
from tests.helpers import TOLERANCE, Graphs, assert_same, check_gradients, compile_graphs, run, run_double

NAME = "encode_saved"
ROWS, WIDE = 128, 96
Function = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """A function between two linears; its input or its output is saved: [128, 96]."""

    def __init__(self, function: Function = F.gelu, last: int = WIDE, wide: int = WIDE) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(64, wide), nn.Linear(last, 64), function

    def forward(self, x: Tensor) -> Any:
        return self.down(self.function(self.up(x)))


class Attention(nn.Module):
    """Self-attention with one linear for query, key and value."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(64, 192), nn.Linear(64, 64), fused

    def forward(self, x: Tensor) -> Any:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True) if self.fused else (q @ k.mT * 0.25).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(-2))


def rows(n: int = ROWS) -> Tensor:
    return torch.randn(n, 64, requires_grad=True)


def tokens() -> Tensor:
    return torch.randn(8, 128, 64, requires_grad=True)


def nbytes(name: str, n: int, width: int) -> int:
    return codec_named(name).nbytes(n, width)


def distances(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """|got - want| / |want| of every tensor, in the Euclidean norm."""
    assert set(got) == set(want)
    return {k: ((got[k].double() - want[k].double()).norm() / (want[k].double().norm() + 1e-30)).item() for k in want}


def check(graphs: Graphs, model: nn.Module, inputs: Sequence[Tensor], bound: float, **how: Any) -> dict[str, Tensor]:
    """Outputs are exact to rounding; gradients are as close to float64 as the codec is."""
    got, want = run(graphs, model, inputs, **how), run_double(model, inputs)
    near = distances(got, want)
    far = {k: d for k, d in near.items() if not d <= (1e-5 if k.startswith("output") else bound)}
    assert not far, f"above {bound}: {far}"
    return got


def check_exact(model: nn.Module, inputs: Sequence[Tensor], codes: list[str], **options: Any) -> None:
    """Nothing is encoded, for these reasons, and gradients are exact."""
    graphs = compile_graphs(model, **{"codec": "int8", **options})
    check_gradients(graphs, model, inputs, inputs[0].dtype)
    assert graphs.codes(NAME) == codes


def held(graphs: Graphs, model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages that autograd really keeps, parameters and inputs left out."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    graphs(*inputs)
    with saved_tensors_hooks(pack, lambda t: t):
        out = graphs(*inputs)
    del out
    given = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *inputs)}
    return sum(size for pointer, size in storages.items() if pointer not in given)


@pytest.mark.parametrize(
    ("name", "function"),
    [(name, F.gelu) for name in CODECS]
    + [(name, f) for name in ("int8", "int4") for f in (F.silu, torch.tanh, torch.sigmoid, torch.square, F.relu)],
)
def test_fires_once(name: str, function: Function) -> None:
    model = Block(function)
    graphs = compile_graphs(model, codec=name)
    check(graphs, model, [rows()], CODECS[name].error * (2 if name == "bf16" else 1.1))
    (site,) = graphs.sites(NAME)
    assert site.action == "rewritten"
    after = nbytes(name, ROWS, WIDE)
    assert (site.bytes_before, site.bytes_after) == (ROWS * WIDE * 4, after)
    assert graphs.chosen.saved_bytes() == after


@pytest.mark.parametrize("name", ["bf16", "int8", "int6", "int5", "fp8"])
def test_the_bytes_counted_are_the_bytes_held(name: str) -> None:
    model, x = Block(), rows()
    graphs = compile_graphs(model, codec=name)
    assert held(graphs, model, [x]) == graphs.chosen.saved_bytes() == nbytes(name, ROWS, WIDE)


@pytest.mark.parametrize("name", ["int8", "int5", "fp8"])
def test_the_report_calls_them_codes(name: str) -> None:
    model = Block()
    graphs = compile_graphs(model, codec=name)
    run(graphs, model, [rows()])
    saved = graphs.chosen.saved_tensors()
    assert {t.kind for t in saved} == {"activation"}
    assert [t.decision for t in saved] == [f"{name} codes"] * (len(saved) - 1) + [f"scales of {name} codes"]


@pytest.mark.parametrize("name", ["int8", "int5", "int4"])
def test_many_tensors_in_one_graph(name: str) -> None:
    """New nodes of the two graphs share names; each code still arrives where it belongs."""
    model = nn.Sequential(Block(), Block(torch.tanh), Block(F.silu), Block())
    graphs = compile_graphs(model, codec=name)
    check(graphs, model, [rows()], 2 * CODECS[name].error)
    assert graphs.rewritten(NAME) == len(graphs.codes(NAME)) >= 4


@pytest.mark.parametrize("model", [Block(), Block(F.relu), Attention(False)], ids=["gelu", "relu", "attention"])
def test_the_forward_pass_is_untouched(model: nn.Module) -> None:
    x = tokens()
    plain = compile_graphs(model)(x)
    for name in ("bf16", "int8", "int5"):
        assert torch.equal(compile_graphs(model, codec=name)(x), plain)


def test_auto_is_int8() -> None:
    model, x = Block(), rows()
    auto, int8 = (run(compile_graphs(model, codec=name), model, [x]) for name in ("auto", "int8"))
    assert_same(auto, int8, 0)


def test_fewer_bits_take_fewer_bytes_and_make_larger_errors() -> None:
    model, x = Block(wide=512, last=512), rows()
    want, found = run_double(model, [x]), []
    for name in (n for n, codec in CODECS.items() if not codec.floating):
        graphs = compile_graphs(model, codec=name)
        got = run(graphs, model, [x])
        found.append((-graphs.chosen.saved_bytes(), distances(got, want)["up.weight"]))
    assert found == sorted(found)


def test_a_smaller_group_is_more_accurate() -> None:
    model, x = Block(), rows()
    want, found = run_double(model, [x]), []
    for group in (8, 16, 96):
        graphs = compile_graphs(model, codec="int4", codec_group=group)
        got = run(graphs, model, [x])
        found.append(distances(got, want)["up.weight"])
        assert graphs.chosen.saved_bytes() == codec_named("int4", group=group).nbytes(ROWS, WIDE)
    assert found == sorted(found)


def test_a_small_tensor_declines() -> None:
    assert 32 * WIDE < SMALLEST <= 64 * WIDE
    check_exact(Block(), [rows(32)], ["LM305"])
    model = Block()
    graphs = compile_graphs(model, codec="int8")
    run(graphs, model, [rows(64)])
    assert graphs.rewritten(NAME) == 1


def test_an_output_of_the_graph_declines() -> None:
    class Model(Block):
        def forward(self, x: Tensor) -> Any:
            hidden = torch.tanh(self.up(x))
            return self.down(hidden), hidden.view(2, -1)

    check_exact(Model(), [rows()], ["LM302"])


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize(
    "function",
    [
        F.elu,
        F.softplus,
        F.softsign,
        F.hardswish,
        torch.abs,
        torch.cos,
        lambda h: 1 / (9 + h),
        lambda h: h.detach().sigmoid() / (9 + h),
        lambda h: torch.log(9 + h),
        lambda h: torch.sqrt(9 + h),
        lambda h: torch.where((h > 0.5) | (h < -0.5), h.sin(), h.cos()),
    ],
    ids=["elu", "softplus", "softsign", "hardswish", "abs", "cos", "reciprocal", "division", "log", "sqrt", "where"],
)
def test_a_use_that_amplifies_an_error_declines(function: Function, frozen: bool) -> None:
    model = Block(function)
    model.down.requires_grad_(not frozen)
    graphs = compile_graphs(model, codec="int8", disable=["approximate_activation"])
    check_gradients(graphs, model, [rows()])
    assert set(graphs.codes(NAME)) == {"LM212"}


def test_options_that_keep_it_exact() -> None:
    check_exact(Block(), [rows()], ["LM211"], keep_exact=["up"])
    check_exact(Block(), [rows()], ["LM201"], gradients="exact")
    check_exact(Block(), [rows()], [], codec="none")
    check_exact(Block(), [rows()], [], disable=[NAME])


def test_keep_exact_names_one_of_two_modules() -> None:
    model = nn.Sequential(Block(), Block())
    graphs = compile_graphs(model, codec="int8", keep_exact=["1.up"])
    check(graphs, model, [rows()], 0.01)
    assert sorted(graphs.codes(NAME)) == ["LM100", "LM100", "LM211"]


def test_statistics_decline() -> None:
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    check_exact(model, [torch.randn(SMALLEST, 64, requires_grad=True)], ["LM212", "LM212"])


def test_a_copy_of_a_weight_declines() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(96, 8) / 8), nn.Parameter(torch.randn(8, 64) / 8)

        def forward(self, x: Tensor) -> Any:
            return F.linear(x, self.up @ self.down)

    check_exact(Model(), [rows()], ["LM212"])


def test_float64_declines() -> None:
    model = Block().double()
    check_exact(model, [torch.randn(ROWS, 64, dtype=torch.float64, requires_grad=True)], ["LM203"])


def test_no_fewer_bytes_decline() -> None:
    model = Block()
    graphs = compile_graphs(model, codec="bf16")
    run(graphs, model, [rows()], autocast=torch.bfloat16)
    assert set(graphs.codes(NAME)) == {"LM306"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    model, x = Block(), rows()
    graphs = compile_graphs(model, codec=name)
    got = run(graphs, model, [x], autocast=dtype)
    assert graphs.rewritten(NAME) == 2  # the cast of x, and what GELU reads
    assert graphs.chosen.saved_bytes() == nbytes(name, ROWS, 64) + nbytes(name, ROWS, WIDE)
    near = distances(got, run_double(model, [x]))
    assert max(near.values()) <= CODECS[name].error * 1.1 + TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["int8", "int4", "int3"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_mask_of_relu_is_exact(name: str, rounding: str) -> None:
    """Backward asks its output for zeros only; the gradient of all but the next linear is bitwise the exact one."""
    model, x = Block(F.relu), rows()
    graphs = compile_graphs(model, codec=name, rounding=rounding)
    got, want = run(graphs, model, [x]), run(compile_graphs(model), model, [x])
    assert graphs.rewritten(NAME) == 1
    assert_same({k: v for k, v in got.items() if k != "down.weight"}, {k: v for k, v in want.items() if k != "down.weight"}, 0)
    assert not torch.equal(got["down.weight"], want["down.weight"])


def test_attention() -> None:
    model, x = Attention(False), tokens()
    for name in ("int8", "int6", "int4"):
        graphs = compile_graphs(model, codec=name)
        check(graphs, model, [x], 3 * CODECS[name].error)
        assert graphs.codes(NAME) == ["LM100"] * len(graphs.codes(NAME))
        assert held(graphs, model, [x]) == graphs.chosen.saved_bytes()


def test_queries_and_keys_take_ten_bits_by_default() -> None:
    """The error of a score is that of its query and key times the score, and an exponential follows."""
    model, x = Attention(True), tokens()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # large scores
    errors = {}
    for codec in ("auto", "int8"):
        graphs = compile_graphs(model, codec=codec)
        got, want = run(graphs, model, [x]), run_double(model, [x])
        errors[codec] = max(distances(got, want).values())
        kinds = {t.decision for t in graphs.chosen.saved_tensors()}
        assert ("int10 codes" in kinds) == (codec == "auto")
    assert errors["auto"] <= 0.6 * errors["int8"]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_fused_attention(name: str) -> None:
    """Query, key and value are views of one storage; all of it is encoded, and the logsumexp stays exact."""
    model, x = Attention(True), tokens()
    graphs = compile_graphs(model, codec=name)
    check(graphs, model, [x], 3 * CODECS[name].error)
    statistic = 8 * 4 * 128 * 4
    exact = [t for t in graphs.chosen.saved_tensors() if t.dtype == "float32"]
    assert [t.nbytes for t in exact] == [statistic]
    assert held(graphs, model, [x]) == graphs.chosen.saved_bytes() == statistic + nbytes(name, 1024, 192) + nbytes(name, 1024, 64)


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_several_views_of_one_storage(name: str) -> None:
    class Model(Block):
        def forward(self, x: Tensor) -> Any:
            a, b, c = self.up(x).unflatten(-1, (3, 64)).unbind(-2)
            return self.down(F.silu(a) * b + c.sigmoid())

    model, x = Model(wide=192, last=64), rows()
    graphs = compile_graphs(model, codec=name)
    check(graphs, model, [x], 2 * CODECS[name].error)
    assert graphs.codes(NAME) == ["LM100", "LM100"]  # the projection, and the sigmoid that the partitioner keeps
    assert held(graphs, model, [x]) == graphs.chosen.saved_bytes() == nbytes(name, ROWS, 192) + nbytes(name, ROWS, 64)


@pytest.mark.parametrize("name", ["int8", "int3"])
def test_overlapping_slices(name: str) -> None:
    class Model(Block):
        def forward(self, x: Tensor) -> Any:
            hidden, half = self.up(x), x.shape[0] // 2
            return self.down(F.silu(hidden[:half, :48]) * hidden[half:, 32:80])

    model = Model(last=48)
    graphs = compile_graphs(model, codec=name)
    check(graphs, model, [rows()], 2 * CODECS[name].error)
    assert graphs.rewritten(NAME) == 1


@pytest.mark.parametrize("name", ["int8", "int5"])
@pytest.mark.parametrize("dims", [(1, 2), (0, 1), (0, 2)])
def test_transposed(name: str, dims: tuple[int, int]) -> None:
    """Groups lie along the dimension that is dense in memory, whichever it is."""

    class Model(Block):
        def forward(self, x: Tensor) -> Any:
            hidden = self.up(x).transpose(*dims).tanh()
            return self.down(hidden.transpose(*dims)), hidden.square().sum(0)

    model = Model()
    graphs = compile_graphs(model, codec=name)
    check(graphs, model, [tokens()], 1.5 * CODECS[name].error)
    assert graphs.rewritten(NAME) == 1
    assert graphs.chosen.saved_bytes() == nbytes(name, 1024, WIDE)


@pytest.mark.e2e
def test_what_attention_reads_is_decoded_in_vector_loops() -> None:
    """Runs of codes are a dimension of the loops: no element computes in which run it lies."""
    torch._dynamo.reset()
    model = torch.compile(Attention(fused=True).bfloat16(), backend="lowmem", options={"strict": True})
    loss, _ = run_and_get_code(lambda: model(tokens().bfloat16()).float().square().mean())
    _, sources = run_and_get_code(loss.backward)
    source = "".join(sources)
    assert "uint8_t*" in source
    assert "div_floor_integer" not in source
    assert "%" not in "".join(line for line in source.splitlines() if "in_ptr" in line)


def test_short_last_dimensions_are_merged() -> None:
    model = Block(lambda h: h.unflatten(-1, (24, 4)).square().tanh().flatten(-2))
    graphs = compile_graphs(model, codec="int8")
    check(graphs, model, [rows()], 0.02)
    assert graphs.chosen.saved_bytes() <= 1.1 * ROWS * WIDE


@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "int3", "fp8"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["marked", "dynamic=True"])
def test_dynamic_batch(name: str, dynamic: bool) -> None:
    model = Block()
    graphs = compile_graphs(model, codec=name, dynamic=True if dynamic else None)
    for n in (128, 200):
        check(graphs, model, [rows(n)], 2 * CODECS[name].error, mark=None if dynamic else 0)
    assert len(graphs.entries) == 1
    assert graphs.rewritten(NAME) == 1


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_dynamic_batch_of_attention(name: str) -> None:
    model = Attention(True)
    graphs = compile_graphs(model, codec=name)
    for n in (8, 12):
        check(graphs, model, [torch.randn(n, 128, 64, requires_grad=True)], 3 * CODECS[name].error, mark=0)
    assert len(graphs.entries) == 1


@pytest.mark.parametrize(("name", "code"), [("bf16", "LM100"), ("int8", "LM100"), ("fp8", "LM100"), ("int4", "LM203")])
def test_dynamic_last_dimension(name: str, code: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Any:
            return ((x * self.scale).cumsum(-1) / 8).tanh().square()

    model = Model()
    graphs = compile_graphs(model, codec=name)
    for width in (96, 131):
        check(graphs, model, [torch.randn(ROWS, width, requires_grad=True)], 0.02, mark=1)
    assert graphs.codes(NAME) == [code]
    assert len(graphs.entries) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("function", [F.gelu, F.relu, torch.tanh], ids=["gelu", "relu", "tanh"])
@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_a_non_finite_input_reaches_the_gradients_as_without_codes(name: str, function: Function, bad: float) -> None:
    model, x = Block(function), rows().detach()
    x[3, 5] = bad
    x.requires_grad_()
    graphs = compile_graphs(model, codec=name)
    got, want = run(graphs, model, [x]), run(compile_graphs(model), model, [x])
    assert graphs.rewritten(NAME) == 1
    for k in want:
        assert not got[k][~want[k].isfinite()].isfinite().any(), k
    others = torch.arange(ROWS) != 3
    assert got["input 0"][others].isfinite().all()


def test_stochastic_rounding_follows_the_seed() -> None:
    model, x = Block(), rows()
    graphs = compile_graphs(model, codec="int4", rounding="stochastic")
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(run(graphs, model, [x]))
    assert_same(results[0], results[1], 0)
    assert not torch.equal(results[0]["up.weight"], results[2]["up.weight"])
    assert torch.equal(results[0]["output 0"], results[2]["output 0"])


def test_stochastic_rounding_is_right_on_average() -> None:
    """For a gradient that is linear in what is saved, the mean over many draws comes closer than one draw."""
    model, x = Block(torch.tanh), rows()
    want = run_double(model, [x])["down.weight"]
    graphs = compile_graphs(model, codec="int3", rounding="stochastic")
    draws = [run(graphs, model, [x])["down.weight"].double() for _ in range(100)]
    one, mean = ((t - want).norm().item() for t in (draws[0], torch.stack(draws).mean(0)))
    assert mean < one / 5


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_inside_a_checkpoint(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(torch.tanh), Block()

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.second, checkpoint(self.first, x, use_reentrant=False), use_reentrant=False)

    model = Model()
    graphs = compile_graphs(model, codec=name)
    check(graphs, model, [rows()], 2 * CODECS[name].error)
    assert held(graphs, model, [rows()]) >= graphs.chosen.saved_bytes()


def test_beside_dropout_and_masks() -> None:
    """The mask that the forward pass drew is the one that the backward pass applies."""

    class Model(Block):
        def forward(self, x: Tensor) -> Any:
            return self.down(F.dropout(torch.tanh(self.up(x)), 0.5, self.training))

    model, x = Model(), rows()
    graphs = compile_graphs(model, codec="int8", gradients="approximate")
    results = []
    for g in (graphs, compile_graphs(model)):
        torch.manual_seed(3)
        results.append(run(g, model, [x]))
    assert graphs.rewritten(NAME) >= 1
    assert max(distances(*results).values()) <= 0.02


@pytest.mark.parametrize("name", ["bf16", "int8", "int3"])
def test_idempotent(name: str) -> None:
    model, x = Block(), rows()
    graphs = compile_graphs(model, codec=name)
    run(graphs, model, [x])
    again, recorder = copy.copy(graphs.chosen), Recorder()
    before = str(again.forward.graph), str(again.backward.graph)
    partition.run_saved_stage(again, Context(Options(codec="int8", strict=True), facts={}), recorder)
    assert not [s for s in recorder.sites if s.pass_name == NAME and s.action == "rewritten"]
    assert (str(again.forward.graph), str(again.backward.graph)) == before


@pytest.mark.parametrize("late", [False, True], ids=["before", "after the rewrite"])
def test_a_failure_leaves_both_graphs_as_they_were(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    original = EncodeSaved.rewrite

    def broken(self: EncodeSaved, graph: fx.Graph, match: Match, ctx: Context) -> None:
        if late:
            original(self, graph, match, ctx)
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(EncodeSaved, "rewrite", broken)
    model = Block()
    graphs = compile_graphs(model, codec="int8", strict=False)
    with pytest.warns(RuntimeWarning, match=NAME):
        check_gradients(graphs, model, [rows()])
    assert graphs.codes(NAME) == ["LM900"]
