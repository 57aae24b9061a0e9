"""``lowmem::scatter_rows``: zeros [V, D] with the rows at some indices replaced, or added to.

An operation of its own so that Inductor does not put it into one kernel with the work before it: what that work read is then
freed before the matrix, the largest tensor of a step, is allocated. Moves V·D + 2·N·D elements and 8·N bytes, the least possible.
Numerics class: EXACT. Written from the definition.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("lowmem::scatter_rows", mutates_args=())
def scatter_rows(rows: torch.Tensor, index: torch.Tensor, count: int, accumulate: bool = False) -> torch.Tensor:
    """out [count, D] in the dtype of ``rows`` [N, D]: out[index[n]] = rows[n], or the sum of all such rows; 0 elsewhere.

    Args:
        rows: any floating-point dtype.
        index: integers [N] in [-count, count).
        count: V.
        accumulate: add rows of the same index, in the dtype of ``rows``; without it they have to be equal.
    """
    at = torch.where(index < 0, index + count, index).long()
    out = rows.new_zeros(count, rows.shape[1])
    return out.index_add_(0, at, rows) if accumulate else out.index_copy_(0, at, rows)


@scatter_rows.register_fake
def _(rows: torch.Tensor, index: torch.Tensor, count: int, accumulate: bool = False) -> torch.Tensor:  # noqa: ARG001
    return rows.new_empty(count, rows.shape[1])
