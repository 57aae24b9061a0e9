"""One interpreting process for all tests here; without triton they are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lowmem_compile.gpu_free.worker import Worker

pytest.importorskip("triton", reason="the extra `dev` installs triton where it has wheels")


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    with Worker() as started:
        yield started
