"""Kernels, one operation a folder; installed as ``lowmem_compile.kernels``."""
