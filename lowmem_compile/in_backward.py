"""Update parameters inside the backward pass: each one as soon as its gradient is there, so that no two need to exist at once.

    from lowmem_compile.in_backward import Update, backward_with_updates
    backward_with_updates(closure, {p: Update("sgd", (rate,)) for p in model.parameters()})

A rule is a small function of tensors, (p, g, *tensors) -> (new p, *new states): its first ``states`` tensors are changed too.
Its other tensors are 0-dimensional inputs of the compiled graph, so a schedule does not recompile.

Eager code: a hook on each parameter runs the rule when its gradient is complete, and drops the gradient. Compiled with lowmem:
while the forward pass runs, :class:`Marking` marks every parameter that an operation reads, Dynamo records the marks with the
rule's tensors as graph inputs, :func:`take_marks` takes them out of the graph again, and the pass ``update_in_backward`` writes
the rule into the backward graph; that graph returns no gradient for the parameter. The mode is part of Dynamo's guards: the same
model called elsewhere has its ordinary graphs. With another backend the marks do nothing, and the hooks run after its backward.

A parameter is updated once a backward pass, from the sum of the gradients of all its uses. A use that the backward graph cannot
see (a second compiled graph, eager code beside a compiled graph) would read a parameter that was changed already: refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from lowmem_compile.errors import GradientError, OptionError

SLOT = "_lowmem_update"
"""Attribute that numbers a parameter while a session runs."""
ORDINAL = "_lowmem_ordinal"
"""Attribute that numbers a parameter while a forward pass is perturbed (:mod:`lowmem_compile.optim.addax.perturbation`)."""
PIECE = 2**20
"""Elements that an eager update of an elementwise rule works on at once."""


@dataclass(frozen=True)
class Rule:
    """How a gradient changes a parameter.

    Attributes:
        name: how graphs and reports call it.
        apply: (p, g, *tensors) -> (new p, *new states); traced, so without side effects. Results are rounded to the dtype of p
            and of the states.
        states: how many of the tensors, from the first, are changed.
        elementwise: p and g may be cut into pieces along the first dimension, in any order, states given on from piece to piece.
        rows: where g is zero nothing changes, and there are no states: rows without a gradient need not be touched.
    """

    name: str
    apply: Callable[..., tuple[Tensor, ...]]
    states: int = 0
    elementwise: bool = False
    rows: bool = False


RULES: dict[str, Rule] = {}


def register_rule(rule: Rule) -> Rule:
    """Make a rule known by its name.

    Raises:
        OptionError: another rule has the name.
    """
    if RULES.setdefault(rule.name, rule) is not rule:
        raise OptionError(f"there is an update rule {rule.name!r} already")
    return rule


@dataclass(frozen=True)
class Update:
    """A rule for a parameter, and its tensors."""

    rule: str
    tensors: tuple[Tensor, ...] = ()


def mark(parameter: Tensor, rule: str, count: Tensor, *tensors: Tensor) -> Tensor:  # noqa: ARG001
    """The parameter itself. In a Dynamo graph the call says which rule, with which tensors, is to update it."""
    return parameter


torch.compiler.allow_in_graph(mark)


class Marking(TorchFunctionMode):
    """Marks the parameters that operations read, for Dynamo; eager operations run as they are."""

    def __init__(self, updates: Sequence[Update], count: Tensor) -> None:
        super().__init__()
        self.updates, self.count = list(updates), count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            args = tuple([self._marked(a) for a in args])
            kwargs = {name: self._marked(a) for name, a in kwargs.items()}
        return func(*args, **kwargs)

    def _marked(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            slot = getattr(value, SLOT, None)
            if slot is not None:
                update = self.updates[slot]
                return mark(value, update.rule, self.count, *update.tensors)
            return value
        if isinstance(value, (list, tuple)) and len(value) and isinstance(value[0], Tensor):
            return type(value)([self._marked(v) for v in value])
        return value


@dataclass(frozen=True)
class Planned:
    """What the graph says of one parameter: places among the inputs of the Dynamo graph.

    Attributes:
        parameter: what the rule changes.
        rule: its name.
        count: int64 scalar that counts the updates which ran.
        unit: what the update adds to it.
        tensors: the rule's.
        gradient: the input whose gradient the rule takes: the parameter itself if -1, or the zero of a projection tap.
    """

    parameter: int
    rule: str
    count: int
    tensors: tuple[int, ...]
    gradient: int = -1
    unit: int = 1

    @property
    def source(self) -> int:
        """The input whose gradient the rule takes."""
        return self.parameter if self.gradient < 0 else self.gradient


def take_marks(gm: fx.GraphModule) -> tuple[Planned, ...]:
    """Take the marks out of a Dynamo graph; what they said, one entry a parameter, in the order of the inputs."""
    place = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    found: dict[int, Planned] = {}
    for node in gm.graph.find_nodes(op="call_function", target=mark):
        parameter, rule, count, *tensors = node.args
        if not isinstance(parameter, fx.Node) or parameter not in place or not isinstance(rule, str):
            raise AssertionError(f"{node.format_node()} marks what is no input of the graph")
        found[place[parameter]] = Planned(place[parameter], rule, place[count], tuple(place[t] for t in tensors))
        node.replace_all_uses_with(parameter)
        gm.graph.erase_node(node)
    if found:
        gm.recompile()
    return tuple(found[i] for i in sorted(found))


def plan_key(plan: Sequence[Planned]) -> str:
    """What of a plan decides the compiled code; empty without one."""
    return json.dumps([(p.parameter, p.rule, p.count, p.tensors, p.gradient, p.unit) for p in plan]) if plan else ""


def with_claims(compiled: Callable[..., Any], plan: Sequence[Planned]) -> Callable[..., Any]:
    """Let a compiled graph tell the session, at each call, which parameters its backward graph is going to update."""
    if not plan:
        return compiled

    def claiming(*args: Any) -> Any:
        if not SESSIONS:
            raise AssertionError("a graph that updates parameters was called outside of a session")
        SESSIONS[-1].claim([args[p.parameter] for p in plan])
        return compiled(*args)

    return claiming


@dataclass
class Session:
    """One forward and backward pass with updates. ``done``: ids of the parameters that were updated."""

    updates: Mapping[Tensor, Update]
    names: Mapping[Tensor, str]
    claimed: set[int] = field(default_factory=set)
    hooked: set[int] = field(default_factory=set)

    def claim(self, parameters: Sequence[Tensor]) -> None:
        """A compiled graph that updates these parameters was called.

        Raises:
            GradientError: one of them was claimed before in this pass.
        """
        twice = [p for p in parameters if id(p) in self.claimed]
        if twice:
            raise GradientError(
                f"{self.name_of(twice[0])} is read by two compiled graphs, or twice by one, in one backward pass that updates "
                "parameters: the first update would change what the second backward graph reads. Call the model once a step, and "
                "compile it in one piece (fullgraph=True shows what breaks the graph), or run it without torch.compile."
            )
        self.claimed |= {id(p) for p in parameters}

    def name_of(self, parameter: Tensor) -> str:
        """For messages."""
        return self.names.get(parameter, "a parameter")

    def hook(self, parameter: Tensor) -> None:
        """Eager update: called when the gradient of a parameter is complete."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return  # autograd calls the hook also where a compiled graph returned no gradient
        if id(parameter) in self.hooked:
            raise GradientError(
                f"{self.name_of(parameter)} got a second gradient in a step that updates parameters in the backward pass. "
                "Gradients are consumed at once and cannot be accumulated: call backward once a step, on a larger batch."
            )
        if gradient.is_sparse:
            raise GradientError(f"the gradient of {self.name_of(parameter)} is sparse; make it dense (sparse=False).")
        self.hooked.add(id(parameter))
        run_rule(parameter, gradient, self.updates[parameter])

    @property
    def done(self) -> set[int]:
        """Ids of the parameters that were updated, or whose graph was to update them."""
        return self.claimed | self.hooked


SESSIONS: list[Session] = []


@torch.no_grad()
def run_rule(parameter: Tensor, gradient: Tensor, update: Update) -> None:
    """Change a parameter, and the rule's states, in place."""
    rule = RULES[update.rule]
    states = update.tensors[: rule.states]
    for p, g in zip(_pieces(parameter, rule), _pieces(gradient, rule), strict=True):
        for old, new in zip((p, *states), rule.apply(p, g, *update.tensors), strict=True):
            old.copy_(new)


def _pieces(tensor: Tensor, rule: Rule) -> Iterator[Tensor]:
    if not rule.elementwise or tensor.dim() == 0 or tensor.numel() <= PIECE:
        return iter((tensor,))
    return iter(tensor.split(max(1, PIECE // (tensor.numel() // tensor.shape[0]))))


def backward_with_updates(
    closure: Callable[[], Tensor],
    updates: Mapping[Tensor, Update],
    *,
    names: Mapping[Tensor, str] | None = None,
    check: Callable[[Tensor], object] = lambda _: None,
) -> tuple[Tensor, set[int]]:
    """Run ``closure`` and the backward pass of the loss it returns; each parameter is updated inside the backward pass.

    Args:
        closure: the forward pass; returns the loss.
        updates: parameters and what to do with their gradients. Other parameters get an ordinary ``grad``.
        names: for messages.
        check: sees the loss before the backward pass, and raises where nothing is to be changed.

    Returns:
        The loss, and ids of the parameters that were updated.

    Raises:
        GradientError: a parameter has a gradient already (accumulation), is read by two compiled graphs or both by compiled and
            eager code, or ``closure`` called backward itself.
        OptionError: an unknown rule.
    """
    session = Session(updates, names or {})
    for p, update in updates.items():
        if update.rule not in RULES:
            raise OptionError(f"unknown update rule {update.rule!r}; the rules are {', '.join(sorted(RULES))}")
        if p.grad is not None:
            raise GradientError(
                f"{session.name_of(p)} has a gradient from before. A step that updates in the backward pass cannot add "
                "to it: gradients are neither accumulated nor clipped by their global norm. Set them to None before the step."
            )
    count = torch.zeros((), dtype=torch.int64)
    parameters = list(updates)
    hooks = []
    SESSIONS.append(session)
    try:
        for i, p in enumerate(parameters):
            setattr(p, SLOT, i)
            hooks.append(p.register_post_accumulate_grad_hook(session.hook))
        with torch.enable_grad(), Marking(list(updates.values()), count):
            loss = closure()
        if session.hooked:
            raise GradientError("the closure called backward itself; let it return the loss.")
        check(loss)
        loss.backward()
    finally:
        SESSIONS.pop()
        for hook in hooks:
            hook.remove()
        for p in parameters:
            delattr(p, SLOT)
    both = session.hooked & session.claimed
    if int(count) + len(both) > len(session.claimed):
        named = sorted(session.name_of(p) for p in parameters if id(p) in both)
        raise GradientError(
            f"{', '.join(named)}: read by a compiled graph, which updated it, and by other code in the same step, which gave a "
            "gradient too. The parameters are not to be trusted now: load a checkpoint, and compile all of the model or none."
        )
    return loss, session.done


def sgd(p: Tensor, g: Tensor, rate: Tensor) -> tuple[Tensor]:
    """p - rate·g in float32 (float64 for float64 parameters), rounded once."""
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    return ((p.to(wide) - rate * g.to(wide)).to(p.dtype),)


def sgd_decay(p: Tensor, g: Tensor, rate: Tensor, decay: Tensor) -> tuple[Tensor]:
    """p·(1 - decay) - rate·g, likewise."""
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    return ((p.to(wide) * (1 - decay) - rate * g.to(wide)).to(p.dtype),)


def sgd_norm(p: Tensor, g: Tensor, squares: Tensor, rate: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`sgd_decay`; the sum of the squares of g, in float32, is added to ``squares``."""
    return sgd_decay(p, g, rate, decay)[0], squares + g.float().square().sum().to(squares.dtype)


register_rule(Rule("sgd", sgd, elementwise=True, rows=True))
register_rule(Rule("sgd_decay", sgd_decay, elementwise=True))
register_rule(Rule("sgd_norm", sgd_norm, states=1, elementwise=True))
