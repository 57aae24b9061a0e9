"""The parts of ``lowmem plan`` that need no trace: optimizer state, cards, the search, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lowmem_compile.errors import LowMemError, OptionError
from lowmem_compile.memory_plan.cards import GIB, card_bytes
from lowmem_compile.memory_plan.depth import IrregularError, Stack, deepened
from lowmem_compile.memory_plan.fixed import OptimizerSpec, fixed_bytes
from lowmem_compile.memory_plan.search import largest_size, line_of
from lowmem_compile.memory_plan.subject import Adaptation, stack_of, subject_of
from lowmem_compile.memory_plan.trace import Run, joined
from lowmem_compile.reporting.model import SavedTensor, TimelinePoint

MIB = 1 << 20


def llama_1b() -> tuple[nn.Module, str]:
    subject = subject_of("llama-1b")
    model = subject.make(None, 1, 8).model.to(torch.bfloat16)
    assert subject.depth == 24
    name = stack_of(model, 24)
    assert name is not None
    return model, name


def test_optimizer_state_of_llama_1b_as_published() -> None:
    """COAP's table: 5108.2 MiB with AdamW, 1988.34 MiB at rank 512 (-61 %); in 8 bits -80 % (its -81 % is LLaVA-7B's)."""
    pytest.importorskip("transformers")
    model, stack = llama_1b()
    adamw = fixed_bytes(model, stack, OptimizerSpec("adamw"))
    coap = fixed_bytes(model, stack, OptimizerSpec("coap", 512))
    eight = fixed_bytes(model, stack, OptimizerSpec("coap", 512, {"bits": 8, "projector_bits": 8}))
    assert adamw.state / MIB == pytest.approx(5108.2, rel=1e-4)
    assert coap.state / MIB == pytest.approx(1988.34, rel=1e-5)
    assert round(100 * (coap.state / coap.adamw - 1)) == -61
    assert round(100 * (eight.state / coap.adamw - 1), 1) == -80.2


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-7b", 6.738),
        ("llama-13b", 13.016),
        ("llama3-8b", 8.030),
        ("qwen3-8b", 8.191),
        ("mistral-7b", 7.242),
        ("vit-l", 0.3043),
    ],
)
def test_models_have_their_published_size(name: str, billions: float) -> None:
    pytest.importorskip("transformers")
    model = subject_of(name).make(None, 1, 8).model
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_plain_optimizers() -> None:
    model = nn.Linear(128, 64, bias=False, device="meta")
    numel = 128 * 64
    state = {name: fixed_bytes(model, None, OptimizerSpec(name)).state for name in ("sgd", "momentum", "adamw", "adamw-8bit")}
    assert state == {"sgd": 0, "momentum": 4 * numel, "adamw": 8 * numel, "adamw-8bit": 2 * numel + 8 * numel // 256}
    assert fixed_bytes(model, None, OptimizerSpec("adamw-foreach")).scratch == 4 * numel
    model.weight.requires_grad_(False)
    assert fixed_bytes(model, None, OptimizerSpec("adamw")).state == 0


def test_cards() -> None:
    assert card_bytes("H100") == 80 * GIB
    assert card_bytes("24GiB") == 24 * GIB
    with pytest.raises(OptionError, match="h100"):
        card_bytes("h1000")


def test_errors_say_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="llama-7b"):
        subject_of("lama-7b")
    with pytest.raises(OptionError, match="--rank"):
        OptimizerSpec("coap")
    with pytest.raises(OptionError, match="coap"):
        OptimizerSpec("adamw", rank=8)
    with pytest.raises(OptionError, match="adamw-8bit"):
        OptimizerSpec("adam9")
    with pytest.raises(OptionError, match="qv"):
        Adaptation(lora="q")
    with pytest.raises(OptionError, match="same linears"):
        Adaptation(lora="qv", loqt=8)
    with pytest.raises(LowMemError, match="cannot be imported"):
        subject_of("no_such_module:f")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(LowMemError, match="architectures"):
        subject_of(str(tmp_path))


def test_search() -> None:
    assert largest_size(lambda size: 10 * size, 95, range(1, 100)) == 9
    assert largest_size(lambda size: 10 * size, 9, range(1, 100)) == 0
    assert largest_size(lambda size: size, 300, range(64, 513, 64)) == 256


def run_of(forward: list[int], backward: list[int], saved: int = 0) -> Run:
    row = SavedTensor("x", "mm", (saved,), "int8", saved, "", "", "activation", "exact")
    return Run(
        (row,),
        tuple(TimelinePoint("", "forward", n) for n in forward),
        tuple(TimelinePoint("", "backward", n) for n in backward),
    )


def test_the_peak_between_two_sizes_is_that_of_the_kernels() -> None:
    """One kernel's memory grows with the batch, another's does not: the peak is neither's alone."""
    line = line_of(run_of([10], [100]), 1, run_of([50], [100]), 5)
    assert [line.peak(size) for size in (1, 5, 10, 20)] == [100, 100, 100, 200]


def test_graphs_of_one_step_lie_on_top_of_each_other() -> None:
    both = joined([run_of([5, 8], [9, 2], saved=8), run_of([3, 4], [6, 1], saved=4)])
    assert [p.live_bytes for p in both.forward] == [5, 8, 11, 12]
    assert [p.live_bytes for p in both.backward] == [14, 9, 10, 3]
    assert both.saved_bytes == 12


def test_layers_that_do_not_follow_one_another_are_not_repeated() -> None:
    with pytest.raises(IrregularError):
        deepened(run_of([1, 2, 3], [3, 2, 1], saved=1), Stack("layers", 0), 5)


def test_a_list_of_layers_alike_is_found_by_its_length() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(4, 4)])
    assert stack_of(model, 3) == "blocks"
    assert stack_of(model, 4) is None
