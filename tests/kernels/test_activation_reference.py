"""The 2-bit reference: codes, planar packing, the gradient as a formula, non-finite inputs."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lowmem_compile.kernels.activation_codes.reference import (
    backward,
    encode,
    pack,
    packed_size,
    row_poison,
    unpack,
)
from lowmem_compile.kernels.activation_codes.tables import StepTable, step_table

TABLES = [
    step_table(name, kind)
    for name in ("gelu", "gelu_tanh", "silu", "mish", "softplus", "log_sigmoid")
    for kind in ("primitive", "derivative")
]
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "log_sigmoid": F.logsigmoid,
}
SHAPES = [(), (1,), (3,), (4,), (5,), (2, 3), (4, 1), (3, 5, 7), (0,), (0, 3), (3, 0)]


def identify(table: object) -> str:
    return f"{table.activation}-{table.kind}" if isinstance(table, StepTable) else str(table)


def gradient(x: Tensor, grad: Tensor, table: StepTable) -> Tensor:
    return backward(grad, pack(encode(x, table)), table, row_poison(x))


def surrogate(x: Tensor, table: StepTable) -> Tensor:
    """levels[0]·x + sum a·ReLU(x - c): the function whose derivative the steps are (up to a constant)."""
    total = table.levels[0] * x
    for threshold, below, above in zip(table.thresholds, table.levels, table.levels[1:], strict=False):
        total = total + (above - below) * F.relu(x - threshold)
    return total


@pytest.mark.parametrize("table", TABLES, ids=identify)
def test_codes_compare_strictly_in_float32(table: StepTable) -> None:
    at = torch.tensor(table.thresholds, dtype=torch.float32)
    above = torch.nextafter(at, torch.full_like(at, math.inf))
    assert encode(at, table).tolist() == [0, 1, 2]
    assert encode(above, table).tolist() == [1, 2, 3]
    # A float64 just above the threshold rounds to the threshold, which is not above itself.
    just_above = torch.where(at == 0, 1e-50, at.double() + 1e-10 * at.abs())
    assert (just_above > at.double()).all()
    assert encode(just_above, table).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_codes_of_every_dtype_count_thresholds_below(dtype: torch.dtype) -> None:
    table = step_table("silu", "derivative")
    x = torch.linspace(-8, 8, 1001).to(dtype)
    thresholds = np.array(table.thresholds, dtype=np.float32)
    expected = np.searchsorted(thresholds, x.float().numpy(), side="left")
    codes = encode(x, table)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == expected.tolist()


def test_codes_of_non_finite_values() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf])
    assert encode(x, step_table("gelu", "primitive")).tolist() == [0, 3, 0]


def test_the_layout_is_planar() -> None:
    codes = torch.tensor([1, 2, 3, 0, 3, 3, 2, 1, 2, 3], dtype=torch.uint8)
    # Q = 3: the planes are 1 2 3 | 0 3 3 | 2 1 2 | 3 and padding; the last plane has the high bits.
    assert pack(codes).tolist() == [0b11_10_00_01, 0b00_01_11_10, 0b00_10_11_11]


@given(st.lists(st.integers(0, 3), max_size=67))
@settings(max_examples=200, deadline=None)
def test_packing_round_trips_and_follows_the_definition(values: list[int]) -> None:
    codes = torch.tensor(values, dtype=torch.uint8)
    packed = pack(codes)
    quarter = math.ceil(len(values) / 4)
    assert packed.dtype == torch.uint8
    assert packed.shape == (quarter,) == (packed_size(len(values)),)
    padded = values + [0] * (4 * quarter - len(values))
    for i, byte in enumerate(packed.tolist()):
        assert [byte >> 2 * k & 3 for k in range(4)] == [padded[i + k * quarter] for k in range(4)]
    assert unpack(packed, codes.shape).tolist() == values


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_keeps_shapes_and_reads_strides(shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 4, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(codes), shape), codes)
    if len(shape) > 1:
        strided = codes.transpose(0, -1)
        assert torch.equal(pack(strided), pack(strided.contiguous()))


@pytest.mark.parametrize("table", TABLES, ids=identify)
def test_backward_is_the_derivative_of_the_surrogate(table: StepTable) -> None:
    """Autograd through the surrogate in float64; only the levels' rounding to float32 differs."""
    generator = torch.Generator().manual_seed(1)
    x = (4 * torch.randn(13, 17, dtype=torch.float64, generator=generator)).requires_grad_()
    grad = torch.randn(13, 17, dtype=torch.float64, generator=generator)
    (expected,) = torch.autograd.grad(surrogate(x, table), x, grad)
    result = gradient(x.detach(), grad, table)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=1.2e-7, atol=1e-14)
    rounded = torch.tensor(table.levels).double()[encode(x.detach(), table).long()]
    assert torch.equal(result, grad * rounded)


@pytest.mark.parametrize("table", TABLES, ids=identify)
def test_backward_is_near_the_exact_gradient(table: StepTable) -> None:
    """The error against autograd through the activation has the RMS under N(0, 1) that the table promises."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    (exact,) = torch.autograd.grad(EXACT[table.activation](x).sum(), x)
    rms = (gradient(x.detach(), torch.ones_like(exact), table) - exact).square().mean().sqrt().item()
    promised = {
        "gelu-primitive": 0.2408, "gelu-derivative": 0.0949,
        "gelu_tanh-primitive": 0.2413, "gelu_tanh-derivative": 0.0949,
        "silu-primitive": 0.2902, "silu-derivative": 0.0914,
        "mish-primitive": 0.2582, "mish-derivative": 0.0881,
        "softplus-primitive": 0.1426, "softplus-derivative": 0.1032,
        "log_sigmoid-primitive": 0.1426, "log_sigmoid-derivative": 0.1032,
    }[identify(table)]  # fmt: skip
    assert rms == pytest.approx(promised, abs=1.5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_are_rounded_once_from_float32(dtype: torch.dtype) -> None:
    table = step_table("gelu", "derivative")
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(5, 33, generator=generator).to(dtype) for _ in range(2))
    result = gradient(x, grad, table)
    levels = torch.tensor(table.levels, dtype=torch.float32)[encode(x, table).long()]
    assert result.dtype == dtype
    assert torch.equal(result, (grad.float() * levels).to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: tuple[int, ...]) -> None:
    table = step_table("gelu", "primitive")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    result = gradient(x, torch.ones(shape), table)
    assert result.shape == torch.Size(shape)
    expected = [table.levels[sum(value > t for t in table.thresholds)] for value in x.reshape(-1).tolist()]
    torch.testing.assert_close(result.reshape(-1), torch.tensor(expected), rtol=1e-7, atol=0)


def test_strided_gradients_are_read_by_position_not_by_storage() -> None:
    table = step_table("silu", "derivative")
    generator = torch.Generator().manual_seed(5)
    x, grad = torch.randn(6, 10, generator=generator).t(), torch.randn(10, 12, generator=generator)[:, ::2]
    assert torch.equal(gradient(x, grad, table), gradient(x.contiguous(), grad.contiguous(), table))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_non_finite_input_poisons_its_row_and_no_other(bad: float, dtype: torch.dtype) -> None:
    table = step_table("gelu", "primitive")
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(6)).to(dtype)
    finite = gradient(x, torch.ones_like(x), table)
    x[1, 0, 3] = bad
    poison = row_poison(x)
    assert poison.dtype == torch.float32
    assert poison.shape == (2, 3, 1)
    result = gradient(x, torch.ones_like(x), table)
    assert result[1, 0].isnan().all()
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 0] = False
    assert torch.equal(result[others], finite[others])


def test_large_finite_inputs_are_not_poisoned() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.full((3, 1000), torch.finfo(dtype).max, dtype=dtype)
        assert torch.equal(row_poison(x), torch.zeros(3, 1))


def test_poison_of_a_scalar_and_of_empty_rows() -> None:
    assert row_poison(torch.tensor(2.0)).shape == ()
    assert row_poison(torch.tensor(math.nan)).isnan()
    assert torch.equal(row_poison(torch.empty(3, 0)), torch.zeros(3, 1))


def test_other_widths_dtypes_and_shapes_are_refused() -> None:
    table = step_table("gelu", "primitive")
    one_bit = StepTable("gelu", "derivative", 1, (0.0,), (0.0, 1.0), "made up")
    x = torch.randn(2, 6)
    packed, poison = pack(encode(x, table)), row_poison(x)
    with pytest.raises(ValueError, match="2-bit"):
        encode(x, one_bit)
    with pytest.raises(ValueError, match="2-bit"):
        backward(x, packed, one_bit, poison)
    with pytest.raises(ValueError, match="int64"):
        encode(torch.arange(3), table)
    with pytest.raises(ValueError, match="complex64"):
        backward(x.to(torch.complex64), packed, table, poison)
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.zeros(3))
    with pytest.raises(ValueError, match=r"uint8 \[4\]"):
        unpack(packed, (2, 7))
    with pytest.raises(ValueError, match=r"uint8 \[3\]"):
        unpack(packed.int(), (2, 6))
    with pytest.raises(ValueError, match=r"float32 \[2, 1\]"):
        backward(x, packed, table, poison[:, 0])


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 33])
def test_four_bit_codes_round_trip(size: int) -> None:
    codes = torch.randint(0, 16, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    packed = pack(codes, 4)
    assert packed.numel() == (size + 1) // 2
    assert torch.equal(unpack(packed, (size,), 4), codes)
