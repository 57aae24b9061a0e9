"""What models meet in use: checkpointing inside them, other lengths, evaluation, generation, state dicts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowmem_compile.api import report
from tests.helpers import compile_graphs
from tests.models.architectures import ARCHITECTURES

BY_NAME = {a.name: a for a in ARCHITECTURES}
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _no_failed_pass() -> Iterator[None]:
    """A warning of lowmem is a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lowmem")
        yield


def gradients(call: Any, model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients of the model's own loss, and the loss."""
    model.zero_grad()
    loss = call(**batch).loss
    loss.backward()
    return {
        "loss": loss.detach(),
        **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    scale = max(v.abs().max().item() for v in want.values())
    errors = {k: (got[k] - want[k]).abs().max().item() / scale for k in want}
    assert {k: e for k, e in errors.items() if not e <= TOLERANCE} == {}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_checkpointing_inside_the_model(name: str, reentrant: bool) -> None:
    model, batch = BY_NAME[name].build(), BY_NAME[name].batch()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    want = gradients(model, model, batch)
    graphs = compile_graphs(model, gradients="exact", report=True)
    assert_same(gradients(graphs, model, batch), want)
    for graph in report().training_graphs:
        ours, inductor = graph.saved_bytes("lowmem"), graph.saved_bytes("inductor")
        assert ours is not None
        assert inductor is not None
        assert ours <= inductor


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_batches_of_other_lengths(name: str) -> None:
    """The second length makes the size symbolic, the third needs no new graph."""
    model = BY_NAME[name].build()
    graphs = compile_graphs(model, gradients="exact")
    counts = []
    for length in (12, 9, 14):
        ids = torch.randint(2, 60, (2, length))
        batch = {"input_ids": ids, "labels": ids.clone()}
        want = gradients(model, model, batch)
        assert_same(gradients(graphs, model, batch), want)
        counts.append(len(graphs.entries))
    assert counts == [1, 2, 2]


def test_evaluation_after_training() -> None:
    model, batch = BY_NAME["bert"].build(), BY_NAME["bert"].batch()
    graphs = compile_graphs(model, gradients="exact")
    gradients(graphs, model, batch)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(graphs(**batch).logits, model(**batch).logits, 0, 1e-5)
    assert [e.training for e in graphs.entries] == [True, False]
    model.train()
    assert_same(gradients(graphs, model, batch), gradients(model, model, batch))
    assert len(graphs.entries) == 2


def test_generation_after_training() -> None:
    """The compiled model generates what the model does, with a cache that grows."""
    architecture = BY_NAME["llama"]
    model, batch = architecture.build(), architecture.batch()
    prompt = {
        "input_ids": batch["input_ids"][:1, :4],
        "max_new_tokens": 4,
        "do_sample": False,
        "use_cache": True,
    }
    with torch.no_grad():
        want = model.eval().generate(**prompt)
    graphs = compile_graphs(model._call_impl, gradients="exact")
    model._compiled_call_impl = graphs
    try:
        gradients(model.train(), model, batch)
        with torch.no_grad():
            got = model.eval().generate(**prompt)
    finally:
        model._compiled_call_impl = None
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["llama", "albert"])
def test_state_dict_knows_nothing_of_lowmem(name: str, tmp_path: Path) -> None:
    """Trained compiled, loaded plain, and the other way round."""
    architecture = BY_NAME[name]
    model, batch = architecture.build(), architecture.batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    buffers = [n for n, _ in model.named_buffers()]
    graphs = compile_graphs(model)
    gradients(graphs, model, batch)
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert list(model.state_dict()) == list(before)
    assert [n for n, _ in model.named_buffers()] == buffers
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(plain.state_dict()[key], value), key
    model.load_state_dict(before)
    want = gradients(plain, plain.train(), batch)["loss"]
    assert not torch.equal(gradients(graphs, model, batch)["loss"], want)
    model.load_state_dict(plain.state_dict())
    assert torch.allclose(gradients(graphs, model, batch)["loss"], want, 0, 1e-5)
    assert len(graphs.entries) == 1
