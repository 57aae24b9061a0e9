"""Where a gradient is projected, to which rank, and the two maps down and up.

Shapes: G [O, I], rank r. A projector is a tuple of factors, and a side says what they do:

    side     factors           down                 up
    right    A [I, r]          G A      [O, r]      R Aᵀ      the input side: G A = dYᵀ (X A)
    left     L [O, r]          Lᵀ G     [r, I]      L R       the output side: Lᵀ G = (dY L)ᵀ X
    both     U [O, m], V [I, n]  convolutions: both channel modes of G [O, I, ...] (Tucker-2)
    out      U [O, m]          convolutions with a kernel of one tap: the output mode alone

Side rules (section 2.1 of GaLore, arXiv:2403.03507, and all methods after it): ``"std"`` projects the shorter side, right
if O >= I. ``"input"`` always projects the input side: the one that lets a compiled backward pass keep X A in place of X.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_compile.errors import OptionError

Side = Literal["right", "left", "both", "out"]
Factors = tuple[Tensor, ...]

SMALLEST_CONVOLUTION = 9216
"""Convolution weights of at most so many elements (32·32·3·3) are left unprojected, as in COAP's released code."""


@dataclass(frozen=True)
class Plan:
    """How one gradient, or several stacked ones that share a projector, is projected.

    Attributes:
        side: which modes.
        shape: of the gradient; for a shared projector, of the gradients stacked along O.
        ranks: one rank a factor.
    """

    side: Side
    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def factor_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes of the factors."""
        modes = {"right": (1,), "left": (0,), "both": (0, 1), "out": (0,)}[self.side]
        return tuple((self.shape[mode], rank) for mode, rank in zip(modes, self.ranks, strict=True))

    def low_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the projected gradient of a parameter of this shape."""
        match self.side:
            case "right":
                return (shape[0], *self.ranks)
            case "both":
                return (*self.ranks, *shape[2:])
            case _:
                return (*self.ranks, *shape[1:])


def down(G: Tensor, factors: Factors, side: Side) -> Tensor:
    """The projected gradient."""
    match side:
        case "right":
            return G @ factors[0]
        case "left":
            return factors[0].T @ G
        case "both":
            return torch.einsum("ab...,am,bn->mn...", G, *factors)
        case "out":
            return torch.einsum("a...,am->m...", G, factors[0])


def up(R: Tensor, factors: Factors, side: Side) -> Tensor:
    """What a projected tensor stands for, in the shape of the gradient."""
    match side:
        case "right":
            return R @ factors[0].T
        case "left":
            return factors[0] @ R
        case "both":
            return torch.einsum("mn...,am,bn->ab...", R, *factors)
        case "out":
            return torch.einsum("m...,am->a...", R, factors[0])


def choose_side(shape: tuple[int, ...], rule: str) -> Side:
    """The side of a matrix [O, I] under a side rule."""
    return "right" if rule == "input" or shape[0] >= shape[1] else "left"


def plan_matrix(shape: tuple[int, ...], group: Mapping[str, Any], name: str, *, shared: bool = False) -> Plan:
    """The plan of a matrix, or of matrices stacked along O that share a projector.

    Raises:
        OptionError: the rank is not below both dimensions.
    """
    limit = min(shape)
    rank = group["rank"] if group["rank"] is not None else max(int(limit // group["rank_ratio"]), 1)
    if rank >= limit:
        raise OptionError(
            f"rank={rank} of {name} is not below the smaller dimension of its shape {'x'.join(map(str, shape))}: nothing would "
            f"be projected. Use a rank below {limit}, or put the parameter into a group with rank=None "
            "(lowmem_compile.optim.split does both)."
        )
    return Plan("right" if shared else choose_side(shape, group["side"]), shape, (rank,))


def plan_convolution(shape: tuple[int, ...], group: Mapping[str, Any], name: str) -> Plan:
    """The Tucker-2 plan of a convolution weight [O, I, ...]; one mode for a kernel of one tap.

    With a rank ratio ρ: m = O//√ρ and n = I//√ρ; one tap: m = O//ρ. With a rank: that rank on every projected mode.

    Raises:
        OptionError: a rank is not below its channel dimension.
    """
    modes = 1 if math.prod(shape[2:]) == 1 else 2
    if group["rank"] is not None:
        ranks = (group["rank"],) * modes
    else:
        ratio = group["rank_ratio"] if modes == 1 else group["rank_ratio"] ** 0.5
        ranks = tuple(max(int(size // ratio), 1) for size in shape[:modes])
    for rank, size in zip(ranks, shape, strict=False):
        if rank >= size:
            raise OptionError(
                f"rank={rank} of {name} is not below its {size} channels (shape {'x'.join(map(str, shape))}). Use a smaller rank "
                "or a rank_ratio, or put the parameter into a group with rank=None."
            )
    return Plan("both" if modes == 2 else "out", shape, ranks)


def make_plan(shape: tuple[int, ...], group: Mapping[str, Any], name: str, *, convolutions: bool) -> Plan | str:
    """How a parameter of this shape is projected in this group, or the reason why it is not.

    Args:
        shape: of the parameter.
        group: a checked parameter group.
        name: of the parameter, for messages.
        convolutions: the method projects convolutions.

    Raises:
        OptionError: the group asks for a rank that is not below the projected dimension.
    """
    if group["rank"] is None and group["rank_ratio"] is None:
        return "its group has rank=None"
    if len(shape) < 2:
        return f"{len(shape)}-dimensional: only matrices are projected" + (" and convolutions" if convolutions else "")
    if len(shape) == 2:
        return plan_matrix(shape, group, name)
    if not convolutions:
        return f"{len(shape)}-dimensional: this method projects matrices only (COAP projects convolutions)"
    if math.prod(shape) <= SMALLEST_CONVOLUTION:
        return f"a convolution of {SMALLEST_CONVOLUTION} elements or fewer"
    return plan_convolution(shape, group, name)
