"""Inductor's CUDA code of whole models, run in Triton's interpreter through Inductor's own wrapper, against eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_compile.gpu_free.blocks import BLOCKS, example, model
from lowmem_compile.gpu_free.generate import generate
from lowmem_compile.gpu_free.resources import compile_for, of_inductor
from lowmem_compile.gpu_free.steps import moved
from lowmem_compile.gpu_free.worker import Worker

pytestmark = pytest.mark.e2e


def step(call: Callable[..., Any], net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one step, in float64."""
    net.zero_grad()
    y = call(x)
    weight = torch.linspace(0.5, 1.5, y.numel()).view(y.shape)
    grads = torch.autograd.grad((y * weight).sum(), [x, *net.parameters()])
    names = ["x", *(n for n, _ in net.named_parameters())]
    return {"y": y.detach().double(), **{n: g.double() for n, g in zip(names, grads, strict=True)}}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative to each tensor's norm; the gradient of a key's bias is zero but for rounding, so it is left out."""
    assert set(got) == set(want)
    return {n: ((got[n] - want[n]).norm() / want[n].norm()).item() for n in want if not n.endswith("attention.k.bias")}


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("vit", 2),
        ("llama", 1),
        pytest.param("llama", 2, marks=pytest.mark.slow),
        pytest.param("bert", 2, marks=pytest.mark.slow),
    ],
)
def test_default_options(worker: Worker, kind: str, layers: int) -> None:
    """In float32: the forward is exact, gradients differ by the codes alone."""
    net, x = model(kind, layers), example()
    want = step(net, net, x)
    worker.launches.clear()
    generated = generate(net, worker)
    found = errors(step(generated, net, x), want)
    assert found["y"] < 1e-5
    assert max(found.values()) < 0.03
    kernels = [k for code in generated.codes for k in code.launches]
    assert [launch.kernel for launch in worker.launches] == kernels
    assert len(kernels) > 10 * layers
    assert "i8" in generated.code("forward").source  # int8 codes are written by Inductor's own kernels
    ours = [kernels.count(name) for name in ("encode_many_kernel", "decode_many_kernel")]
    assert all(layers <= count <= layers + 1 for count in ours)  # one a layer, and what the ends of the graph leave
    counted, ran = sum(moved(code.steps) for code in generated.codes), sum(launch.moved for launch in worker.launches)
    assert ran == pytest.approx(counted, rel=0.02)  # Inductor's count from shapes, and the bytes of the run


@pytest.mark.parametrize(
    ("kind", "layers"), [("llama", 1), *(pytest.param(kind, 2, marks=pytest.mark.slow) for kind in ("vit", "llama", "bert"))]
)
def test_shared_launches(worker: Worker, kind: str, layers: int) -> None:
    """Codes made and read by kernels that share launches: the same results, no kernel of ours, and fewer launches."""
    net, x = model(kind, layers), example()
    want = step(net, net, x)
    worker.launches.clear()
    generated = generate(net, worker, options={"launches": "shared"})
    found = errors(step(generated, net, x), want)
    assert found["y"] < 1e-5
    assert max(found.values()) < 0.03
    kernels = [k for code in generated.codes for k in code.launches]
    assert [launch.kernel for launch in worker.launches] == kernels
    assert not {"encode_many_kernel", "decode_many_kernel"} & set(kernels)
    assert all("SequentialFlattenComboKernelGrid" in code.source for code in generated.codes)
    counted, ran = sum(moved(code.steps) for code in generated.codes), sum(launch.moved for launch in worker.launches)
    assert ran == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(("kind", "layers"), [("llama", 1), *(pytest.param(kind, 2, marks=pytest.mark.slow) for kind in BLOCKS)])
def test_exact_gradients(worker: Worker, kind: str, layers: int) -> None:
    net, x = model(kind, layers), example()
    want = step(net, net, x)
    found = errors(step(generate(net, worker, options={"codec": "none", "gradients": "exact"}), net, x), want)
    assert max(found.values()) < 1e-4


@pytest.mark.usefixtures("_triton")
def test_generated_kernels_compile() -> None:
    net = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.randn(128, 64, requires_grad=True)
    generated = generate(net)
    generated(x).sum().backward()
    kernels = generated.code("forward").kernels
    assert len(kernels) >= 2
    for name, source in kernels.items():
        for target in ("sm_80", "sm_90"):
            assert compile_for(of_inductor(name, source), target).spilled == 0


def test_a_wrong_kernel_is_caught(worker: Worker) -> None:
    """The same wrapper with one sign turned: the interpreter must run what is in the source, not something like it."""
    x = torch.randn(64, 64)
    generated = generate(lambda x: torch.relu(x) + 1.0, worker, backend="inductor")
    assert torch.equal(generated(x), torch.relu(x) + 1.0)
    source = generated.code("inference").source
    broken = source.replace("1.0", "-1.0")
    assert broken != source
    (wrong,) = worker.run(broken, [x])
    assert torch.equal(wrong, torch.relu(x) - 1.0)


def test_memory_is_poisoned(worker: Worker) -> None:
    """A kernel that does not write its output leaves NaN there."""
    x = torch.randn(64, 64)
    generated = generate(lambda x: x * 2.0, worker, backend="inductor")
    generated(x)
    source = generated.code("inference").source
    lines = [line for line in source.splitlines() if ".run(" not in line]
    (left,) = worker.run("\n".join(lines), [x])
    assert left.isnan().all()


def test_failures_reach_the_caller(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        worker.run("call = lambda args: 1 / 0", [])
