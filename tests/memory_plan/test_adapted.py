"""``lowmem plan --loqt`` and ``--fused-backward``: bytes of quantised weights, and gradients that do not stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lowmem_compile
from lowmem_compile.cli import app
from lowmem_compile.errors import OptionError
from lowmem_compile.memory_plan.depth import Stack, deepened
from lowmem_compile.memory_plan.fixed import OptimizerSpec, fixed_bytes, in_dtype
from lowmem_compile.memory_plan.result import MemoryPlan
from lowmem_compile.memory_plan.subject import Adaptation, Subject, subject_of
from lowmem_compile.memory_plan.trace import Setting, Trace, trace
from tests.memory_plan.tiny import CONFIG

transformers = pytest.importorskip("transformers")

BATCH, LENGTH, RANK = 2, 64, 16


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def subject(path: str) -> Subject:
    return subject_of(path, Adaptation(loqt=RANK))


@pytest.fixture(scope="module")
def steps(subject: Subject) -> dict[bool, Trace]:
    """Traces of three layers, by whether the optimizer steps inside the backward pass."""
    return {
        fused: trace(subject.make(3, BATCH, LENGTH), Setting("bf16", budgets=(), part=True, fused_backward=fused))
        for fused in (False, True)
    }


def merged_model() -> torch.nn.Module:
    """The same model with real weights, after a first merge."""
    model: torch.nn.Module = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k[0] != "a" or "heads" in k})
    )
    model = model.to(torch.bfloat16)
    training = lowmem_compile.loqt(model, RANK, include=["model.layers.*"], double_quantise=True)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    training.merge(lambda: model(input_ids=tokens, labels=tokens).loss)
    return model


def test_weights_are_those_of_a_merged_model(subject: Subject) -> None:
    planned = fixed_bytes(in_dtype(subject.make(None, 1, 8).model, "bf16"), "model.layers", OptimizerSpec("adamw"))
    real = fixed_bytes(merged_model(), "model.layers", OptimizerSpec("adamw"))
    assert planned == real
    plain = fixed_bytes(in_dtype(subject_of(subject.name).make(None, 1, 8).model, "bf16"), None, OptimizerSpec("adamw"))
    assert planned.gradients < 0.6 * plain.gradients


def test_gradients_stay_unless_the_step_is_in_the_backward_pass(subject: Subject, steps: dict[bool, Trace]) -> None:
    stays, goes = steps[False].runs, steps[True].runs
    model = in_dtype(subject.make(3, 1, 8).model, "bf16")
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert stays["lowmem"].backward[-1].live_bytes == gradients
    assert goes["lowmem"].backward[-1].live_bytes == 0
    assert goes["lowmem"].peak <= stays["lowmem"].peak
    assert goes["lowmem"].saved_bytes == stays["lowmem"].saved_bytes
    assert goes["inductor"] == stays["inductor"]  # an ordinary compile hands all gradients over at its end


def test_repeated_layers_add_no_gradients(steps: dict[bool, Trace]) -> None:
    stack = Stack("model.layers", 1 << 20)
    for fused, more in ((False, 5 << 20), (True, 0)):
        run = steps[fused].runs["lowmem"]
        assert deepened(run, stack, 8).backward[-1].live_bytes == run.backward[-1].live_bytes + more


def test_a_rank_that_saves_nothing_is_refused(path: str) -> None:
    with pytest.raises(OptionError, match="rank=64"):
        subject_of(path, Adaptation(loqt=64)).make(2, 1, 8)


def test_the_command_counts_no_step_behind_the_pass(tmp_path: Path) -> None:
    config, out = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps({**CONFIG, "num_hidden_layers": 1}), encoding="utf-8")
    line = f"plan {config} --batch 1 --sequence 8 --loqt {RANK} --fused-backward --json {out}"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    plan = MemoryPlan.from_json(out.read_text(encoding="utf-8"))
    runs = {c.name: c for c in plan.contenders}
    resident = plan.weights + plan.optimizer_state
    assert runs["inductor"].total >= resident + plan.gradients
    assert runs["lowmem"].total == resident + runs["lowmem"].peak < resident + plan.gradients
    assert "LoQT, rank 16" in plan.title
    assert any("--fused-backward" in note for note in plan.notes)
