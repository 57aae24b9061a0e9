"""scatter_rows: zeros with some rows filled."""

from __future__ import annotations

import pytest
import torch

from lowmem_compile.kernels.scatter_rows import scatter_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("index", [[], [3], [0, 6, 2], [-1, 3, -7], [5, 5, 5]])
def test_rows_lie_at_their_indices(index: list[int], dtype: torch.dtype) -> None:
    table = torch.arange(7.0).reshape(7, 1).expand(7, 5).to(dtype) + 1
    at = torch.tensor(index, dtype=torch.long)
    out = scatter_rows(table[at], at, 7)
    wanted = torch.zeros(7, 5, dtype=dtype)
    for i in index:
        wanted[i] = table[i]
    assert torch.equal(out, wanted)
    assert out.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", [[], [3], [-1, 6, 2, 2, 6, 6]])
def test_rows_of_one_index_are_added(index: list[int], dtype: torch.dtype) -> None:
    at, rows = torch.tensor(index, dtype=torch.long), torch.arange(5.0 * len(index)).reshape(len(index), 5).to(dtype)
    wanted = torch.zeros(7, 5, dtype=dtype)
    for i, row in zip(index, rows, strict=True):
        wanted[i] += row
    assert torch.equal(scatter_rows(rows, at, 7, accumulate=True), wanted)


def test_the_operation_is_registered_correctly() -> None:
    rows, index = torch.randn(3, 4), torch.tensor([1, -2, 0])
    for accumulate in (False, True):
        torch.library.opcheck(torch.ops.lowmem.scatter_rows.default, (rows, index, 6, accumulate))


def test_an_index_outside_is_an_error() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        scatter_rows(torch.ones(1, 2), torch.tensor([4]), 4)
