"""A Triton function with everything its compiler needs to know ahead of a launch. Imports no triton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Specialised:
    """A Triton function with what Triton specialises it on.

    Attributes:
        function: from ``@triton.jit``.
        signature: type of each argument, such as ``"*bf16"``, ``"i64"``, ``"constexpr"``.
        constants: values of the constant arguments.
        attributes: alignment, as Triton's AST source takes it.
        num_warps: warps a block.
        num_stages: software pipelining stages.
        enable_fp_fusion: products and sums may be contracted.
    """

    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    attributes: Any
    num_warps: int
    num_stages: int = 1
    enable_fp_fusion: bool = True
