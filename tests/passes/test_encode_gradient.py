"""encode_gradient: a weight's gradient that the chunked loss made waits for the backward pass as codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.contract import Context
from lowmem_compile.kernels.group_codes import CODECS, codec_named
from lowmem_compile.options import Options
from lowmem_compile.partition import saved_context
from lowmem_compile.passes.encode_gradient import RISE, EncodeGradient
from lowmem_compile.pipeline import Recorder, run_pass
from lowmem_compile.planner.timeline import peak, simulate
from tests.helpers import assert_same, compile_graphs, run, run_double
from tests.passes.encoding import distances

NAME = "encode_gradient"
V, D, T = 600, 64, 600


class LanguageModel(nn.Module):
    """An embedding, a few layers that save much, a head that may be the embedding, and the loss."""

    def __init__(self, *, tied: bool, layers: int = 2, wide: int = 256) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(D, wide), nn.GELU(), nn.Linear(wide, D)) for _ in range(layers))
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Any:
        y = self.embedding(x)
        for layer in self.layers:
            y = y + layer(y)
        return F.cross_entropy(self.head(y).view(-1, V), (x.view(-1) * 7 + 1) % V)


def tokens(n: int = T) -> Tensor:
    return torch.randint(0, V, (2, n // 2))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["int8", "int5"])
def test_fires_once(name: str, tied: bool) -> None:
    model, x = LanguageModel(tied=tied), tokens()
    graphs = compile_graphs(model, codec=name)
    got, want = run(graphs, model, [x]), run_double(model, [x])
    (site,) = graphs.sites(NAME)
    assert site.action == "rewritten", site.reason
    codes = codec_named(name, group=Options().codec_group).nbytes(V, D)
    assert (site.bytes_before, site.bytes_after) == (4 * V * D, codes)
    far = distances(got, want)
    assert max(far.values()) < 2 * CODECS[name].error, far
    if not tied:
        assert far["head.weight"] > 0.1 * CODECS[name].error, "the head's gradient was not in codes"


def test_the_head_alone_is_off() -> None:
    """Against the same codes of everything else: the other gradients keep their bits."""
    model, x = LanguageModel(tied=False), tokens()
    got = run(compile_graphs(model, codec="int8"), model, [x])
    want = run(compile_graphs(model, codec="int8", disable=[NAME]), model, [x])
    assert [name for name in want if not torch.equal(got[name], want[name])] == ["head.weight"]


def test_no_peak_rises() -> None:
    """The site is declined where the end of the backward pass, codes beside gradient, is the highest moment."""
    for rows, wide, action in ((T, 256, "rewritten"), (8, 64, "declined")):
        model, x = LanguageModel(tied=True, layers=1, wide=wide), tokens(rows)
        graphs, plain = (compile_graphs(model, codec="int8", disable=d) for d in ([], [NAME]))
        for compiled in (graphs, plain):
            compiled(x).backward()
        (site,) = graphs.sites(NAME)
        assert site.action == action, (rows, wide, site.reason)
        assert peak(simulate(graphs.chosen)) <= RISE * peak(simulate(plain.chosen))
        if action == "declined":
            assert site.code == "LM215"
            assert "MiB" in site.reason


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ({"gradients": "exact"}, ["LM201"]),
        ({"codec": "none"}, []),
        ({"codec": "bf16"}, ["LM100"]),
        ({"codec": "auto", "memory_budget": 0.3}, []),
        ({"keep_exact": ["head"]}, ["LM211"]),
    ],
)
def test_options(options: dict[str, Any], codes: list[str]) -> None:
    """The gradient is of the head. A plan for a budget decides by itself, and ``encode_saved`` does it."""
    model = LanguageModel(tied=False)
    graphs = compile_graphs(model, **{"codec": "int8", **options})
    graphs(tokens()).backward()
    assert graphs.codes(NAME) == codes


def test_ordinary_tensors_are_left_to_encode_saved() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    graphs = compile_graphs(model, codec="int8")
    graphs(torch.randn(128, 64, requires_grad=True)).sum().backward()
    assert graphs.rewritten("encode_saved") == 1
    assert graphs.sites(NAME) == []


def test_a_factor_of_the_loss_leaves_it_a_gradient() -> None:
    class Squared(LanguageModel):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) ** 2

    model, x = Squared(tied=False), tokens()
    graphs = compile_graphs(model, codec="int8")
    far = distances(run(graphs, model, [x]), run_double(model, [x]))
    assert graphs.rewritten(NAME) == 1
    assert max(far.values()) < 2 * CODECS["int8"].error


def test_dynamic_dimension() -> None:
    model = LanguageModel(tied=True)
    graphs = compile_graphs(model, codec="int8")
    for rows in (300, 340):
        x = torch.randint(0, V, (2, rows))
        assert max(distances(run(graphs, model, [x], mark=1), run_double(model, [x])).values()) < 2 * CODECS["int8"].error
    assert len(graphs.entries) == 1
    assert graphs.rewritten(NAME) == 1


def test_nothing_is_left_to_find() -> None:
    model = LanguageModel(tied=True)
    graphs = compile_graphs(model, codec="int8")
    graphs(tokens()).backward()
    options = Options.from_dict({"strict": True, "check": "full", "codec": "int8"})
    recorder = Recorder()
    assert run_pass(EncodeGradient(), graphs.chosen.forward, saved_context(graphs.chosen, Context(options)), recorder) == []
    assert recorder.sites == []


def test_not_a_number_arrives() -> None:
    model = LanguageModel(tied=False)
    with torch.no_grad():
        model.layers[0].get_parameter("0.bias")[3] = float("nan")
    graphs = compile_graphs(model, codec="int8")
    got = run(graphs, model, [tokens()])
    assert graphs.rewritten(NAME) == 1
    assert got["head.weight"].isnan().all()


@pytest.mark.e2e
@pytest.mark.parametrize("tied", [False, True])
def test_end_to_end(tied: bool) -> None:
    model, x = LanguageModel(tied=tied), tokens()
    compiled = torch.compile(model, backend="lowmem", options={"strict": True})
    assert_same(run(compiled, model, [x]), run_double(model, [x]), 2e-2)
