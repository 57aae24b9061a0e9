"""chunk_loss: the last linear and the cross-entropy, over a part of the tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.kernels.linear_cross_entropy import op as loss_op
from lowmem_compile.passes.chunk_loss import ChunkLoss
from tests.helpers import (
    TOLERANCE,
    Graphs,
    apply,
    assert_same,
    compile_graphs,
    dynamo_graph,
    run,
    run_double,
    targets,
)

NAME = "chunk_loss"
PASS = ChunkLoss()
N, T, D, V = 4, 24, 8, 96
LOGITS = "linear_cross_entropy.default"


class Head(nn.Module):
    """A hidden layer, a head, and a loss."""

    def __init__(self, loss: Callable[..., Any], *, bias: bool = False, out: int = V) -> None:
        super().__init__()
        self.body, self.head, self.loss = nn.Linear(D, D), nn.Linear(D, out, bias=bias), loss

    def forward(self, x: Tensor, target: Tensor) -> Any:
        return self.loss(self.head(torch.tanh(self.body(x))), target)


def batch(rank: int = 3) -> tuple[Tensor, Tensor]:
    rows = (N, T) if rank == 3 else (N * T,)
    target = torch.randint(0, V, rows)
    target[..., ::5] = -100
    return torch.randn(*rows, D, requires_grad=True), target


def z_loss(flat: Tensor, target: Tensor) -> Tensor:
    lse = flat.logsumexp(-1)
    return F.cross_entropy(flat, target) + 0.05 * (lse * lse).mean()


def language_model(logits: Tensor, target: Tensor) -> Tensor:
    shifted = logits.float()[..., :-1, :].contiguous()
    return F.cross_entropy(shifted.view(-1, V), target[..., 1:].reshape(-1))


def padded_target(logits: Tensor, target: Tensor) -> Tensor:
    labels = F.pad(target, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.float().view(-1, V), labels.view(-1), ignore_index=-100, reduction="mean")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "language model": language_model,
    "padded target": padded_target,
    "reshape": lambda z, t: F.cross_entropy(z.reshape(-1, V), t.reshape(-1)),
    "sum": lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1), reduction="sum"),
    "smoothed": lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1), label_smoothing=0.1),
    "smoothed sum, other index": lambda z, t: F.cross_entropy(
        z.view(-1, V), t.clamp(min=0).view(-1), ignore_index=3, reduction="sum", label_smoothing=0.2
    ),
    "z-loss": lambda z, t: z_loss(z.view(-1, V), t.view(-1)),
    "z-loss, summed, first": lambda z, t: (
        torch.logsumexp(z, dim=-1).pow(2).sum() * 1e-3 + F.cross_entropy(z.view(-1, V), t.view(-1), label_smoothing=0.1)
    ),
    "z-loss of the shifted rows": lambda z, t: z_loss(z.float()[:, :-1].reshape(-1, V), t[:, 1:].reshape(-1)),
    "slice by range": lambda z, t: F.cross_entropy(z[:, 2:].reshape(-1, V), t[:, 2:].reshape(-1)),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_fires_once_and_matches_float64(loss: str) -> None:
    model = Head(LOSSES[loss], bias=loss in ("sum", "smoothed"))
    x, target = batch()
    gm, inputs = dynamo_graph(model, x, target)
    sites, _ = apply(PASS, gm)
    assert [s.action for s in sites] == ["rewritten"]
    names = targets(gm.graph)
    assert (names.count(LOGITS), names.count("cross_entropy")) == (1, 0)
    assert apply(PASS, gm) == ([], []), "not idempotent"
    position = next(i for i, v in enumerate(inputs) if v is x)

    def call(x: Tensor, _: Tensor) -> Tensor:
        out: tuple[Tensor] = gm(*inputs[:position], x, *inputs[position + 1 :])
        return out[0]

    with (
        patch.object(loss_op, "_fused", lambda: loss_op.chunk_loss_),
        patch.object(loss_op, "CHUNK_BYTES", 4096),
    ):
        assert_same(run(call, model, [x, target]), run_double(model, [x, target]), TOLERANCE[torch.float32])


def second_output(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits.view(-1, V), target.view(-1)), logits


def with_lse(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A cross-entropy and something of the logsumexp of its rows that is no z-loss."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        flat = logits.view(-1, V)
        return F.cross_entropy(flat, target.view(-1)) + function(flat.logsumexp(-1))

    return loss


NEAR_MISSES: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "logits returned": (second_output, "LM207"),
    "logits read elsewhere": (lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1)) + z.square().mean(), "LM207"),
    "cubes of the logsumexp": (with_lse(lambda s: s.pow(3).mean()), "LM207"),
    "logsumexp itself": (with_lse(lambda s: s.mean()), "LM207"),
    "weighted squares": (with_lse(lambda s: (s.square() * torch.arange(N * T)).mean()), "LM207"),
    "z-loss divided by a tensor": (with_lse(lambda s: s.square().mean() * s.detach().max()), "LM207"),
    "z-loss returned too": (
        lambda z, t: (F.cross_entropy(z.view(-1, V), t.view(-1)) + (y := z.logsumexp(-1).square().mean()), y),
        "LM207",
    ),
    "z-loss of other rows": (
        lambda z, t: F.cross_entropy(z[:, 1:].reshape(-1, V), t[:, 1:].reshape(-1)) + z.logsumexp(-1).square().mean(),
        "LM207",
    ),
    "z-loss beside a sum": (
        lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1), reduction="sum") + z.logsumexp(-1).square().mean(),
        "LM207",
    ),
    "sliced along the vocabulary": (
        lambda z, t: F.cross_entropy(z[..., : V - 1].reshape(-1, V - 1), t.reshape(-1) % (V - 1)),
        "LM207",
    ),
    "sliced after the view": (
        lambda z, t: F.cross_entropy(z.view(-1, V)[:, : V - 1], t.view(-1) % (V - 1)),
        "LM207",
    ),
    "vocabulary split in two": (
        lambda z, t: F.cross_entropy(z.view(-1, V // 2), t.repeat_interleave(2, 1).view(-1) % (V // 2)),
        "LM208",
    ),
    "classes in dimension 1": (lambda z, t: F.cross_entropy(z[..., :N], t[:, :N] % T), "LM207"),
    "class weights": (
        lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1), torch.arange(V).float()),
        "LM208",
    ),
    "soft targets": (
        lambda z, t: F.cross_entropy(z.view(-1, V), F.one_hot(t.clamp(min=0), V).float().view(-1, V)),
        "LM208",
    ),
    "not reduced": (lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1), reduction="none"), "LM208"),
}


@pytest.mark.parametrize("loss", NEAR_MISSES)
def test_near_misses_decline(loss: str) -> None:
    fn, code = NEAR_MISSES[loss]
    gm, _ = dynamo_graph(Head(fn), *batch())
    sites, done = apply(PASS, gm)
    assert [(s.action, s.code) for s in sites] == [("declined", code)]
    assert not done
    assert targets(gm.graph).count("cross_entropy") == 1


def test_classes_in_dimension_one_declines() -> None:
    """Logits [N, C, T] go with targets [N, T]: the last dimension of the linear is no vocabulary."""
    model = Head(F.cross_entropy, out=T)
    x = torch.randn(N, T, D)
    gm, _ = dynamo_graph(model, x, torch.randint(0, T, (N, T)))
    sites, _ = apply(PASS, gm)
    assert [s.action for s in sites] == ["declined"]


def test_nothing_to_win_declines() -> None:
    gm, _ = dynamo_graph(Head(F.cross_entropy, out=10), torch.randn(5, D), torch.randint(0, 10, (5,)))
    sites, _ = apply(PASS, gm)
    assert [s.code for s in sites] == ["LM306"]


def test_a_frozen_head_needs_no_weight_gradient() -> None:
    model = Head(LOSSES["reshape"])
    model.head.requires_grad_(False)
    x, target = batch()
    graphs = compile_graphs(model)
    assert_same(run(graphs, model, [x, target]), run_double(model, [x, target]), TOLERANCE[torch.float32])
    assert graphs.rewritten(NAME) == 1
    assert graphs.chosen.saved_bytes() == 2 * N * T * D * 4 + 8


def test_switched_off_by_the_option() -> None:
    gm, _ = dynamo_graph(Head(LOSSES["reshape"]), *batch())
    sites, _ = apply(PASS, gm, chunked_loss="never")
    assert [s.code for s in sites] == ["LM200"]


def test_logits_are_neither_saved_nor_whole() -> None:
    model, (x, target) = Head(LOSSES["language model"]), batch()
    graphs = compile_graphs(model)
    run(graphs, model, [x, target])
    assert graphs.rewritten(NAME) == 1
    sizes = {n.meta["val"].numel() for g in (graphs.chosen.forward, graphs.chosen.backward) for n in values(g.graph)}
    assert max(sizes) < N * (T - 1) * V


def test_autocast() -> None:
    model, (x, target) = Head(LOSSES["language model"]), batch()
    graphs = compile_graphs(model)
    got = run(graphs, model, [x, target], autocast=torch.bfloat16)
    assert graphs.rewritten(NAME) == 1
    assert_same(got, run_double(model, [x, target]), TOLERANCE[torch.bfloat16])


def test_dynamic_dimension() -> None:
    model = Head(LOSSES["reshape"])
    graphs = compile_graphs(model)
    for rows in (N, N + 3):
        x, target = torch.randn(rows, T, D, requires_grad=True), torch.randint(0, V, (rows, T))
        assert_same(run(graphs, model, [x, target], mark=0), run_double(model, [x, target]), TOLERANCE[torch.float32])
    assert len(graphs.entries) == 1
    assert graphs.rewritten(NAME) == 1


def test_every_target_ignored_gives_nan_like_pytorch() -> None:
    model, (x, target) = Head(LOSSES["reshape"]), batch()
    graphs = compile_graphs(model)
    assert torch.isnan(graphs(x, torch.full_like(target, -100)))


def values(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)]


def test_helpers_see_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong gradient of the chunked loss is noticed by this file's comparison."""
    exact = loss_op.chunk_gradient

    def spoiled(*args: Any) -> tuple[Tensor, Tensor]:
        loss, grad = exact(*args)
        grad[-1] *= 1.5
        return loss, grad

    monkeypatch.setattr(loss_op, "chunk_gradient", spoiled)
    model = Head(LOSSES["sum"])
    x, target = batch()
    target[-1, -1] = 1
    graphs: Graphs = compile_graphs(model)
    with pytest.raises(AssertionError, match="relative errors"):
        assert_same(run(graphs, model, [x, target]), run_double(model, [x, target]), TOLERANCE[torch.float32])
