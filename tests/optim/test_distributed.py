"""Gradients averaged over two processes, projected ones in projected form: the weights of one process with the whole batch."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowmem_compile.errors import OptionError
from lowmem_compile.optim import GaLore, average_gradients
from lowmem_compile.optim.gradient import ProjectedGradient
from lowmem_compile.optim.projector import down

D, O, R, ROWS, STEPS = 12, 20, 3, 8, 5


def gradients(model: nn.Linear, x: Tensor, optimizer: GaLore, *, project: bool) -> None:
    """The gradients of one backward pass, projected as a compiled graph would give them where that is allowed."""
    model(x).square().mean().backward()
    W = model.weight
    tap = optimizer.tap(W)
    if project and not isinstance(tap, str):
        assert W.grad is not None
        W.grad = ProjectedGradient(down(W.grad, (tap.basis,), tap.side), tap.basis, tap.side, tap.generation)


def make() -> tuple[nn.Linear, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Linear(D, O), [torch.randn(2, ROWS, D) for _ in range(STEPS)]


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, batches = make()
    optimizer = GaLore(model.parameters(), rank=R, update_interval=3)
    sent = []
    for x in batches:
        gradients(model, x[rank], optimizer, project=True)
        sent.append(average_gradients(optimizer))
        optimizer.step()
        optimizer.zero_grad()
    torch.save((model.state_dict(), sent), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = [subprocess.Popen([sys.executable, "-P", __file__, str(rank), folder]) for rank in range(2)]
        assert [process.wait(timeout=300) for process in ranks] == [0, 0]
        (first, sent), (second, _) = (torch.load(Path(folder) / f"{rank}.pt") for rank in range(2))
    model, batches = make()
    optimizer = GaLore(model.parameters(), rank=R, update_interval=3)
    for x in batches:
        gradients(model, x.reshape(-1, D), optimizer, project=False)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6)
    whole, low = 4 * (O * D + O), 4 * (O * R + O)
    assert sent == [whole, low, low, whole, low]


def test_a_basis_of_each_rank_is_refused() -> None:
    model = copy.deepcopy(make()[0])
    with pytest.raises(OptionError, match="refresh_in_backward=True"):
        average_gradients(GaLore(model.parameters(), rank=R, refresh_in_backward=True))


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2])
