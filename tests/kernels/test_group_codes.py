"""Group-wise integer codes against float64: codes, scales, layout, error bounds, non-finite values, zeros, rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from lowmem_compile.kernels.group_codes import CODECS, Codec, codec_named, group_size, in_memory, planes
from lowmem_compile.kernels.group_codes.codec import rounded_to_bfloat16

INTEGER = [name for name, codec in CODECS.items() if name.startswith("int")]
GROUPED = [*INTEGER, "fp8"]
WIDTHS = [1, 2, 7, 50, 63, 64, 65, 100, 128, 257]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
ROUNDOFF = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}
TINY = {torch.float16: 2**-25, torch.bfloat16: 2**-134, torch.float32: 2**-150}  # half of the smallest denormal
NEAREST_BF16 = 2**-8
NORMAL = 2**-126  # smallest scale with the full precision of bfloat16
BAD = [math.nan, math.inf, -math.inf]


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), x.shape[-1], x.dtype)


def layout(codec: Codec, width: int) -> tuple[Tensor, Tensor, int, int]:
    """Run of each element of a row, its place there, elements a run and elements a group: as documented."""
    runs = 1 if codec.bits == 8 else 8 // min(planes(codec.bits))
    filled = max(math.ceil(width / runs), 1)
    group = group_size(filled, codec.group)
    index = torch.arange(width)
    return index // filled, index % filled, math.ceil(filled / group) * group, group


def groups(codec: Codec, width: int) -> Tensor:
    """The group of each element of a row."""
    run, place, length, group = layout(codec, width)
    return run * (length // group) + place // group


def read_codes(codec: Codec, parts: tuple[Tensor, ...], width: int) -> Tensor:
    """The signed codes, read element by element from the documented layout."""
    run, place, length, _ = layout(codec, width)
    if codec.bits == 8:
        assert parts[0].dtype == (torch.float8_e4m3fn if codec.floating else torch.int8)
        return parts[0][..., :width].double()
    runs = 8 // min(planes(codec.bits))
    left, total = codec.bits, torch.zeros(*parts[0].shape[:-1], width, dtype=torch.int64)
    for plane, w in zip(parts[:-1], planes(codec.bits), strict=True):
        left -= w
        rows = runs * w // 8  # runs of bytes; each holds 8/w runs of elements
        assert plane.dtype == torch.uint8
        assert plane.shape[-1] == rows * length
        total += (plane.long()[..., run % rows * length + place] >> w * (run // rows) & 2**w - 1) << left
    return (total - codec.largest).double()


def scales(codec: Codec, parts: tuple[Tensor, ...], width: int) -> Tensor:
    """The scale of each element."""
    return parts[-1].double()[..., groups(codec, width)]


def largest_of_group(codec: Codec, x: Tensor) -> Tensor:
    """The largest magnitude in the group of each element."""
    group = groups(codec, x.shape[-1])
    same = group[:, None] == group
    return torch.where(same, x.double().abs().unsqueeze(-2), 0).amax(-1)


def check(codec: Codec, x: Tensor) -> None:
    """Scales, codes and decoded values are those of the definition, computed in float64."""
    width, parts = x.shape[-1], codec.encode(x)
    assert sum(p.nbytes for p in parts) == codec.nbytes(x[..., 0].numel(), width)
    result = codec.decode(parts, width, x.dtype)
    assert result.shape == x.shape
    assert result.dtype == x.dtype
    if codec.bits == 16:
        assert torch.equal(result, x.bfloat16().to(x.dtype))
        return
    s, q = scales(codec, parts, width), read_codes(codec, parts, width)
    exact = largest_of_group(codec, x) / codec.largest
    assert parts[-1].dtype == torch.bfloat16
    off = NEAREST_BF16 if codec.bits <= 8 else NEAREST_BF16 * (2 + NEAREST_BF16)  # rounded up beyond 8 bits
    assert ((s - exact).abs() <= exact * off * (1 + 1e-6)).all()
    ratio = x.double() / s.where(s > 0, 1)
    assert (q.abs() <= codec.largest).all()
    step = (
        2.0 ** torch.floor(torch.log2(ratio.abs().clamp(min=2**-6, max=codec.largest)) - 3) if codec.floating else torch.ones(())
    )
    assert ((q - ratio).abs() <= step * (0.5 + 1e-4)).all()
    assert torch.equal(result, (q * s).to(x.dtype))
    rounding = ROUNDOFF[x.dtype] * x.double().abs() * 1.01 + TINY[x.dtype]
    assert ((result.double() - x.double()).abs() <= step * s / 2 * (1 + 1e-4 + ROUNDOFF[x.dtype]) + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CODECS)
def test_the_definition(name: str, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, width) * torch.logspace(-3, 3, 5)[:, None]
    check(CODECS[name], x.to(dtype))


@pytest.mark.parametrize("group", [8, 9, 32, 64, 128, 1000])
@pytest.mark.parametrize("name", GROUPED)
def test_the_definition_for_every_group(name: str, group: int) -> None:
    for width in (3, 48, 130, 131):
        check(codec_named(name, group=group), torch.randn(3, width))


@pytest.mark.parametrize("shape", [(1,), (7,), (257,), (2, 3, 65), (2, 1, 3, 64), (4, 1)])
@pytest.mark.parametrize("name", CODECS)
def test_every_shape(name: str, shape: tuple[int, ...]) -> None:
    check(CODECS[name], torch.randn(shape))


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0), (2, 0, 65), (0, 0)])
@pytest.mark.parametrize("name", CODECS)
def test_empty_tensors(name: str, shape: tuple[int, ...]) -> None:
    codec, x = CODECS[name], torch.empty(shape)
    parts = codec.encode(x)
    assert codec.decode(parts, shape[-1], x.dtype).shape == shape
    assert sum(p.nbytes for p in parts) == codec.nbytes(math.prod(shape[:-1]), shape[-1])


@pytest.mark.parametrize("name", CODECS)
def test_strided_tensors_are_read_by_position(name: str) -> None:
    x = torch.randn(70, 130).t()
    assert torch.equal(round_trip(CODECS[name], x), round_trip(CODECS[name], x.contiguous()))


@pytest.mark.parametrize("name", INTEGER)
def test_codes_reach_the_largest_and_no_further(name: str) -> None:
    """Scales that bfloat16 rounds down push the largest element up; it still gets the largest code."""
    codec = CODECS[name]
    x = torch.linspace(1, 2, 4001)[:, None] * torch.where(torch.arange(16) % 2 == 0, 1.0, -1.0)
    codes = read_codes(codec, codec.encode(x), 16)
    if codec.bits <= 8:
        assert torch.equal(codes, x.sign().double() * codec.largest)
    assert torch.equal(codes.sign(), x.sign().double())
    assert codes.abs().max() == codec.largest
    assert codes.abs().min() >= codec.largest * (1 - 2 * NEAREST_BF16) - 0.5


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("keep_zero", [False, True], ids=["", "keep_zero"])
def test_a_non_finite_value_poisons_its_group_of_float8_and_no_other(keep_zero: bool, bad: float) -> None:
    codec, x = codec_named("fp8", keep_zero=keep_zero), torch.randn(3, 257)
    x[0, 5::9] = 0
    finite = round_trip(codec, x)
    x[1, 150] = bad
    group, poisoned = groups(codec, 257), torch.zeros(3, 257, dtype=torch.bool)
    poisoned[1] = group == group[150]
    result = round_trip(codec, x)
    assert result[poisoned].isnan().all()
    assert torch.equal(result[~poisoned], finite[~poisoned])


def test_float8_keeps_small_elements_beside_large_ones() -> None:
    """Its error is a share of each element; that of int8 a share of the group's largest."""
    x = torch.randn(100, 64) * torch.logspace(0, -3, 64)
    near = ((round_trip(CODECS["fp8"], x) - x).abs() / x.abs().clamp(min=1e-9))[x.abs() > 2**-14 * x.abs().amax(1, keepdim=True)]
    assert near.max() <= 2**-4 * 1.01
    far = (round_trip(CODECS["int8"], x) - x).abs() / x.abs()
    assert far.max() > 0.5


def test_the_mask_of_float8_is_exact() -> None:
    x = torch.randn(64, 257) * torch.logspace(-6, 1, 257)
    x[:, ::3] = 0
    assert torch.equal(round_trip(codec_named("fp8", keep_zero=True), x).sign(), x.sign())
    assert not torch.equal(round_trip(codec_named("fp8"), x).sign(), x.sign())


def test_float8_rounds_to_nearest_only() -> None:
    with pytest.raises(ValueError, match="'fp8' rounds to nearest"):
        codec_named("fp8", stochastic=True)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("keep_zero", [False, True], ids=["", "keep_zero"])
@pytest.mark.parametrize("name", INTEGER)
def test_a_non_finite_value_poisons_its_group_and_no_other(name: str, keep_zero: bool, stochastic: bool, bad: float) -> None:
    codec = codec_named(name, keep_zero=keep_zero, stochastic=stochastic)
    for width, where in [(128, 0), (128, 63), (128, 64), (128, 127), (1, 0), (7, 3), (65, 0), (257, 150), (257, 256)]:
        x = torch.randn(3, width)
        x[0, 5::9] = 0
        torch.manual_seed(1)
        finite = round_trip(codec, x)
        x[1, where] = bad
        torch.manual_seed(1)
        result = round_trip(codec, x)
        group, poisoned = groups(codec, width), torch.zeros(3, width, dtype=torch.bool)
        poisoned[1] = group == group[where]
        assert result[poisoned].isnan().all(), (width, where)
        assert torch.equal(result[~poisoned], finite[~poisoned]), (width, where)


def test_a_cast_keeps_non_finite_values_where_they_are() -> None:
    x = torch.tensor([[1.0, math.nan, 2.0], [math.inf, 1.0, -math.inf]])
    torch.testing.assert_close(round_trip(CODECS["bf16"], x), x, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("keep_zero", [False, True], ids=["", "keep_zero"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", INTEGER)
def test_groups_of_zeros(name: str, stochastic: bool, keep_zero: bool) -> None:
    codec = codec_named(name, stochastic=stochastic, keep_zero=keep_zero)
    x, empty = torch.randn(2, 192), groups(codec, 192) == 1
    x[0, empty] = 0
    result = round_trip(codec, x)
    assert torch.equal(result[0, empty], x[0, empty])
    assert (result[0, ~empty] != 0).any()


@pytest.mark.parametrize("keep_zero", [False, True], ids=["", "keep_zero"])
@pytest.mark.parametrize("name", GROUPED)
def test_denormals_stay_small(name: str, keep_zero: bool) -> None:
    """Where the scale leaves the normal numbers, every element decodes to something as small, and zero to zero."""
    codec = codec_named(name, keep_zero=keep_zero)
    for largest in torch.logspace(-45, -35, 60, dtype=torch.float64).tolist():
        x = (torch.linspace(-1, 1, 65, dtype=torch.float64) * largest).float()[None]
        result = round_trip(codec, x)
        assert result.isfinite().all()
        bound = max(NORMAL * codec.largest, largest / codec.largest)
        assert (result - x).abs().max().item() <= bound, largest
        assert (result[x == 0] == 0).all(), largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GROUPED)
def test_the_largest_numbers_stay_finite(name: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for factor in (1.0, 0.999, 0.99):
        x = torch.tensor([[largest * factor, -largest * factor, 1.0, 0.0]]).to(dtype)
        result = round_trip(CODECS[name], x)
        assert result.isfinite().all(), (factor, result)
        assert (result[0, :2].double() / x[0, :2].double() - 1).abs().max() <= 2**-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", INTEGER)
def test_keep_zero(name: str, stochastic: bool, dtype: torch.dtype) -> None:
    codec = codec_named(name, stochastic=stochastic, keep_zero=True)
    x = (torch.randn(64, 257) * torch.logspace(-4, 1, 257)).to(dtype)
    x[:, ::3] = 0
    result = round_trip(codec, x)
    assert torch.equal(result.sign(), x.sign())
    s = scales(codec, codec.encode(x), 257)
    bound = s * (1 + 1e-4 + ROUNDOFF[dtype]) + ROUNDOFF[dtype] * x.double().abs() * 1.01 + TINY[dtype]
    assert ((result.double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("name", GROUPED)
def test_keep_zero_leaves_other_values_as_they_are(name: str) -> None:
    x = torch.randn(20, 128)
    plain, kept = round_trip(codec_named(name), x), round_trip(codec_named(name, keep_zero=True), x)
    assert (kept != 0).all()
    assert torch.equal(kept[plain != 0], plain[plain != 0])


@pytest.mark.parametrize("name", INTEGER)
def test_stochastic_rounding_goes_to_a_neighbour(name: str) -> None:
    codec = codec_named(name, stochastic=True)
    x = torch.randn(100, 257)
    parts = codec.encode(x)
    s = scales(codec, parts, 257)
    assert ((codec.decode(parts, 257, x.dtype).double() - x.double()).abs() <= s * (1 + 1e-4)).all()
    assert (read_codes(codec, parts, 257).abs() <= codec.largest).all()


@pytest.mark.parametrize("name", INTEGER)
def test_stochastic_rounding_is_right_on_average(name: str) -> None:
    codec, draws = codec_named(name, stochastic=True), 4000
    x = torch.randn(1, 64)
    s = scales(codec, codec.encode(x), 64)
    mean = round_trip(codec, x.expand(draws, 64)).double().mean(0, keepdim=True)
    inside = x.abs() < largest_of_group(codec, x)  # the largest alone can lie beyond the last code, by the rounding of the scale
    away = (mean - x.double()).abs() / s
    assert away[inside].max() <= 5 * 0.5 / draws**0.5
    assert away.max() <= codec.largest * NEAREST_BF16 + 5 * 0.5 / draws**0.5
    nearest = round_trip(codec_named(name), x)
    assert ((nearest.double() - x).abs() / s)[inside].max() > 5 * 0.5 / draws**0.5  # nearest rounding is not


@pytest.mark.parametrize("name", INTEGER)
def test_stochastic_rounding_follows_the_seed(name: str) -> None:
    codec, x = codec_named(name, stochastic=True), torch.randn(4, 100)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(round_trip(codec, x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize(("name", "stochastic"), [(n, s) for n in CODECS for s in (False, True) if not (n == "fp8" and s)])
def test_the_estimated_error(name: str, stochastic: bool) -> None:
    codec, x = codec_named(name, stochastic=stochastic), torch.randn(2000, 256, dtype=torch.float64).float()
    measured = ((round_trip(codec, x) - x).norm() / x.norm()).item()
    assert codec.error == pytest.approx(measured, rel=0.15)


def test_fewer_bits_take_fewer_bytes_and_make_larger_errors() -> None:
    found = [CODECS[name] for name in CODECS if name != "fp8"]  # of eight bits, but less close than int8
    assert [c.bits for c in found] == sorted((c.bits for c in found), reverse=True)
    sizes, errors = [c.nbytes(10, 256) for c in found], [c.error for c in found]
    assert sizes == sorted(sizes, reverse=True)
    assert errors[1:] == sorted(errors[1:])  # the cast is not a step of this ladder
    assert len(set(sizes)) == len(set(errors)) == len(found)


@pytest.mark.parametrize("name", INTEGER)
def test_encoding_twice_changes_nothing_more(name: str) -> None:
    """Decoded values lie on the grid; only the rounding of the scale can move it."""
    codec, x = CODECS[name], torch.randn(50, 128)
    once = round_trip(codec, x)
    if codec.bits <= 8:
        assert torch.equal(round_trip(codec, once), once)
    assert (round_trip(codec, once) - once).norm() <= 2 * codec.error * x.norm()


@pytest.mark.parametrize(("name", "width", "runs", "length", "group"), [
    ("int8", 100, 1, 100, 50), ("int8", 67, 1, 128, 64), ("int4", 128, 2, 64, 64), ("int4", 257, 2, 129, 43),
    ("int4", 254, 2, 128, 64), ("int6", 96, 4, 24, 24), ("int5", 64, 8, 8, 8), ("int7", 1, 8, 1, 1), ("int3", 2048, 8, 256, 64),
])  # fmt: skip
def test_runs(name: str, width: int, runs: int, length: int, group: int) -> None:
    assert CODECS[name].layout(width) == (runs, length, group)


@pytest.mark.parametrize("name", ["int2", "fp4", "", "auto"])
def test_an_unknown_codec_lists_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match="bf16, int10, int8, int7, int6, int5, int4, int3"):
        codec_named(name)


@pytest.mark.parametrize(
    ("bits", "widths"), [(10, (8, 2)), (8, (8,)), (7, (4, 2, 1)), (6, (4, 2)), (5, (4, 1)), (4, (4,)), (3, (2, 1))]
)
def test_planes(bits: int, widths: tuple[int, ...]) -> None:
    assert planes(bits) == widths


@given(st.integers(0, 5000), st.integers(8, 512))
def test_group_size(width: int, group: int) -> None:
    size = group_size(width, group)
    assert 1 <= size <= group
    if width <= group:
        assert size == max(width, 1)
    else:
        divisors = [g for g in range(group // 2, group + 1) if width % g == 0]
        assert size == max(divisors, default=group)


@given(st.integers(1, 300), st.integers(1, 4), st.integers(8, 128), st.sampled_from(INTEGER))
def test_nbytes(width: int, rows: int, group: int, name: str) -> None:
    codec = codec_named(name, group=group)
    parts = codec.encode(torch.randn(rows, width))
    assert sum(p.nbytes for p in parts) == codec.nbytes(rows, width)
    ours = codec.decode(parts, width, torch.float32)
    assert ours.shape == (rows, width)


@pytest.mark.parametrize("width", [1, 48, 64, 100, 384, 576])
@pytest.mark.parametrize("name", [n for n in CODECS if n != "bf16"])
def test_codes_written_for_loops_are_the_same(name: str, width: int) -> None:
    codec = codec_named(name)
    x = torch.randn(5, width) * 10 ** torch.randn(5, 1)
    x[0, 0], x[1, -1], x[2], x[3, 0] = math.nan, math.inf, 0.0, 65504.0
    for dtype in DTYPES:
        parts = codec.encode(x.to(dtype))
        for got, want in zip(codec.encode(x.to(dtype), in_loops=True), parts, strict=True):
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
        got, want = (codec.decode(parts, width, dtype, in_loops=in_loops) for in_loops in (True, False))
        assert torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


@pytest.mark.e2e
@pytest.mark.parametrize(("name", "heads"), [("int10", 12), ("int6", 9), ("int8", 9)])
def test_loops_are_vector_loops(name: str, heads: int) -> None:
    """Neither groups that are no whole number of vectors nor the views that cut out heads leave an element to a scalar loop."""
    codec = codec_named(name, group=128)

    def encode(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = (a + b).unflatten(-1, (heads, 64)).transpose(-2, -3)
        return q, *codec.encode(in_memory(q).transpose(-2, -3).flatten(-2), in_loops=True)

    a, b = torch.randn(2, 2, 32, heads * 64).to(torch.bfloat16)
    made, (source,) = run_and_get_code(torch.compile(encode), a, b)
    assert "at::vec::Vectorized" in source
    assert "std::nearbyint" not in source
    assert "div_floor_integer" not in source
    for got, want in zip(made, encode(a, b), strict=True):
        assert torch.equal(got, want)


@pytest.mark.e2e
def test_inductor_makes_the_same_codes() -> None:
    """The rounding of the scale must survive in a fused loop, which drops a cast to bfloat16 and back."""
    x = torch.randn(6, 128).to(torch.bfloat16)
    codec = codec_named("int10")
    compiled = torch.compile(lambda x: codec.encode(x * 2))
    for got, want in zip(compiled(x), codec.encode(x * 2), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("value", [0.0, 1.0, 1.00390625, 1.0117188, 2.0**-127, 3.3e38, 1e-45, float("inf")])
def test_rounding_to_bfloat16_by_bits(value: float) -> None:
    x = torch.tensor([value, 0.7 * value])
    assert torch.equal(rounded_to_bfloat16(x), x.to(torch.bfloat16).float())
