"""Every architecture through lowmem with exact gradients, without code generation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

from tests.helpers import Graphs, compile_graphs
from tests.models.architectures import ARCHITECTURES, Architecture

# Share of the largest gradient of the model. Some gradients are zero in exact arithmetic (the bias of k under
# softmax), so a tensor's own largest value is no scale.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _no_failed_pass() -> Iterator[None]:
    """A warning of lowmem is a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lowmem")
        yield


def step(call: Callable[..., Any], model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Loss and every gradient."""
    model.zero_grad()
    loss = call(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def matched(graphs: Graphs, pass_name: str) -> int:
    """How many places a pass found, over all graphs."""
    return sum(run.matched for e in graphs.entries for run in e.recorder.runs if run.name == pass_name)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_recognised_and_exact(architecture: Architecture) -> None:
    """The passes find what the architecture contains, rewrite what is spelt out, and change no gradient."""
    model, batch = architecture.build(), architecture.batch()
    loss, gradients = step(model, model, batch)
    graphs = compile_graphs(model, gradients="exact")
    our_loss, ours = step(graphs, model, batch)

    counts = {name: matched(graphs, name) for name in ("recognise_norm", "recognise_activation", "approximate_activation")}
    assert counts == {
        "recognise_norm": architecture.norms,
        "recognise_activation": architecture.by_hand,
        "approximate_activation": architecture.activations,
    }, architecture.where
    assert graphs.rewritten("recognise_activation") == architecture.by_hand
    assert graphs.rewritten("approximate_activation") == 0

    assert our_loss == pytest.approx(loss, rel=1e-5)
    assert ours.keys() == gradients.keys()
    scale = max(g.abs().max().item() for g in gradients.values())
    errors = {n: (ours[n] - gradients[n]).abs().max().item() / scale for n in gradients}
    assert {n: e for n, e in errors.items() if not e <= TOLERANCE} == {}
