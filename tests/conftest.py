"""What every test gets: fixed seeds, torch's global state put back, compiled code forgotten.

torch is never imported here before a test has imported it, so that the tests without torch stay fast.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = 20_240_501

CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"
# A cached graph skips the passes: a test could pass without running what it tests. Where this cache is off,
# AOTAutograd's is too.
GRAPH_CACHE = "TORCHINDUCTOR_FX_GRAPH_CACHE_DEFAULT"
# These would win over a test that switches a cache on for itself.
FORCED = ("TORCHINDUCTOR_FX_GRAPH_CACHE", "TORCHINDUCTOR_AUTOGRAD_CACHE")

# The first example compiles; the clock says nothing about the code under test.
settings.register_profile("lowmem", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("lowmem")

_OWN_CACHE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Turn Inductor's graph cache off, and give the run a code cache unless it was given one.

    pytest-xdist's workers inherit both.
    """
    os.environ[GRAPH_CACHE] = "0"
    for name in FORCED:
        os.environ.pop(name, None)
    if CACHE_DIR not in os.environ:
        config.stash[_OWN_CACHE] = os.environ[CACHE_DIR] = tempfile.mkdtemp(prefix="lowmem-inductor-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the code cache if this run made it."""
    own = config.stash.get(_OWN_CACHE, None)
    if own is not None:
        shutil.rmtree(own, ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same seeds."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 (code under test may draw from the global generator)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _torch_state() -> Iterator[None]:
    """Put torch's global switches back, and forget what was compiled."""
    if "torch" not in sys.modules:
        yield
    else:
        import torch

        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        grad, deterministic = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
        threads = torch.get_num_threads()
        yield
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)  # "cpu" would leave a mode on
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()


@pytest.fixture
def fresh_inductor_cache(tmp_path: Path) -> Iterator[Path]:
    """An empty Inductor cache folder for one test, with the graph caches on: for tests about caching."""
    import torch._inductor.config
    from torch._inductor.utils import fresh_cache

    folder = tmp_path / "inductor"
    folder.mkdir()
    with torch._inductor.config.patch(fx_graph_cache=True), fresh_cache(dir=str(folder)):
        yield Path(os.environ[CACHE_DIR])
