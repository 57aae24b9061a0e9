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


def main() -> None:
    """Run the command; a user's mistake is a message and exit status 1, not a traceback."""
    try:
        app()
    except LowMemError as error:
        print(f"lowmem: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
