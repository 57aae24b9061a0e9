"""A matrix of zeros with some rows filled, made in one call of its own."""

from lowmem_compile.kernels.scatter_rows.op import scatter_rows

__all__ = ["scatter_rows"]
