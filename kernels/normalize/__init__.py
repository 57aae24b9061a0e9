"""Normalisation without affine, whose backward reads its output."""

from lowmem_compile.kernels.normalize.op import normalize, normalize_backward
from lowmem_compile.kernels.normalize.reference import normalize_backward_reference, normalize_reference

__all__ = ["normalize", "normalize_backward", "normalize_backward_reference", "normalize_reference"]
