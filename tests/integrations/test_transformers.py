"""Training with transformers.Trainer and LowMemCallback, most of it without code generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lowmem_compile import backend
from lowmem_compile._torch import compile_fx
from lowmem_compile.api import report
from lowmem_compile.errors import OptionError
from lowmem_compile.integrations.transformers import LowMemCallback

LENGTH = 12
EXACT = {"gradients": "exact", "strict": True}


def build() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            use_cache=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = [torch.randint(2, 64, (LENGTH,), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in found]


def trainer(folder: Path, callback: LowMemCallback | None, model: nn.Module | None = None, **arguments: Any) -> Trainer:
    """Four steps of SGD on two rows each."""
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 3,
        **arguments,
    }
    return Trainer(
        model=build() if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=rows(8),
        eval_dataset=rows(2),
        callbacks=[] if callback is None else [callback],
    )


def losses(done: Trainer) -> list[float]:
    """The training loss of every step."""
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    assert list(got) == list(want)
    far = {k: (got[k] - want[k]).abs().max().item() for k in want if not torch.allclose(got[k], want[k], 0, tolerance)}
    assert far == {}


@pytest.fixture
def as_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend run the graphs operation by operation in place of generating code."""

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        def run(args: list[Any]) -> Any:
            return gm.forward(*args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def without_code(gm: fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Any:
        return compile_fx(gm, example_inputs, **{"inner_compile": capture, **kwargs})

    monkeypatch.setattr(backend, "compile_fx", without_code)


@pytest.mark.usefixtures("as_captured")
def test_same_weights_as_without(tmp_path: Path) -> None:
    eager = trainer(tmp_path / "eager", None)
    eager.train()
    ours = trainer(tmp_path / "ours", LowMemCallback(EXACT))
    ours.train()
    assert [g.mode for g in report(ours.model).graphs] == ["training"]
    assert losses(ours) == pytest.approx(losses(eager), rel=1e-4)
    assert_close(weights(ours.model), weights(eager.model), 1e-5)


@pytest.mark.usefixtures("as_captured")
def test_model_is_left_as_found(tmp_path: Path) -> None:
    model: Any = build()
    names = list(model.state_dict())
    ours = trainer(tmp_path, LowMemCallback(EXACT), model, max_steps=1)
    ours.train()
    assert model._compiled_call_impl is None
    assert list(model.state_dict()) == names
    graphs = len(report().graphs)
    model.eval()
    prompt = rows(1)[0]["input_ids"][None]
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, LENGTH + 4)
    assert len(report().graphs) == graphs
    assert ours.model is model


@pytest.mark.usefixtures("as_captured")
def test_checkpoint_resumes_with_and_without(tmp_path: Path) -> None:
    """A run that stops after two steps and goes on, either way, ends where an uninterrupted one does."""
    whole = trainer(tmp_path / "whole", LowMemCallback(EXACT), save_strategy="steps", save_steps=2)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    saved = LlamaForCausalLM.from_pretrained(checkpoint)
    assert list(saved.state_dict()) == list(build().state_dict())
    for name, callback in (("eager", None), ("ours", LowMemCallback(EXACT))):
        resumed = trainer(tmp_path / name, callback)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-4)
        assert_close(weights(resumed.model), weights(whole.model), 1e-5)


@pytest.mark.usefixtures("as_captured")
def test_eager_checkpoint_continues_in_lowmem(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", None, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(tmp_path / "ours", LowMemCallback(EXACT))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_close(weights(resumed.model), weights(whole.model), 1e-5)
    resumed.save_model(str(tmp_path / "final"))
    assert_close(weights(LlamaForCausalLM.from_pretrained(tmp_path / "final")), weights(resumed.model), 0.0)


@pytest.mark.usefixtures("as_captured")
def test_autocast_with_evaluation(tmp_path: Path) -> None:
    """bf16=True, an evaluation in the middle and one after training, default options."""
    how: dict[str, Any] = {"bf16": True, "eval_strategy": "steps", "eval_steps": 2}
    eager = trainer(tmp_path / "eager", None, **how)
    ours = trainer(tmp_path / "ours", LowMemCallback({"strict": True}), **how)
    eager.train()
    ours.train()
    assert sorted(g.mode for g in report(ours.model).graphs) == ["inference", "training"]
    evaluations = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (ours, eager)]
    assert len(evaluations[0]) == 2
    assert evaluations[0] == pytest.approx(evaluations[1], rel=5e-3)
    assert ours.evaluate()["eval_loss"] == pytest.approx(eager.evaluate()["eval_loss"], rel=5e-3)


@pytest.mark.usefixtures("as_captured")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    how: dict[str, Any] = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        "max_steps": 2,
    }
    eager = trainer(tmp_path / "eager", None, **how)
    ours = trainer(tmp_path / "ours", LowMemCallback(EXACT), **how)
    eager.train()
    ours.train()
    assert_close(weights(ours.model), weights(eager.model), 1e-5)


def test_unknown_option_is_refused_at_once() -> None:
    with pytest.raises(OptionError, match="gradient"):
        LowMemCallback({"gradient": "exact"})


def test_compiling_twice_is_refused(tmp_path: Path) -> None:
    twice = trainer(tmp_path, LowMemCallback(), torch_compile=True)
    with pytest.raises(OptionError, match="leave one of them out"):
        twice.train()


@pytest.mark.e2e
def test_generated_code_trains(tmp_path: Path) -> None:
    eager = trainer(tmp_path / "eager", None, max_steps=2)
    ours = trainer(tmp_path / "ours", LowMemCallback(EXACT), max_steps=2)
    eager.train()
    ours.train()
    assert losses(ours) == pytest.approx(losses(eager), rel=1e-4)
    assert_close(weights(ours.model), weights(eager.model), 1e-5)
