"""Peaks by the generated code against those of the allocator, and what a budget in bytes makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem_compile
from lowmem_compile import _torch
from lowmem_compile.demo.measure import PeakBytes, peak_bytes
from lowmem_compile.errors import ScheduleError
from lowmem_compile.planner.budget import Budget
from lowmem_compile.planner.generated import followed
from lowmem_compile.planner.in_code import met_in_code
from lowmem_compile.planner.plan import Plan
from lowmem_compile.planner.replay import Code, TensorSpec, replay
from lowmem_compile.reporting import render_html, render_text
from lowmem_compile.reporting.model import GraphReport, Phase, Report, TimelinePoint

ROWS, LENGTH, WIDTH, HEADS = 4, 64, 64, 4
OPTIONS: Mapping[str, Mapping[str, Any] | None] = {
    "inductor": None,
    "default": {},
    "0.25": {"memory_budget": 0.25},
    "exact": {"gradients": "exact"},
}


class Attention(nn.Module):
    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out


class Bert(nn.Module):
    """Post-norm blocks with GELU, on token numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(100, WIDTH), Attention(causal=False)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down, self.head = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        x = self.first(x + self.attention(x))
        x = self.second(x + self.down(F.gelu(self.up(x))))
        return F.cross_entropy(self.head(x[:, 0]).float(), tokens[:, 0] % 3)


class Llama(nn.Module):
    """A pre-norm block with RMSNorm and SwiGLU, and a language model's loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(100, WIDTH), Attention(causal=True)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(3))
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((WIDTH, 172), (WIDTH, 172), (172, WIDTH)))
        self.head = nn.Linear(WIDTH, 100, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        x = x + self.attention(self.norms[0](x))
        y = self.norms[1](x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        logits = self.head(self.norms[2](x)).float()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Vit(nn.Module):
    """A convolution that cuts an image into patches, and a block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, WIDTH, 8, 8), Attention(causal=False)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down, self.head = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = x + self.attention(self.first(x))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return F.cross_entropy(self.head(x.mean(1)).float(), torch.zeros(len(x), dtype=torch.int64))


class Loops:
    """In place of Inductor's C++ compiler: loops that do nothing but zero the integers they are given, which may be indices."""

    def __getattr__(self, _kind: str) -> Callable[..., Callable[..., None]]:
        return lambda *_args, **_kwargs: self.loop

    @staticmethod
    def loop(*args: Any) -> None:
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.int64, torch.int32):
                tensor.zero_()

    def wait(self, _scope: dict[str, Any]) -> None:
        """Nothing to wait for."""


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 100, (ROWS, LENGTH))


def peaks(model: nn.Module, x: Tensor, setting: str, *, real: bool = False) -> tuple[int, PeakBytes]:
    """Simulated and measured peak of a step; without ``real`` generated loops are stubs, which allocate as little."""
    codes: list[Code | None] = []
    options = OPTIONS[setting]
    follow = followed(lambda _phase, code: codes.append(code))

    def inductor(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return _torch.compile_fx(gm, inputs, inner_compile=follow)

    with _torch.without_graph_caches(), nullcontext() if real else _torch.stub_kernels(Loops):
        call = (
            torch.compile(model, backend=inductor)
            if options is None
            else torch.compile(model, backend="lowmem", options=dict(options))
        )
        call(x).backward()
        model.zero_grad(set_to_none=True)
        measured = peak_bytes(lambda: call(x))
    if options is None:
        forward, backward = codes
        points = replay(forward, backward)
        return max(p.live_bytes for p in points), measured
    report = lowmem_compile.report(call)
    assert all("lowmem" in g.estimated and not g.not_replayed for g in report.training_graphs)
    return report.step_peak("lowmem") or 0, measured


MODELS: Mapping[str, Callable[[], nn.Module]] = {"bert": Bert, "llama": Llama, "vit": Vit}
QUICK = {("bert", "default"), ("llama", "0.25"), ("vit", "inductor"), ("vit", "exact")}


@pytest.mark.parametrize(
    ("name", "setting"),
    [pytest.param(n, s, marks=[] if (n, s) in QUICK else [pytest.mark.slow]) for n in MODELS for s in OPTIONS],
)
def test_the_simulated_peak_is_the_allocators(name: str, setting: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    x = torch.randn(ROWS, 3, 64, 64) if name == "vit" else tokens()
    simulated, measured = peaks(model, x, setting)
    assert abs(simulated / measured.peak - 1) <= 0.05, (simulated, measured)


@pytest.mark.slow
@pytest.mark.parametrize("setting", OPTIONS)
@pytest.mark.parametrize("family", ["Bert", "Llama", "ViT"])
def test_the_same_for_models_of_transformers(family: str, setting: str) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    heads = {"Bert": "ForSequenceClassification", "Llama": "ForCausalLM", "ViT": "ForImageClassification"}
    config = getattr(transformers, f"{family}Config")(
        **(shape if family != "ViT" else {**shape, "image_size": 64, "patch_size": 8})
    )
    torch.manual_seed(0)
    inner = getattr(transformers, family + heads[family])(config).eval()

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x).logits.float()
            wanted = x if logits.dim() == 3 else torch.zeros(len(x), dtype=torch.int64)
            return F.cross_entropy(logits.flatten(0, -2), wanted.flatten())

    x = torch.randn(ROWS, 3, 64, 64) if family == "ViT" else tokens()
    simulated, measured = peaks(Loss(), x, setting)
    assert abs(simulated / measured.peak - 1) <= 0.05, (simulated, measured)


@pytest.mark.e2e
@pytest.mark.slow
def test_real_loops_allocate_as_little_as_stubs() -> None:
    torch.manual_seed(0)
    model = Bert()
    simulated, measured = peaks(model, tokens(), "default", real=True)
    assert abs(simulated / measured.peak - 1) <= 0.001, (simulated, measured)
    torch._dynamo.reset()
    assert peaks(model, tokens(), "default")[1] == measured


WRAPPER = """
import torch
from torch._inductor.async_compile import AsyncCompile
assert_size_stride = torch._C._dynamo.guards.assert_size_stride
empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu
reinterpret_tensor = torch._C._dynamo.guards._reinterpret_tensor
async_compile = AsyncCompile()
loop = async_compile.cpp_pybinding([], '')
async_compile.wait(globals())
del async_compile

def call(args):
{body}
"""


def code(body: str, *inputs: TensorSpec | int) -> Code:
    return Code(WRAPPER.format(body="\n".join(f"    {line.strip()}" for line in body.strip().splitlines())), inputs)


def spec(*size: int, tangent: bool = False) -> TensorSpec:
    return TensorSpec(size, (size[1], 1) if len(size) == 2 else (1,), torch.float32, torch.device("cpu"), tangent)


def test_what_is_alive_counted_by_hand() -> None:
    forward = code(
        """
        x, n = args
        args.clear()
        a = empty_strided_cpu((n, 10), (10, 1), torch.float32)   # 400
        loop(x, a)
        b = reinterpret_tensor(a, (100, ), (1, ), 0); del a      # the same memory
        loop(b)
        c = torch.ops.aten.sum.default(x)                        # 4
        d = empty_strided_cpu((50, ), (1, ), torch.float16)      # 100
        loop(d)
        del d
        return (c, b, x, n)
        """,
        spec(10, 10),
        10,
    )
    backward = code(
        """
        n, b, x, t = args
        args.clear()
        g = empty_strided_cpu((10, 10), (10, 1), torch.float32)  # 400
        loop(b, t, g)
        del b, t
        loop(g)
        return (g, )
        """,
        10,
        spec(100),
        spec(10, 10),
        spec(1, tangent=True),
    )
    found = [(p.phase, p.label, p.live_bytes) for p in replay(forward, backward, 1)]
    assert found == [
        ("forward", "loop", 400),
        ("forward", "loop", 400),
        ("forward", "sum", 404),
        ("forward", "loop", 504),
        ("forward", "end of forward", 404),
        ("backward", "start of backward", 404),
        ("backward", "loop", 808),  # the loss, what was saved, its gradient (4 bytes) and g
        ("backward", "loop", 404),
        ("backward", "end of backward", 404),
    ]
    assert [(p.phase, p.label, p.live_bytes) for p in replay(forward, backward)] == found


def test_a_wrapper_that_cannot_be_followed_is_an_error() -> None:
    nothing = code("args.clear()\nreturn ()")
    with pytest.raises(ScheduleError, match="NameError: name 'something'"):
        replay(code("args.clear()\nsomething()\nreturn ()"), nothing, 0)
    with pytest.raises(ScheduleError, match="more saved tensors than the forward"):
        replay(nothing, code("args.clear()\nreturn ()", spec(3)), 0)
    with pytest.raises(ScheduleError, match="1 saved tensors fewer"):
        replay(code("(x, ) = args\nargs.clear()\nreturn (x, )", spec(3)), nothing, 0)
    with pytest.raises(ScheduleError, match="not Python"):
        replay(nothing, None, 0)


def test_a_step_of_several_graphs_and_variants() -> None:
    def points(forward: list[int], backward: list[int]) -> tuple[TimelinePoint, ...]:
        phases: dict[Phase, list[int]] = {"forward": forward, "backward": backward}
        return tuple(TimelinePoint("", phase, live) for phase, many in phases.items() for live in many)

    def graph(name: str, frame: str, forward: list[int], backward: list[int]) -> GraphReport:
        return GraphReport(name, "training", timelines={"lowmem": points(forward, backward)}, frame=frame)

    one, two = graph("0", "a", [10, 7], [12, 2]), graph("1", "b", [20, 5], [30, 3])
    assert Report((one,)).step_peak("lowmem") == 12
    assert Report((one, two)).step_peak("lowmem") == 37  # the second's backward beside what the first keeps
    assert Report((one, graph("2", "a", [11, 7], [13, 2]))).step_peak("lowmem") == 13  # a variant of the first
    assert Report((two, graph("3", "c", [1, 1], [1, 40]))).step_peak("lowmem") == 70  # gradients of the last stay
    assert Report((one,)).step_peak("inductor") is None


def test_the_report_has_both_peaks_and_the_cache_keeps_them() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)), torch.randn(64, WIDTH)
    report = lowmem_compile.explain(model, x, schedule=True)
    (graph,) = report.graphs
    assert set(graph.estimated) == {"inductor", "lowmem"}
    assert (graph.peak("lowmem") or 0) < (graph.peak("inductor") or 0)
    assert GraphReport.from_json(graph.to_json()) == graph
    plain = lowmem_compile.explain(model, x).graphs[0]
    assert not plain.estimated
    assert plain.peak("lowmem") == graph.estimated["lowmem"]
    assert "by the generated code" in render_text(report)
    assert "by the generated code" in render_html(report)
    assert "by the generated code" not in render_text(lowmem_compile.explain(model, x))


@pytest.mark.slow
def test_a_budget_in_bytes_holds_in_the_generated_code() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Attention(causal=True) for _ in range(4))), torch.randn(8, LENGTH, WIDTH)
    least = lowmem_compile.explain(model, x, options={"memory_budget": 0.15}, schedule=True).graphs[0].peak("lowmem") or 0
    told = lowmem_compile.explain(model, x, options={"memory_budget": f"{1.1 * least / 2**20:.3f}MiB"}, schedule=True)
    assert (told.graphs[0].peak("lowmem") or 0) <= 1.1 * least


def test_a_budget_is_planned_again_where_the_estimate_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that peaks a fifth above the estimates: the plan is one for a budget that is lower by the difference."""
    made: list[Plan] = []
    planner = SimpleNamespace(
        nearest=lambda ceiling, _: plan(ceiling // 10 * 10),
        meet=lambda budget, _saved, _room, off=0: plan((budget.peak - off) // 10 * 10),
    )
    stock = SimpleNamespace(saved_bytes=lambda: 1000)
    monkeypatch.setattr("lowmem_compile.planner.in_code.simulate", lambda _: [TimelinePoint("", "forward", 1000)])

    def plan(peak: int) -> Plan:
        made.append(Plan({"x": str(peak)}, peak, 0.0, 0.0, peak))
        return made[-1]

    def timeline(above: float) -> Callable[[Plan], list[TimelinePoint]]:
        return lambda p: [TimelinePoint("", "forward", int(p.peak * above))]

    def met(above: float) -> Plan:
        made.clear()
        return met_in_code(planner, Budget(peak=600), stock, timeline(above))  # type: ignore[arg-type]

    assert met(1.0).peak == 600
    assert len(made) == 1
    assert met(1.2).peak == 480
    assert met(0.8).peak == 720  # room that the estimate did not see
    planner.meet = lambda *_: plan(590)
    with pytest.warns(RuntimeWarning, match="Ask for less"):
        best = met(1.2)
    assert best.peak == 590
