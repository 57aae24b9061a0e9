"""``lowmem plan``: what is planned from few layers is what more layers, and a real compile, keep and peak at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lowmem_compile.cli import app
from lowmem_compile.demo.measure import resident_tensors, saved_bytes
from lowmem_compile.memory_plan.depth import Stack, deepened, deviation
from lowmem_compile.memory_plan.page import render_plan
from lowmem_compile.memory_plan.result import MemoryPlan
from lowmem_compile.memory_plan.subject import Subject, stack_of, subject_of
from lowmem_compile.memory_plan.trace import Setting, Trace, trace
from tests.memory_plan.tiny import CONFIG

pytest.importorskip("transformers")

BATCH, LENGTH = 2, 128


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(CONFIG), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def subject(path: Path) -> Subject:
    return subject_of(str(path))


@pytest.fixture(scope="module")
def three(subject: Subject) -> Trace:
    return trace(subject.make(3, BATCH, LENGTH), Setting("fp32", budgets=(0.25,), device="cpu", part=True))


def stack(subject: Subject) -> Stack:
    model = subject.make(3, 1, 8).model
    name = stack_of(model, 3)
    assert name == "model.layers"
    return Stack(name, sum(p.numel() * 4 for p in model.get_submodule(name)[1].parameters()))  # type: ignore[index]


def test_nothing_is_allocated(subject: Subject) -> None:
    assert subject.depth == 6
    assert all(p.is_meta for p in subject.make(None, 1, 8).model.parameters())


def test_three_layers_foretell_five(subject: Subject, three: Trace) -> None:
    five = trace(subject.make(5, BATCH, LENGTH), Setting("fp32", budgets=(), device="cpu"))
    for name in ("eager", "inductor", "lowmem"):
        off = deviation(deepened(three.runs[name], stack(subject), 5), five.runs[name])
        assert off.saved == 0
        assert abs(off.peak) <= 0.05 * five.runs[name].peak
        assert deepened(three.runs[name], stack(subject), 3) == three.runs[name]
    assert five.runs["lowmem"].saved_bytes < 0.6 * five.runs["inductor"].saved_bytes


def test_a_budget_is_kept(three: Trace) -> None:
    assert not three.refused
    share = three.runs["lowmem 0.25"].saved_bytes / three.runs["inductor"].saved_bytes
    assert 0.15 < share <= 0.25
    assert 0 < (three.runs["lowmem 0.25"].error or 0) < 0.05


@pytest.mark.e2e
@pytest.mark.slow
def test_the_plan_keeps_what_a_compile_keeps(subject: Subject) -> None:
    """Saved bytes to the byte, for lowmem and for Inductor."""
    import transformers

    planned = trace(subject.make(2, 4, LENGTH), Setting("fp32", budgets=(), device="cpu"))
    config = transformers.LlamaConfig(**{**CONFIG, "num_hidden_layers": 2, "use_cache": False})
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(0, 256, (4, LENGTH))
    for name in ("lowmem", "inductor"):
        compiled = torch.compile(model, backend=name)

        def loss(call: Any = compiled) -> torch.Tensor:
            out: torch.Tensor = call(input_ids=ids, labels=ids).loss
            return out

        loss().backward()
        model.zero_grad()
        kept = saved_bytes(loss, exclude=resident_tensors(model, [ids]))
        model.zero_grad()
        assert planned.runs[name].saved_bytes == kept.total


def test_the_command(path: Path, tmp_path: Path) -> None:
    data, page = tmp_path / "plan.json", tmp_path / "plan.html"
    arguments = [
        "plan",
        str(path),
        "--batch",
        "2",
        "--sequence",
        "128",
        "--card",
        "8MiB",
        "--reserve",
        "1MiB",
        "--budget",
        "0.25",
    ]
    result = CliRunner().invoke(app, [*arguments, "--json", str(data), "--html", str(page)], catch_exceptions=False)
    assert result.exit_code == 0
    plan = MemoryPlan.from_json(data.read_text(encoding="utf-8"))
    assert [c.name for c in plan.contenders] == ["eager", "inductor", "lowmem", "lowmem 0.25"]
    assert plan.weights == 2 * plan.parameters + 2 * 2 * 8  # and the two buffers of the rotary embedding, in bfloat16
    assert plan.optimizer_state == 4 * plan.parameters
    lowmem, eager = plan.contender("lowmem"), plan.contender("eager")
    assert lowmem.total == plan.weights + plan.optimizer_state + max(lowmem.peak, plan.gradients)
    assert lowmem.saved_off == 0
    assert sum(lowmem.by_kind.values()) == sum(lowmem.by_layer.values()) == lowmem.saved
    assert sum(1 for layer in lowmem.by_layer if layer.startswith("model.layers.")) == 6
    assert lowmem.largest_batch is not None
    assert eager.largest_batch is not None
    assert lowmem.largest_batch.size > eager.largest_batch.size > 0
    text = page.read_text(encoding="utf-8")
    assert text == render_plan(plan)
    assert text.count("<svg") == 2
    assert "lowmem, budget 0.25" in text
    assert "lowmem" in result.output
