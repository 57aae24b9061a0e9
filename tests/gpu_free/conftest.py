"""One interpreting process for all tests here. What needs triton is skipped without it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lowmem_compile.gpu_free.worker import Worker


@pytest.fixture(scope="session")
def _triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Skip without triton; with it, what it compiles is kept for this run alone."""
    pytest.importorskip("triton", reason="no triton: the extra `dev` installs it on Linux x86-64 alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="session")
def worker(_triton: None) -> Iterator[Worker]:
    with Worker() as started:
        yield started
