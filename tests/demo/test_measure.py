"""Saved and peak bytes against cases counted by hand: N x D = 1024 x 256 float32, 1 MiB a tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem_compile.demo.measure import _running_total, peak_bytes, resident_tensors, saved_bytes

MIB = 2**20
N, D = 1024, 256


def _input() -> Tensor:
    return torch.randn(N, D)


def _weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(D, D) / 16)


def test_saved_counts_intermediates_but_neither_parameters_nor_inputs() -> None:
    x, w = _input().requires_grad_(), _weight()

    def forward() -> Tensor:
        h = x @ w  # saves x and w, both excluded
        return h.exp().sin().sum()  # exp saves its output, sin its input: one storage

    kept = saved_bytes(forward, exclude=[x, w])
    assert kept.total == MIB
    assert [(s.shape, s.dtype, s.nbytes) for s in kept.storages] == [((N, D), "float32", MIB)]
    assert saved_bytes(forward, exclude=[x]).total == MIB + D * D * 4
    assert saved_bytes(forward, exclude=[]).total == 2 * MIB + D * D * 4


def test_views_of_one_storage_count_once_and_in_full() -> None:
    w = nn.Parameter(_input())

    def forward() -> Tensor:
        h = w.exp()  # saved by exp
        return h[:8].square().sum() + h.t().square().sum()  # two views of it saved by square

    assert saved_bytes(forward, exclude=[w]).total == MIB

    def slice_only() -> Tensor:
        return (w * 2)[:8].square().sum()  # 8 rows of a 1 MiB storage that stays alive

    assert saved_bytes(slice_only, exclude=[w]).total == MIB


def test_equal_values_in_different_storages_count_each() -> None:
    w = nn.Parameter(_input())
    kept = saved_bytes(lambda: (w * 2).sin().sum() + (w * 2).sin().sum(), exclude=[w])
    assert kept.total == 2 * MIB


def test_outputs_are_told_apart() -> None:
    w = nn.Parameter(_input())

    def forward() -> tuple[Tensor, Tensor]:
        out = w.exp()
        return out.sin().sin().sum(), out

    kept = saved_bytes(forward, exclude=[w], outputs=lambda result: result)
    assert (kept.total, kept.intermediate) == (2 * MIB, MIB)


def test_tensors_kept_on_a_context_without_save_for_backward_count() -> None:
    class Stash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            ctx.stash = [x + 1]  # type: ignore[attr-defined]
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * 2

    w = nn.Parameter(_input())
    assert saved_bytes(lambda: Stash.apply(w).sum(), exclude=[w]).total == MIB  # type: ignore[no-untyped-call]


def test_checkpointing_keeps_only_the_inputs_of_the_region() -> None:
    x, w = _input(), _weight()

    def region(h: Tensor) -> Tensor:
        return h.exp().sin().cos()

    def forward() -> Tensor:
        out: Tensor = checkpoint(region, x @ w, use_reentrant=False)
        return out.sum()

    assert saved_bytes(forward, exclude=[x, w]).total == MIB
    assert saved_bytes(lambda: region(x @ w).sum(), exclude=[x, w]).total == 2 * MIB


def test_resident_tensors_are_parameters_buffers_and_inputs() -> None:
    model = nn.BatchNorm1d(4)
    x = torch.zeros(2, 4)
    assert {t.data_ptr() for t in resident_tensors(model, [x])} >= {
        model.weight.data_ptr(),
        model.running_mean.data_ptr(),  # type: ignore[union-attr]
        x.data_ptr(),
    }


def test_peak_of_a_chain_counted_by_hand() -> None:
    w = nn.Parameter(_input())

    def forward() -> Tensor:
        return w.exp().sin().sum()

    forward().backward()
    w.grad = None
    peak = peak_bytes(forward)
    # Forward: e = exp(w) is kept; s = sin(e) dies after the sum; the loss takes 4 bytes.
    assert peak.after_forward == MIB + 4
    # Backward: e, cos(e) and the product of cos(e) with the (expanded, 4-byte) gradient; then e, that product
    # and its product with e, which becomes w.grad.
    assert 3 * MIB <= peak.peak <= 3 * MIB + 64
    # w.grad and the loss stay.
    assert MIB + 4 <= peak.end <= MIB + 64


def test_peak_sees_what_saved_bytes_cannot() -> None:
    w = nn.Parameter(_input())

    def wide() -> Tensor:
        return torch.cat([w.detach()] * 8).sum() + w.sum()

    assert saved_bytes(wide, exclude=[w]).total == 0
    assert 8 * MIB <= peak_bytes(wide).peak <= 8 * MIB + 64


def test_after_forward_equals_saved_bytes() -> None:
    x, model = _input(), nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D), nn.Linear(D, D))

    def forward() -> Tensor:
        out: Tensor = model(x)
        return out.square().sum()

    kept = saved_bytes(forward, exclude=resident_tensors(model, [x]))
    assert peak_bytes(forward).after_forward == kept.total + 4  # and the loss


def test_running_total_keeps_the_order_of_equal_times() -> None:
    total = _running_total([(1, 10), (2, -10), (2, 30), (3, -5)], middle=2)
    assert (total.peak, total.after_forward, total.end) == (30, 30, 25)


def test_profiler_noise_is_dropped_and_the_rest_passed_on(capfd: object) -> None:
    import os

    from lowmem_compile.demo.measure import _without_profiler_noise

    with _without_profiler_noise():
        os.write(2, b"USDT: started\na warning\n")
    assert capfd.readouterr().err == "a warning\n"  # type: ignore[attr-defined]
