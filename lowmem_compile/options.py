"""The options of the backend: one frozen, validated dataclass.

``torch.compile(model, backend="lowmem", options={...})`` passes its dictionary to :meth:`Options.from_dict`, which
refuses unknown names and wrong types before anything is traced.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lowmem_compile.errors import OptionError
from lowmem_compile.planner.budget import budget_of

Gradients = Literal["approximate", "exact"]
Table = Literal["slope", "derivative", "primitive"]
Recompute = Literal["pointwise", "inductor"]
Fold = Literal["auto", "always", "never"]
Loss = Literal["auto", "never"]
CodeBits = Literal[2, 4, 5]
SlopeBits = Literal[4, 5, 6, 7, 8]
CodecName = Literal["auto", "none", "bf16", "int10", "int8", "int7", "int6", "int5", "int4", "int3", "fp8"]
Rounding = Literal["nearest", "stochastic"]
Launches = Literal["own", "shared"]
Check = Literal["off", "lint", "full"]


@dataclass(frozen=True)
class Options:
    """What the backend may do to a graph.

    Attributes:
        gradients: ``"approximate"`` (default) allows passes whose gradient differs from the exact one where that saves
            bytes; ``"exact"`` uses only exact and reassociated passes.
        table: codes of approximate-BP activations: ``"slope"`` (default: the derivative itself in ``slope_bits`` bits),
            ``"derivative"`` (a step function of 2, 4 or 5 bits fitted to it) or ``"primitive"`` (ReGELU2/ReSiLU2, the published
            coefficients, always 2 bits).
        code_bits: bits a code of a ``"derivative"`` table takes: 5 (default), 4 or 2.
        slope_bits: bits a slope code takes: 4 to 8; ``None`` (default): 6 on a CPU, elsewhere 8, which Inductor makes in a kernel
            that is there anyway.
        recompute: ``"pointwise"`` (default) lets the backward pass recompute pointwise operations, matmul inputs
            included; ``"inductor"`` keeps Inductor's own rule.
        fold_norm_affine: fold a norm's affine into the linears that read it: ``"auto"`` only where it lowers the
            saved bytes, ``"always"`` wherever it is legal, ``"never"``.
        chunked_loss: compute a large-vocabulary linear + cross-entropy in chunks: ``"auto"`` or ``"never"``.
        codec: how saved floating-point tensors are kept: ``"auto"`` (default: ``"int8"``; ``"int10"`` for queries,
            keys, values and outputs that a library's backward pass of attention reads; on a CPU ``"int7"`` for queries and
            values that ours reads and ``"int6"`` for what a frozen norm's backward alone reads), ``"none"``, ``"bf16"``,
            ``"int10"`` to ``"int3"``, group-wise codes of so many bits, or ``"fp8"``, group-wise ``float8_e4m3fn``.
        codec_group: elements along the last dimension that share a scale.
        rounding: of the codes: ``"nearest"`` or ``"stochastic"`` (unbiased; follows ``torch.manual_seed``).
        memory_budget: what may be kept for the backward pass: a share of the bytes Inductor would save (``0.3``), or a peak
            such as ``"6GiB"`` of forward and backward beyond parameters, buffers, inputs and optimizer state. Codec,
            recomputation or exact is then chosen for each tensor (:mod:`lowmem_compile.planner.plan`). ``None`` (default):
            ``codec`` for all.
        calibrate: measure on the batch of the first call how much an error in each saved tensor changes the gradient
            (:mod:`lowmem_compile.planner.calibrate`), in place of a prior. With ``memory_budget`` the plan uses it; without, a
            tensor takes 8 bits, 10 bits or stays exact so that no parameter's gradient has a cosine below 0.9999 for it.
        launches: on a GPU, encodes and decodes that Inductor fuses with nothing are kernels of this project (``"own"``, default),
            or Inductor's, which join the launch of a kernel nearby (``"shared"``: fewer launches, a longer compilation; not yet
            run on a GPU; :mod:`lowmem_compile.launches`).
        keep_exact: module paths, or whole parts of them (``"layer.0"``); what such modules save is not encoded.
        disable: names of passes not to run.
        strict: raise when a pass fails, instead of compiling without it.
        report: collect what :func:`lowmem_compile.report` shows (about the cost of tracing the model once).
        check: graph check after every pass: ``"off"``, ``"lint"`` (default), ``"full"`` (also re-run with fake tensors).
        dump: folder for the numbered graphs before and after every pass; ``None`` for none (or ``LOWMEM_DEBUG_DIR``).
        inductor: config patches passed on to Inductor, as in ``torch.compile(options=...)``.
    """

    gradients: Gradients = "approximate"
    table: Table = "slope"
    code_bits: CodeBits = 5
    slope_bits: SlopeBits | None = None
    recompute: Recompute = "pointwise"
    fold_norm_affine: Fold = "auto"
    chunked_loss: Loss = "auto"
    codec: CodecName = "auto"
    codec_group: int = 128
    rounding: Rounding = "nearest"
    memory_budget: float | str | None = None
    calibrate: bool = False
    launches: Launches = "own"
    keep_exact: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    strict: bool = False
    report: bool = True
    check: Check = "lint"
    dump: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in ("disable", "keep_exact") and isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, f.name, value)
            _check_type(f.name, value, hints[f.name])
        if self.memory_budget is not None and self.codec not in ("auto", "none"):
            raise OptionError(
                f"options['memory_budget'] chooses a codec for each tensor; options['codec'] = {self.codec!r} names one for all. "
                "Leave one of them out ('none' is allowed: recomputation alone)."
            )
        if self.calibrate and (self.codec != "auto" or self.gradients == "exact"):
            named = "gradients" if self.gradients == "exact" else "codec"
            raise OptionError(
                f"options['calibrate'] measures where codes do no harm; options[{named!r}] = {getattr(self, named)!r} leaves "
                "nothing to choose. Leave one of them out."
            )
        if self.codec == "fp8" and self.rounding == "stochastic":
            raise OptionError(
                "options['codec'] = 'fp8' rounds to nearest; options['rounding'] = 'stochastic' is for integer codes such as "
                "'int8'."
            )
        if self.disable:
            from lowmem_compile.pipeline import pass_names

            unknown = sorted(set(self.disable) - set(pass_names()))
            if unknown:
                raise OptionError(f"options['disable'] names unknown passes {unknown}; the passes are {', '.join(pass_names())}")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any] | None) -> Options:
        """Validate the dictionary given to ``torch.compile(options=...)``.

        Raises:
            OptionError: an unknown name (the valid ones are listed) or a value of the wrong type.
        """
        options = dict(options or {})
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = [k for k in options if k not in names]
        if unknown:
            hints = "; ".join(
                f"did you mean {close[0]!r} for {k!r}?"
                for k in unknown
                if (close := difflib.get_close_matches(str(k), names, n=1))
            )
            raise OptionError(
                f"unknown lowmem option{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}. "
                f"Valid options: {', '.join(names)}. Inductor's own config goes under 'inductor'."
                + (f" ({hints})" if hints else "")
            )
        return cls(**options)

    def key(self) -> str:
        """Canonical JSON of every option that can change the compiled code."""
        data = dataclasses.asdict(self)
        return json.dumps(data, sort_keys=True, default=repr)


def _check_type(name: str, value: Any, hint: Any) -> None:
    if any(get_origin(part) is Literal for part in get_args(hint)):
        hint = Literal[*(choice for part in get_args(hint) for choice in (get_args(part) or (None,)))]
    if get_origin(hint) is Literal:
        if value not in get_args(hint) or isinstance(value, bool):
            raise OptionError(f"options[{name!r}] must be one of {', '.join(map(repr, get_args(hint)))}, not {value!r}")
        return
    if name in ("disable", "keep_exact"):
        ok = isinstance(value, tuple) and all(isinstance(v, str) and v for v in value)
        wanted = "a list of pass names" if name == "disable" else "a list of module names, or parts of them"
    elif name == "memory_budget":
        if value is not None:
            if not isinstance(value, (int, float, str)):
                raise OptionError(f"options[{name!r}] must be a share such as 0.3 or a size such as '6GiB', not {value!r}")
            budget_of(value)
        return
    elif name == "codec_group":
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= 8
        wanted = "a number of elements, 8 or more"
    elif name == "inductor":
        ok = isinstance(value, Mapping) and all(isinstance(k, str) for k in value)
        wanted = "a dict of Inductor config names and values"
    elif name == "dump":
        ok = value is None or isinstance(value, str)
        wanted = "a folder name or None"
    else:
        ok = isinstance(value, bool)
        wanted = "True or False"
    if not ok:
        raise OptionError(f"options[{name!r}] must be {wanted}, not {value!r}")
