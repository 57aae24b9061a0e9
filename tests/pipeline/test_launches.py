"""Which kernels share a launch: the choice on schedules made by hand, and the form of the codes that makes it possible."""

from __future__ import annotations

import pickle

import pytest
import torch

from lowmem_compile._torch import MIXED_READS, inductor_config
from lowmem_compile.fusing import SCHEDULER_PASS, settings_for_codes, shares_launches
from lowmem_compile.kernels.group_codes import behind, codec_named, encode_runs, in_memory
from lowmem_compile.launches import MOST, ShareLaunches, Unit, is_ordered, peak, shared
from lowmem_compile.options import Options


def unit(name: str, reads: str, writes: str, size: int = 100, *, host: bool = False, guest: bool = False) -> Unit:
    return Unit(name, frozenset(reads.split()), dict.fromkeys(writes.split(), size), may_host=host or guest, may_move=guest)


def names(groups: list[list[Unit]]) -> list[list[str]]:
    return [[u.node for u in g] for g in groups]


def test_encodes_wait_for_a_host() -> None:
    """q is read by the attention too; its codes are only results of the graph, so they are made where the activation is."""
    units = [
        unit("mm q", "x", "q"),
        unit("encode q", "q", "cq", 10, guest=True),
        unit("attention", "q", "o"),
        unit("encode o", "o", "co", 10, guest=True),
        unit("mm up", "o", "h"),
        unit("gelu", "h", "y", host=True),
        unit("mm down", "y", "z", 1000),
    ]
    groups = shared(units, {}, frozenset({"cq", "co", "z"}))
    assert names(groups) == [["mm q"], ["attention"], ["mm up"], ["encode o", "encode q", "gelu"], ["mm down"]]


def test_decodes_come_early() -> None:
    units = [
        unit("mm a", "g", "da"),
        unit("gelu backward", "da", "db", host=True),
        unit("mm b", "db", "dc", 500),
        unit("decode q", "codes", "q", guest=True),
        unit("attention backward", "dc q", "dq", 500),
    ]
    groups = shared(units, {"codes": 30}, frozenset({"dq"}))
    assert names(groups) == [["mm a"], ["decode q", "gelu backward"], ["mm b"], ["attention backward"]]


def test_the_peak_bounds_what_waits() -> None:
    """A large tensor does not wait for a host where everything else is largest."""
    units = [
        unit("mm q", "x", "q", 1000),
        unit("encode q", "q", "cq", 10, guest=True),
        unit("mm up", "x", "h", 1000),
        unit("gelu", "h", "y", 1000, host=True),
        unit("mm down", "y", "z"),
    ]
    results = frozenset({"cq", "z"})
    assert names(shared(units, {}, results)) == [[u.node] for u in units]
    assert peak([[u] for u in units], {}, results) == 2010
    small = [unit("mm q", "x", "q", 10), *units[1:]]
    assert ["encode q", "gelu"] in names(shared(small, {}, results))


def test_nothing_moves_past_what_it_needs() -> None:
    units = [
        unit("encode", "x", "c", 10, guest=True),
        unit("reads it", "c", "d", host=True),
        unit("add", "x", "y", host=True),
    ]
    groups = shared(units, {}, frozenset({"d", "y"}))
    assert is_ordered(groups)
    assert names(groups) == [["encode"], ["reads it"], ["add"]]  # neither with its reader nor behind it
    assert not is_ordered([units[:2]])
    assert not is_ordered([[units[1]], [units[0]]])


def test_guests_without_a_host_share_a_launch() -> None:
    guests = [unit(f"encode {i}", "x", f"c{i}", 1, guest=True) for i in range(MOST + 2)]
    groups = shared([unit("mm", "w", "x"), *guests, unit("mm 2", "x", "z")], {}, frozenset({g for u in guests for g in u.writes}))
    assert is_ordered(groups)
    assert max(map(len, groups)) <= MOST
    assert len(groups) < 2 + len(guests)


def test_the_peak_counts_what_lives() -> None:
    """Inputs live until their last reader, results to the end."""
    a, b, c = unit("a", "i", "a", 4), unit("b", "a", "b", 8), unit("c", "b", "c", 2)
    assert peak([[a], [b], [c]], {"i": 16}, frozenset({"c"})) == 16 + 4
    assert peak([[a], [b], [c]], {}, frozenset({"a", "c"})) == 4 + 8 + 2
    assert peak([], {}, frozenset()) == 0


def test_the_hook_is_part_of_the_cache_key() -> None:
    assert ShareLaunches("one").uuid() == "one"
    assert pickle.dumps(ShareLaunches("one")) != pickle.dumps(ShareLaunches("two"))
    assert ShareLaunches("one")([]) == []


def test_a_scheduler_pass_of_the_user_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_compile.fusing.runs_triton", lambda device: device == "cuda")
    assert shares_launches(Options(launches="shared"), "cuda")
    assert not shares_launches(Options(launches="shared"), "cpu")
    assert not shares_launches(Options(launches="own"), "cuda")
    assert not shares_launches(Options(launches="shared", inductor={SCHEDULER_PASS: lambda nodes: nodes}), "cuda")


@pytest.mark.parametrize("width", [1, 3, 64, 77, 300])
def test_codes_run_by_run_are_the_codes(width: int) -> None:
    x = torch.randn(2, 5, width).bfloat16()
    x[0, 1], x[1, 2, 0], x[0, 3, -1] = 0.0, torch.inf, torch.nan
    for bits in (3, 4, 5, 6, 7, 8, 10):
        for keep in (False, True):
            codec = codec_named(f"int{bits}", keep_zero=keep)
            for got, want in zip(encode_runs(codec, x), codec.encode(x), strict=True):
                assert got.shape == want.shape
                assert got.dtype == want.dtype
                assert torch.equal(got.nan_to_num(nan=-7), want.nan_to_num(nan=-7))


def test_codes_run_by_run_need_codes() -> None:
    with pytest.raises(ValueError, match="no runs"):
        encode_runs(codec_named("bf16"), torch.randn(2, 64))


def test_opcheck() -> None:
    x = torch.randn(3, 4)
    torch.library.opcheck(in_memory, (x,))
    torch.library.opcheck(behind, ([x[:, None], x[:, None]],))


def test_codes_count_as_one_tensor_in_a_norm_s_gradient() -> None:
    """On a GPU its kernel may read three tensors more than Inductor allows; no limit stays none, and a CPU has no such kernel."""
    assert settings_for_codes("cpu") == {}
    if not settings_for_codes("cuda"):
        pytest.skip("no Triton")
    with inductor_config.patch({MIXED_READS: 10}):
        assert settings_for_codes("cuda") == {MIXED_READS: 13}
    with inductor_config.patch({MIXED_READS: 0}):
        assert settings_for_codes("cuda") == {}
