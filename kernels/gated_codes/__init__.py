"""Gated activations (SwiGLU, GeGLU) that keep group-wise codes of their two inputs. See README.md in this folder."""

from lowmem_compile.kernels.gated_codes.op import gated_codes
from lowmem_compile.kernels.gated_codes.reference import gated_backward_reference, gated_reference

__all__ = ["gated_backward_reference", "gated_codes", "gated_reference"]
