"""Joint graph → forward and backward graph: try the rewrites, keep the ones that pay, never end above Inductor.

Candidates, each partitioned for real and counted:

1. ``inductor``   Inductor's own partition of the graph without our rewrites;
2. ``one_flag``   the same with ``ban_recompute_materialized_backward=False``, PyTorch's exact rival;
3. ``lowmem``     our passes and rules; sites whose rewrite did not free its tensor are undone and the rest partitioned again.

The candidate with the fewest saved bytes is compiled; at equal bytes the earlier one, which changes less.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from lowmem_compile._torch import (
    functorch_config,
    min_cut_rematerialization_partition,
    saved_values_chooser,
    select_decomp_table,
)
from lowmem_compile.contract import Context, Rewrite, Stage
from lowmem_compile.errors import BudgetError, CalibrationError, ScheduleError
from lowmem_compile.graph import copy_module, decompose, forget_mutation_regions, is_tangent, placeholders, storage_root
from lowmem_compile.kernels.normalize import normalize_backward_reference, normalize_reference
from lowmem_compile.options import SlopeBits
from lowmem_compile.passes.approximate_activation import ACTIVATIONS, default_slope_bits
from lowmem_compile.pipeline import Recorder, run_stage
from lowmem_compile.planner.budget import budget_of
from lowmem_compile.planner.calibrate import Measured, measure
from lowmem_compile.planner.choices import LADDER, encodable
from lowmem_compile.planner.coarse import coarse_peak
from lowmem_compile.planner.curve import INDUCTOR_BUDGETS, curve_of, planned_tensors
from lowmem_compile.planner.generated import generated_timeline
from lowmem_compile.planner.in_code import met_in_code
from lowmem_compile.planner.plan import SMALLEST_GRAPH, Plan, Planner
from lowmem_compile.planner.timeline import peak, simulate
from lowmem_compile.recompute import choose_saved
from lowmem_compile.reporting.model import CurvePoint, PlannedTensor, TimelinePoint
from lowmem_compile.saved import Partition
from lowmem_compile.tapped_inputs import TappedInput, remove_taps

log = logging.getLogger(__name__)

KEPT_WHOLE = tuple(ACTIVATIONS)
COARSE = 0.03
"""Estimated relative error of the gradient (a cosine of 0.9995) above which a plan tries slopes of fewer bits."""
FEWER_SLOPE_BITS: SlopeBits = 6
"""Their error, 0.8 % root mean square, is about that of other tensors in 8 bits."""
OWN_OPS: dict[str, Callable[..., Any]] = {
    "lowmem.normalize.default": lambda *args: tuple(t.contiguous() for t in normalize_reference(*args)),
    "lowmem.normalize_backward.default": lambda *args: normalize_backward_reference(*args).contiguous(),
}
"""The operations' definitions, with the layout that they promise."""


@dataclass(frozen=True)
class Candidates:
    """The partitions that were counted, the name of the best, and a copy of it after the saved stage: what is compiled.

    ``context`` is that of the saved stage: with the plan, if there is one, under ``facts["plan"]``.
    """

    partitions: Mapping[str, Partition]
    chosen: str
    compiled: Partition
    recorder: Recorder
    context: Context
    planned: tuple[PlannedTensor, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    schedules: Mapping[str, tuple[TimelinePoint, ...]] = field(default_factory=dict)
    """Timelines by the code that Inductor generates, of the contenders for which it was generated here."""
    not_replayed: str = ""
    tapped: tuple[TappedInput, ...] = ()

    @property
    def before_codecs(self) -> Partition:
        """The chosen partition before the saved stage."""
        return self.partitions[self.chosen]


def expand(graph: fx.Graph) -> None:
    """Decompose the operations that were kept whole for the passes."""
    table = dict(select_decomp_table())
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if str(node.target) in OWN_OPS:
            decompose(graph, node, OWN_OPS[str(node.target)], table)
        elif node.target in KEPT_WHOLE:
            decompose(graph, node, table[node.target], table)


def cut(module: fx.GraphModule, joint_inputs: Any, kwargs: dict[str, Any]) -> Partition:
    """Partition a joint graph with Inductor's min-cut, whoever chooses the saved values at the moment."""
    module.recompile()
    forward, backward = min_cut_rematerialization_partition(module, joint_inputs, **kwargs)
    return Partition(forward, backward, kwargs["num_fwd_outputs"])


def stock_partitions(gm: fx.GraphModule, joint_inputs: Any, kwargs: dict[str, Any]) -> dict[str, Partition]:
    """Inductor's own partition, and the one with its one flag."""
    plain = copy_module(gm)
    expand(plain.graph)
    partitions = {"inductor": cut(copy_module(plain), joint_inputs, kwargs)}
    with functorch_config.patch(ban_recompute_materialized_backward=False):
        partitions["one_flag"] = cut(plain, joint_inputs, kwargs)
    return partitions


def budget_partitions(gm: fx.GraphModule, joint_inputs: Any, kwargs: dict[str, Any]) -> dict[str, Partition]:
    """Inductor's partitions at several values of ``activation_memory_budget``, named ``"inductor 0.5"`` and so on."""
    plain = copy_module(gm)
    expand(plain.graph)
    found = {}
    for budget in INDUCTOR_BUDGETS:
        with functorch_config.patch(activation_memory_budget=budget):
            found[f"inductor {budget:g}"] = cut(copy_module(plain), joint_inputs, kwargs)
    return found


def partition_joint(
    gm: fx.GraphModule, joint_inputs: Any, ctx: Context, recorder: Recorder, kwargs: dict[str, Any]
) -> Candidates:
    """Partition a joint graph (see the module docstring)."""
    for node, index in zip(placeholders(gm.graph), range(len(gm.graph.nodes)), strict=False):
        node.meta["lowmem_static"] = index in (kwargs.get("static_lifetime_input_indices") or ())
    recorder.dump("joint", gm)
    tapped = tuple(remove_taps(gm.graph))

    stock = stock_partitions(gm, joint_inputs, kwargs)

    def attempt(ctx: Context) -> Attempt:
        lowmem, record = rewritten_partition(gm, joint_inputs, ctx, recorder, kwargs)
        partitions = {**stock, "lowmem": lowmem}
        chosen = choose(partitions, ctx)
        wants_plan = ctx.options.memory_budget is not None or ctx.options.calibrate
        planner = planner_of(partitions[chosen], ctx) if wants_plan or ctx.facts.get("curve") else None
        plan = None if planner is None else plan_for(planner, partitions[chosen], stock["inductor"], ctx)
        return Attempt(ctx, partitions, chosen, record, planner, plan)

    best = best_attempt(attempt, ctx)
    partitions, chosen, planner, plan = best.partitions, best.chosen, best.planner, best.plan
    recorder.adopt(best.record if chosen == "lowmem" else declined(best.record))
    winner = partitions[chosen]
    ctx = replace(best.ctx, facts={**ctx.facts, "plan": plan})
    compiled = after_saved_stage(winner, ctx, recorder)
    recorder.dump("forward", compiled.forward)
    recorder.dump("backward", compiled.backward)
    log.info("saved for backward: %s; compiled: %s", {n: p.saved_bytes() for n, p in partitions.items()}, chosen)
    planned: tuple[PlannedTensor, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    if planner is not None:
        planned = planned_tensors(planner, plan, winner)
    if planner is not None and ctx.facts.get("curve"):
        rivals = (ctx.facts["baseline"]() if ctx.facts.get("baseline") else None) or {
            **partitions,
            **budget_partitions(gm, joint_inputs, kwargs),
        }
        curve = curve_of(planner, rivals)
    schedules, not_replayed = schedules_of(compiled, partitions["inductor"], ctx) if ctx.facts.get("schedule") else ({}, "")
    return Candidates(partitions, chosen, compiled, recorder, ctx, planned, curve, schedules, not_replayed, tapped)


@dataclass(frozen=True)
class Attempt:
    """A graph partitioned, and planned where a plan is asked for."""

    ctx: Context
    partitions: Mapping[str, Partition]
    chosen: str
    record: Recorder
    planner: Planner | None
    plan: Plan | None


def best_attempt(attempt: Callable[[Context], Attempt], ctx: Context) -> Attempt:
    """The attempt with the options as they are, or with fewer bits a slope where a budget asks too much of everything else.

    Slopes are no choice of the plan. Where they take most of a budget, what is left gets so few bits that the estimated error
    is above ``COARSE``, or there is no plan. Then ``FEWER_SLOPE_BITS`` are tried, and taken where the error is smaller.

    Raises:
        BudgetError: neither meets the budget.
    """
    options = ctx.options
    has_fewer = options.table == "slope" and options.gradients != "exact" and default_slope_bits(ctx) > FEWER_SLOPE_BITS
    fewer = replace(ctx, options=replace(options, slope_bits=FEWER_SLOPE_BITS))
    try:
        first = attempt(ctx)
    except BudgetError:
        if not has_fewer:
            raise
        return attempt(fewer)
    if not has_fewer or first.plan is None or not first.plan.for_budget or first.plan.error <= COARSE:
        return first
    second = attempt(fewer)
    return second if second.plan is not None and second.plan.error < first.plan.error else first


def rewritten_partition(
    gm: fx.GraphModule, joint_inputs: Any, ctx: Context, recorder: Recorder, kwargs: dict[str, Any]
) -> tuple[Partition, Recorder]:
    """The partition with our passes and rules, and what they recorded; rewrites that do not pay are left out."""
    ours = functools.partial(choose_saved, pointwise=ctx.options.recompute == "pointwise")

    @functools.cache
    def rewrite_and_cut(skip: frozenset[str]) -> tuple[Partition, list[Rewrite], Recorder]:
        module = copy_module(gm)
        record = Recorder(recorder.graph_id, recorder.dump_dir, pending=[])
        rewritten = run_stage(Stage.JOINT, module, replace(ctx, skip=skip), record)
        expand(module.graph)
        with saved_values_chooser(ours):
            return cut(module, joint_inputs, kwargs), rewritten, record

    trial, rewritten, _ = rewrite_and_cut(frozenset())
    skip = {r.site for r in rewritten if not _pays(r, trial)}
    skip |= _classes_that_do_not_pay(rewritten, skip, lambda s: rewrite_and_cut(s)[0].saved_bytes())
    partition, _, record = rewrite_and_cut(frozenset(skip))
    return partition, record


def schedules_of(compiled: Partition, inductor: Partition, ctx: Context) -> tuple[dict[str, tuple[TimelinePoint, ...]], str]:
    """Timelines of lowmem and of Inductor by the code that Inductor generates, or why there are none."""
    try:
        stock = generated_timeline(stock_of(inductor, ctx), ctx.facts["stock_config"])
        return {"inductor": stock, "lowmem": generated_timeline(compiled, {})}, ""
    except ScheduleError as error:
        log.warning("peaks stay estimates: %s", error)
        return {}, str(error)


def plan_for(planner: Planner, winner: Partition, inductor: Partition, ctx: Context) -> Plan | None:
    """The plan for ``options["memory_budget"]`` or ``options["calibrate"]``, or ``None`` without them.

    Raises:
        BudgetError: no plan meets the budget.
        CalibrationError: the graph could not be measured, and ``options["strict"]`` is set.
    """
    if ctx.options.memory_budget is None and not ctx.options.calibrate:
        return None
    stock = stock_of(inductor, ctx)
    if stock.saved_bytes() < SMALLEST_GRAPH:
        return None
    if ctx.options.memory_budget is None:
        return planner.careful() if planner.measured else None
    budget = budget_of(ctx.options.memory_budget)
    if budget.share is not None:
        plan = planner.meet(budget, stock.saved_bytes(), peak(simulate(stock)))
    else:
        plan = met_in_code(planner, budget, stock, lambda p: generated_timeline(_applied(p, winner, ctx), {}))
    log.info("plan: %s", plan)
    return plan


def _applied(plan: Plan, winner: Partition, ctx: Context) -> Partition:
    return after_saved_stage(winner, replace(ctx, facts={**ctx.facts, "plan": plan}), Recorder())


def stock_of(inductor: Partition, ctx: Context) -> Partition:
    """What Inductor makes of the graph as captured; ``inductor`` where no pass changed the graph before AOTAutograd."""
    count = ctx.facts.get("baseline")
    return (count() or {}).get("inductor", inductor) if count is not None else inductor


def planner_of(partition: Partition, ctx: Context) -> Planner:
    """A planner for a partition that the saved stage has not changed yet."""
    trial = Partition(copy_module(partition.forward), copy_module(partition.backward), partition.num_user_outputs)
    run_stage(Stage.BACKWARD, trial.backward, backward_context(trial, ctx), None)
    context = saved_context(trial, ctx)
    return Planner(trial, context, calibrated(trial, context) if ctx.options.calibrate else {})


def calibrated(partition: Partition, ctx: Context) -> dict[str, Measured]:
    """What one batch shows of each tensor that crosses; nothing, and a warning, where that cannot be measured.

    Raises:
        CalibrationError: it cannot be measured, and ``options["strict"]`` is set.
    """
    matches = encodable(partition.forward.graph, ctx)
    partition.forward.recompile()
    partition.backward.recompile()
    try:
        return measure(partition, ctx, ctx.facts["example_inputs"], matches, LADDER)
    except CalibrationError as error:
        message = f"options['calibrate']: not measured, {error}. The prior error model is used (docs/planner.md)."
        if ctx.options.strict:
            raise CalibrationError(message) from error
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return {}


def choose(partitions: Mapping[str, Partition], ctx: Context) -> str:
    """The candidate with the fewest saved bytes among those whose coarse peak is not above Inductor's."""
    allowed = [n for n in partitions if n != "one_flag" or ctx.options.recompute == "pointwise"]
    ceiling = coarse_peak(partitions["inductor"])
    lower = [n for n in allowed if n == "inductor" or coarse_peak(partitions[n]) <= ceiling]
    return min(lower, key=lambda name: partitions[name].saved_bytes())


def declined(record: Recorder) -> Recorder:
    """A trial that was not compiled: its rewrites count as declined, its dumps are dropped."""
    reason = "with these rewrites the graph would keep more bytes, or peak higher, than Inductor's own partition"
    sites = [
        replace(s, action="declined", code="LM300", reason=reason, bytes_before=0, bytes_after=0)
        if s.action == "rewritten"
        else s
        for s in record.sites
    ]
    runs = [replace(r, rewritten=0, declined=r.matched) for r in record.runs]
    return Recorder(record.graph_id, record.dump_dir, sites=sites, runs=runs, pending=[])


def _pays(rewrite: Rewrite, trial: Partition) -> bool:
    """Whether the tensors a rewrite was to free are gone from the saved set."""
    kept = {n.name for n in trial.kept()} | {storage_root(n).name for n in trial.saved_nodes()}
    return not rewrite.displaced & kept


def _classes_that_do_not_pay(
    rewritten: list[Rewrite], skip: set[str], bytes_without: Callable[[frozenset[str]], int]
) -> set[str]:
    """Leave out in turn all sites of a pass, and a class without which no more bytes are saved is dropped.

    Rewrites that are to free no tensor (their passes are after something else) stay.
    A pass whose sites together save what their formulas promise is kept whole; of another, each class of alike sites is left
    out in turn.
    """
    left = [r for r in rewritten if r.displaced and r.site not in skip]
    dropped: set[str] = set()
    if not left:
        return dropped
    best = bytes_without(frozenset(skip))

    def pays(sites: set[str], promised: int) -> bool | None:
        """False if no more bytes are saved without them (they are dropped), None if fewer than promised."""
        nonlocal best
        without = bytes_without(frozenset(skip | dropped | sites))
        if without <= best:
            dropped.update(sites)
            best = without
            return False
        return True if without - best >= promised else None

    for name in dict.fromkeys(r.pass_name for r in left):
        mine = [r for r in left if r.pass_name == name]
        classes: dict[Any, set[str]] = {}
        for rewrite in mine:
            classes.setdefault(rewrite.alike, set()).add(rewrite.site)
        if pays({r.site for r in mine}, sum(r.saves for r in mine)) is None and len(classes) > 1:
            for sites in classes.values():
                pays(sites, 0)
    return dropped


def after_saved_stage(partition: Partition, ctx: Context, recorder: Recorder) -> Partition:
    """A copy of a partition after the passes over the tensors that cross from forward to backward.

    Such a pass changes two graphs, so a failure is undone by starting again from a copy without the pass.
    """
    without = ctx.options.disable
    while True:
        trial = Partition(copy_module(partition.forward), copy_module(partition.backward), partition.num_user_outputs)
        record = Recorder(recorder.graph_id, recorder.dump_dir, pending=[])
        run_saved_stage(trial, replace(ctx, options=replace(ctx.options, disable=without)), record)
        if not record.failures:
            recorder.adopt(record)
            return trial
        recorder.sites += [s for s in record.sites if s.action == "failed"]
        recorder.runs += [r for r in record.runs if r.name in record.failures]
        without = (*without, *record.failures)


def run_saved_stage(partition: Partition, ctx: Context, recorder: Recorder) -> None:
    """Run the passes over the backward graph, then those over the tensors that cross from forward to backward."""
    run_stage(Stage.BACKWARD, partition.backward, backward_context(partition, ctx), recorder)
    run_stage(Stage.SAVED, partition.forward, saved_context(partition, ctx), recorder)
    for module in (partition.forward, partition.backward):
        forget_mutation_regions(module.graph)
        module.recompile()


def backward_context(partition: Partition, ctx: Context) -> Context:
    """The context of the passes over the backward graph."""
    facts = {"forward": partition.forward.graph, "num_user_outputs": partition.num_user_outputs}
    return replace(ctx, facts={**ctx.facts, **facts})


def saved_context(partition: Partition, ctx: Context) -> Context:
    """The context of the passes over the tensors that cross from forward to backward."""
    saved = partition.saved_nodes()
    inputs = placeholders(partition.backward.graph)
    by_name = {n.name: n for n in inputs if not is_tangent(n)}
    facts = {
        "saved": saved,
        "user_outputs": partition.user_outputs(),
        "num_user_outputs": partition.num_user_outputs,
        "backward": partition.backward.graph,
        "placeholder_of": {n: by_name[n.name] for n in saved if n.name in by_name},
    }
    return replace(ctx, facts={**ctx.facts, **facts})
