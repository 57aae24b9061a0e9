"""The process that interprets: see :mod:`.worker`, which starts it.

Triton's interpreter falls short of a GPU in four places, mended here: libdevice's functions are missing (numpy's stand in),
float32 → bfloat16 truncates (every GPU rounds to nearest even), a matrix product takes the bits of bfloat16 for numbers, and a
reduction with a function of its own takes a Python call an element (here: one a level of a tree).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import pickle
import re
import sys
import tempfile
import traceback
import types
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import special

from lowmem_compile._torch import code_generation

Array = npt.NDArray[Any]
Record = tuple[str, int, int, int, int]
RECORDS: list[Record] = []
"""Name, bytes read, written (distinct), loaded, stored (all), one a launch since the last answer."""

LARGEST_BLOCK = {"X": 4096, "Y": 256, "Z": 64, "R": 256}
"""Elements a block, by the first letter of the dimension. Inductor leaves a mask out where every block it allows (X: up to 4096)
divides the size: a larger one would write beyond the end."""

LIBDEVICE: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "ceil": np.ceil,
    "cos": np.cos,
    "erf": special.erf,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "isinf": np.isinf,
    "isnan": np.isnan,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "nearbyint": np.rint,
    "pow": np.power,
    "rsqrt": lambda x: (1.0 / np.sqrt(x)).astype(x.dtype),
    "sin": np.sin,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "trunc": np.trunc,
}


def main() -> int:
    """Answer requests from standard input until it ends."""
    given = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what kernels and torch print must not end up between the answers
    _mend()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(prefix="lowmem-interpret-") as folder, np.errstate(all="ignore"):
        sources = Sources(Path(folder))
        while True:
            try:
                kind, what, args = pickle.load(given)  # noqa: S301 (from the process that started this one)
            except EOFError:
                return 0
            RECORDS.clear()
            try:
                result: Any = sources.call(what, args) if kind == "wrapper" else _function(what)(*args)
                answer = ("", result, list(RECORDS))
            except Exception:  # noqa: BLE001 (the other process raises it)
                answer = (traceback.format_exc(), None, list(RECORDS))
            pickle.dump(answer, answers)
            answers.flush()


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


class Sources:
    """Generated modules, loaded once each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded: dict[str, types.ModuleType] = {}

    def call(self, wrapper: str, args: tuple[Any, ...]) -> Any:
        """Run a wrapper on CPU tensors."""
        importlib.import_module("lowmem_compile.kernels.group_codes")  # our operations, which wrappers call by name
        return self.module(on_cpu(wrapper)).call(list(args))

    def module(self, source: str) -> types.ModuleType:
        """The module of a source; its Triton functions are interpreted."""
        if source not in self.loaded:
            path = self.folder / f"generated_{len(self.loaded)}.py"
            path.write_text(source, encoding="utf-8")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            self.loaded[source] = module
            with unittest.mock.patch.object(code_generation().AsyncCompile, "triton", self.kernel):
                spec.loader.exec_module(module)
        return self.loaded[source]

    def kernel(self, name: str, source: str, **_: Any) -> Kernel:
        """What stands in for ``AsyncCompile.triton``."""
        module = self.module(source)
        module.libdevice = Libdevice()  # type: ignore[attr-defined]
        return Kernel(getattr(module, name))


class Kernel:
    """A generated kernel with Inductor's own launcher, in blocks that suit an interpreter.

    Each dimension is cut into two blocks where Inductor would cut it into more: block sizes change no result but the order
    of sums, and the interpreter's time is that of the number of blocks.
    """

    def __init__(self, tuned: Any) -> None:
        self.tuned = tuned
        self.names = list(tuned.triton_meta["signature"])
        self.config = tuned.configs[0]
        self.blocks = dict(self.config.kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Launch, as the wrapper does."""
        sizes = dict(zip((n for n in self.names if n not in self.blocks), args, strict=False))
        shared: dict[str, Any] = self.tuned.inductor_meta.get("combo_grid_meta", {})
        for block in self.blocks:
            name, _, part = block.partition("_")  # XBLOCK, or XBLOCK_2 of the third kernel that shares the launch
            numel = shared.get(f"xnumel_{part}") if part.isdecimal() else sizes.get(f"{block.removesuffix('BLOCK').lower()}numel")
            if (block.endswith("BLOCK") or name == "XBLOCK") and numel is not None:
                half = 1 << max(-(-int(numel) // 2) - 1, 0).bit_length()
                limit = LARGEST_BLOCK[block[0]]
                self.config.kwargs[block] = min(max(half, self.blocks[block]), max(limit, self.blocks[block]))
        self.tuned.configs = [self.config]
        return self.tuned.run(*args, **kwargs)


def on_cpu(wrapper: str) -> str:
    """A wrapper's source with the CPU in place of ``cuda:0``."""
    replaced = {
        r"^from torch\._C import _cuda_getCurrentRawStream as get_raw_stream$": "get_raw_stream = lambda _: 0",
        r"^empty_strided_cuda = .*$": "from lowmem_compile.gpu_free.interpret import poisoned as empty_strided_cuda",
        r"torch\.cuda\._DeviceGuard\(0\)": "__import__('contextlib').nullcontext()",
        r"torch\.cuda\.set_device\(0\)": "pass",
        r"device\(type='cuda', index=0\)": "device(type='cpu')",
        r"device='cuda(:0)?'": "device='cpu'",
        r"device_str='cpu'": "device_str='cuda'",
    }
    for old, new in replaced.items():
        wrapper = re.sub(old, new, wrapper, flags=re.MULTILINE)
    return wrapper


def poisoned(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory of the worst kind: NaN, or a conspicuous integer."""
    out = torch.empty_strided(size, stride, dtype=dtype)
    if not out.numel():
        return out
    flat = out.as_strided((1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)),), (1,))
    flat.fill_(math.nan if dtype.is_floating_point or dtype.is_complex else (True if dtype == torch.bool else 77))
    return out


class Libdevice:
    """libdevice for interpreted kernels: each function by numpy, in the argument's dtype."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in LIBDEVICE:
            raise AttributeError(f"the interpreter has no libdevice.{name}; add it to LIBDEVICE")
        return lambda *args: _elementwise(LIBDEVICE[name], *args)


def _elementwise(function: Callable[..., Any], *args: Any) -> Any:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    data = [a.handle.data if isinstance(a, tl.tensor) else a for a in args]
    result = function(*data)
    tensor = next(a for a in args if isinstance(a, tl.tensor))
    scalar = tl.int1 if result.dtype == np.bool_ else tensor.type.scalar
    kind = tl.block_type(scalar, list(result.shape)) if tensor.type.is_block() else scalar
    return tl.tensor(TensorHandle(result, scalar), kind)


def _mend() -> None:
    """Correct rounding to bfloat16, count memory traffic, keep Triton's driver out."""
    from triton.runtime import interpreter

    private = code_generation()
    private.triton_helpers.set_driver_to_gpu = lambda: None
    private.triton_helpers.libdevice = Libdevice()
    builder = interpreter.InterpreterBuilder
    _round_to_bfloat16(interpreter)
    _multiply_bfloat16(interpreter)
    interpreter.ReduceOps.generic_reduce = _tree_reduce
    counted = Counted(interpreter)
    builder.create_masked_load = counted.load
    builder.create_masked_store = counted.store
    launch = interpreter.GridExecutor.__call__

    def recorded(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with counted.launch(executor.fn.__name__):
            return launch(executor, *args, **kwargs)

    interpreter.GridExecutor.__call__ = recorded


def _round_to_bfloat16(interpreter: Any) -> None:
    import triton.language as tl

    plain = interpreter.InterpreterBuilder.cast_impl

    def cast(builder: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == tl.bfloat16 and after != tl.bfloat16:
            wide = (source.data.astype(np.uint32) << 16).view(np.float32)
            handle = interpreter.TensorHandle(wide, tl.float32)
            return handle if after == tl.float32 else plain(builder, handle, target)
        if after == tl.bfloat16 and before != tl.bfloat16:
            return interpreter.TensorHandle(to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        return plain(builder, source, target)

    def convert(builder: Any, source: Any, target: Any, _rounding: Any = None) -> Any:
        return cast(builder, source, target)

    interpreter.InterpreterBuilder.cast_impl = cast
    interpreter.InterpreterBuilder.create_fp_to_fp = convert


def _multiply_bfloat16(interpreter: Any) -> None:
    import triton.language as tl

    plain = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(builder: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        return plain(builder, widened(a), widened(b), total, *rest)

    interpreter.InterpreterBuilder.create_dot = dot


def _tree_reduce(reduction: Any, given: Any) -> list[Any]:
    """Neighbours are combined, then neighbouring results: log₂(n) calls for n elements, of whatever function."""
    tensors, axis = reduction.unravel(given, reduction.axis)
    rank = tensors[0].handle.data.ndim
    data = [np.moveaxis(t.handle.data, axis, 0) for t in tensors]
    while len(data[0]) > 1:
        paired = len(data[0]) // 2 * 2
        halves = [d[start:paired:2] for start in (0, 1) for d in data]
        both = [reduction.to_tensor(half, tensors[i % len(data)].dtype) for i, half in enumerate(halves)]
        result = reduction.combine_fn.fn(*both)
        result = result if isinstance(result, tuple) else (result,)
        made = [np.broadcast_to(r.handle.data, halves[i].shape) for i, r in enumerate(result)]
        data = [np.concatenate([m, d[paired:]]) for m, d in zip(made, data, strict=True)]
    kept = [d[0] for d in data]
    if reduction.keep_dims:
        kept = [k.reshape((1,) * rank) if reduction.axis is None else np.expand_dims(k, axis) for k in kept]
    return [reduction.to_tensor(k, t.dtype) for k, t in zip(kept, tensors, strict=True)]


def to_bfloat16(x: Array) -> Array:
    """The bits of float32 numbers as bfloat16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(x.shape)


class Counted:
    """Loads and stores of the interpreter, counted by launch."""

    def __init__(self, interpreter: Any) -> None:
        self.plain_load = interpreter.InterpreterBuilder.create_masked_load
        self.plain_store = interpreter.InterpreterBuilder.create_masked_store
        self.loaded: list[tuple[Array, int]] = []
        self.stored: list[tuple[Array, int]] = []
        self.load = lambda builder, ptrs, mask, *rest: self._note(self.loaded, self.plain_load, builder, ptrs, mask, rest)
        self.store = lambda builder, ptrs, value, mask, *rest: self._note_store(builder, ptrs, value, mask, rest)

    @contextlib.contextmanager
    def launch(self, name: str) -> Iterator[None]:
        """Count what happens in here as one launch."""
        self.loaded.clear()
        self.stored.clear()
        yield
        read, loads = _bytes(self.loaded)
        written, stores = _bytes(self.stored)
        RECORDS.append((name, read, written, loads, stores))

    @staticmethod
    def _note(to: list[tuple[Array, int]], plain: Any, builder: Any, ptrs: Any, mask: Any, rest: Any) -> Any:
        to.append(_addresses(ptrs, mask))
        return plain(builder, ptrs, mask, *rest)

    def _note_store(self, builder: Any, ptrs: Any, value: Any, mask: Any, rest: Any) -> Any:
        self.stored.append(_addresses(ptrs, mask))
        return self.plain_store(builder, ptrs, value, mask, *rest)


def _addresses(ptrs: Any, mask: Any) -> tuple[Array, int]:
    size = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
    return np.asarray(ptrs.data)[np.broadcast_to(mask.data, np.shape(ptrs.data))].ravel(), size


def _bytes(accesses: list[tuple[Array, int]]) -> tuple[int, int]:
    """Distinct bytes, and bytes with repeats."""
    distinct = 0
    for size in {s for _, s in accesses}:
        distinct += size * int(np.unique(np.concatenate([a for a, s in accesses if s == size])).size)
    return distinct, sum(a.size * s for a, s in accesses)


if __name__ == "__main__":
    # Wrappers import `poisoned` from this module by its real name: that copy shares nothing that matters with this one.
    sys.exit(main())
