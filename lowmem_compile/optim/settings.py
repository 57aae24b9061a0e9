"""The options of a parameter group, checked when the group is added.

Every key has a default; a key that is not an option of the method is an error, with the nearest name. The checks name the group,
the option, the value and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor

from lowmem_compile.errors import OptionError

ParamsLike = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

SIDES = ("std", "input")
BITS = (None, 8, 32)
FOREIGN = ("params", "param_names", "initial_lr", "name")
"""Keys that PyTorch, its schedulers and users put into groups."""
ALIASES = {
    "update_proj_gap": "update_interval",
    "proj_type": "side",
    "rank_ratio_matrix": "rank_ratio",
    "rank_ratio_cnn": "rank_ratio",
    "alpha": "scale",
    "beta1": "betas",
}
STRUCTURE = ("rank", "rank_ratio", "side", "base", "bits", "projector_bits", "block_size", "quantise_from", "shared", "mini")
"""Options that decide which tensors the state has: a resumed optimizer must have the ones of its checkpoint."""

COMMON: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.0,
    "side": "std",
    "base": "adamw",
    "bits": None,
    "projector_bits": None,
    "block_size": 256,
    "quantise_from": 4096,
    "clip_threshold": 1.0,
    "decay_rate": -0.8,
    "factored_eps": 1e-30,
    "min_scale": 1e-3,
    "scale_parameter": True,
    "refresh_in_backward": False,
    "fused_backward": False,
    "shared": (),
}


class Common(TypedDict, total=False):
    """Options that all methods have.

    Attributes:
        betas: β₁ and β₂ of ``"adamw"``; ``"adafactor"`` uses β₁ alone, and keeps no momentum if it is 0.
        eps: ε of ``"adamw"``.
        weight_decay: decoupled decay a step, in units of the learning rate.
        side: ``"std"`` projects the shorter side (published), ``"input"`` always the input side.
        base: the base update, ``"adamw"`` or ``"adafactor"``.
        bits: how moments are stored: in the parameter's dtype (``None``; float32 for float16), in float32 (32) or in block-wise
            8 bits (8).
        projector_bits: 8 stores the projector in block-wise 8 bits, ``None`` in the parameter's dtype.
        block_size: values that share a scale in 8 bits.
        quantise_from: tensors of fewer elements stay in the parameter's dtype.
        clip_threshold: RMS that an ``"adafactor"`` update is clipped to.
        decay_rate: exponent of ``"adafactor"``'s β₂ₜ = 1 - t^decay_rate.
        factored_eps: ε₁ of ``"adafactor"``, added to squared gradients.
        min_scale: ε₂ of ``"adafactor"``, the least RMS of a parameter that scales its learning rate.
        scale_parameter: ``"adafactor"`` multiplies the learning rate by the parameter's RMS.
        refresh_in_backward: in a compiled model, make a basis inside the backward pass, from the gradient of one weight at a
            time; with accumulation, from that of the first backward pass of the step. Weights with a shared projector and weights
            that are read more than once are refreshed in the step.
        fused_backward: do the whole step of a parameter inside the backward pass, so that gradients never exist together; not
            with accumulation, clipping by the global norm, ``GradScaler``, DistributedDataParallel or ``average_gradients``.
        shared: lists of matrices of one group that read the same input; each list shares one right projector.
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    side: str
    base: str
    bits: int | None
    projector_bits: int | None
    block_size: int
    quantise_from: int
    clip_threshold: float
    decay_rate: float
    factored_eps: float
    min_scale: float
    scale_parameter: bool
    refresh_in_backward: bool
    fused_backward: bool
    shared: Sequence[Sequence[Tensor]]


def check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse names that are not options.

    Raises:
        OptionError: with the nearest option.
    """
    valid = sorted(known)
    for name in names:
        if name not in valid:
            near = ALIASES.get(name) or next(iter(difflib.get_close_matches(name, valid, 1)), None)
            hint = f"; did you mean {near!r}?" if near in valid else "."
            raise OptionError(f"{where} has no option {name!r}{hint} The options are {', '.join(valid)}.")


def settle_rank(group: dict[str, Any], defaults: Mapping[str, Any], method: str, where: str) -> None:
    """Give a group its rank or rank ratio: its own, or else the constructor's.

    Raises:
        OptionError: neither has one, or both are given.
    """
    if "rank" not in group and "rank_ratio" not in group:
        if defaults["rank"] is None and defaults["rank_ratio"] is None:
            raise OptionError(
                f"{method}: {where} has no rank. Pass rank=... or rank_ratio=... to {method} or in the group; "
                "rank=None in the group leaves its parameters unprojected."
            )
        group["rank"], group["rank_ratio"] = defaults["rank"], defaults["rank_ratio"]
    group.setdefault("rank", None)
    group.setdefault("rank_ratio", None)
    rank, ratio = group["rank"], group["rank_ratio"]
    if rank is not None and ratio is not None:
        raise OptionError(f"{method}: {where} has both rank={rank} and rank_ratio={ratio}; give one of them.")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise OptionError(f"{method}: {where} has rank={rank!r}; a rank is a whole number from 1, or None for no projection.")
    if ratio is not None and not ratio > 1:
        raise OptionError(f"{method}: {where} has rank_ratio={ratio!r}; a ratio is above 1 (the rank is min(O, I) // ratio).")


def check_values(group: Mapping[str, Any], bases: Sequence[str], method: str, where: str) -> None:
    """Refuse values outside their range.

    Raises:
        OptionError: names the group, the option, the value and what is allowed.
    """

    def require(name: str, allowed: bool, what: str) -> None:
        if not allowed:
            raise OptionError(f"{method}: {where} has {name}={group[name]!r}; {what}.")

    beta1, beta2 = group["betas"]
    require("lr", float(group["lr"]) >= 0, "a learning rate is 0 or more")
    require("betas", 0 <= beta1 < 1 and 0 <= beta2 < 1, "each beta is at least 0 and below 1")
    require("eps", group["eps"] >= 0, "it is 0 or more")
    require("weight_decay", group["weight_decay"] >= 0, "it is 0 or more")
    require("side", group["side"] in SIDES, f"the side rules are {', '.join(map(repr, SIDES))}")
    require("base", group["base"] in bases, f"{method} has the base updates {', '.join(map(repr, bases))}")
    require("bits", group["bits"] in BITS, "moments are stored in the parameter's dtype (None), 8 or 32 bits")
    require("projector_bits", group["projector_bits"] in (None, 8), "it is None (the parameter's dtype) or 8")
    require("block_size", isinstance(group["block_size"], int) and group["block_size"] >= 1, "it is a whole number from 1")
    require("clip_threshold", group["clip_threshold"] > 0, "it is above 0")
    require("decay_rate", group["decay_rate"] < 0, "it is below 0 (the published value is -0.8)")
    for name in ("refresh_in_backward", "fused_backward"):
        require(name, isinstance(group[name], bool), "it is True or False")
    for name in ("update_interval", "reproject_factor"):
        if name in group:
            require(name, isinstance(group[name], int) and group[name] >= 1, "it is a whole number of steps from 1")


def shared_indices(sets: Sequence[Sequence[Any]], params: Sequence[Tensor], where: str) -> tuple[tuple[int, ...], ...]:
    """Lists of parameters that share a projector, as indices into their group.

    Raises:
        OptionError: a parameter is not in the group, is in two sets, is no matrix, or reads another width than its set.
    """
    index = {id(p): i for i, p in enumerate(params)}
    seen: set[int] = set()
    result = []
    for members in sets:
        places = []
        for member in members:
            place = member if isinstance(member, int) else index.get(id(member))
            if place is None or place >= len(params):
                raise OptionError(f"shared: a set has a parameter that is not in {where}; put all that share into one group.")
            if place in seen:
                raise OptionError(f"shared: parameter {place} of {where} is named twice; a parameter has one projector.")
            seen.add(place)
            places.append(place)
        shapes = {tuple(params[place].shape)[1:] for place in places}
        if any(params[place].dim() != 2 for place in places) or len(shapes) > 1:
            found = ", ".join("x".join(map(str, params[place].shape)) for place in places)
            raise OptionError(f"shared: a set of {where} has shapes {found}; it must hold matrices that read one input width.")
        if len(places) > 1:
            result.append(tuple(places))
    return tuple(result)
