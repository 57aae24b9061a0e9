"""What projection taps change in bytes: gradients, tensors kept for the backward pass, simulated peak. No code is generated.

    python benchmarks/projected_gradients.py [--layers 2] [--rows 4] [--length 128] [--ratio 4]

A LLaMA-60M shape (512, 1376, 8 heads, 32000 words), float32, linears of the layers projected with rank 512 / ratio. `whole`
compiles without the pass: what an optimizer gets that projects gradients itself. Peaks are those of forward and backward pass
beyond parameters and inputs, gradients included, by the project's simulation.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import lowmem_compile
from lowmem_compile import optim
from lowmem_compile.planner.timeline import peak
from lowmem_compile.reporting.units import format_bytes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 2), ("rows", 4), ("length", 128), ("ratio", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    table = Table("gradients", "side", "gradient bytes of projected weights", "kept for backward", "simulated peak")
    for label, side, options in (
        ("whole", "std", {"disable": ["projection_taps"]}),
        ("projected", "std", {}),
        ("projected", "input", {}),
    ):
        table.add_row(label, side, *map(format_bytes, measure(chosen, side, options)))
    Console(width=120).print(table)


def measure(chosen: argparse.Namespace, side: str, options: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of gradients, kept tensors and peak."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=chosen.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    groups = optim.split(model, rank=512 // chosen.ratio, include=["*attn*", "*mlp*"], side=side).groups
    optimizer = optim.COAP(groups)
    for p in groups[0]["params"]:
        optimizer.make_basis(p[1], torch.randn_like(p[1]))  # as the first step would: an ordinary step is measured
    ids = torch.randint(0, 32000, (chosen.rows, chosen.length))
    graph = lowmem_compile.explain(model, input_ids=ids, labels=ids, options=options).graphs[0]
    rows = optim.report(optimizer).projected
    whole = "disable" in options
    gradients = sum(row.gradient_bytes if whole else row.projected_bytes for row in rows)
    return gradients, sum(t.nbytes for t in graph.saved["lowmem"]), peak(graph.timelines["lowmem"])


if __name__ == "__main__":
    main()
