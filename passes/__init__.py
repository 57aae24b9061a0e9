"""Graph rewrites, one idea a file; installed as ``lowmem_compile.passes``."""
