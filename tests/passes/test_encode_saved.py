"""encode_saved: floating-point tensors cross into the backward pass as group-wise codes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from lowmem_compile.kernels.group_codes import CODECS, codec_named
from tests.helpers import TOLERANCE, assert_same, compile_graphs, run, run_double
from tests.passes.encoding import (
    NAME,
    ROWS,
    WIDE,
    Attention,
    Block,
    Function,
    check,
    distances,
    held,
    nbytes,
    rows,
    tokens,
)


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
    options: dict[str, Any] = {"strict": True, "disable": ["attention_backward"]}  # which reads codes of eight bits
    model = torch.compile(Attention(fused=True).bfloat16(), backend="lowmem", options=options)
    loss, _ = run_and_get_code(lambda: model(tokens().bfloat16()).float().square().mean())
    _, sources = run_and_get_code(loss.backward)
    source = "".join(sources)
    assert "uint8_t*" in source
    assert "div_floor_integer" not in source
    assert "%" not in "".join(line for line in source.splitlines() if "in_ptr" in line)


class Normed(nn.Module):
    """A norm between linears, whose backward sums what it reads over a row."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(192, 192), nn.RMSNorm(192), nn.Linear(192, 192)

    def forward(self, x: Tensor) -> Any:
        return torch.tanh(self.outer(self.norm(torch.tanh(self.inner(x)))))


@pytest.mark.parametrize(
    ("name", "model", "alone"),
    [
        ("int6", Normed, True),
        ("int8", Normed, False),
        ("int6", Block, True),  # GELU again, for a weight's gradient, and its slope
        ("int8", Block, False),
        ("int6", functools.partial(Block, torch.tanh), False),
    ],
)
def test_what_is_decoded_in_loops_of_its_own(name: str, model: Callable[[], nn.Module], alone: bool) -> None:
    """Where codes lie in runs: what a norm sums, and what two results are made of. One pointwise result decodes for itself."""
    net = model()
    graphs = compile_graphs(net, codec=name)
    run(graphs, net, [torch.randn(128, 192, requires_grad=True) if model is Normed else rows()])
    assert graphs.rewritten(NAME) > 0
    assert any(n.target is torch.ops.lowmem.in_memory.default for n in graphs.chosen.backward.graph.nodes) == alone


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
