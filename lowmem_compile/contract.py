"""The contract every pass keeps: find (the pattern) · check (may I?) · rewrite (cannot fail).

A pass holds no state between calls; everything it needs is in the match and the context.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import sympy
    from torch import fx

    from lowmem_compile.options import Options


class Stage(enum.Enum):
    """Where in the pipeline a pass runs."""

    DYNAMO = "dynamo"
    """torch IR, parameters are inputs, before AOTAutograd."""
    JOINT = "joint"
    """ATen forward + backward graph, before the partition."""
    BACKWARD = "backward"
    """The backward graph after the partition: what is alive at once in it, not what crosses into it."""
    SAVED = "saved"
    """The forward and backward graph after the partition."""


class Numerics(enum.Enum):
    """What a pass does to the numbers."""

    EXACT = "exact"
    """Bitwise the same result."""
    REASSOCIATED = "reassociated"
    """The same mathematics, other rounding."""
    APPROXIMATE = "approximate"
    """Another gradient."""


@dataclass(frozen=True)
class Match:
    """A place where the pattern of a pass was found."""

    node: fx.Node
    info: Any = None


@dataclass(frozen=True)
class Decline:
    """Why a match is not rewritten: a stable reason code and one sentence for this place."""

    code: str
    reason: str


@dataclass(frozen=True)
class Rewrite:
    """A match that was rewritten: what the partition needs to know to judge whether it paid."""

    pass_name: str
    site: str
    """Name of the match node."""
    displaced: frozenset[str] = frozenset()
    """Names of the tensors that need not be saved any more if the rewrite pays."""
    alike: tuple[Any, ...] = ()
    """Sites with an equal value are treated alike by the partitioner."""
    saves: int = 0
    """Bytes that the site's formula promises."""


@dataclass(frozen=True)
class Context:
    """What a pass may look at besides the graph."""

    options: Options
    device: str = "cpu"
    skip: frozenset[str] = frozenset()
    """Names of match nodes that must not be rewritten (the partition showed that they do not pay)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Read-only facts the stage provides (autocast dtype per node, parameters, ...)."""


@runtime_checkable
class Pass(Protocol):
    """One rewrite."""

    name: str
    stage: Stage
    numerics: Numerics

    def find(self, graph: fx.Graph, ctx: Context) -> list[Match]:
        """All places of the pattern, in graph order."""
        ...

    def check(self, match: Match, ctx: Context) -> Decline | None:
        """``None`` if the match may be rewritten, otherwise the reason why not."""
        ...

    def rewrite(self, graph: fx.Graph, match: Match, ctx: Context) -> None:
        """Change the graph. Called only after ``check`` allowed it; cannot fail."""
        ...

    def bytes_saved(self, match: Match, ctx: Context) -> sympy.Expr:
        """Bytes no longer saved for backward, as a formula in the shapes."""
        ...


@runtime_checkable
class DescribingPass(Pass, Protocol):
    """A pass that says more of a rewritten place than its name."""

    def describe(self, match: Match, ctx: Context) -> str:
        """One sentence for the report, asked for before the rewrite."""
        ...


@runtime_checkable
class JointPass(Pass, Protocol):
    """A pass whose rewrites are kept only where they lower the bytes saved."""

    def displaced(self, match: Match) -> list[fx.Node]:
        """The tensors that need not be saved any more if the rewrite pays."""
        ...

    def site_class(self, match: Match) -> tuple[Any, ...]:
        """Sites that the partitioner treats alike have the same class."""
        ...
