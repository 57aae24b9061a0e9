"""Parameters that FSDP2 (``fully_shard``) has cut into rows: every rank steps its own rows.

A parameter W [O, I] is a DTensor with the placement ``Shard(0)``: rank k holds rows W_k of W, G_k of G, and the whole basis.

    right    R_k = G_k A [O_k, r]              nothing is sent; moments are those of the rows
    left     R = Σ_k L_kᵀ G_k [r, I]           r·I numbers are summed; moments are whole on every rank
    up       W_k ← W_k - η·scale·(N_k Aᵀ)      left: (L_k N)
    basis    from the whole gradient, gathered for one parameter at a time, and rank 0's result for all

FSDP itself reduces whole gradients before the optimizer sees them; those that a compiled graph gives projected are reduced by
:mod:`lowmem_compile.optim.row_gradients`. State is plain tensors: of the rows of this rank, and of bases
and left moments the same everywhere; a checkpoint of a rank is for that rank and the same number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_compile.errors import OptionError
from lowmem_compile.optim.projector import Factors, Plan


@dataclass(frozen=True)
class Ranks:
    """The ranks that hold rows of a parameter.

    Attributes:
        number: of them.
        group: their process group.
    """

    number: int
    group: Any

    def total(self, t: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, which all of them get."""
        summed = t.contiguous().clone()
        dist.all_reduce(summed, group=self.group)
        return summed


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


def local(t: Tensor) -> Tensor:
    """The rows that this rank holds; another tensor as it is."""
    if not is_sharded(t):
        return t
    with torch.no_grad():
        rows: Tensor = t.to_local()  # type: ignore[attr-defined]
    return rows


def local_shape(p: Tensor) -> tuple[int, ...]:
    """The shape of what this rank holds."""
    return tuple(local(p).shape)


def check_sharded(p: Tensor, name: str, group: Mapping[str, Any], plan: Plan | str, where: str) -> None:
    """Refuse what cannot be stepped by rows.

    Raises:
        OptionError: names the option and the way out.
    """
    if not is_sharded(p):
        return
    from torch.distributed.tensor import Shard

    placements = tuple(p.placements)  # type: ignore[attr-defined]
    if placements != (Shard(0),):
        raise OptionError(
            f"{where}: {name} is a DTensor placed as {placements}; rows of one mesh dimension (Shard(0), as fully_shard makes "
            "them) are supported. Shard it so, or leave it out of this optimizer."
        )
    needs = {"base='adafactor'": group["base"] == "adafactor", "mini=True": bool(group.get("mini"))}
    needs |= {"shared": bool(group["shared"]), "fused_backward=True": bool(group["fused_backward"])}
    wrong = [option for option, on in needs.items() if on]
    if wrong:
        raise OptionError(
            f"{where}: {name} is sharded over ranks by rows, and {wrong[0]} needs all of it at once. Use another setting for "
            "this group, or train without fully_shard (DistributedDataParallel with projected_allreduce, or average_gradients)."
        )
    if not isinstance(plan, str) and plan.side not in ("right", "left"):
        raise OptionError(f"{where}: {name} is a convolution that is sharded over ranks; put it into a group with rank=None.")


def gathered(t: Tensor) -> Tensor:
    """All rows; another tensor as it is."""
    if not is_sharded(t):
        return t
    whole: Tensor = t.full_tensor()  # type: ignore[attr-defined]
    return whole


def gathered_rows(rows: Tensor, p: Tensor) -> Tensor:
    """All rows of a tensor of which each rank holds those that belong to its rows of p."""
    if not is_sharded(p):
        return rows
    from torch.distributed.tensor import DTensor

    shape = (p.shape[0], *rows.shape[1:])
    made: Any = DTensor.from_local(
        rows.contiguous(),
        p.device_mesh,  # type: ignore[attr-defined]
        p.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )
    return gathered(made)


def ranks_of(p: Tensor) -> Ranks:
    """The ranks that hold rows of a DTensor."""
    mesh = p.device_mesh  # type: ignore[attr-defined]
    return Ranks(mesh.size(), mesh.get_group())


def total_of(p: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Sums a tensor over the ranks that hold rows of p; ``None`` if this one holds all."""
    return ranks_of(p).total if is_sharded(p) else None


def same_everywhere(factors: Factors, p: Tensor) -> Factors:
    """The factors of the first rank."""
    if not is_sharded(p):
        return factors
    made = tuple(factor.contiguous() for factor in factors)
    for factor in made:
        dist.broadcast(factor, group=p.device_mesh.get_group(), group_src=0)  # type: ignore[attr-defined]
    return made


def rows_of(t: Tensor, p: Tensor) -> Tensor:
    """Of a tensor with a row for each row of p, those that this rank holds."""
    if not is_sharded(p):
        return t
    mesh = p.device_mesh  # type: ignore[attr-defined]
    each = -(-p.shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * each, p.shape[0])
    return t[start : start + local_shape(p)[0]]


def factors_of_rows(factors: Factors, p: Tensor, plan: Plan) -> Factors:
    """The part of the factors that concerns the rows of this rank: rows of L, all of A."""
    return (rows_of(factors[0], p),) if plan.side == "left" and is_sharded(p) else factors


def is_finite(grad: Tensor) -> bool:
    """Whether a gradient is finite, on all ranks that hold rows of it."""
    finite = local(grad).isfinite().all()
    total = total_of(grad)
    return bool(finite if total is None else total((~finite).to(torch.int32)) == 0)
