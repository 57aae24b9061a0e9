"""The ``lowmem`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lowmem_compile import __version__
from lowmem_compile.errors import LowMemError

app = typer.Typer(
    name="lowmem",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"lowmem {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train with less memory: torch.compile(model, backend="lowmem")."""


@app.command("demo")
def demo_command(
    models: Annotated[str, typer.Option(help="Comma-separated: minilm, smollm2, albert, dinov2, ...")] = "minilm,smollm2",
    steps: Annotated[int, typer.Option(help="Training steps of each variant.", min=1)] = 5,
    layers: Annotated[int | None, typer.Option(help="Blocks of each model; 0 for all. SmolLM2: 6 unless given.")] = None,
    precision: Annotated[str, typer.Option(help="bf16, autocast or fp32.")] = "autocast",
    mode: Annotated[str, typer.Option(help="full, qv (LoRA on q,v) or all (LoRA on all linears).")] = "full",
    output: Annotated[Path, typer.Option(help="Folder for the HTML reports.")] = Path("lowmem-demo"),
) -> None:
    """Fine-tune real pretrained models on real text: eager, Inductor and lowmem side by side."""
    from lowmem_compile.demo.models import MODELS
    from lowmem_compile.demo.run import demo
    from lowmem_compile.demo.workload import MODES, PRECISIONS, one_of

    demo(
        folder=output,
        models=[one_of("model", name, MODELS) for name in models.split(",") if name],
        steps=steps,
        layers=layers,
        precision=one_of("precision", precision, PRECISIONS),
        mode=one_of("mode", mode, MODES),
    )


@app.command("plan")
def plan_command(
    model: Annotated[str, typer.Argument(help="A known name (llama-7b, vit-l, ...), a config.json, or package.module:function.")],
    batch: Annotated[int | None, typer.Option(help="Rows.", min=1)] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens a row.", min=1)] = None,
    precision: Annotated[str, typer.Option(help="bf16, autocast (float32 weights) or fp32.")] = "bf16",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw-8bit, coap, galore, ...")] = "adamw",
    rank: Annotated[int | None, typer.Option(help="Rank of a low-rank optimizer.", min=1)] = None,
    bits: Annotated[int | None, typer.Option(help="8: moments of a low-rank optimizer in 8 bits.")] = None,
    projector_bits: Annotated[int | None, typer.Option(help="8: its projector too.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Names of the weights that it projects, such as '*attn*'.")] = None,
    card: Annotated[str | None, typer.Option(help="A card's name or size (h100, 24GiB): what is the largest that fits?")] = None,
    reserve: Annotated[str, typer.Option(help="Memory of the card that is not for tensors.")] = "1GiB",
    budget: Annotated[list[float] | None, typer.Option(help="memory_budget, as a share of Inductor's bytes; repeatable.")] = None,
    lora: Annotated[str | None, typer.Option(help="LoRA on qv or all linears; the rest is frozen.")] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA.", min=1)] = 16,
    loqt: Annotated[int | None, typer.Option(help="LoQT of this rank on the linears of the layers.", min=1)] = None,
    fused_backward: Annotated[
        bool, typer.Option("--fused-backward", help="lowmem steps the optimizer inside the backward pass: gradients do not stay.")
    ] = False,
    loss_only: Annotated[bool, typer.Option("--loss-only", help="Compile the loss alone: logits are not returned.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Trace all layers; minutes for a deep model.")] = False,
    device: Annotated[str, typer.Option(help="Whose kernels are simulated: cuda or cpu.")] = "cuda",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the plan as JSON.")] = None,
    html_path: Annotated[Path | None, typer.Option("--html", help="Write the plan as one HTML page.")] = None,
) -> None:
    """Plan the memory of training a model of real size, without its weights and without a GPU."""
    from lowmem_compile.memory_plan.command import run_plan
    from lowmem_compile.memory_plan.subject import Adaptation

    run_plan(
        model,
        batch=batch,
        sequence=sequence,
        precision=precision,
        optimizer=optimizer,
        rank=rank,
        state={"bits": bits, "projector_bits": projector_bits},
        include=tuple(include or ()),
        card=card,
        reserve=reserve,
        budgets=tuple(budget) if budget else (0.25,),
        adaptation=Adaptation(lora, lora_rank, loqt),
        fused_backward=fused_backward,
        loss_only=loss_only,
        exact=exact,
        device=device,
        json_path=json_path,
        html_path=html_path,
    )


def main() -> None:
    """Run the command; a user's mistake is a message and exit status 1, not a traceback."""
    try:
        app()
    except LowMemError as error:
        print(f"lowmem: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
