"""Pre-training with COAP: a LLaMA of one layer learns Python's help pages byte by byte, its gradients computed in projected form.

    pip install "lowmem[hf]"; python examples/pretrain_coap.py

Model and loop are the usual ones. `split` sorts the parameters, COAP keeps its state for the projections alone, and the
compiled backward pass computes these projections and never a whole gradient of a projected weight. `refresh_in_backward`
holds this for the steps that make a basis too: they have one whole gradient at a time.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lowmem_compile
from lowmem_compile import optim

STEPS, ROWS, LENGTH = 24, 8, 64
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=LENGTH,
    use_cache=False,
)


def main() -> None:
    """Train for a few steps; print the loss, what the optimizer keeps, and what the compiler did about gradients."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    text = torch.tensor(list("\n".join(topics.values()).encode()), dtype=torch.int64)

    groups = optim.split(model, rank=24, include=["*attn*", "*mlp*"], side="input").groups
    optimizer = optim.COAP(groups, lr=1e-2, update_interval=10, refresh_in_backward=True)
    print(optim.report(optimizer))

    model.train()
    model.compile(backend="lowmem")
    for step in range(STEPS):
        starts = torch.randint(0, len(text) - LENGTH, (ROWS,))
        batch = torch.stack([text[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 6 == 5:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)

    for graph in lowmem_compile.report(model).graphs:
        print(f"{graph.graph_id}:")
        for site in graph.sites:
            if site.pass_name == "projection_taps":
                print(f"  {site.module}: {site.reason}")


if __name__ == "__main__":
    main()
