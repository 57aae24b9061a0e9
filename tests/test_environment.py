"""The compiler stack that we stand on works here: if this fails, look at the machine before our code."""

from pathlib import Path

import pytest
import torch


def step(x: torch.Tensor) -> torch.Tensor:
    """A scalar loss of any tensor."""
    return (torch.sin(x) * x).sum()


def cache_hits() -> int:
    """How often a second compile of `step` takes its graph from AOTAutograd's cache or from Inductor's."""
    from torch._dynamo.utils import counters

    counters.clear()
    for _ in range(2):
        torch.compiler.reset()
        torch.compile(step, backend="inductor")(torch.ones(4, 8))
    return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]


@pytest.mark.e2e
def test_inductor_compiles_a_training_step() -> None:
    """Stock Inductor builds kernels for forward and backward, and agrees with eager."""
    from torch._inductor import metrics

    metrics.reset()
    x = torch.randn(8, 16, requires_grad=True)
    expected = torch.autograd.grad(step(x), x)[0]
    actual = torch.autograd.grad(torch.compile(step, backend="inductor")(x), x)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert metrics.generated_kernel_count >= 2


@pytest.mark.e2e
def test_graph_caches_are_off() -> None:
    """A cached graph would skip the passes that a test is about."""
    assert cache_hits() == 0


@pytest.mark.e2e
def test_fresh_inductor_cache(fresh_inductor_cache: Path) -> None:
    """The fixture's folder is where Inductor looks, it begins empty, and the graph caches are on."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert Path(cache_dir()) == fresh_inductor_cache
    assert list(fresh_inductor_cache.iterdir()) == []
    assert cache_hits() > 0


def test_leaks_default_dtype_and_device() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    assert torch.empty(1).dtype == torch.float64


def test_starts_from_the_defaults() -> None:
    """The test above changed them; the fixture put them back."""
    assert torch.empty(1).dtype == torch.float32
    assert torch.empty(1).device.type == "cpu"
