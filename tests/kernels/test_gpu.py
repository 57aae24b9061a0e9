"""Our Triton kernels on a GPU against their definitions on the CPU: codes bit for bit, activations to within roundings."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from lowmem_compile.kernels.activation_codes import reference
from lowmem_compile.kernels.activation_codes.op import ACTIVATIONS, step_activation
from lowmem_compile.kernels.activation_codes.tables import step_table
from lowmem_compile.kernels.gated_codes import gated_codes
from lowmem_compile.kernels.group_codes import codec_named, decode_many, encode_groups, encode_many
from lowmem_compile.kernels.group_codes.counter import CounterCodec

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
CODECS = ("int10", "int8", "int7", "int6", "int5", "int4", "int3")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(5, 77), (3, 200), (2, 7), (2, 3, 64), (1, 1), (37, 1000), (129, 4096), (9, 4097)]
SEED = torch.tensor([0x1234_5678_9ABC])
NAN = -77.0


def same(got: Tensor, want: Tensor) -> bool:
    """The same bits, but for what a NaN carries."""
    got, want = got.cpu(), want.cpu()
    return got.dtype == want.dtype and torch.equal(got.nan_to_num(nan=NAN), want.nan_to_num(nan=NAN))


def awkward(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Gaussian rows with ties, a NaN, an infinity, a row of zeros and one that is nearly zero."""
    x = torch.randn(shape)
    flat = x.view(-1, shape[-1])
    flat[0] = (flat[0] * 4).round() / 4
    for row, value in enumerate((math.nan, math.inf, 0.0), 1):
        if row < len(flat):
            flat[row, -1 if value else slice(None)] = value
    flat[-1] *= 1e-38
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_encode(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = awkward(shape, dtype)
        for keep_zero in (False, True):
            codec = codec_named(name, keep_zero=keep_zero)
            got = encode_groups(x.to(DEVICE), codec.bits, codec.group, keep_zero, None)
            assert all(same(a, b) for a, b in zip(got, codec.encode(x), strict=True)), (shape, keep_zero)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_encode_stochastic(name: str, dtype: torch.dtype) -> None:
    codec = codec_named(name, stochastic=True)
    definition = CounterCodec(**dataclasses.asdict(codec), seed=SEED)
    for shape in SHAPES:
        x = awkward(shape, dtype)
        got = encode_groups(x.to(DEVICE), codec.bits, codec.group, False, SEED.to(DEVICE))
        assert all(same(a, b) for a, b in zip(got, definition.encode(x), strict=True)), shape
    other = encode_groups(x.to(DEVICE), codec.bits, codec.group, False, SEED.to(DEVICE) + 1)
    assert not torch.equal(other[0], got[0])


def test_encode_reads_strided_rows() -> None:
    codec, wide = codec_named("int4"), torch.full((6, 300), math.nan)
    wide[:, 1:200:2] = torch.randn(6, 100)
    tall = torch.randn(100, 6)
    pairs = [(wide.to(DEVICE)[:, 1:200:2], wide[:, 1:200:2]), (tall.to(DEVICE).t(), tall.t())]
    pairs.append((tall.to(DEVICE).flatten()[1:97].view(2, 48), tall.flatten()[1:97].view(2, 48)))
    for there, here in pairs:
        got, want = encode_groups(there, 4, codec.group, False, None), codec.encode(here.contiguous())
        assert all(same(a, b) for a, b in zip(got, want, strict=True))


def test_encode_beyond_two_to_the_31() -> None:
    """Offsets of 32 bits would wrap, in x or in what is written."""
    codec = codec_named("int8")
    near = torch.randn(3, 64).bfloat16()
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 64), (2**30, 1))
    far.copy_(near)
    assert all(same(a, b) for a, b in zip(encode_groups(far, 8, 64, False, None), codec.encode(near), strict=True))
    del far
    x = torch.randn(2**11 + 1, 2**20, device=DEVICE, dtype=torch.bfloat16)
    got = encode_groups(x, 8, 64, False, None)
    for row in (0, 2**10, 2**11):
        assert all(same(a[row], b[0]) for a, b in zip(got, codec.encode(x[row : row + 1].cpu()), strict=True))


def check_steps(h: Tensor, name: str, kind: str, bits: int) -> None:
    table = step_table(name, kind, bits)
    y, codes, poison = (t.cpu() for t in step_activation(h.to(DEVICE), name, kind, bits))
    assert torch.equal(codes, reference.pack(reference.encode(h, table), bits))
    assert same(poison, reference.row_poison(h))
    finite = h.isfinite()
    want = ACTIVATIONS[name](h.double())[finite]
    error = (y.double()[finite] - want).abs()
    assert (error <= torch.finfo(h.dtype).eps * want.abs() + 1e-6).all()
    assert y[h.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "kind", "bits"),
    [(n, "derivative", b) for n in ACTIVATIONS for b in (2, 4)] + [("gelu", "primitive", 2), ("silu", "primitive", 2)],
)
def test_step_codes(name: str, kind: str, bits: int, dtype: torch.dtype) -> None:
    for shape in ((7, 333), (2, 3, 5), (9,), (1,), (130, 4097)):
        h = (torch.randn(shape) * 3).to(dtype)
        if h.numel() > 3:
            h.view(-1)[1], h.view(-1)[3] = math.nan, -math.inf
        check_steps(h, name, kind, bits)
    check_steps(torch.tensor(0.3, dtype=dtype), name, kind, bits)
    check_steps((torch.randn(40, 50) * 3).to(dtype).t(), name, kind, bits)


@pytest.mark.parametrize("bits", [2, 4])
def test_step_codes_at_every_threshold(bits: int) -> None:
    """All numbers of bfloat16 and float16, and the float32 neighbours of each threshold."""
    table = step_table("gelu", "derivative", bits)
    at = torch.tensor(table.thresholds, dtype=torch.float32)
    near = torch.cat([at, at.nextafter(at + 1), at.nextafter(at - 1)])
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for h in (near, everything.view(torch.bfloat16), everything.view(torch.float16)):
        _, codes, _ = step_activation(h.to(DEVICE), "gelu", "derivative", bits)
        assert torch.equal(codes.cpu(), reference.pack(reference.encode(h, table), bits))


def test_step_codes_beyond_two_to_the_31() -> None:
    """3·Q does not fit 32 bits, for Q bytes of 2-bit codes."""
    width = 2**20
    h = torch.empty(2800, width, dtype=torch.bfloat16, device=DEVICE).normal_()
    y, codes, poison = step_activation(h, "gelu", "derivative", 2)
    flat, table = h.view(-1), step_table("gelu", "derivative", 2)
    length = codes.numel()
    assert 3 * length > 2**31
    for first in (0, length // 2, length - 4096):
        runs = torch.stack([flat[k * length + first : k * length + first + 4096] for k in range(4)]).cpu()
        assert torch.equal(codes[first : first + 4096].cpu(), reference.pack(reference.encode(runs, table), 2))
    torch.testing.assert_close(y[-1], torch.nn.functional.gelu(h[-1]))
    assert not poison.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("name", CODECS)
def test_gated_codes(name: str, activation: str, dtype: torch.dtype) -> None:
    bits = codec_named(name).bits
    for shape in ((5, 77), (2, 3, 40), (1, 1), (65, 4097)):
        a, b = awkward(shape, dtype), torch.randn(shape).to(dtype)
        y, *parts = (t.cpu() for t in gated_codes(a.to(DEVICE), b.to(DEVICE), activation, bits, 64))
        want, *want_parts = gated_codes(a, b, activation, bits, 64)
        assert all(same(p, q) for p, q in zip(parts, want_parts, strict=True)), shape
        finite = ~a.isinf()  # PyTorch's GELU of infinity is NaN on some CPUs
        # 1 + erf cancels in GELU's tail: a rounding of 1, times a and b
        close = torch.allclose(y[finite].float(), want[finite].float(), rtol=torch.finfo(dtype).eps, atol=2e-5, equal_nan=True)
        assert close, shape


STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")
"""Of opcheck's tests those without symbolic sizes: a layout of codes is that of a number."""


def test_opcheck() -> None:
    x = torch.randn(4, 70, device=DEVICE)
    torch.library.opcheck(encode_groups, (x, 5, 64, False, None), test_utils=STATIC)
    torch.library.opcheck(encode_groups, (x.bfloat16(), 8, 64, True, SEED.to(DEVICE)), test_utils=STATIC)
    pair = (x.clone().requires_grad_(), torch.randn(4, 70, device=DEVICE, requires_grad=True))
    torch.library.opcheck(gated_codes, (*pair, "silu", 8, 64), test_utils=STATIC)
    torch.library.opcheck(step_activation, (pair[0], "silu", "derivative", 4))


def test_gradients_are_the_cpu_s() -> None:
    a, b, grad = (torch.randn(6, 64) for _ in range(3))
    found = []
    for device in ("cpu", DEVICE):
        pair = [t.to(device).requires_grad_() for t in (a, b)]
        gated = torch.autograd.grad(gated_codes(*pair, "silu", 8, 64)[0], pair, grad.to(device))
        (steps,) = torch.autograd.grad(step_activation(pair[0], "gelu", "derivative", 4)[0], pair[0], grad.to(device))
        found.append([t.cpu() for t in (*gated, steps)])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tensors_in_one_launch(dtype: torch.dtype) -> None:
    xs = [awkward(shape, dtype) for shape in SHAPES[: len(CODECS)]]
    codecs = [codec_named(name) for name in CODECS]
    bits, groups = [c.bits for c in codecs], [c.group for c in codecs]
    got = encode_many([x.to(DEVICE) for x in xs], bits, groups, [False] * len(xs))
    want = [part for x, codec in zip(xs, codecs, strict=True) for part in codec.encode(x)]
    assert all(same(a, b.contiguous()) for a, b in zip(got, want, strict=True))
    widths = [x.shape[-1] for x in xs]
    decoded = decode_many(got, bits, groups, widths, dtype)
    again = decode_many([part.cpu() for part in got], bits, groups, widths, dtype)
    assert all(same(a, b) for a, b in zip(decoded, again, strict=True))


def test_the_pipeline_launches_them() -> None:
    """A layer with attention: codes by our kernels, gradients as on the CPU."""
    from lowmem_compile.gpu_free.blocks import example, model

    net, x = model("vit", 1), example()
    grads: dict[str, list[Tensor]] = {}
    for device in ("cpu", DEVICE):
        torch.compiler.reset()
        net, leaf = net.to(device), x.detach().to(device).requires_grad_()
        net.zero_grad()
        y = torch.compile(net, backend="lowmem", options={"strict": True})(leaf)
        with torch.profiler.profile() as profile:
            y.square().mean().backward()
        found = [leaf.grad, *(p.grad for n, p in net.named_parameters() if not n.endswith("attention.k.bias"))]
        grads[device] = [g.detach().cpu().double() for g in found if g is not None]
    assert any("decode_many" in event.name for event in profile.events())
    for got, want in zip(grads[DEVICE], grads["cpu"], strict=True):
        assert ((got - want).norm() / want.norm()) < 0.03  # attention of another library, and a code may fall to either side
