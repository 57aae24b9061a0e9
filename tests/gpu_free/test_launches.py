"""Codes of several tensors in one launch, decodes inside matrix products, and what a step launches and moves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_compile._torch import FakeTensorMode, join_in_place, keep_in_memory, offer_prologue
from lowmem_compile.gpu_free.blocks import REAL, Size, example, model
from lowmem_compile.gpu_free.generate import generate
from lowmem_compile.gpu_free.operations import TEMPLATES, products
from lowmem_compile.gpu_free.steps import Step, eager, least, loss_of, moved
from lowmem_compile.gpu_free.worker import Worker
from lowmem_compile.kernels.group_codes import codec_named, decode_many, encode_many, encode_runs
from lowmem_compile.kernels.group_codes.many import parts_of

MANY = "lowmem_compile.kernels.group_codes.many_triton"
NAMES = ("int8", "int10", "int4", "int7", "int5")


def same(got: Tensor, want: Tensor) -> bool:
    """The same bits, but for what a NaN carries."""
    return got.dtype == want.dtype and torch.equal(got.nan_to_num(nan=-77.0), want.nan_to_num(nan=-77.0))


def several() -> list[Tensor]:
    """Tensors of odd sizes and several dtypes, strided, with ties, a NaN, an infinity, zeros and no rows at all."""
    wide = torch.full((6, 300), math.nan)
    wide[:, 1:200:2] = torch.randn(6, 100)
    found = [torch.randn(5, 77).bfloat16(), torch.randn(2, 3, 200), wide[:, 1:200:2], torch.randn(64, 9).t().half()]
    found[0][1, 3], found[1][0, 0, 5], found[1][0, 1] = math.nan, math.inf, 0.0
    return [*found, torch.randn(0, 64)]


@pytest.mark.parametrize("keep_zero", [False, True])
def test_codes_of_several_tensors(worker: Worker, keep_zero: bool) -> None:
    xs, codecs = several(), [codec_named(name, keep_zero=keep_zero) for name in NAMES]
    worker.launches.clear()
    got = worker.call(f"{MANY}:encode_many", xs, codecs)
    want = [part.contiguous() for x, codec in zip(xs, codecs, strict=True) for part in codec.encode(x.contiguous())]
    assert all(same(a, b) for a, b in zip(got, want, strict=True))
    (launch,) = worker.launches
    assert launch.moved == sum(t.numel() * t.element_size() for t in (*xs, *got))
    split = parts_of(got, [codec.bits for codec in codecs])
    widths = [x.shape[-1] for x in xs]
    decoded = worker.call(f"{MANY}:decode_many", split, codecs, widths, torch.bfloat16)
    for x, parts, codec in zip(decoded, split, codecs, strict=True):
        assert same(x, codec.decode(tuple(parts), x.shape[-1], torch.bfloat16).contiguous())


def test_decoding_moves_the_least(worker: Worker) -> None:
    xs, codecs = [torch.randn(16, 256).bfloat16() for _ in range(2)], [codec_named("int10"), codec_named("int4")]
    parts = [list(codec.encode(x)) for x, codec in zip(xs, codecs, strict=True)]
    worker.launches.clear()
    outs = worker.call(f"{MANY}:decode_many", parts, codecs, [256, 256], torch.bfloat16)
    (launch,) = worker.launches
    assert launch.moved == sum(t.numel() * t.element_size() for t in (*parts[0], *parts[1], *outs))


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("decode", [False, True])
def test_compiles_without_spills(decode: bool) -> None:
    from lowmem_compile.gpu_free.resources import TARGETS, compile_for
    from lowmem_compile.kernels.group_codes import many_triton

    kernel = many_triton.specialised([codec_named(name) for name in ("int10", "int8", "int7")], 1024, "bf16", decode=decode)
    assert all(compile_for(kernel, target).spilled == 0 for target in TARGETS)


def test_opcheck() -> None:
    """Without symbolic sizes: a layout of codes is that of a number."""
    static = ("test_schema", "test_autograd_registration", "test_faketensor")
    xs = [torch.randn(4, 70), torch.randn(3, 64).bfloat16()]
    given: tuple[list[Any], ...] = ([10, 8], [64, 64], [False, True])
    torch.library.opcheck(encode_many, (xs, *given), test_utils=static)
    parts = encode_many(xs, *given)
    torch.library.opcheck(decode_many, (parts, [10, 8], [64, 64], [70, 64], torch.float32), test_utils=static)
    torch.library.opcheck(torch.ops.lowmem.in_prologue, (xs[0],))


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["dYᵀ deq(int8)", "dYᵀ deq(int4)", "(dY W) · slopes of 8 bits"])
def test_a_matrix_product_with_codes_is_one_kernel(worker: Worker, name: str) -> None:
    """A decode as prologue, an unpack as epilogue, in Inductor's templates; and the product is right."""
    offer_prologue(torch.ops.lowmem.in_prologue.default)
    operation = products()[name]
    want = operation.function(*operation.args).float()
    generated = generate(operation.function, worker, backend="inductor", options=TEMPLATES)
    got = generated(*operation.args).float()
    code = generated.code("inference")
    assert len(code.launches) == 1
    assert not code.extern
    assert ((got - want).norm() / want.norm()) < 5e-3  # one rounding to bfloat16 of the same numbers, at another place


@pytest.mark.e2e
@pytest.mark.usefixtures("worker")  # skips without triton
def test_a_weight_gradient_from_codes_is_offered_as_a_template() -> None:
    """The pass marks what one product alone reads, and Inductor decodes it in that product's kernel."""
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))
    x = torch.randn(128, 64, dtype=torch.bfloat16, requires_grad=True)
    generated = generate(net.bfloat16(), options={"inductor": TEMPLATES, "keep_exact": ["1"]})
    loss_of(generated(x)).backward()
    assert all(code.source.count("lowmem.decode_many") == 0 for code in generated.codes)


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["int10", "int4", "int8"])
def test_codes_run_by_run_are_one_kernel_of_the_least_bytes(worker: Worker, name: str) -> None:
    """Inductor makes two kernels of ``Codec.encode`` below 8 bits, three at 10: not of the same codes run by run."""
    keep_in_memory(torch.ops.lowmem.in_memory.default)
    join_in_place(torch.ops.lowmem.behind.default)
    codec, x = codec_named(name), torch.randn(16, 300).bfloat16()
    worker.launches.clear()
    got = generate(lambda x: encode_runs(codec, x), worker, backend="inductor")(x)
    assert all(same(a, b) for a, b in zip(got, codec.encode(x), strict=True))
    (launch,) = worker.launches
    assert launch.moved == sum(t.numel() * t.element_size() for t in (x, *got))


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize(("name", "extra"), [("LLaMA-7B", 1), ("ViT-B", 0), ("RoBERTa-base", 1)])
def test_launches_of_a_layer(name: str, extra: int) -> None:
    """With shared launches the third layer launches no more forward than without lowmem, and backward only the decode."""
    counts: dict[str, list[tuple[int, int]]] = {"inductor": [], "lowmem": []}
    kind, size = REAL[name]
    for backend, found in counts.items():
        for layers in (2, 3):
            torch.compiler.reset()
            options = {"launches": "shared"} if backend == "lowmem" else {}
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                with FakeTensorMode():
                    generated = generate(model(kind, layers, size), backend=backend, options=options)
                    loss_of(generated(example(torch.bfloat16, size))).backward()
            finally:
                torch.set_default_dtype(before)
            found.append((len(generated.code("forward").launches), len(generated.code("backward").launches)))
    (forward, backward), (forward_alone, backward_alone) = (
        [more - fewer for more, fewer in zip(counts[backend][1], counts[backend][0], strict=True)]
        for backend in ("lowmem", "inductor")
    )
    assert forward <= forward_alone
    assert backward <= backward_alone + extra


def test_least_of_a_chain() -> None:
    """x is read by a loop, a library call reads what it makes and makes what another loop reads and returns."""
    chain = [
        Step("a", True, {"x": 8}, {"y": 4, "z": 4}),
        Step("b", True, {"z": 4}, {"w": 2}),
        Step("mm", False, {"y": 4, "w": 2}, {"p": 6}),
        Step("c", True, {"p": 6}, {"out": 6}, frozenset({"out"})),
    ]
    assert moved(chain) == 8 + 8 + 6 + 12
    assert moved(chain, loops=False) == 12
    assert least(chain) == 8 + 6 + 4 + 2 + 6  # z lives in one kernel only


def test_eager_is_counted_by_operation() -> None:
    with FakeTensorMode():
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU())
        steps = eager(net, torch.randn(4, 8, requires_grad=True))
    relu = next(s for s in steps if s.name == "relu")
    assert relu.loop
    assert relu.moved == 2 * 4 * 16 * 4
    assert any(s.name == "addmm" and not s.loop for s in steps)


@pytest.mark.e2e
def test_a_layer_of_fake_tensors() -> None:
    """A published model's layer is too large to run, not to count: one more launch for its codes, and none else."""
    size, found = Size(256, 4, 4, 1024, 8, 128), {}
    for backend in ("inductor", "lowmem"):
        torch.compiler.reset()
        with FakeTensorMode():
            net, x = model("vit", 1, size), example(torch.float32, size)
            generated = generate(net, backend=backend)
            loss_of(generated(x)).backward()
        found[backend] = generated.code("forward")
        steps = [s for s in found[backend].steps if s.loop]
        assert len(steps) == len(found[backend].launches)
        assert least(found[backend].steps) <= moved(found[backend].steps)
    extra = [name for name in found["lowmem"].launches if name == "encode_many_kernel"]
    assert 1 <= len(extra) <= 2  # what the last layer leaves is a launch of the graph, not of a layer
    assert len(found["lowmem"].launches) == len(found["inductor"].launches) + len(extra)
