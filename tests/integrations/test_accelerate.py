"""``register()`` and ``torch_compile_backend="lowmem"``, in processes of their own: it changes Accelerate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REGISTER = """
import copy, pickle
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
import lowmem_compile.integrations.accelerate as adapter

try:
    TorchDynamoPlugin(backend="lowmem")
    raise SystemExit("Accelerate knows lowmem by itself: register() can go")
except ValueError:
    pass
before = list(DynamoBackend)
adapter.register()
adapter.register()
assert list(DynamoBackend) == [*before, DynamoBackend.LOWMEM], list(DynamoBackend)
assert DynamoBackend("LOWMEM") is DynamoBackend["LOWMEM"] is DynamoBackend.LOWMEM
assert "LOWMEM" in DynamoBackend and str(DynamoBackend.LOWMEM) == "LOWMEM"
member = DynamoBackend.LOWMEM
assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
plugin = TorchDynamoPlugin(backend="lowmem", options={"gradients": "exact"})
assert plugin.to_kwargs() == {"backend": "lowmem", "options": {"gradients": "exact"}}, plugin.to_kwargs()
try:
    TorchDynamoPlugin(backend="lowmemory")
    raise SystemExit("any name is accepted")
except ValueError:
    pass
"""

TRAIN = """
import sys
import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments
from lowmem_compile.api import report
from lowmem_compile.integrations.accelerate import register

register()
config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=16)
model = BertForMaskedLM(config)
names = list(model.state_dict())
ids = torch.randint(2, 64, (4, 8))
args = TrainingArguments(output_dir=sys.argv[1], torch_compile_backend="lowmem", max_steps=2, report_to=[],
                         per_device_train_batch_size=2, use_cpu=True, save_strategy="no", disable_tqdm=True)
trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": i, "labels": i} for i in ids])
trainer.train()
assert "training" in [g.mode for g in report(model).graphs]
trainer.save_model(sys.argv[1])
assert list(BertForMaskedLM.from_pretrained(sys.argv[1]).state_dict()) == names
"""


def run(program: str, *arguments: str) -> None:
    """Run a program in a new process; its errors are the test's."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_register_adds_one_member() -> None:
    run(REGISTER)


@pytest.mark.e2e
def test_trainer_argument(tmp_path: Path) -> None:
    run(TRAIN, str(tmp_path))
