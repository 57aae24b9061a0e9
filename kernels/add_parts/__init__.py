"""An addition that is a call of its own."""

from lowmem_compile.kernels.add_parts.op import add_parts

__all__ = ["add_parts"]
