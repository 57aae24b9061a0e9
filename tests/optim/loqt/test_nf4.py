"""NF4 against its definition, and bit by bit against bitsandbytes where that is installed."""

from __future__ import annotations

import pytest
import torch
from scipy.special import ndtri

from lowmem_compile.errors import OptionError
from lowmem_compile.optim.loqt.nf4 import LEVELS, NF4, PIECE, Plain, check_block

CPU = torch.device("cpu")
SHAPES = [(48, 64), (7, 9), (5, 13), (1, 1), (130, 33)]


def round_trip(x: torch.Tensor, form: NF4) -> torch.Tensor:
    return form.decode(form.encode(x), form.tables(CPU), torch.float32)


def test_the_levels_are_the_quantiles_of_the_paper() -> None:
    """δ = ½(1 - 1/32 + 1 - 1/30); 8 quantiles from δ down to above ½, 7 mirrored, and zero; divided by the largest."""
    delta = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive = [float(ndtri(delta + (0.5 - delta) * k / 8)) for k in range(8)]
    negative = [-float(ndtri(delta + (0.5 - delta) * k / 7)) for k in range(7)]
    assert sorted([*positive, *negative, 0.0]) == pytest.approx([v * positive[0] for v in LEVELS], abs=1e-6)
    assert list(LEVELS) == sorted(set(LEVELS))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_value_becomes_the_nearest_level_of_its_block(shape: tuple[int, int], double: bool) -> None:
    x = torch.randn(shape)
    form = NF4(shape, 16, double)
    got = round_trip(x, form).reshape(-1)
    for start in range(0, x.numel(), 16):
        block, decoded = x.reshape(-1)[start : start + 16], got[start : start + 16]
        scale = block.abs().max()
        want = torch.tensor(LEVELS)[(block[:, None] / scale - torch.tensor(LEVELS)).abs().argmin(1)]
        if double:  # the scale itself is rounded: one factor for the block
            factor = (decoded / (want * scale)).nan_to_num(nan=1.0)
            assert (factor - 1).abs().max() < 0.1
            assert torch.allclose(decoded, want * scale * factor.median(), atol=1e-6)
        else:
            assert torch.equal(decoded, want * scale)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (1376, 512)])
def test_bytes(shape: tuple[int, int], double: bool) -> None:
    form = NF4(shape, 64, double)
    stored = form.encode(torch.randn(shape))
    n, b = shape[0] * shape[1], -(-shape[0] * shape[1] // 64)
    assert sum(t.nbytes for t in stored.values()) == form.nbytes
    assert form.nbytes == 32 * b + (b + 4 * -(-b // 256) + 4 if double else 4 * b)
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == form.parts()
    if n > 10_000:
        assert 8 * form.nbytes / n == pytest.approx(4.127 if double else 4.5, abs=2e-3)


def test_double_quantisation_costs_little() -> None:
    x = 0.02 * torch.randn(512, 512)
    once, twice = (float((round_trip(x, NF4((512, 512), 64, d)) - x).norm() / x.norm()) for d in (False, True))
    assert 0.09 < once < 0.094
    assert once <= twice < 1.001 * once


def test_zeros_stay_zero_and_levels_stay_themselves() -> None:
    form = NF4((4, 16), 16)
    assert torch.equal(round_trip(torch.zeros(4, 16), form), torch.zeros(4, 16))
    x = torch.tensor(LEVELS).repeat(4, 1) * torch.tensor([[0.5], [1.0], [2.0], [8.0]])
    assert torch.equal(round_trip(x, form), x)


def test_what_is_not_finite_spoils_its_block_alone() -> None:
    x = torch.randn(3, 16)
    x[0, 3], x[2, 0] = float("inf"), float("nan")
    got = round_trip(x, NF4((3, 16), 16))
    assert got[0].isnan().any()
    assert got[2].isnan().all()
    assert got[1].isfinite().all()


def test_pieces_do_not_show() -> None:
    x = torch.randn(PIECE // 256 + 3, 260)
    form = NF4(tuple(x.shape), 64)
    assert x.numel() > PIECE
    got = round_trip(x, form).reshape(-1)
    tail = x.reshape(-1)[PIECE:]
    assert torch.equal(got[PIECE:], round_trip(tail, NF4(tuple(tail.shape), 64)))


def test_bfloat16_and_strided_input() -> None:
    x = torch.randn(64, 48).to(torch.bfloat16)
    form = NF4((48, 64), 64)
    assert torch.equal(round_trip(x.T, form), round_trip(x.T.contiguous().float(), form))
    assert form.decode(form.encode(x.T), form.tables(CPU), torch.bfloat16).dtype == torch.bfloat16


def test_plain() -> None:
    form = Plain((3, 5), torch.bfloat16)
    stored = form.encode(torch.randn(3, 5))
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == form.parts()
    assert form.nbytes == 30


@pytest.mark.parametrize("block", [63, 65, 0, 8, 8192, 96, 64.0, True, "64"])
def test_blocks_that_there_are_not(block: object) -> None:
    with pytest.raises(OptionError, match=r"block=.*power of two from 16 to 4096"):
        check_block(block)


@pytest.mark.parametrize("double", [False, True])
def test_equal_to_bitsandbytes(double: bool) -> None:
    """Codes and scales give the same bits; 8-bit scales are decoded in another order of operations."""
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(128, 192)
    code, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=double)
    theirs, ours = functional.dequantize_4bit(code, state), round_trip(x, NF4((128, 192), 64, double))
    assert (ours - theirs).abs().max() <= (1e-6 if double else 0)
