"""Two processes, gradients averaged in projected form or rows sharded: the weights of one process with the whole batch."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

from lowmem_compile.errors import OptionError
from lowmem_compile.optim import COAP, Fira, GaLore, LowRankOptimizer, average_gradients, projected_allreduce
from lowmem_compile.optim.gradient import ProjectedGradient, projected_gradient
from lowmem_compile.optim.projector import down

D, O, R, ROWS, STEPS = 12, 20, 3, 8, 5
LIMIT = 0.05


def project_gradients(optimizer: LowRankOptimizer, weights: list[Tensor]) -> None:
    """Put projected gradients in the place of whole ones where a compiled graph would."""
    for W in weights:
        tap = optimizer.tap(W)
        if not isinstance(tap, str):
            assert W.grad is not None
            W.grad = ProjectedGradient(down(W.grad, (tap.basis,), tap.side), tap.basis, tap.side, tap.generation)


def gradients(model: nn.Linear, x: Tensor, optimizer: LowRankOptimizer, *, project: bool) -> None:
    """The gradients of one backward pass, projected as a compiled graph would give them where that is allowed."""
    model(x).square().mean().backward()
    if project:
        project_gradients(optimizer, [model.weight])


def make() -> tuple[nn.Linear, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Linear(D, O), [torch.randn(2, ROWS, D) for _ in range(STEPS)]


def data_parallel(rank: int) -> tuple[dict[str, Tensor], list[int]]:
    """``average_gradients`` on a plain model; the bytes that were sent."""
    model, batches = make()
    optimizer = GaLore(model.parameters(), rank=R, update_interval=3)
    sent = []
    for x in batches:
        gradients(model, x[rank], optimizer, project=True)
        sent.append(average_gradients(optimizer))
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), sent


def distributed_data_parallel(rank: int, *, view: bool) -> tuple[dict[str, Tensor], list[int]]:
    """``projected_allreduce``, with accumulation and a global norm; the bytes that ``all_reduce`` was given."""
    model, batches = make()
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view)
    optimizer = GaLore(wrapped.parameters(), rank=R, update_interval=3)
    wrapped.register_comm_hook(optimizer, projected_allreduce)
    sent, reduce = [0], dist.all_reduce

    def counting(flat: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[-1] += flat.nbytes
        return reduce(flat, *args, **kwargs)

    for x in batches:
        half = ROWS // 2
        with wrapped.no_sync():
            (wrapped(x[rank][:half]).square().mean() / 2).backward()
        with patch.object(dist, "all_reduce", counting):
            (wrapped(x[rank][half:]).square().mean() / 2).backward()
        assert isinstance(model.weight.grad, ProjectedGradient) == (len(sent) not in (1, 4))
        clip_grad_norm_(wrapped.parameters(), LIMIT)
        optimizer.step()
        optimizer.zero_grad()
        sent.append(0)
    return model.state_dict(), sent[:-1]


def sharded(rank: int, name: str) -> tuple[dict[str, Tensor], list[int]]:
    """``fully_shard``; the bytes of state of the weight."""
    model, batches = make()
    whole = nn.Sequential(model)
    fully_shard(whole, mesh=init_device_mesh("cpu", (2,)))
    optimizer = SHARDED[name](whole.parameters())
    for x in batches:
        whole(x[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state: dict[str, Any] = model.state_dict()
    held = sum(t.nbytes for t in optimizer.state[model.weight].values() if isinstance(t, Tensor))
    assert held == optimizer.state_bytes(model.weight)
    with pytest.raises(OptionError, match="base='adafactor' needs all of it at once"):
        GaLore(whole.parameters(), rank=R, base="adafactor")
    return {key: value.full_tensor() for key, value in state.items()}, [held]


SHARDED: dict[str, Callable[[Any], LowRankOptimizer]] = {
    "COAP": lambda p: COAP(p, rank=R, update_interval=2, reproject_factor=2, restore_state=True),
    "Fira": lambda p: Fira(p, rank=R, update_interval=3),
}


class Block(nn.Module):
    """One weight is projected on the right, the other on the left; 21 rows do not divide by 2."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 21), nn.Linear(21, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return y


def make_blocks() -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()), [torch.randn(2, ROWS, D).requires_grad_() for _ in range(STEPS)]


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.dim() == 2]


def sharded_and_compiled(rank: int, *, low_precision: bool) -> tuple[dict[str, Tensor], list[int]]:
    """``fully_shard`` around compiled blocks, with accumulation and a global norm; bytes sent in each step, FSDP's too."""
    model, batches = make_blocks()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32 if low_precision else None)
    mesh = init_device_mesh("cpu", (2,))
    for block in [*model, model]:
        if block is not model:
            block.compile(backend="lowmem")
        fully_shard(block, mesh=mesh, mp_policy=policy if low_precision else MixedPrecisionPolicy())
    optimizer = GaLore(weights_of(model), rank=R, update_interval=3)
    sent, half = [0], ROWS // 2
    scatter, reduce = dist.reduce_scatter_single, dist.all_reduce

    def scattering(*args: Tensor, **kwargs: Any) -> Any:
        sent[-1] += (args[1] if len(args) > 1 else kwargs["input"]).nbytes
        return scatter(*args, **kwargs)

    def reducing(flat: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[-1] += flat.nbytes
        return reduce(flat, *args, **kwargs)

    for x in batches:
        model.set_requires_gradient_sync(False)  # type: ignore[operator]
        (model(x[rank][:half]).square().mean() / 2).backward()
        model.set_requires_gradient_sync(True)  # type: ignore[operator]
        with patch.object(dist, "reduce_scatter_single", scattering), patch.object(dist, "all_reduce", reducing):
            (model(x[rank][half:]).square().mean() / 2).backward()
        assert all((projected_gradient(p) is not None) == (len(sent) not in (1, 4)) for p in weights_of(model))
        clip_grad_norm_(weights_of(model), LIMIT)
        optimizer.step()
        model.zero_grad()
        sent.append(0)
    state: dict[str, Any] = model.state_dict()
    return {key: value.full_tensor() for key, value in state.items()}, sent[:-1]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, tuple[dict[str, Tensor], list[int]]]]:
    """What two ranks have in the end, by the way in which they worked together."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [subprocess.Popen([sys.executable, "-P", __file__, str(rank), folder]) for rank in range(2)]
        assert [process.wait(timeout=300) for process in ranks] == [0, 0]
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results: dict[str, Any] = {
        "average": data_parallel(rank),
        "ddp": distributed_data_parallel(rank, view=False),
        "ddp view": distributed_data_parallel(rank, view=True),
        **{name: sharded(rank, name) for name in SHARDED},
        "compiled": sharded_and_compiled(rank, low_precision=False),
        "compiled, bfloat16": sharded_and_compiled(rank, low_precision=True),
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def alone(optimizer_of: Callable[[Any], LowRankOptimizer], limit: float | None = None) -> dict[str, Tensor]:
    """One process with the whole batch."""
    model, batches = make()
    optimizer = optimizer_of(model.parameters())
    for x in batches:
        gradients(model, x.reshape(-1, D), optimizer, project=limit is not None)
        if limit is not None:
            clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


WHOLE, LOW = 4 * (O * D + O), 4 * (O * R + O)


@pytest.mark.parametrize("what", ["average", "ddp", "ddp view"])
def test_two_processes_equal_one_with_the_whole_batch(ranks: Any, what: str) -> None:
    (first, sent), (second, _) = (rank[what] for rank in ranks)
    want = alone(lambda p: GaLore(p, rank=R, update_interval=3), None if what == "average" else LIMIT)
    for name, value in want.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6)
    assert sent == [WHOLE, LOW, LOW, WHOLE, LOW]


def test_rows_sharded_over_two_processes(ranks: Any) -> None:
    for name, optimizer_of in SHARDED.items():
        (first, held), (second, _) = (rank[name] for rank in ranks)
        for key, value in alone(optimizer_of).items():
            assert torch.equal(first[key], second[key])
            torch.testing.assert_close(first[key], value, rtol=0, atol=1e-6)
        assert held == [4 * (D * R + 2 * O // 2 * R + (name == "Fira"))]


@pytest.mark.parametrize(("what", "tolerance"), [("compiled", 1e-6), ("compiled, bfloat16", 3e-4)])
def test_compiled_blocks_that_are_sharded_send_projections(ranks: Any, what: str, tolerance: float) -> None:
    (first, sent), (second, _) = (rank[what] for rank in ranks)
    model, batches = make_blocks()
    optimizer = GaLore(weights_of(model), rank=R, update_interval=3)
    for x in batches:
        model(x.reshape(-1, D)).square().mean().backward()
        project_gradients(optimizer, weights_of(model))
        clip_grad_norm_(weights_of(model), LIMIT)
        optimizer.step()
        model.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=tolerance)
    whole, low, biases = 22 * D + 21 * D, 22 * R + R * 21, 22 + D
    sizes = [4 * 2 * (weights + biases) for weights in (whole, low)]
    assert sent == [sizes[0], sizes[1], sizes[1], sizes[0], sizes[1]]


def test_a_basis_of_each_rank_is_refused() -> None:
    model = copy.deepcopy(make()[0])
    with pytest.raises(OptionError, match="refresh_in_backward=True"):
        average_gradients(GaLore(model.parameters(), rank=R, refresh_in_backward=True))
    with pytest.raises(OptionError, match="fused_backward=True"):
        average_gradients(GaLore(model.parameters(), rank=R, fused_backward=True))


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2])
