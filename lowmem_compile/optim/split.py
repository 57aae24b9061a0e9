"""A model's parameters in two groups: those to project and the rest, with the reason for each that is left out."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowmem_compile.errors import OptionError

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Split:
    """What :func:`split` found.

    Attributes:
        groups: parameter groups for an optimizer: the projected one, and the rest with ``rank=None`` if there is a rest.
        projected: names of the parameters in the first.
        left_out: the reason for each parameter that is not.
    """

    groups: list[dict[str, Any]]
    projected: tuple[str, ...]
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.projected)} parameters projected, {len(self.left_out)} not"]
        lines += [f"  {name}: projected" for name in self.projected]
        return "\n".join([*lines, *(f"  {name}: not projected, {reason}" for name, reason in self.left_out.items())])


def split(
    model: nn.Module,
    *,
    rank: int | None = None,
    rank_ratio: float | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    convolutions: bool = False,
    **options: Any,
) -> Split:
    """Two parameter groups of a model: weights of linears to project, and everything else.

    Args:
        model: its trained parameters are sorted; frozen ones are left to no group.
        rank: for the projected group.
        rank_ratio: instead of a rank.
        include: patterns (``*``, ``?``, ``[...]``) for whole parameter names, such as ``"*attn*"``.
        exclude: patterns for names to leave out, such as ``"lm_head.*"``.
        convolutions: project weights of convolutions too (COAP does).
        **options: other options of the projected group.

    Returns:
        Groups with the parameters' names, ready for an optimizer.

    Raises:
        OptionError: no rank, a pattern that matches no parameter that could be projected, or nothing to project.
    """
    if (rank is None) == (rank_ratio is None):
        raise OptionError(f"split needs one of rank and rank_ratio; it got rank={rank!r} and rank_ratio={rank_ratio!r}.")
    kinds = (nn.Linear, *Convolution) if convolutions else (nn.Linear,)
    owners = {id(module.weight): module for module in model.modules() if isinstance(module, kinds)}
    tied = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Embedding)}
    candidates = [name for name, p in model.named_parameters() if p.requires_grad and id(p) in owners]
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not fnmatch.filter(candidates, pattern):
                raise OptionError(
                    f"{option}: {pattern!r} matches none of the {len(candidates)} weights that could be projected, such as "
                    f"{', '.join(candidates[:5]) or 'none at all'}. Patterns are for whole names: '*attn*', not 'attn'."
                )
    chosen: list[tuple[str, Tensor]] = []
    rest: list[tuple[str, Tensor]] = []
    left_out: dict[str, str] = {}
    for name, p in model.named_parameters():
        reason = _reason(name, p, owners, tied, include, exclude, rank)
        if not reason:
            chosen.append((name, p))
            continue
        left_out[name] = reason
        if p.requires_grad:
            rest.append((name, p))
    if not chosen:
        raise OptionError(f"split found nothing to project. {Split([], (), left_out)}")
    size = {"rank": rank} if rank is not None else {"rank_ratio": rank_ratio}
    groups: list[dict[str, Any]] = [{"params": chosen, **size, **options}]
    if rest:
        groups.append({"params": rest, "rank": None})
    return Split(groups, tuple(name for name, _ in chosen), left_out)


def _reason(
    name: str,
    p: Tensor,
    owners: Mapping[int, nn.Module],
    tied: Mapping[int, nn.Module],
    include: Sequence[str],
    exclude: Sequence[str],
    rank: int | None,
) -> str:
    """Why a parameter is not projected; empty if it is."""
    if not p.requires_grad:
        return "frozen"
    if id(p) not in owners:
        return f"{p.dim()}-dimensional, or not the weight of a linear (or, if asked for, of a convolution)"
    if id(p) in tied:
        return "tied to an embedding"
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded by name"
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return "its name matches no pattern of include"
    limit = min(p.shape[:2])
    if rank is not None and rank >= limit:
        return f"rank={rank} is not below its smaller dimension, {limit}"
    if limit < 2:
        return "one of its dimensions is 1"
    return ""
