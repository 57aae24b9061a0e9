"""The model of Inductor's kernels: what is one call, what is fused, what a call takes beside its results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.planner.kernels import Kernel, kernels_of, realised
from lowmem_compile.planner.program import Op, Program, ops_of
from lowmem_compile.planner.scratch import ATTENTION, scratch_bytes
from lowmem_compile.planner.timeline import kernel_points, peak

aten = torch.ops.aten


def traced(fn: object, *args: Tensor) -> fx.Graph:
    return make_fx(fn, tracing_mode="fake")(*args).graph  # type: ignore[arg-type]


def kernels(fn: object, *args: Tensor) -> list[Kernel]:
    graph = traced(fn, *args)
    outputs = frozenset(n.name for n in graph.output_node().all_input_nodes)
    return kernels_of(ops_of(graph), outputs)


def test_an_addition_is_part_of_the_product_unless_a_view_stands_between() -> None:
    a, b, c = torch.randn(8, 16), torch.randn(16, 4), torch.randn(8, 4)
    (one,) = kernels(lambda a, b, c: aten.add.Tensor(aten.mm(a, b), c), a, b, c)
    assert (one.loop, one.makes[0].target) == (False, "addmm")
    apart = kernels(lambda a, b, c: aten.add.Tensor(aten.view(aten.mm(a, b), [2, 4, 4]), aten.view(c, [2, 4, 4])), a, b, c)
    assert [k.loop for k in apart] == [False, True]


def test_sums_over_rows_and_over_columns_run_in_different_orders() -> None:
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    assert len(kernels(lambda x, y: (aten.sum.dim_IntList(x * y, [1]), x * y + 1), x, y)) == 1
    assert len(kernels(lambda x, y: (aten.sum.dim_IntList(x * y, [0]), x * y + 1), x, y)) == 2
    assert len(kernels(lambda x, y: (aten.sum.dim_IntList(x * y, [0]), aten.sum.dim_IntList(x, [0])), x, y)) == 1


def test_work_that_two_values_share_is_counted_once() -> None:
    """Twenty doublings x ← x + x are twenty operations and no million: cheap enough to be done in both readers' loops."""
    ops = [Op("x", "", "input", nbytes=64, domain=16), *(doubled(i) for i in range(20))]
    readers = [Op(n, "relu", "pointwise", ("d19",), 64, 16) for n in ("one", "two")]
    made = {op.name for k in realised([*ops, *readers], frozenset({"one", "two"})) for op in k.makes}
    assert made == {"one", "two"}


def doubled(i: int) -> Op:
    below = "x" if i == 0 else f"d{i - 1}"
    return Op(f"d{i}", "mul", "pointwise", (below, f"d{i - 2}" if i > 1 else below), 64, 16)


def test_a_bitcast_is_a_loop() -> None:
    (only,) = kernels(lambda x: aten.view.dtype(x * 2, torch.int32) + 1, torch.randn(8))
    assert only.loop


def test_scratch_of_a_convolution_is_measured() -> None:
    """oneDNN reorders the weight of this one: at least its bytes."""
    image, weight = torch.randn(2, 64, 16, 16).to(torch.bfloat16), torch.randn(64, 64, 3, 3).to(torch.bfloat16)
    graph = traced(lambda x, w: aten.convolution.default(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), image, weight)
    (node,) = graph.find_nodes(op="call_function", target=aten.convolution.default)
    assert 0 < scratch_bytes(node) < 100 * weight.nbytes


def test_scratch_of_a_chunked_loss_is_one_chunk_of_logits() -> None:
    h, weight, target = torch.randn(64, 8), torch.randn(1000, 8), torch.zeros(64, dtype=torch.int64)
    graph = traced(lambda h, w, t: torch.ops.lowmem.linear_cross_entropy(h, w, None, t, -100, 0.0, True)[0], h, weight, target)
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.lowmem.linear_cross_entropy.default)
    assert scratch_bytes(node) == 64 * 1000 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_scratch_of_attention_is_that_of_one_head(dtype: torch.dtype, turned: bool) -> None:
    """A block of scores for each thread, whatever the batch and the heads, and a copy of a gradient that lies otherwise."""
    forward, backward = ATTENTION
    q, g = torch.randn(3, 5, 64, 16, dtype=dtype), torch.randn(3, 64, 5, 16, dtype=dtype).transpose(1, 2)
    g = g.contiguous() if turned else g
    out, statistic = forward(q, q, q, 0.0, True, scale=0.5)

    def gradients(g: Tensor, q: Tensor, out: Tensor, statistic: Tensor) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = backward(g, q, q, q, out, statistic, 0.0, True, scale=0.5)
        return made

    (node,) = traced(gradients, g, q, out, statistic).find_nodes(op="call_function", target=backward)
    kept: list[tuple[Tensor, ...]] = []

    def once() -> Tensor:
        kept.append(gradients(g, q, out, statistic))
        return q

    found = peak_bytes(once, lambda _: None)
    assert scratch_bytes(node) == found.peak - found.end > 0


def test_a_buffer_is_not_held_across_a_call_whose_scratch_memory_would_then_make_the_peak() -> None:
    def call(name: str, nbytes: int, *reads: str, scratch: int = 0) -> Op:
        return Op(name, "library", "extern", reads, nbytes, nbytes, "bytes", scratch=scratch)

    def highest(size: int, scratch: int, *, hold: bool) -> int:
        ops = (
            Op("x", "", "input", nbytes=1),
            *(call("high", size, "x"), call("read", 1, "high")),
            *(call("first", 10, "x"), call("read too", 1, "first")),
            *(call("between", 1, "x", scratch=scratch), call("second", 10, "x")),
            call("last", 1, "read", "read too", "between", "second"),
        )
        return peak(kernel_points(Program(ops, (), frozenset({"last"}), frozenset(), ()), hold=hold)[0])

    assert highest(100, 95, hold=False) == 101  # the high buffer and what reads it
    assert highest(100, 95, hold=True) == 101  # 108, if the first of the two equal buffers waited for the second
