"""Exact resume: which options a checkpoint must share with the optimizer, and loading without casts.

``Optimizer.load_state_dict`` casts every tensor of the state to its parameter's dtype: codes of 8-bit moments would become
floating point, and float32 statistics of a bfloat16 parameter would be rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lowmem_compile.errors import OptionError
from lowmem_compile.optim.settings import STRUCTURE


def check_structure(method: str, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> None:
    """Refuse a checkpoint whose state has other shapes or another storage.

    Raises:
        OptionError: names the group, the option, both values and the way out.
    """
    for number, (group, loaded) in enumerate(zip(ours, theirs, strict=False)):  # PyTorch compares the numbers of groups
        for name in STRUCTURE:
            if name in group and name in loaded and _plain(group[name]) != _plain(loaded[name]):
                raise OptionError(
                    f"group {number} has {name}={group[name]!r}, the checkpoint {name}={loaded[name]!r}: the stored state would "
                    f"not fit. Build {method} with {name}={loaded[name]!r}, or start without the optimizer's state."
                )


def take_over(state: dict[Any, dict[str, Any]], params: Sequence[Tensor], loaded: dict[str, Any]) -> None:
    """Put copies of a checkpoint's tensors into the state, in the dtypes they were saved in, on the parameters' devices."""
    keys = [key for group in loaded["param_groups"] for key in group["params"]]
    for key, p in zip(keys, params, strict=True):
        for name, value in loaded["state"].get(key, {}).items():
            if isinstance(value, Tensor):
                state[p][name] = value.to(device=p.device, copy=True)


def _plain(value: Any) -> Any:
    """Tuples and lists alike, whatever the serialisation made of them."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
