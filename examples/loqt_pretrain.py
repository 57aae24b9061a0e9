"""Pre-train a small LLaMA from scratch with LoQT: 4-bit weights, a frozen 4-bit projector, a trained low-rank factor.

    pip install "lowmem[hf]"; python examples/loqt_pretrain.py
    python examples/loqt_pretrain.py --backend lowmem --steps 400       # compiled: x P is kept in place of x

Shows what each layer holds, trains with merges on the language reference that comes with Python (as bytes), stops in the middle
and goes on from a checkpoint, and at the end exports a plain model that loads into the original class.
"""

from __future__ import annotations

import functools
import io
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import lowmem_compile
from lowmem_compile.demo.data import corpus
from lowmem_compile.optim.loqt import AdamW, LoQT

ROWS, LENGTH, RANK = 8, 64, 16


def start(steps: int) -> tuple[LlamaForCausalLM, LoQT, AdamW]:
    """A model with random weights under LoQT, and its optimizer: 8-bit moments of all that is trained."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    training = lowmem_compile.loqt(
        model, RANK, include=["*self_attn*", "*mlp*"], double_quantise=True, interval=max(steps // 5, 1)
    )
    return model, training, AdamW(training.parameters(), lr=1e-2, bits=8)


def batch(text: Tensor, step: int) -> Tensor:
    """Windows of the text that depend on the step alone, int64 [ROWS, LENGTH]."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - LENGTH, (ROWS,), generator=generator)
    return torch.stack([text[s : s + LENGTH] for s in starts.tolist()])


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross entropy of the next byte."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def main(steps: int = 100, backend: Annotated[str, typer.Option(help="eager, or lowmem to compile")] = "eager") -> None:
    """Train, interrupt, resume, export."""
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(corpus().encode()), dtype=torch.uint8).long()
    model, training, optimizer = start(steps)
    print(training.report(bits=8))
    saved = io.BytesIO()
    for part in (range(steps // 2), range(steps // 2, steps)):
        if part.start:  # as after a crash: everything anew, and the state from the checkpoint
            model, training, optimizer = start(steps)
            saved.seek(0)
            states = torch.load(saved, weights_only=True)
            targets: list[Any] = [model, training, optimizer]
            for target, state in zip(targets, states, strict=True):
                target.load_state_dict(state)
        if backend != "eager":
            model.compile(backend=backend)
        bar = tqdm(part, initial=part.start, total=steps, desc="training", mininterval=1)
        for step in bar:
            ids = batch(text, step)
            if training.before_step(functools.partial(loss_of, model, ids)):
                assert training.last is not None
                worst = max(training.last.errors.values())
                tqdm.write(f"step {step}: merge, loss {training.last.loss:.3f}, largest error of a weight {worst:.1%}")
            loss = loss_of(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.close()
        torch.save([model.state_dict(), training.state_dict(), optimizer.state_dict()], saved)

    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(training.merge_and_export().state_dict())
    ids = batch(text, steps)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        ours, theirs = loss_of(model, ids), loss_of(plain, ids)
    print(f"next batch: loss {ours:.4f} under LoQT, {theirs:.4f} in the exported model")


if __name__ == "__main__":
    typer.run(main)
