"""Our Triton kernels in the interpreter, against their definitions, and through Triton's compilers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_compile.gpu_free.operations import GATED, GROUPS, STEPS
from lowmem_compile.gpu_free.worker import Worker
from lowmem_compile.kernels.activation_codes import reference
from lowmem_compile.kernels.activation_codes.op import ACTIVATIONS, step_activation
from lowmem_compile.kernels.activation_codes.tables import step_table
from lowmem_compile.kernels.gated_codes import gated_codes
from lowmem_compile.kernels.group_codes import codec_named, encode_groups
from lowmem_compile.kernels.group_codes.counter import CounterCodec, uniform

CODECS = ("int10", "int8", "int7", "int6", "int5", "int4", "int3")
SHAPES = [(5, 77), (3, 200), (2, 7), (2, 3, 64), (1, 1)]
SEED = torch.tensor([0x1234_5678_9ABC])


def same(got: Tensor, want: Tensor) -> bool:
    """The same bits, but for what a NaN carries."""
    return got.dtype == want.dtype and torch.equal(got.nan_to_num(nan=-77.0), want.nan_to_num(nan=-77.0))


def awkward(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Gaussian rows with ties, a NaN, an infinity, a row of zeros and one that is nearly zero."""
    x = torch.randn(shape)
    flat = x.view(-1, shape[-1])
    flat[0] = (flat[0] * 4).round() / 4
    for row, value in enumerate((math.nan, math.inf, 0.0), 1):
        if row < len(flat):
            flat[row, -1] = value
    flat[-1] *= 1e-38
    return x.to(dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in CODECS]
    # a dtype changes nothing but the load: a width of one plane, one of three, and the one that rounds scales upwards
    + [(name, dtype) for name in ("int8", "int7", "int10") for dtype in (torch.float16, torch.float32)],
)
def test_encode(worker: Worker, name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = awkward(shape, dtype)
        for keep_zero in (False, True):
            codec = codec_named(name, keep_zero=keep_zero)
            got, want = worker.call(GROUPS, x, codec), codec.encode(x)
            assert all(same(a, b.contiguous()) for a, b in zip(got, want, strict=True)), (shape, keep_zero)


@pytest.mark.parametrize("name", ["int8", "int5"])
def test_encode_stochastic(worker: Worker, name: str) -> None:
    codec, x = codec_named(name, stochastic=True), awkward((5, 77), torch.float32)
    definition = CounterCodec(**dataclasses.asdict(codec), seed=SEED)
    got, want = worker.call(GROUPS, x, codec, SEED), definition.encode(x)
    assert all(same(a, b.contiguous()) for a, b in zip(got, want, strict=True))
    other = worker.call(GROUPS, x, codec, SEED + 1)
    assert not torch.equal(other[0], got[0])


def test_random_numbers_are_philox_s() -> None:
    """The known answer of Philox4x32-10 for counter and key zero is 6627E8D5 …; and the mean and variance are uniform's."""
    word = 0x6627E8D5
    assert uniform(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).item() == pytest.approx(word / 2**31)
    u = uniform(SEED, torch.arange(20000))
    assert 0 <= u.min() < u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * 20000))
    assert u.var().item() == pytest.approx(1 / 12, rel=0.03)


def test_stochastic_rounding_is_right_on_average() -> None:
    x = torch.randn(2, 64)
    codec = codec_named("int4", stochastic=True)
    seeds = range(400)
    decoded = [codec.decode(tuple(encode_groups(x, 4, 64, False, torch.tensor([s]))), 64, torch.float32) for s in seeds]
    step = codec.encode(x)[-1].float().repeat_interleave(32, -1)
    inside = x.abs() < 6.9 * step  # the largest element may be clamped
    error = (torch.stack(decoded).mean(0) - x).abs()
    assert (error <= 5 * 0.5 * step / math.sqrt(len(seeds)))[inside].all()


def test_encode_reads_strided_rows(worker: Worker) -> None:
    codec, wide = codec_named("int4"), torch.full((6, 300), math.nan)
    wide[:, 1:200:2] = torch.randn(6, 100)
    for x in (wide[:, 1:200:2], torch.randn(100, 6).t()):
        got, want = worker.call(GROUPS, x, codec), codec.encode(x.contiguous())
        assert all(same(a, b.contiguous()) for a, b in zip(got, want, strict=True))


def test_encode_beyond_two_to_the_31(worker: Worker) -> None:
    """Rows lie 2³⁰ elements apart: an offset of 32 bits would wrap. The memory in between is never touched."""
    far, near = worker.call("lowmem_compile.gpu_free.far_rows:encode_far_rows", 4)
    assert all(same(a, b) for a, b in zip(far, near, strict=True))


@pytest.mark.parametrize(
    ("name", "kind", "bits"), [(n, "derivative", b) for n in ACTIVATIONS for b in (2, 4)] + [("gelu", "primitive", 2)]
)
def test_step_codes(worker: Worker, name: str, kind: str, bits: int) -> None:
    table = step_table(name, kind, bits)
    for shape, dtype in (((7, 333), torch.bfloat16), ((2, 3, 5), torch.float32), ((9,), torch.float16)):
        h = (torch.randn(shape) * 3).to(dtype)
        h.view(-1)[1], h.view(-1)[3] = math.nan, -math.inf
        y, codes, poison = worker.call(STEPS, h, name, table)
        assert torch.equal(codes, reference.pack(reference.encode(h, table), bits))
        assert torch.equal(poison.isnan(), reference.row_poison(h).isnan())
        assert not poison[~poison.isnan()].any()
        want = ACTIVATIONS[name](h.double())
        error = (y.double() - want).abs()[h.isfinite()]
        assert (error <= torch.finfo(dtype).eps * want.abs()[h.isfinite()] + 1e-6).all()
        assert y.view(-1)[1].isnan()


@pytest.mark.parametrize("name", ["silu", "gelu"])
@pytest.mark.parametrize("codec", ["int4", "int7", "int8"])
def test_gated_codes(worker: Worker, codec: str, name: str) -> None:
    for shape, dtype in (((5, 77), torch.bfloat16), ((2, 3, 40), torch.float32)):
        a, b = awkward(shape, dtype), torch.randn(shape).to(dtype)
        y, *parts = worker.call(GATED, a, b, name, codec_named(codec))
        want, *want_parts = gated_codes(a, b, name, codec_named(codec).bits, 64)
        assert all(same(p, q) for p, q in zip(parts, want_parts, strict=True))
        finite = ~a.isinf()  # PyTorch's GELU of infinity is NaN on some CPUs
        # 1 + erf cancels in GELU's tail: a rounding of 1, times a and b
        close = torch.allclose(y[finite].float(), want[finite].float(), rtol=torch.finfo(dtype).eps, atol=2e-5, equal_nan=True)
        assert close


def test_each_byte_is_moved_once(worker: Worker) -> None:
    x = torch.randn(16, 1024).bfloat16()
    table, codec = step_table("gelu", "derivative", 2), codec_named("int4")
    calls: dict[str, tuple[Any, ...]] = {
        "encode": (GROUPS, x, codec),
        "steps": (STEPS, x, "gelu", table),
        "gated": (GATED, x, x.clone(), "silu", codec),
    }
    for name, call in calls.items():
        worker.launches.clear()
        made = worker.call(*call)
        (launch,) = worker.launches
        outputs = [t for t in made if not (name == "steps" and t.dtype == torch.float32)]  # no row is bad
        least = sum(t.numel() * t.element_size() for t in (*(a for a in call if isinstance(a, Tensor)), *outputs))
        assert launch.moved == launch.loads + launch.stores == least, name


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("variant", ["encode int4", "gelu, derivative codes of 2 bits", "SwiGLU, encode int4"])
def test_compiles_without_spills(variant: str) -> None:
    from lowmem_compile.gpu_free.page import own_kernels
    from lowmem_compile.gpu_free.resources import TARGETS, compile_for

    kernel = own_kernels()[variant]
    for target in TARGETS:
        found = compile_for(kernel, target)
        assert found.spilled == 0
        assert 0 < found.registers <= 256


STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")
"""Of opcheck's tests those without symbolic sizes: a layout of codes is that of a number."""


def test_opcheck() -> None:
    x = torch.randn(4, 70)
    torch.library.opcheck(encode_groups, (x, 5, 64, False, None), test_utils=STATIC)
    torch.library.opcheck(encode_groups, (x.bfloat16(), 8, 64, True, SEED), test_utils=STATIC)
    pair = (x.clone().requires_grad_(), torch.randn(4, 70, requires_grad=True))
    torch.library.opcheck(gated_codes, (*pair, "silu", 8, 64), test_utils=STATIC)
    torch.library.opcheck(step_activation, (pair[0], "silu", "derivative", 4))


def test_gradients() -> None:
    """The formulas of the definitions, from the codes."""
    a, b, grad = (torch.randn(6, 64, requires_grad=i < 2) for i in range(3))
    y, *parts = gated_codes(a, b, "silu", 8, 64)
    da, db = torch.autograd.grad(y, (a, b), grad)
    codec = codec_named("int8")
    near_a, near_b = (codec.decode(tuple(p), 64, torch.float32).requires_grad_() for p in (parts[:2], parts[2:]))
    want = torch.autograd.grad(torch.nn.functional.silu(near_a) * near_b, (near_a, near_b), grad)
    torch.testing.assert_close((da, db), want)
    table = step_table("gelu", "derivative", 4)
    y, codes, poison = step_activation(a, "gelu", "derivative", 4)
    (dh,) = torch.autograd.grad(y, a, grad)
    assert torch.equal(dh, reference.backward(grad, codes, table, poison))


def test_step_codes_that_do_not_fill_a_byte_are_refused() -> None:
    """Tables of 5 bits are for the pass, which packs planes."""
    with pytest.raises(ValueError, match="2 or 4 bits"):
        step_activation(torch.randn(8), "gelu", "derivative", 5)
