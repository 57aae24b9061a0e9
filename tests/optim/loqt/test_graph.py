"""What the backend keeps of a model under LoQT: x P in place of x, and never a decoded weight. And one run through Inductor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowmem_compile
from tests.helpers import compile_graphs
from tests.optim.loqt.common import D, H, N, R, batch, loss_of, under_loqt


@pytest.mark.parametrize("options", [{}, {"double_quantise": True}], ids=str)
def test_the_compiled_graph_keeps_x_p(options: dict[str, Any]) -> None:
    """P on the input side of all: of each linear's x only x P [N, r], and what norm and GELU need; no weight, no P."""
    model, _ = under_loqt(side="input", **options)
    eager = copy.deepcopy(model)
    graphs = compile_graphs(model, gradients="exact")
    loss_of(graphs).backward()
    loss_of(eager).backward()
    kept = [tuple(node.meta["val"].shape) for node in graphs.chosen.kept()]
    assert kept.count((N, R)) == 3
    assert kept.count((N, H)) == 1  # GELU's input; its output, down's x, is not kept
    assert kept.count((N, D)) <= 2  # the norm's input and the loss's; the norm's output, up's x, is not kept
    assert not {(D, D), (H, D), (D, H), (D, R), (R, D), (H, R), (R, H)} & set(kept)
    stock = graphs.only.partitions["inductor"].saved_bytes()
    assert stock - graphs.chosen.saved_bytes() >= 4 * 2 * D * H  # Inductor keeps the decoded weights that dX needs
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6), name


def test_p_on_the_output_side_needs_x() -> None:
    model, _ = under_loqt()
    graphs = compile_graphs(model, gradients="exact")
    loss_of(graphs).backward()
    kept = [tuple(node.meta["val"].shape) for node in graphs.chosen.kept()]
    assert kept.count((N, R)) == 2
    assert not {(D, D), (H, D), (D, H)} & set(kept)


@pytest.mark.e2e
def test_compiled_training_equals_eager_training_and_merges_do_not_recompile() -> None:
    """One layer, so that little has to be compiled."""
    runs = []
    x, target = batch()
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, D))
        training = lowmem_compile.loqt(model, R, interval=3)
        optimizer = torch.optim.SGD(training.parameters(), lr=0.3)
        if compiled:
            model.compile(backend="lowmem", options={"report": False})
        losses = []
        for step in range(6):
            with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
                training.before_step(lambda: F.mse_loss(model(x), target))  # noqa: B023
                loss = F.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert training.merges == 2
        runs.append(losses)
    assert runs[1] == pytest.approx(runs[0], rel=2e-3)  # a code that rounds the other way moves the rest a little
