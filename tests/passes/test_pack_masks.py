"""pack_masks: boolean tensors cross into the backward pass in one bit an element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lowmem_compile.contract import Context, Match
from lowmem_compile.passes.pack_masks import PackMasks, pack_bits, unpack_bits
from tests.helpers import TOLERANCE, assert_same, check_gradients, compile_graphs, run

NAME = "pack_masks"


class Masked(nn.Module):
    """A mask from a linear that is not needed otherwise, times a linear that is trained."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, width).requires_grad_(False), nn.Linear(8, width)

    def forward(self, x: Tensor) -> Any:
        return self.up(x).masked_fill(self.gate(x.detach()) > 0, 0.0)


class Dropped(nn.Module):
    """Dropout between two linears; the dropped activation is returned beside the output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 33), nn.Linear(33, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dropped = F.dropout(self.up(x), 0.5, self.training)
        return self.down(dropped), dropped.detach()


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (64,), (3, 5, 7), (2, 0, 4), (1023,)])
def test_pack_and_unpack(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, shape), mask)


def test_pack_reads_the_elements_of_a_transpose() -> None:
    mask = (torch.rand(9, 11) > 0.5).t()
    assert torch.equal(unpack_bits(pack_bits(mask), (11, 9)), mask)


@pytest.mark.parametrize("rows", [4, 5])
def test_fires_once(rows: int) -> None:
    model = Masked()
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [torch.randn(rows, 8, requires_grad=True)])
    assert graphs.rewritten(NAME) == 1
    saved = graphs.chosen.saved_tensors()
    assert [(t.kind, t.nbytes, t.decision) for t in saved] == [("mask", rows * 32 // 8, "1-bit mask")]
    assert graphs.chosen.saved_bytes() * 8 == graphs.only.partitions["inductor"].saved_bytes()


def test_a_small_mask_declines() -> None:
    model = Masked(3)
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [torch.randn(4, 8, requires_grad=True)])
    assert graphs.codes(NAME) == ["LM305"]


def test_a_returned_mask_declines() -> None:
    class Model(Masked):
        def forward(self, x: Tensor) -> Any:
            mask = self.gate(x.detach()) > 0
            return self.up(x).masked_fill(mask, 0.0), mask

    model = Model()
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [torch.randn(4, 8, requires_grad=True)])
    assert graphs.codes(NAME) == ["LM302"]


def test_a_mask_given_as_input_declines() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 32)

        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return self.up(x).masked_fill(mask, 0.0)

    model, mask = Model(), torch.rand(4, 32) > 0.5
    graphs = compile_graphs(model)
    x = torch.randn(4, 8, requires_grad=True)
    y = graphs(x, mask)
    y.sum().backward()
    assert model.up.bias.grad is not None
    assert torch.equal(model.up.bias.grad, (~mask).float().sum(0))
    assert graphs.codes(NAME) == ["LM302"]


def test_a_mask_read_twice() -> None:
    class Model(Masked):
        def forward(self, x: Tensor) -> Any:
            mask = self.gate(x.detach()) > 0
            return self.up(x).masked_fill(mask, 0.0) + torch.where(mask, self.up(x) * 3, self.up(x))

    model = Model()
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [torch.randn(4, 8, requires_grad=True)])
    assert graphs.rewritten(NAME) == 1


def test_dropout() -> None:
    """The mask that the forward pass drew is the one that the backward pass applies."""
    model = Dropped()
    graphs = compile_graphs(model, gradients="exact")
    x = torch.randn(16, 8, requires_grad=True)
    y, dropped = graphs(x)
    y.sum().backward()
    assert graphs.rewritten(NAME) == 1
    kept = (dropped != 0) * 2.0
    assert 0.3 < kept.mean() / 2 < 0.7
    hidden = model.up(x)
    want = torch.autograd.grad(model.down(hidden * kept).sum(), [x, *model.parameters()])
    names = ["x", *dict(model.named_parameters())]
    got = [t.grad for t in (x, *model.parameters()) if t.grad is not None]
    assert_same(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)), TOLERANCE[torch.float32])


def test_dynamic_dimension() -> None:
    model = Masked()
    graphs = compile_graphs(model)
    for rows in (6, 9):
        check_gradients(graphs, model, [torch.randn(rows, 8, requires_grad=True)], mark=0)
    assert len(graphs.entries) == 1
    assert graphs.rewritten(NAME) == 1


def test_exact() -> None:
    """Bitwise the gradients of the same graphs without the pass."""
    model, x = Masked(), torch.randn(5, 8, requires_grad=True)
    with_pass = run(compile_graphs(model), model, [x])
    without = run(compile_graphs(model, disable=[NAME]), model, [x])
    assert all(torch.equal(with_pass[k], without[k]) for k in without)
    assert set(with_pass) == set(without)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after the rewrite"])
def test_a_failure_leaves_both_graphs_as_they_were(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PackMasks.rewrite

    def broken(self: PackMasks, graph: fx.Graph, match: Match, ctx: Context) -> None:
        if late:
            original(self, graph, match, ctx)
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(PackMasks, "rewrite", broken)
    model = Masked()
    graphs = compile_graphs(model, strict=False)
    with pytest.warns(RuntimeWarning, match=NAME):
        check_gradients(graphs, model, [torch.randn(4, 8, requires_grad=True)])
    assert graphs.codes(NAME) == ["LM900"]
