"""Data parallel training without DistributedDataParallel: gradients are averaged as they are, projected ones in projected form.

    loss.backward();  average_gradients(optimizer);  optimizer.step()

What a rank sends for a projected weight O x I is O·r (right) or r·I (left) numbers in place of O·I. All ranks hold the same
basis, since they make it from the same averaged whole gradients, so the average of the projections is the projection of the
average. The ranks have to start from the same weights, and step together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_compile.errors import GradientError, OptionError
from lowmem_compile.optim.gradient import ProjectedGradient

if TYPE_CHECKING:
    from lowmem_compile.optim.base import LowRankOptimizer

BUCKET = 25 * 2**20
"""Bytes that are sent together, at least where there are as many."""


def average_gradients(optimizer: LowRankOptimizer, group: dist.ProcessGroup | None = None) -> int:
    """Replace each gradient by its average over the ranks of a process group.

    Every rank must have gradients for the same parameters, in the same form: run the same number of backward passes between two
    steps. Gradients are sent in buckets of one dtype.

    Args:
        optimizer: its parameters' gradients are averaged; not under DistributedDataParallel, which does so itself.
        group: the default group if ``None``.

    Returns:
        Bytes of gradients that this rank handed over.

    Raises:
        OptionError: a group of the optimizer has ``refresh_in_backward``: each rank would make a basis from its own gradient.
        GradientError: another rank has gradients of other shapes.
    """
    if any(g["refresh_in_backward"] for g in optimizer.param_groups):
        raise OptionError(
            "refresh_in_backward=True makes a basis from the gradient of one rank, and the bases of the ranks would differ. Set "
            "it to False where gradients are averaged over ranks."
        )
    held = [_held(p.grad) for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    _check_same(held, group)
    for bucket in _buckets(held):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))
    return sum(t.numel() * t.element_size() for t in held)


def _held(grad: Tensor) -> Tensor:
    return grad.held if isinstance(grad, ProjectedGradient) else grad


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device, in order, until a bucket is full."""
    for kind in dict.fromkeys((t.dtype, t.device) for t in tensors):
        bucket: list[Tensor] = []
        for tensor in (t for t in tensors if (t.dtype, t.device) == kind):
            bucket.append(tensor)
            if sum(t.numel() * t.element_size() for t in bucket) >= BUCKET:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def _check_same(tensors: list[Tensor], group: dist.ProcessGroup | None) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    everyone: list[list[tuple[int, ...]] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, shapes, group=group)
    if any(other != shapes for other in everyone):
        raise GradientError(
            "the ranks have gradients of different shapes: a parameter has a gradient on some ranks alone, or its gradient is "
            "projected on some and whole on others. Give every rank a gradient for the same parameters in each step."
        )
