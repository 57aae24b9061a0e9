"""launch_together: on a GPU, encodes and decodes that Inductor fuses with nothing share launches; and which these are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lowmem_compile import registry
from lowmem_compile.backend import lowmem
from lowmem_compile.passes.launch_together import DECODE, ENCODE
from tests.helpers import Graphs, assert_same, compile_graphs, run

NAME = "launch_together"


@pytest.fixture(autouse=True)
def _triton() -> None:
    pytest.importorskip("triton", reason="without triton there are no kernels to emit")


class Attention(nn.Module):
    """Norm, attention with ``heads`` key heads, residual."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(64), heads
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 16 * heads), nn.Linear(64, 16 * heads)
        self.out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(4 // self.heads, 1) for t in (k, v)) if self.heads < 4 else (k, v)
        y = F.scaled_dot_product_attention(q, k, v)
        made: Tensor = x + self.out(y.transpose(1, 2).flatten(-2))
        return made


class MLP(nn.Module):
    """Two linears and a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(F.gelu(self.up(x)))
        return made


def on_gpu(model: Callable[..., Any], **options: Any) -> Graphs:
    """As ``compile_graphs``, with the passes' choices for a GPU; the operations run as on a CPU."""
    options = {"report": False, "strict": True, **options}

    def capture(gm: fx.GraphModule, _: Sequence[Any], **__: Any) -> Callable[..., Any]:
        def call(args: list[Any]) -> Any:
            return gm.forward(*args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return lowmem(gm, example_inputs, options=options, inner_compile=capture, device="cuda")

    backend.reset = registry.reset  # type: ignore[attr-defined]
    return Graphs(torch.compile(model, backend=backend))


def calls(graph: fx.Graph, target: Any) -> list[list[int]]:
    """The bits of the tensors of each encode or decode."""
    return [list(n.args[1]) for n in graph.nodes if n.target is target]


def tokens() -> Tensor:
    return torch.randn(4, 32, 64, requires_grad=True)


def test_one_launch_a_layer() -> None:
    model = nn.Sequential(Attention(), MLP(), Attention())
    graphs = on_gpu(model)
    run(graphs, model, [tokens()])
    encodes, decodes = calls(graphs.chosen.forward.graph, ENCODE), calls(graphs.chosen.backward.graph, DECODE)
    assert len(encodes) <= 3  # one for each attention, and what is left at the end
    assert all(bits.count(10) == 4 for bits in encodes[:2])  # queries, keys, values and the output
    assert [bits for bits in decodes if 10 in bits] == [[10, 10, 10, 10]] * 2
    assert graphs.rewritten(NAME) >= 4


def test_the_same_bits_as_alone() -> None:
    model, x = nn.Sequential(Attention(), Attention()), tokens()
    together = run(on_gpu(model), model, [x])
    torch.compiler.reset()
    alone = run(on_gpu(model, disable=[NAME]), model, [x])
    assert_same(together, alone, 0.0)


def test_the_same_bits_as_on_a_cpu() -> None:
    """Which kernel makes the codes changes no gradient."""
    model, x = nn.Sequential(Attention(), MLP()), tokens()
    gpu = run(on_gpu(model), model, [x])
    torch.compiler.reset()
    assert_same(gpu, run(compile_graphs(model, codec="auto"), model, [x]), 0.0)


def test_a_fused_encode_stays_with_inductor() -> None:
    """The input of a GELU is encoded by the GELU's kernel, and decoded by that of its backward."""
    model = nn.Sequential(nn.Linear(64, 64), MLP())
    graphs = on_gpu(model, recompute="pointwise")
    run(graphs, model, [tokens()])
    wide = [n for g in (graphs.chosen.forward, graphs.chosen.backward) for n in g.graph.nodes if n.target in (ENCODE, DECODE)]
    assert all(t.meta["val"].shape[-1] != 128 for n in wide for t in n.args[0])


@pytest.mark.parametrize("codec", ["int4", "int6"])
def test_fewer_bits_are_ours(codec: str) -> None:
    model = MLP()
    graphs = on_gpu(model, codec=codec)
    run(graphs, model, [tokens()])
    assert calls(graphs.chosen.forward.graph, ENCODE)
    assert not calls(graphs.chosen.backward.graph, DECODE)  # the decode is part of GELU's backward


def test_grouped_queries_are_decoded_together() -> None:
    """Keys and values are repeated for the attention: their decodes share its launch all the same."""
    model = nn.Sequential(Attention(heads=2), MLP())
    graphs = on_gpu(model)
    run(graphs, model, [tokens()])
    assert [10, 10, 10, 10] in calls(graphs.chosen.backward.graph, DECODE)


def test_a_lone_encode_declines() -> None:
    model = MLP()
    graphs = on_gpu(model, codec="int4")
    run(graphs, model, [tokens()])
    assert set(graphs.codes(NAME)) == {"LM310"}


@pytest.mark.parametrize("options", [{"rounding": "stochastic"}, {"codec": "bf16"}, {"codec": "none"}])
def test_what_has_no_kernel(options: dict[str, Any]) -> None:
    model = Attention()
    graphs = on_gpu(model, **options)
    run(graphs, model, [tokens()])
    assert not calls(graphs.chosen.forward.graph, ENCODE)
    assert not graphs.codes(NAME)


def test_on_a_cpu_nothing_changes() -> None:
    model = Attention()
    graphs = compile_graphs(model, codec="auto")
    run(graphs, model, [tokens()])
    assert not calls(graphs.chosen.forward.graph, ENCODE)
    assert not graphs.codes(NAME)


def test_saved_bytes_are_the_same() -> None:
    model, x = nn.Sequential(Attention(), MLP()), tokens()
    gpu = on_gpu(model)
    run(gpu, model, [x])
    torch.compiler.reset()
    cpu = compile_graphs(model, codec="auto")
    run(cpu, model, [x])
    assert gpu.chosen.saved_bytes() == cpu.chosen.saved_bytes()
