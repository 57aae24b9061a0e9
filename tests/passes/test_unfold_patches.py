"""unfold_patches: a convolution whose windows tile its input is a linear layer on the windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.contract import Context
from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.options import Options
from lowmem_compile.passes import unfold_patches
from lowmem_compile.passes.unfold_patches import UnfoldPatches
from tests.helpers import TOLERANCE, apply, assert_same, check_gradients, compile_graphs, dynamo_graph, run, run_double

NAME = "unfold_patches"
PASS = UnfoldPatches()
MEASURED = unfold_patches.scratch
OUT = 12


@pytest.fixture(autouse=True)
def _takes_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much memory a convolution takes depends on the processor."""
    monkeypatch.setattr(unfold_patches, "scratch", lambda *_: 1 << 30)


class Patches(nn.Module):
    """A patch embedding, and work behind it."""

    def __init__(self, dims: int = 2, window: Any = 4, channels: int = 3, **settings: Any) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.embed = kind(channels, OUT, window, **{"stride": window, **settings})
        self.mix = nn.Linear(OUT, OUT)

    def forward(self, x: Tensor) -> Any:
        return torch.tanh(self.mix(self.embed(x).flatten(2).transpose(1, 2)))


def image(*sizes: int, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *(sizes or (8, 12)), requires_grad=True)


class Functional(Patches):
    def forward(self, x: Tensor) -> Any:
        return torch.tanh(F.conv2d(x, weight=self.embed.weight, stride=4, bias=self.embed.bias))


class Positional(Patches):
    def forward(self, x: Tensor) -> Any:
        return torch.tanh(F.conv2d(x, self.embed.weight, self.embed.bias, [4, 4], "valid", 1, 1))


class Behind(Patches):
    """Behind other work, which needs the gradient of the images; the output is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        y = self.embed(torch.tanh(self.before(x)))
        return y, torch.sin(y)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "images": (Patches, ()),
    "no bias": (lambda: Patches(bias=False), ()),
    "a remainder": (Patches, (9, 15)),
    "a remainder in one dimension": (Patches, (8, 15)),
    "one patch": (Patches, (4, 4)),
    "oblong windows": (lambda: Patches(window=(2, 6)), ()),
    "signals": (lambda: Patches(1, 5), (20,)),
    "videos": (lambda: Patches(3, (2, 4, 4)), (4, 8, 12)),
    "padding='valid'": (lambda: Patches(padding="valid"), ()),
    "functional": (Functional, ()),
    "all by position": (Positional, ()),
    "behind other work": (Behind, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_fires_once_and_matches_float64(case: str) -> None:
    make, sizes = CASES[case]
    graphs = compile_graphs(model := make(), gradients="exact")
    check_gradients(graphs, model, [image(*sizes)])
    assert graphs.codes(NAME) == ["LM100"]


def test_the_output_has_the_strides_of_a_convolutions() -> None:
    model = nn.Conv2d(3, OUT, 4, stride=4)
    y = compile_graphs(model, gradients="exact")(x := image())
    assert y.stride() == model(x).stride()


@pytest.mark.parametrize("part", ["embed.weight", "embed.bias", "embed"])
def test_frozen(part: str) -> None:
    model = Patches()
    (model.get_submodule(part) if part == "embed" else model.get_parameter(part)).requires_grad_(False)
    graphs = compile_graphs(model, gradients="exact")
    check_gradients(graphs, model, [image().detach()])
    assert graphs.rewritten(NAME) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    graphs = compile_graphs(model := Patches(), gradients="exact")
    got = run(graphs, model, [x := image()], autocast=dtype)
    assert_same(got, run_double(model, [x]), TOLERANCE[dtype])
    assert graphs.rewritten(NAME) == 1


def test_narrow_weights() -> None:
    model, x = Patches().bfloat16(), image().detach().bfloat16()
    graphs = compile_graphs(model, gradients="exact")
    check_gradients(graphs, model, [x], torch.bfloat16)
    assert graphs.rewritten(NAME) == 1


def test_nothing_is_kept_but_the_images() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, OUT, 4, stride=4)), image().detach()
    with_pass, without = (compile_graphs(model, gradients="exact", disable=d) for d in ([], [NAME]))
    for graphs in (with_pass, without):
        check_gradients(graphs, model, [x])
    assert with_pass.chosen.saved_bytes() <= without.chosen.saved_bytes()


NEAR_MISSES: dict[str, Callable[[], nn.Module]] = {
    "windows overlap": lambda: Patches(stride=2),
    "windows leave gaps": lambda: Patches(stride=5),
    "padding": lambda: Patches(padding=2),
    "dilation": lambda: Patches(window=2, stride=2, dilation=2),
    "groups": lambda: Patches(channels=3, groups=3),
    "one element": lambda: Patches(window=1),
    "one of two dimensions": lambda: Patches(window=(4, 2), stride=(4, 1)),
    "padding='same'": lambda: Patches(window=3, stride=1, padding="same"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss(case: str) -> None:
    graphs = compile_graphs(model := NEAR_MISSES[case](), gradients="exact")
    check_gradients(graphs, model, [image(12, 12)])
    assert graphs.sites(NAME) == []


def test_one_image_without_a_batch_is_left_alone() -> None:
    graphs = compile_graphs(model := nn.Conv2d(3, OUT, 4, stride=4), gradients="exact")
    check_gradients(graphs, model, [image().detach()[0]])
    assert graphs.sites(NAME) == []


def test_inference_declines() -> None:
    graphs = compile_graphs(model := Patches())
    with torch.no_grad():
        assert torch.allclose(graphs(x := image()), model(x), atol=1e-5)
    assert graphs.codes(NAME) == ["LM303"]


def test_a_dynamic_batch() -> None:
    graphs = compile_graphs(model := Patches(), gradients="exact")
    for batch in (2, 5):
        check_gradients(graphs, model, [image(batch=batch)], mark=0)
    assert len(graphs.entries) == 1
    assert graphs.rewritten(NAME) == 1


def test_dynamic_images_decline() -> None:
    graphs = compile_graphs(model := Patches(), dynamic=True, gradients="exact")
    for size in (8, 16):
        check_gradients(graphs, model, [image(size, size)])
    assert graphs.codes(NAME) == ["LM203"]


def test_idempotent() -> None:
    gm, _ = dynamo_graph(Patches(), image())
    _, done = apply(PASS, gm)
    assert len(done) == 1
    sites, done = apply(PASS, gm)
    assert (sites, done) == ([], [])


@pytest.mark.parametrize(("taken", "code"), [(1 << 19, "LM305"), (1 << 20, "LM306"), (1 << 22, "LM100")])
def test_it_is_used_where_the_convolution_takes_more(taken: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfold_patches, "scratch", lambda *_: taken)
    graphs = compile_graphs(nn.Sequential(nn.Conv2d(3, OUT, 64, stride=64), nn.Flatten()), gradients="exact")
    graphs(image(512, 512, batch=1)).sum().backward()
    (site,) = graphs.sites(NAME)
    assert site.code == code
    if code == "LM100":
        assert site.bytes_before == taken - 4 * 3 * 512 * 512


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_convolution_takes_is_measured(frozen: bool) -> None:
    """In the dtype and the layout that it is computed in; as the pass asks, so a direct measurement."""
    model, x = nn.Conv2d(3, 64, 14, stride=14).bfloat16(), torch.randn(2, 3, 112, 112, dtype=torch.bfloat16)
    model.weight.requires_grad_(not frozen)
    gm, _ = dynamo_graph(model, x)
    context = Context(Options())
    (match,) = PASS.find(gm.graph, context)
    weight, image = (t.detach().to(memory_format=torch.channels_last) for t in (model.weight, x))
    y = torch.conv2d(image, weight, stride=14)
    settings = ([14, 14], [0, 0], [1, 1], False, [0, 0], 1)

    def forward() -> Tensor:
        result: Tensor = torch.ops.aten.convolution(image, weight, None, *settings)
        return result

    def backward() -> Any:
        return torch.ops.aten.convolution_backward(y, image, weight, [0], *settings, [False, True, False])

    taken = []
    for call in (forward, backward):
        call()
        found = peak_bytes(call, lambda _: None)
        taken.append(found.peak - found.end)
    assert MEASURED(match, context) == (taken[0] if frozen else max(taken))
    assert unfold_patches.patch_bytes(match, context) == x.nbytes
