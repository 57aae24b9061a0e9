"""Run an unmodified model at θ + scale·z without changing θ: a mode that gives each operation perturbed parameters.

A linear and an embedding get their own operations (:mod:`lowmem_compile.optim.addax.operations`), which hold no large perturbed
parameter whole; any other operation gets a perturbed copy, which lives as long as the operation (or a view it returns) needs it.
Tied parameters are one parameter with one z.

Under ``torch.compile``, with any backend, Dynamo traces the mode: the operations stand in the graph, seed and scale are its
inputs, and the mode is part of the guards, so the model's ordinary graphs are untouched. Not seen: parameters read through a view
or a copy that was made before the mode began, and code that Python does not run (TorchScript).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lowmem_compile.errors import GradientError
from lowmem_compile.in_backward import ORDINAL
from lowmem_compile.optim.addax import operations as _operations  # noqa: F401 (registers the operations)

DESCRIBING = frozenset(
    {
        "size",
        "dim",
        "ndimension",
        "stride",
        "numel",
        "nelement",
        "element_size",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
    }
    | {
        "storage_offset",
        "data_ptr",
        "untyped_storage",
        "get_device",
        "__len__",
        "__hash__",
        "is_pinned",
        "has_names",
        "dim_order",
    }
    | {"new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like", "ones_like", "full_like", "is_same_size"}
)
"""Methods that do not read a parameter's values."""
READING = frozenset({"T", "mT", "H", "mH", "real", "imag", "data"})
"""Attributes that do."""


class Perturbation(TorchFunctionMode):
    """While it is on, every operation reads the parameters as p + scale·z.

    Args:
        parameters: by ordinal, their place in the optimizer.
        seed: of z.
        scale: ε or -ε.
    """

    def __init__(self, parameters: Mapping[int, Tensor], seed: int, scale: float) -> None:
        super().__init__()
        self.parameters = dict(parameters)
        self.seed = torch.tensor(seed, dtype=torch.int64)
        self.scale = torch.tensor(scale, dtype=torch.float64)

    def __enter__(self) -> Self:
        for i, p in self.parameters.items():
            setattr(p, ORDINAL, i)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for p in self.parameters.values():
            delattr(p, ORDINAL)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _holds(args) and not _holds(kwargs.values()):
            return func(*args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.embedding:
            return self._embedding(*args, **kwargs)
        if not torch.compiler.is_compiling() and (func in own_operations() or _only_describes(func, args)):
            return func(*args, **kwargs)
        args = tuple([self._instead(a) for a in args])
        return func(*args, **{key: self._instead(a) for key, a in kwargs.items()})

    def _instead(self, value: Any) -> Any:
        """A perturbed copy of a parameter, anything else as it is; lists and tuples are looked into."""
        if isinstance(value, Tensor):
            ordinal = getattr(value, ORDINAL, None)
            return value if ordinal is None else torch.ops.lowmem.perturbed(value, self.seed, self.scale, ordinal)
        if isinstance(value, (list, tuple)) and _holds(value):
            return type(value)([self._instead(v) for v in value])
        return value

    def _linear(self, *args: Any, **kwargs: Any) -> Tensor:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        x = self._instead(args[0] if args else kwargs["input"])
        bias = self._instead(args[2] if len(args) > 2 else kwargs.get("bias"))
        ordinal = getattr(weight, ORDINAL, None)
        if ordinal is None:
            return F.linear(x, weight, bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        result: Tensor = torch.ops.lowmem.perturbed_linear(x, weight, bias, self.seed, self.scale, ordinal)
        return result

    def _embedding(self, *args: Any, **kwargs: Any) -> Tensor:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        index = args[0] if args else kwargs["input"]
        ordinal = getattr(weight, ORDINAL, None)
        renormalised = (args[3] if len(args) > 3 else kwargs.get("max_norm")) is not None
        if ordinal is None or renormalised:
            options = {key: v for key, v in kwargs.items() if key not in ("input", "weight")}
            return F.embedding(index, self._instead(weight), *args[2:], **options)
        result: Tensor = torch.ops.lowmem.perturbed_embedding(index, weight, self.seed, self.scale, ordinal)
        return result


def _holds(values: Any) -> bool:
    """Whether one of the values, or of the values in lists and tuples among them, is a numbered parameter."""
    for value in values:
        if isinstance(value, Tensor):
            if getattr(value, ORDINAL, None) is not None:
                return True
        elif isinstance(value, (list, tuple)) and _holds(value):
            return True
    return False


@functools.cache
def own_operations() -> frozenset[Any]:
    """The operations that perturb by themselves: a compiled graph calls them while the mode is on."""
    packets = [torch.ops.lowmem.perturbed, torch.ops.lowmem.perturbed_linear, torch.ops.lowmem.perturbed_embedding]
    return frozenset([*packets, *(p.default for p in packets)])


def complete(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Perturb what Dynamo does not show the mode: attributes such as ``W.T`` of a parameter. Changes a Dynamo graph in place.

    Raises:
        GradientError: the graph has no other perturbed parameter, so it does not hold the seed.
    """
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    numbered = [(n, k) for n, v in zip(nodes, example_inputs, strict=True) if (k := getattr(v, ORDINAL, None)) is not None]
    unseen = [(n, k, u) for n, k in numbered for u in n.users if u.target not in own_operations()]
    if not unseen:
        return
    seen = next((n for n in gm.graph.nodes if n.target in own_operations()), None)
    if seen is None:
        raise GradientError(
            f"a compiled graph of the perturbed forward pass reads {unseen[0][0].name} through an attribute alone "
            f"({unseen[0][2].name}), where it cannot be perturbed; write W.t() in place of W.T."
        )
    seed, scale = seen.args[-3:-1]
    for node, ordinal, user in unseen:
        with gm.graph.inserting_before(user):
            new = gm.graph.call_function(torch.ops.lowmem.perturbed, (node, seed, scale, ordinal))
        new.meta = {**user.meta, "example_value": node.meta["example_value"]}
        user.replace_input_with(node, new)
    gm.recompile()


def _only_describes(func: Any, args: Any) -> bool:
    """Whether an eager call does not read a parameter's values; under Dynamo such calls do not come here.

    Raises:
        GradientError: it writes to a parameter.
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in READING
    if (name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))) and _holds(args[:1]):
        raise GradientError(
            f"the forward pass writes to a parameter in place ({name}); a perturbed forward pass only reads them. Leave this "
            "parameter out of the optimizer."
        )
    return name in DESCRIBING
