"""``torch.compile(model, backend="lowmem")``: the function Dynamo calls once a graph."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx

from lowmem_compile._torch import (
    CustomPartitionerFn,
    StableDecompositions,
    compile_fx,
    compile_fx_inner,
    copy_dynamo_module,
    inductor_config,
    join_in_place,
    keep_in_memory,
    keep_inputs_whole,
    list_mode_options,
    mode_names,
    offer_prologue,
    own_tracing_context,
    select_decomp_table,
)
from lowmem_compile.autocast import ambient_autocast, autocast_dtypes
from lowmem_compile.contract import Context, Stage
from lowmem_compile.errors import OptionError
from lowmem_compile.fusing import SCHEDULER_PASS, settings_for_codes, shares_launches
from lowmem_compile.generation import cheaply
from lowmem_compile.graph import placeholders
from lowmem_compile.in_backward import ORDINAL, Planned, plan_key, take_marks, with_claims
from lowmem_compile.launches import ShareLaunches
from lowmem_compile.options import Options
from lowmem_compile.partition import KEPT_WHOLE, Candidates, budget_partitions, partition_joint, stock_partitions
from lowmem_compile.peak_estimate import better_peak_estimate
from lowmem_compile.pipeline import run_stage
from lowmem_compile.planner.generated import followed
from lowmem_compile.registry import Entry, forget, register
from lowmem_compile.registry import reset as reset_registry
from lowmem_compile.saved import Partition
from lowmem_compile.tapping import TapInput, Variants, parameter_positions
from lowmem_compile.whole_loops import whole_loops

log = logging.getLogger(__name__)


OWN_CONFIG: Mapping[str, Any] = {"reorder_for_peak_memory": False}
"""Inductor's reordering takes the best of a few greedy orders by its own estimate of the peak. With decoded tensors in the graph
these put the decoding of all layers at the start of the backward pass (MiniLM, LoRA q,v: 101 MB against 66 MB in graph order)."""

SHARED_CONFIG: Mapping[str, Any] = {"combo_kernel_allow_mixed_sizes": 2}
"""Kernels that share a launch need not be of one size."""


@dataclass(frozen=True)
class Watch:
    """What a dry run wants to know besides the report; see :func:`lowmem`."""

    observe: Callable[[Entry, Candidates], None] | None = None
    curve: bool = False
    device: str | None = None
    schedule: bool = False


def lowmem(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    inner_compile: Callable[..., Any] | None = None,
    observe: Callable[[Entry, Candidates], None] | None = None,
    curve: bool = False,
    device: str | None = None,
    schedule: bool = False,
) -> Callable[..., Any]:
    """Compile one Dynamo graph: rewrite it so that less is kept for the backward pass, then hand it to Inductor.

    Args:
        gm: torch-IR graph; parameters are inputs.
        example_inputs: the tensors of this call.
        mode: passed on to Inductor (``"max-autotune"``, ...).
        options: see :class:`lowmem_compile.options.Options`.
        inner_compile: replaces Inductor's code generation (dry runs and graph-level tests); turns its caches off.
        curve: collect for the report what budgets would give, Inductor's own too.
        observe: called with the partitions of the graph when they were made; not called when a cache answers.
        device: what code is generated for, if that is not where the tensors are; passes choose kernels by it.
        schedule: also generate Inductor's code for its own partition and lowmem's, without compiling it, and take the report's
            peaks from it (dry runs; a compile reads the code it generates anyway).

    Raises:
        OptionError: unknown or ill-typed option, unknown mode; before anything is traced.
    """
    settings = Options.from_dict(options)
    patches = {**OWN_CONFIG, **_mode_patches(mode), **settings.inductor}
    updates = take_marks(gm)
    if any(hasattr(i, ORDINAL) for i in example_inputs):
        from lowmem_compile.optim.addax.perturbation import complete

        complete(gm, example_inputs)

    def build(
        graph: fx.GraphModule, inputs: list[Any], args: Sequence[Any], taps: Mapping[str, TapInput], planned: Sequence[Planned]
    ) -> Callable[..., Any]:
        return compile_graph(
            graph, inputs, args, taps, planned, settings, dict(patches), inner_compile, Watch(observe, curve, device, schedule)
        )

    if may_tap(settings) and not updates and parameter_positions(example_inputs):
        return Variants(gm, example_inputs, build)
    return with_claims(build(gm, list(example_inputs), example_inputs, {}, updates), updates)


def may_tap(settings: Options) -> bool:
    """Whether gradients may be projected in a graph that is compiled now."""
    return torch.is_grad_enabled() and "projection_taps" not in settings.disable


def compile_graph(
    gm: fx.GraphModule,
    inputs: list[Any],
    args: Sequence[Any],
    taps: Mapping[str, TapInput],
    updates: Sequence[Planned],
    settings: Options,
    patches: dict[str, Any],
    inner_compile: Callable[..., Any] | None,
    watch: Watch,
) -> Callable[..., Any]:
    """Rewrite and compile one variant of a graph.

    Args:
        gm: torch-IR graph; ours to change.
        inputs: what is compiled for: real or fake tensors and sizes, one a placeholder.
        args: the real tensors of this call.
        taps: weights whose gradients may be projected, by the name of their placeholder.
        updates: parameters that the backward graph is to update.
        settings: the options.
        patches: Inductor's configuration.
        inner_compile: see :func:`lowmem`.
        watch: likewise.
    """
    entry = register(gm, args, settings, identity(settings, updates))
    recorder = entry.recorder
    device = next((i.device.type for i in args if isinstance(i, torch.Tensor)), "cpu")
    facts = {**dynamo_facts(gm, args, device, entry), "taps": taps}
    target = watch.device or device
    ctx = Context(options=settings, device=target, facts=facts)
    recorder.dump("dynamo", gm)
    untouched = copy_dynamo_module(gm) if settings.report and entry.training else None
    if run_stage(Stage.DYNAMO, gm, ctx, recorder) and untouched is not None:
        entry.baseline = functools.partial(
            count_baseline, untouched, list(inputs), patches, ambient_autocast(device), curve=watch.curve
        )
    gm.recompile()
    keep_inputs_whole(torch.ops.lowmem.encode_many.default)
    offer_prologue(torch.ops.lowmem.in_prologue.default)
    keep_in_memory(torch.ops.lowmem.in_memory.default)
    join_in_place(torch.ops.lowmem.behind.default)
    partitioner = Partitioner(settings, target, entry, watch, args if settings.calibrate else (), updates)
    patches = {**settings_for_codes(target), **patches, "custom_partitioner_fn": partitioner}
    if shares_launches(settings, target):
        patches = {**SHARED_CONFIG, **patches, SCHEDULER_PASS: ShareLaunches(partitioner.uuid())}
    if inner_compile is not None:
        inner = inner_compile
        patches["force_disable_caches"] = True
    elif settings.report and entry.training:
        inner = cheaply(followed(entry.generated))
    else:
        inner = cheaply(compile_fx_inner)
    try:
        table = decompositions(settings)
        inner = whole_loops()(better_peak_estimate()(inner))
        compiled: Any = compile_fx(gm, inputs, config_patches=patches, decompositions=table, inner_compile=inner)
    except BaseException:
        forget(entry)  # an error, or Dynamo starts again with other assumptions
        raise
    finally:
        partitioner.inputs = ()
    return cast("Callable[..., Any]", compiled)


lowmem.reset = reset_registry  # type: ignore[attr-defined]  # called by torch._dynamo.reset()


def dynamo_facts(gm: fx.GraphModule, example_inputs: Sequence[Any], device: str, entry: Entry) -> dict[str, Any]:
    """What the passes of the Dynamo stage may know besides the graph."""
    return {
        "gm": gm,
        "autocast": autocast_dtypes(gm.graph, device),
        "training": entry.training,
        "inputs": {n: t for n, t in zip(placeholders(gm.graph), example_inputs, strict=True) if isinstance(t, torch.Tensor)},
    }


class Counter(CustomPartitionerFn):
    """Partition as Inductor does, with and without its one flag, and stop before code generation."""

    def __init__(self, *, curve: bool) -> None:
        self.curve = curve
        self.partitions: dict[str, Partition] = {}

    def __deepcopy__(self, memo: Any) -> Counter:
        return self

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        self.partitions = stock_partitions(gm, joint_inputs, kwargs)
        if self.curve:
            self.partitions.update(budget_partitions(gm, joint_inputs, kwargs))
        raise StopHere

    def uuid(self) -> None:
        return None


class StopHere(Exception):  # noqa: N818
    """Ends a compile whose partition is all that was wanted."""


def count_baseline(
    gm: fx.GraphModule, example_inputs: list[Any], patches: Mapping[str, Any], autocast: torch.autocast, *, curve: bool = False
) -> dict[str, Partition]:
    """What Inductor would save for the graph before any of our passes touched it.

    Called while AOTAutograd compiles, which turns gradients and autocast off: both are set as they were for the capture.
    """
    counter = Counter(curve=curve)
    with own_tracing_context(example_inputs), torch.enable_grad(), autocast, contextlib.suppress(StopHere):
        compile_fx(gm, example_inputs, config_patches={**patches, "custom_partitioner_fn": counter, "force_disable_caches": True})
    return counter.partitions


class Partitioner(CustomPartitionerFn):
    """Inductor's partitioner hook. Holds no graph; its uuid covers everything that can change the result.

    ``inputs`` are the tensors of the call that compiles, for ``options["calibrate"]``, and only as long as it compiles. What they
    are is not part of the uuid: a compile that the cache answers keeps the measurement it was made with.
    """

    def __init__(
        self,
        options: Options,
        device: str,
        entry: Any,
        watch: Watch | None = None,
        inputs: Sequence[Any] = (),
        updates: Sequence[Planned] = (),
    ) -> None:
        self.options, self.device, self.entry, self.watch = options, device, entry, watch or Watch()
        self.inputs, self.updates = inputs, updates
        self.stock_config = {name: getattr(inductor_config, name) for name in OWN_CONFIG} | dict(options.inductor)

    def __deepcopy__(self, memo: Any) -> Partitioner:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.uuid(),)  # what Inductor's cache keys pickle

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        facts = {
            "baseline": self.entry.baseline_partitions,
            "curve": self.watch.curve,
            "example_inputs": self.inputs,
            "updates": self.updates,
            "schedule": self.watch.schedule,
            "stock_config": self.stock_config,
        }
        ctx = Context(options=self.options, device=self.device, facts=facts)
        candidates = partition_joint(gm, joint_inputs, ctx, self.entry.recorder, kwargs)
        self.entry.partitioned(candidates)
        if self.watch.observe is not None:
            self.watch.observe(self.entry, candidates)
        return candidates.compiled.forward, candidates.compiled.backward

    def uuid(self) -> str:
        return identity(self.options, self.updates)


def decompositions(options: Options) -> StableDecompositions:
    """Inductor's decompositions, less the operations the passes want to see whole."""
    table = {k: v for k, v in select_decomp_table().items() if k not in KEPT_WHOLE}
    return StableDecompositions(table, identity(options))


def identity(options: Options, updates: Sequence[Planned] = ()) -> str:
    """Hash of the package's sources, the options, the updates and the versions: the cache key of everything lowmem does."""
    parts = (sources_hash(), options.key(), torch.__version__, _triton_version(), plan_key(updates))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


@functools.cache
def sources_hash() -> str:
    """Hash of every Python source of the package, passes and kernels included."""
    digest = hashlib.sha256()
    roots: list[str] = []
    import lowmem_compile.kernels
    import lowmem_compile.passes

    for package in (lowmem_compile, lowmem_compile.kernels, lowmem_compile.passes):
        roots += list(package.__path__)
    for root in dict.fromkeys(roots):
        for path in sorted(Path(root).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def _mode_patches(mode: str | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    if mode not in mode_names():
        raise OptionError(f"unknown mode {mode!r}; Inductor's modes are {', '.join(mode_names())}")
    return list_mode_options(mode)


def dump_folder(options: Options) -> Path | None:
    """Where graphs are dumped: ``options['dump']``, else ``LOWMEM_DEBUG_DIR``, else nowhere."""
    folder = options.dump or os.environ.get("LOWMEM_DEBUG_DIR")
    return Path(folder) if folder else None
