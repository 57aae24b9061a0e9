"""Whatever the model does and whichever pass fails: the result is right, or the error is clear."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowmem_compile.contract import Context, Match
from lowmem_compile.passes.approximate_activation import ApproximateActivation
from lowmem_compile.passes.norm_from_output import NormFromOutput
from lowmem_compile.passes.recognise_activation import RecogniseActivation
from tests.helpers import TOLERANCE, assert_same, check_gradients, compile_graphs, run, run_double

D, WIDE, ROWS = 16, 64, 12


class Block(nn.Module):
    """A site for most passes: a norm, a hand-written activation, a frozen linear, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, WIDE), nn.Linear(WIDE, D).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.inner(x)
        a = self.up(self.norm(h))
        y: Tensor = h + self.down(a * torch.sigmoid(a))
        return y


def x_of(*shape: int) -> Tensor:
    return torch.randn(*(shape or (ROWS, D)), requires_grad=True)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after half the rewrite"])
@pytest.mark.parametrize("failing", [RecogniseActivation, ApproximateActivation])
def test_a_pass_that_throws_is_left_out(failing: type, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., None] = failing.rewrite  # type: ignore[attr-defined]

    def broken(self: Any, graph: fx.Graph, match: Match, ctx: Context) -> None:
        if late:
            original(self, graph, match, ctx)
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(failing, "rewrite", broken)
    model, x = Block(), x_of()
    name: str = failing.name  # type: ignore[attr-defined]
    graphs = compile_graphs(model, strict=False, disable=["approximate_activation"] if failing is RecogniseActivation else [])
    with pytest.warns(RuntimeWarning, match=name) as caught:
        got = run(graphs, model, [x])
    (message,) = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert "on purpose" in message
    assert_same(got, run_double(model, [x]), TOLERANCE[torch.float32])
    assert [(s.action, s.code) for s in graphs.sites(name)] == [("failed", "LM900")]


@pytest.mark.parametrize("failing", [RecogniseActivation, ApproximateActivation])
def test_strict_raises(failing: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(failing, "rewrite", broken)
    with pytest.raises(Exception, match=f"PassError.*{failing.name}.*on purpose"):  # type: ignore[attr-defined]
        compile_graphs(Block(), strict=True)(x_of())


def test_a_rewrite_that_loses_a_value_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RecogniseActivation.rewrite

    def forgetful(self: RecogniseActivation, graph: fx.Graph, match: Match, ctx: Context) -> None:
        original(self, graph, match, ctx)
        for node in graph.nodes:
            if node.target is F.silu:
                del node.meta["example_value"]

    monkeypatch.setattr(RecogniseActivation, "rewrite", forgetful)
    with pytest.raises(Exception, match=r"PassError.*recognise_activation"):
        compile_graphs(Block(), strict=True, check="lint")(x_of())


def test_the_warning_names_the_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(RecogniseActivation, "rewrite", broken)
    with pytest.warns(RuntimeWarning, match=str(tmp_path)):
        compile_graphs(Block(), strict=False, dump=str(tmp_path))(x_of())


def test_dumps_are_numbered_and_readable(tmp_path: Path) -> None:
    graphs = compile_graphs(Block(), dump=str(tmp_path))
    graphs(x_of())
    (folder,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".py")
    stems = [n[3:-3] for n in names]
    assert [n[:2] for n in names] == [f"{i:02d}" for i in range(len(names))]
    assert stems[:2] == ["dynamo", "after_recognise_activation"]
    assert {"joint", "after_approximate_activation"} <= set(stems)
    for name in names:
        text = (folder / name).read_text(encoding="utf-8")
        compile(text, name, "exec")
        assert "def forward" in text


def test_nothing_is_dumped_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOWMEM_DEBUG_DIR", raising=False)
    compile_graphs(Block())(x_of())
    assert not list(tmp_path.iterdir())


def test_inductors_off_switch_turns_one_pass_off() -> None:
    model, x = Block(), x_of()
    with inductor_config.patch(disabled_passes="lowmem_recognise_activation"):
        graphs = compile_graphs(model)
        got = run(graphs, model, [x])
    assert graphs.sites("recognise_activation") == []
    assert_same(got, run_double(model, [x]), TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["recognise_activation", "approximate_activation"])
def test_a_disabled_pass_does_not_run(name: str) -> None:
    graphs = compile_graphs(Block(), disable=[name])
    graphs(x_of())
    assert graphs.sites(name) == []


def test_no_grad_and_eval() -> None:
    model, x = Block().eval(), torch.randn(ROWS, D)
    graphs = compile_graphs(model)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(graphs(x), model(x))
    assert graphs.candidates == []


def test_no_parameter_requires_grad() -> None:
    model, x = Block().requires_grad_(False), torch.randn(ROWS, D)
    graphs = compile_graphs(model, gradients="exact")
    torch.testing.assert_close(graphs(x), model(x))
    assert graphs.candidates == []
    check_gradients(graphs, model, [x_of()])


def test_graph_breaks() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            torch._dynamo.graph_break()
            y: Tensor = self.second(h)
            return y

    model, x = Model(), x_of()
    graphs = compile_graphs(model, gradients="exact")
    check_gradients(graphs, model, [x])
    assert len(graphs.candidates) == 2


def test_checkpoint_inside_the_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.first, x, use_reentrant=False)
            y: Tensor = checkpoint(self.second, h, use_reentrant=False)
            return y

    model, x = Model(), x_of()
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [x])
    plain = graphs.only.partitions["inductor"].saved_bytes()
    assert graphs.chosen.saved_bytes() <= plain
    assert not any(n.meta["val"].numel() >= ROWS * WIDE for n in graphs.chosen.kept())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(dtype: torch.dtype) -> None:
    model, x = Block().to(dtype), torch.randn(ROWS, D, dtype=dtype, requires_grad=True)
    graphs = compile_graphs(model, gradients="exact")
    check_gradients(graphs, model, [x], dtype=torch.bfloat16)


def test_autocast_inside_and_outside() -> None:
    class Model(Block):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
                return super().forward(x).to(x.dtype)

    for model, autocast in ((Block(), torch.bfloat16), (Model(), None)):
        graphs = compile_graphs(model, gradients="exact")
        x = x_of()
        assert_same(run(graphs, model, [x], autocast=autocast), run_double(model, [x]), TOLERANCE[torch.bfloat16])
        assert graphs.rewritten("recognise_norm") == 1


@pytest.mark.parametrize("training", [False, True])
def test_a_dropout_rate_may_be_a_dynamic_number(*, training: bool) -> None:
    model = nn.Sequential(nn.Linear(D, WIDE), nn.GELU(), nn.Dropout(0.1), nn.Linear(WIDE, D)).train(training)
    graphs = compile_graphs(model, dynamic=True, fullgraph=True, report=True)
    for rows in (ROWS, ROWS + 3):
        graphs(x_of(rows, D)).sum().backward()
    (entry,) = graphs.entries
    assert entry.eager is not None
    assert entry.eager[0]
    if not training:
        check_gradients(graphs, model, [x_of()])


def test_dynamic_rows_do_not_recompile() -> None:
    model = Block()
    graphs = compile_graphs(model, gradients="exact")
    for rows in (5, 8, 13):
        check_gradients(graphs, model, [x_of(rows, D)], mark=0)
    assert len(graphs.entries) == 1


def test_non_contiguous_input() -> None:
    model, x = Block(), torch.randn(D, 5, ROWS).permute(2, 1, 0)
    assert not x.is_contiguous()
    check_gradients(compile_graphs(model, gradients="exact"), model, [x.detach().requires_grad_()])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_no_rows(autocast: torch.dtype | None) -> None:
    model, x = Block(), torch.empty(0, D, requires_grad=True)
    got = run(compile_graphs(model), model, [x], autocast=autocast)
    assert got["output 0"].shape == (0, D)
    assert all(not v.any() for v in got.values())


def test_double_backward_is_refused_clearly() -> None:
    model, x = Block(), x_of()
    y = compile_graphs(model)(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        slope.sum().backward()


def test_retain_graph_gives_the_same_gradient_twice() -> None:
    model, x = Block(), x_of()
    loss = compile_graphs(model)(x).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_state_dict_and_parameters_are_the_models_own() -> None:
    model, x = Block(), x_of()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run(compile_graphs(model), model, [x], autocast=torch.bfloat16)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_training_step_is_seen_by_the_next_call() -> None:
    model, x = Block(), x_of()
    graphs = compile_graphs(model, gradients="exact")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        check_gradients(graphs, model, [x])
        optimizer.step()
    assert len(graphs.entries) == 1


def test_tied_weights() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm, self.w = (
                nn.Linear(D, D),
                nn.RMSNorm(D, eps=1e-6),
                nn.Linear(D, D, bias=False),
            )

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.w(self.norm(self.inner(F.silu(self.w(x)))))
            return y

    model, x = Model(), x_of()
    for autocast in (None, torch.bfloat16):
        got = run(compile_graphs(model, gradients="exact"), model, [x], autocast=autocast)
        assert_same(got, run_double(model, [x]), TOLERANCE[autocast or torch.float32])


def test_the_library_is_silent_when_all_goes_well(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = Block(), x_of()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=RuntimeWarning)
        run(compile_graphs(model), model, [x], autocast=torch.bfloat16)
    assert capsys.readouterr() == ("", "")


def test_failed_pass_in_a_trial_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(NormFromOutput, "rewrite", broken)

    class Model(Block):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                h = self.inner(x)
            a = self.up(self.norm(h))
            y: Tensor = self.down(F.silu(a))
            return y

    model, x = Model(), x_of()
    graphs = compile_graphs(model, strict=False)
    with pytest.warns(RuntimeWarning, match="norm_from_output"):
        run(graphs, model, [x], autocast=torch.bfloat16)
    assert graphs.rewritten("approximate_activation") == 1
