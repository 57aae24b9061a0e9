"""One batch of measurement: how much an error in each saved tensor changes the gradient.

The forward graph runs once on the inputs of the call that compiles, and the backward graph once for each tensor, which then comes
from codes: the relative change of the gradient, divided by the relative error of the tensor, is its gain s. It replaces the prior
of :mod:`lowmem_compile.planner.choices`. Both graphs run operation by operation, as eager PyTorch would: their memory is eager
PyTorch's, once, before the first step. Parameters, buffers and random number generators are left as they were.

Output gradients are ones where the graph computes the loss (a scalar), random otherwise.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lowmem_compile._torch import FakeTensor, OpOverload, unset_fake_temporarily
from lowmem_compile.contract import Context, Match
from lowmem_compile.crossing import view_chain
from lowmem_compile.errors import CalibrationError
from lowmem_compile.graph import concrete, is_tangent, output_values, placeholders, sizes, tensor_value
from lowmem_compile.kernels.group_codes import Codec, codec_named
from lowmem_compile.kernels.linear_cross_entropy.op import plain_kernel
from lowmem_compile.passes.encode_saved import coder
from lowmem_compile.saved import Partition

log = logging.getLogger(__name__)

PASSES = 48
"""Backward passes at most; of more tensors, those in evenly spaced layers are measured and stand for their neighbours."""
PROBE, PROBE_SCORE = "int6", "int8"
"""Codes of the measurement: errors well above the rounding of bfloat16, and for queries and keys small enough to act linearly."""
NEGLIGIBLE = 1e-3
"""A gradient whose norm is a smaller share of the largest one's is left out of :attr:`Measured.worst`: it may be all rounding
(the bias of keys has no gradient in exact arithmetic)."""


@dataclass(frozen=True)
class Measured:
    """What one batch showed of a saved tensor.

    Attributes:
        errors: relative error (L2) of the tensor in each codec.
        gain: relative error of the whole gradient, per relative error of the tensor.
        worst: the same of the one parameter's gradient that suffers most.
        direct: this tensor was measured, and not one like it in another layer.
    """

    errors: Mapping[str, float]
    gain: float
    worst: float
    direct: bool = True

    def error(self, codec: str) -> float:
        """Relative error of the whole gradient with the tensor in ``codec``."""
        return self.gain * self.errors[codec]

    def cosine(self, codec: str) -> float:
        """The lowest cosine of a parameter's gradient with its exact one: 1 − ε²/2 for a relative error of ε."""
        return 1.0 - (self.worst * self.errors[codec]) ** 2 / 2


def measure(
    partition: Partition, ctx: Context, inputs: Sequence[Any], matches: Sequence[Match], codecs: Sequence[str]
) -> dict[str, Measured]:
    """Measure the tensors that ``encode_saved`` could keep as codes.

    Args:
        partition: forward and backward graph before the saved stage.
        ctx: context of the saved stage.
        inputs: real tensors for the forward graph's inputs.
        matches: of ``encode_saved``.
        codecs: names of the codecs whose error is wanted.

    Returns:
        By the name of the storage's owner.

    Raises:
        CalibrationError: the graph cannot be run on the inputs.
    """
    from tqdm import tqdm

    check_inputs(partition, inputs)
    placeholder_of: dict[fx.Node, fx.Node] = ctx.facts["placeholder_of"]
    with _outside_the_compile(ctx.device):
        wanted = {m.info.encoded for m in matches}
        values, saved = _forward(partition, inputs, wanted)
        given = _backward_inputs(partition, saved)
        exact = _Run(partition.backward).run(*given)
        norms = [_norm(g) for g in exact]
        chosen = spread([_alike(m) for m in matches], PASSES)
        results: dict[int, tuple[float, float]] = {}
        errors: list[dict[str, float]] = []
        names = {str(p.target): i for i, p in enumerate(placeholders(partition.backward.graph))}
        bar = tqdm(total=len(chosen), desc="lowmem: calibrating", unit="tensor", leave=False, disable=None)
        for i, match in enumerate(matches):
            value = values[match.info.encoded]
            trips = {name: _round_trip(_codec(name, match, ctx), match, value) for name in codecs}
            errors.append({name: _relative(trip, value) for name, trip in trips.items()})
            del trips
            if i not in chosen:
                continue
            probe = _codec(PROBE_SCORE if any(u.kind == "score" for u in match.info.uses) else PROBE, match, ctx)
            decoded = _round_trip(probe, match, value)
            size = _relative(decoded, value)
            perturbed = list(given)
            for node in match.info.saved:
                perturbed[names[str(placeholder_of[node].target)]] = _seen(node, match.info.encoded, decoded)
            changed = _Run(partition.backward).run(*perturbed)
            results[i] = _gain(changed, exact, norms, size)
            bar.update()
        bar.close()
    found = {}
    for i, match in enumerate(matches):
        near = i if i in results else min((j for j in results if _alike(matches[j]) == _alike(match)), key=lambda j: abs(j - i))
        gain, worst = results[near]
        found[match.node.name] = Measured(errors[i], gain, worst, direct=near == i)
        log.info("calibrated %s: %s", match.node.name, found[match.node.name])
    return found


def check_inputs(partition: Partition, inputs: Sequence[Any]) -> None:
    """The graph's inputs and the given ones agree in number, shape and dtype.

    Raises:
        CalibrationError: they do not.
    """
    nodes = placeholders(partition.forward.graph)
    if len(nodes) != len(inputs):
        counts = f"the graph has {len(nodes)} inputs, the call {len(inputs)}"
        raise CalibrationError(f"{counts} (aliased inputs, or tensor subclasses)")
    for node, value in zip(nodes, inputs, strict=True):
        want = node.meta.get("val")
        if isinstance(value, FakeTensor):
            raise CalibrationError("the call's inputs are fake tensors, which have no values")
        if not isinstance(want, torch.Tensor):
            continue
        fits = isinstance(value, torch.Tensor) and value.dtype == want.dtype and value.dim() == want.dim()
        if not fits or any(isinstance(s, int) and s != t for s, t in zip(sizes(want), value.shape, strict=True)):
            raise CalibrationError(f"input {node.target} of the graph is not the call's")


def spread(classes: Sequence[Any], limit: int) -> set[int]:
    """Which indices to measure: all, or evenly spaced ones of each class: about ``limit`` in sum, two a class at least."""
    if len(classes) <= limit:
        return set(range(len(classes)))
    members: dict[Any, list[int]] = {}
    for i, key in enumerate(classes):
        members.setdefault(key, []).append(i)
    chosen: set[int] = set()
    for indices in members.values():
        count = min(len(indices), max(2, limit * len(indices) // len(classes)))
        last = len(indices) - 1
        chosen |= {indices[round(k * last / max(count - 1, 1))] for k in range(count)}
    return chosen


class _Run(fx.Interpreter):
    """Runs a graph; what it would write into its inputs is left out, and the values of ``keep`` are kept."""

    def __init__(self, module: fx.GraphModule, keep: frozenset[fx.Node] = frozenset()) -> None:
        super().__init__(module)
        self.keep, self.kept = keep, dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.keep:
            self.kept[n] = result
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten.copy_.default:
            return args[1]
        if isinstance(target, OpOverload) and target._schema.is_mutable:
            raise CalibrationError(f"the graph writes in place ({target})")
        return super().call_function(target, args, kwargs)


@contextlib.contextmanager
def _outside_the_compile(device: str) -> Iterator[None]:
    """Real tensors, no autograd, no autocast (the graph's casts are operations), random state restored."""
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with (
        unset_fake_temporarily(),
        torch.no_grad(),
        torch.autocast(device, enabled=False),
        torch.random.fork_rng(devices),
        plain_kernel(),
    ):
        yield


def _forward(partition: Partition, inputs: Sequence[Any], wanted: set[fx.Node]) -> tuple[dict[fx.Node, Any], dict[str, Any]]:
    """Values of the wanted nodes, and of everything the forward graph hands on, by name."""
    run = _Run(partition.forward, frozenset(wanted))
    results = run.run(*[i.detach() if isinstance(i, torch.Tensor) else i for i in inputs])
    nodes = output_values(partition.forward.graph)
    saved = {n.name: r for n, r in zip(nodes, results, strict=True) if isinstance(n, fx.Node)}
    return run.kept, saved


def _backward_inputs(partition: Partition, saved: Mapping[str, Any]) -> list[Any]:
    given: list[Any] = []
    generator = torch.Generator().manual_seed(0)
    for node in placeholders(partition.backward.graph):
        name = str(node.target)
        if not is_tangent(node):
            if name not in saved:
                raise CalibrationError(f"the backward graph reads {name}, which the forward graph does not hand on")
            given.append(saved[name])
            continue
        value = tensor_value(node)
        shape = [concrete(s) for s in value.shape]
        noise = torch.ones(shape) if value.numel() == 1 else torch.randn(shape, generator=generator)
        given.append(noise.to(value.device, value.dtype))
    return given


def _codec(name: str, match: Match, ctx: Context) -> Codec:
    keep_zero = any(u.kind == "compared with zero" for u in match.info.uses)
    stochastic = ctx.options.rounding == "stochastic"
    return codec_named(name, group=ctx.options.codec_group, stochastic=stochastic, keep_zero=keep_zero)


def _round_trip(codec: Codec, match: Match, value: torch.Tensor) -> torch.Tensor:
    encode, decode = coder(codec, tensor_value(match.info.encoded))
    return decode(*encode(value))


def _seen(saved: fx.Node, encoded: fx.Node, decoded: torch.Tensor) -> Any:
    """What the backward graph reads for ``saved`` when its storage is decoded."""
    result: Any = decoded
    for view in view_chain(saved) if saved is not encoded else []:
        args = [result if isinstance(a, fx.Node) else a for a in view.args]
        result = view.target(*args, **view.kwargs)  # type: ignore[operator]
    return result


def _gain(changed: Any, exact: Any, norms: Sequence[float], size: float) -> tuple[float, float]:
    """Relative error of the whole gradient and of the worst of its tensors, per relative error ``size``."""
    whole = sum(n * n for n in norms) ** 0.5
    if size == 0.0 or whole == 0.0:
        return 0.0, 0.0
    distances = [_norm(b, a) for a, b in zip(exact, changed, strict=True)]
    least = NEGLIGIBLE * max(norms)
    worst = max((d / n for d, n in zip(distances, norms, strict=True) if n > least), default=0.0)
    return sum(d * d for d in distances) ** 0.5 / whole / size, worst / size


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    norm = _norm(want)
    return _norm(got, want) / norm if norm else 0.0


def _norm(value: Any, minus: Any = None) -> float:
    """L2 norm of a tensor, or of a difference; other values have none."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return 0.0
    wide = value.float() if minus is None else value.float() - minus.float()
    return float(torch.linalg.vector_norm(wide))


def _alike(match: Match) -> tuple[Any, ...]:
    """Tensors of different layers that play one part."""
    node = match.info.encoded
    kinds = tuple(sorted({u.kind for u in match.info.uses}))
    return (str(node.target), tuple(map(str, sizes(tensor_value(node)))), tensor_value(node).dtype, kinds)
