"""Linear + cross-entropy over a large vocabulary, in chunks over tokens; logits are never whole and never saved."""

from lowmem_compile.kernels.linear_cross_entropy.op import linear_cross_entropy
from lowmem_compile.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
