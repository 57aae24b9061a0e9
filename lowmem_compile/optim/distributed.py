"""Data parallel training: gradients are averaged as they are, projected ones in projected form.

    loss.backward();  average_gradients(optimizer);  optimizer.step()               a plain model on every rank
    DistributedDataParallel(model).register_comm_hook(optimizer, projected_allreduce)  reduced while the backward pass runs

What a rank sends for a projected weight O x I is O·r (right) or r·I (left) numbers in place of O·I. All ranks hold the same
basis, since they make it from the same averaged whole gradients, so the average of the projections is the projection of the
average. The ranks have to start from the same weights, and step together. Weights that FSDP shards: see
:mod:`lowmem_compile.optim.sharded`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_compile._torch import at_end_of_backward
from lowmem_compile.errors import GradientError, OptionError
from lowmem_compile.optim.buckets import buckets
from lowmem_compile.optim.gradient import ProjectedGradient
from lowmem_compile.optim.projector import down
from lowmem_compile.optim.taps import Tap

if TYPE_CHECKING:
    from lowmem_compile.optim.base import LowRankOptimizer


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
        OptionError: a group of the optimizer has ``refresh_in_backward``: each rank would make a basis from its own gradient; or
            ``fused_backward``: there is no gradient left.
        GradientError: another rank has gradients of other shapes.
    """
    _check_options(optimizer)
    held = [_held(p.grad) for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    _check_same(held, group)
    for bucket in buckets(held, lambda t: (t.dtype, t.device), lambda t: t.nbytes):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))
    return sum(t.numel() * t.element_size() for t in held)


def projected_allreduce(optimizer: LowRankOptimizer, bucket: Any) -> torch.futures.Future[Tensor]:
    """A communication hook of DistributedDataParallel that averages projected gradients in projected form.

    ``ddp.register_comm_hook(optimizer, projected_allreduce)``, the optimizer built from ``ddp.module`` or ``ddp``. A bucket's
    projections and whole gradients go in one message, while the backward pass still runs. After it ``param.grad`` of a projected
    weight is a :class:`~lowmem_compile.optim.gradient.ProjectedGradient`; each rank has formed the whole gradient before.
    Whole gradients are sent where the step needs them: at a refresh, and always for Fira and APOLLO.

    Args:
        optimizer: holds the parameters.
        bucket: a ``dist.GradBucket``.

    Accumulate inside ``ddp.no_sync()``. The default process group is used.

    Raises:
        OptionError: see :func:`average_gradients`.
    """
    _check_options(optimizer)
    held = {p for g in optimizer.param_groups for p in g["params"]}
    params, grads = bucket.parameters(), bucket.gradients()
    taps = [tap if p in held and isinstance(tap := optimizer.tap(p), Tap) else None for p in params]
    sent = [
        grad if tap is None else down(grad.to(tap.basis.dtype), (tap.basis,), tap.side)
        for grad, tap in zip(grads, taps, strict=True)
    ]
    flat = torch.cat([t.to(grads[0].dtype).reshape(-1) for t in sent]).div_(dist.get_world_size())
    lows: list[tuple[Tensor, ProjectedGradient]] = []

    def receive(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        parts = done.value()[0].split([t.numel() for t in sent])
        for p, grad, tap, part, like in zip(params, grads, taps, parts, sent, strict=True):
            if tap is None:
                grad.copy_(part.view_as(grad))
            else:
                lows.append((p, ProjectedGradient(part.view_as(like).clone(), tap.basis, tap.side, tap.generation)))
        whole: Tensor = bucket.buffer()
        return whole

    def put() -> None:
        for p, low in lows:
            p.grad = low

    # DistributedDataParallel writes the buckets to the parameters in a call-back of its own at the end, queued after this one.
    at_end_of_backward(lambda: at_end_of_backward(put))
    work = dist.all_reduce(flat, async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(receive)
    return future


# DistributedDataParallel compares the annotations themselves, not their names.
projected_allreduce.__annotations__.update({"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]})  # type: ignore[attr-defined]


def _check_options(optimizer: LowRankOptimizer) -> None:
    if any(g["refresh_in_backward"] for g in optimizer.param_groups):
        raise OptionError(
            "refresh_in_backward=True makes a basis from the gradient of one rank, and the bases of the ranks would differ. Set "
            "it to False where gradients are averaged over ranks."
        )
    if any(g["fused_backward"] for g in optimizer.param_groups):
        raise OptionError(
            "fused_backward=True has updated the parameters from the gradient of one rank, and none is left to average. Build "
            "the optimizer with fused_backward=False where gradients are averaged over ranks."
        )


def _held(grad: Tensor) -> Tensor:
    return grad.held if isinstance(grad, ProjectedGradient) else grad


def _check_same(tensors: list[Tensor], group: dist.ProcessGroup | None) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    everyone: list[list[tuple[int, ...]] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, shapes, group=group)
    if any(other != shapes for other in everyone):
        raise GradientError(
            "the ranks have gradients of different shapes: a parameter has a gradient on some ranks alone, or its gradient is "
            "projected on some and whole on others. Give every rank a gradient for the same parameters in each step."
        )
