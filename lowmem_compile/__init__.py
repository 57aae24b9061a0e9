"""Training with less memory: ``torch.compile(model, backend="lowmem")``.

The backend is registered through the ``torch_dynamo_backends`` entry point, so using it needs no import of
this package. Importing it has no side effects and does not import torch; public names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowmem_compile.api import explain, report
    from lowmem_compile.errors import LowMemError
    from lowmem_compile.optim.loqt.convert import loqt
    from lowmem_compile.options import Options

__version__ = "0.1.0"

__all__ = ["LowMemError", "Options", "__version__", "explain", "loqt", "report"]

_HOME_OF = {
    "LowMemError": "lowmem_compile.errors",
    "Options": "lowmem_compile.options",
    "explain": "lowmem_compile.api",
    "loqt": "lowmem_compile.optim.loqt.convert",
    "report": "lowmem_compile.api",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use (PEP 562)."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
