"""``lowmem_compile.explain`` (a dry run) and ``lowmem_compile.report`` (what a compiled model does)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lowmem_compile import registry
from lowmem_compile._torch import dry_run
from lowmem_compile.errors import ReportError
from lowmem_compile.options import Options
from lowmem_compile.reporting.model import Report


def report(compiled: Any = None) -> Report:
    """What lowmem did to a compiled model or function: every site, every saved tensor, with reasons.

    Args:
        compiled: what ``torch.compile`` returned, a module compiled in place, or ``None`` for every graph of this process.

    Raises:
        ReportError: lowmem compiled nothing of it (yet): the model has to run once, with gradients for a training report.
    """
    entries = registry.ENTRIES if compiled is None else [e for e in registry.ENTRIES if e.belongs_to(*_identity(compiled))]
    if not entries:
        raise ReportError(
            "lowmem has compiled no graph of this object. Call it once after torch.compile(..., backend='lowmem') "
            "(compilation happens at the first call), or use lowmem_compile.explain(model, *inputs) for a dry run. "
            "The method compile() of a torch.nn.Sequential compiles nothing (pytorch#150915): use torch.compile(model, ...)."
        )
    return Report(
        graphs=tuple(e.report() for e in entries),
        options=dict(vars(entries[-1].options)),
        versions={"torch": torch.__version__, "lowmem": _version()},
    )


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    options: Mapping[str, Any] | None = None,
    curve: bool = False,
    schedule: bool = False,
    **kwargs: Any,
) -> Report:
    """The report that compiling ``model`` for these inputs would give: nothing is compiled, nothing is trained.

    Args:
        model: an unmodified module or function.
        inputs: one batch, as in a call.
        options: as for ``torch.compile(..., backend="lowmem", options=...)``.
        curve: also find what other budgets would give, lowmem's and Inductor's own: bytes, estimated error and time.
        schedule: also let Inductor generate its code, for its own partition and for lowmem's, and take their peaks and timelines
            from that; otherwise they are estimated from the graphs.
        **kwargs: the arguments of the call that are given by name.

    Raises:
        OptionError: unknown or ill-typed option.
    """
    settings = Options.from_dict(options)
    before = list(registry.ENTRIES)
    registry.ENTRIES.clear()
    try:
        dry_run(model, inputs, kwargs, dict(options or {}), curve=curve, schedule=schedule)
        graphs = tuple(e.report() for e in registry.ENTRIES)
    finally:
        registry.ENTRIES[:] = before
    if not graphs:
        raise ReportError("the call contains no tensor operation that torch.compile could capture")
    return Report(
        graphs=graphs,
        options=dict(vars(settings)),
        versions={"torch": torch.__version__, "lowmem": _version()},
    )


def _identity(compiled: Any) -> tuple[set[int], set[tuple[str, str]]]:
    tensors: set[int] = set()
    frames: set[tuple[str, str]] = set()
    module = compiled if isinstance(compiled, torch.nn.Module) else getattr(compiled, "__self__", None)
    if isinstance(module, torch.nn.Module):
        tensors = {id(p) for p in module.parameters()}
    else:
        function = inspect.unwrap(getattr(compiled, "_torchdynamo_orig_callable", compiled))
        code = getattr(function, "__code__", None)
        if code is None:
            raise ReportError(f"expected what torch.compile returned, not {type(compiled).__name__}")
        frames = {(code.co_filename, code.co_name)}
    return tensors, frames


def _version() -> str:
    from lowmem_compile import __version__

    return __version__
