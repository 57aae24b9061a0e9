"""What the tests of the passes and the pipeline share: graphs without code generation, float64 references."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn
from torch._dynamo import mark_dynamic

from lowmem_compile import registry
from lowmem_compile.autocast import autocast_dtypes
from lowmem_compile.backend import lowmem
from lowmem_compile.contract import Context, Pass, Rewrite
from lowmem_compile.kernels.linear_cross_entropy.op import plain_kernel
from lowmem_compile.options import Options
from lowmem_compile.partition import Candidates
from lowmem_compile.pipeline import Recorder, run_pass
from lowmem_compile.registry import Entry
from lowmem_compile.reporting.model import Site
from lowmem_compile.saved import Partition

# Largest error allowed, as a share of the largest magnitude of the expected tensor.
TOLERANCE = {
    torch.float64: 1e-10,  # dozens of roundings of 1e-16, and a condition number of a norm
    torch.float32: 2e-5,  # dozens of roundings of 6e-8, through a norm
    torch.bfloat16: 4e-2,  # a handful of roundings of 2⁻⁹ along the longest path
    torch.float16: 5e-3,  # a handful of roundings of 2⁻¹²
}


@dataclass
class Graphs:
    """A compiled callable whose graphs run as they were captured, and what lowmem decided about each."""

    call: Callable[..., Any]
    entries: list[Entry] = field(default_factory=list)
    candidates: list[Candidates] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = list(registry.ENTRIES)
        with plain_kernel(), patch.object(Entry, "partitioned", self.observe):
            result = self.call(*args, **kwargs)
        self.entries += [e for e in registry.ENTRIES if not any(e is b for b in before)]
        return result

    @property
    def observe(self) -> Callable[[Entry, Candidates], None]:
        """Stands in for ``Entry.partitioned``, of graphs that are compiled at a call and of variants compiled later."""
        original = Entry.partitioned

        def spy(entry: Entry, candidates: Candidates) -> None:
            self.candidates.append(candidates)
            original(entry, candidates)

        return spy

    @property
    def only(self) -> Candidates:
        """The candidates of the only training graph."""
        assert len(self.candidates) == 1, f"{len(self.candidates)} training graphs"
        return self.candidates[0]

    @property
    def chosen(self) -> Partition:
        """The partition that was compiled."""
        return self.only.compiled

    def sites(self, pass_name: str, action: str | None = None) -> list[Site]:
        """What a pass said about its matches, over all graphs."""
        found = [s for e in self.entries for s in e.recorder.sites if s.pass_name == pass_name]
        return [s for s in found if action in (None, s.action)]

    def codes(self, pass_name: str) -> list[str]:
        """The reason codes of a pass, in graph order."""
        return [s.code for s in self.sites(pass_name)]

    def rewritten(self, pass_name: str) -> int:
        """How many matches the pass rewrote."""
        return len(self.sites(pass_name, "rewritten"))


def compile_graphs(model: Callable[..., Any], *, dynamic: bool | None = None, fullgraph: bool = False, **options: Any) -> Graphs:
    """Compile with lowmem up to the partition: forward and backward graph run operation by operation.

    ``report`` is off unless asked for: it compiles more than the test needs.
    """
    options = {"report": False, "strict": True, "check": "full", "codec": "none", **options}

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        def run(args: list[Any]) -> Any:
            return gm.forward(*args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return lowmem(gm, example_inputs, options=options, inner_compile=capture)

    backend.reset = registry.reset  # type: ignore[attr-defined]
    return Graphs(torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=fullgraph))


def dynamo_graph(model: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> tuple[fx.GraphModule, list[Any]]:
    """The one graph that Dynamo captures, and the arguments it was called with."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append((gm, list(example_inputs)))
        return gm.forward

    torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    assert len(found) == 1
    return found[0]


def apply(p: Pass, gm: fx.GraphModule, **options: Any) -> tuple[list[Site], list[Rewrite]]:
    """Run one pass over a Dynamo graph as the backend would, errors raised."""
    recorder = Recorder()
    facts = {"autocast": autocast_dtypes(gm.graph, "cpu"), "training": True}
    done = run_pass(p, gm, Context(Options.from_dict({"strict": True, "check": "full", **options}), facts=facts), recorder)
    gm.recompile()
    return recorder.sites, done


def targets(graph: fx.Graph) -> list[str]:
    """Names of the operations of a graph, in order."""
    return [
        n.target if n.op == "call_method" else n.target.__name__ for n in graph.nodes if n.op in ("call_function", "call_method")
    ]


def run(
    call: Callable[..., Any],
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    autocast: torch.dtype | None = None,
    kwargs: Mapping[str, Any] | None = None,
    mark: int | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs and every gradient of one forward and backward pass, by name.

    The loss is the outputs' inner product with fixed pseudo-random numbers, so that no gradient is trivial.
    ``mark`` is the dimension of every input that is marked as dynamic.
    """
    leaves = [i.detach().clone().requires_grad_(i.requires_grad) for i in inputs]
    for leaf in leaves if mark is not None else []:
        mark_dynamic(leaf, mark)
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = call(*leaves, **(kwargs or {}))
    outs = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, torch.Tensor)]
    generator = torch.Generator().manual_seed(7)
    wide = [(o.double(), torch.rand(o.shape, dtype=torch.float64, generator=generator) + 0.5) for o in outs]
    loss = torch.stack([(o * w).sum() for o, w in wide if o.requires_grad]).sum()
    loss.backward()
    result = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    result |= {f"input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    result |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result


def run_double(
    model: nn.Module, inputs: Sequence[torch.Tensor], kwargs: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """The same in float64, eagerly."""
    wide = copy.deepcopy(model).double()
    leaves = [i.detach().double().requires_grad_(i.requires_grad) if i.is_floating_point() else i for i in inputs]
    return run(wide, wide, leaves, kwargs=kwargs)


def assert_same(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor], tolerance: float) -> None:
    """The same tensors by name, within ``tolerance`` of the largest magnitude of the expected tensor."""
    assert set(got) == set(want)
    errors = {name: error(got[name], want[name]) for name in want}
    wrong = {name: e for name, e in errors.items() if not e <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| / max |want|."""
    assert got.shape == want.shape
    if not want.numel():
        return 0.0
    scale = want.double().abs().max().item()
    return (got.double() - want.double()).abs().max().item() / (scale or 1.0)


def check_gradients(
    graphs: Callable[..., Any],
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    dtype: torch.dtype = torch.float32,
    **how: Any,
) -> None:
    """Forward and every gradient of the compiled model against float64."""
    assert_same(run(graphs, model, inputs, **how), run_double(model, inputs, how.get("kwargs")), TOLERANCE[dtype])
