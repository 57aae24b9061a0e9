"""A process in which Triton kernels are interpreted: Python functions on CPU tensors.

Triton decides when it is imported whether ``@triton.jit`` compiles or interprets, so code is generated in one process and
run in another.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Traffic:
    """What one launch of a kernel did to memory, counted load by load.

    Attributes:
        kernel: name of the Triton function.
        read: distinct bytes loaded: what must come from memory if every cache is perfect.
        written: distinct bytes stored.
        loads: bytes of all loads, repeats counted: what is asked for.
        stores: bytes of all stores.
    """

    kernel: str
    read: int
    written: int
    loads: int
    stores: int

    @property
    def moved(self) -> int:
        """Distinct bytes read and written."""
        return self.read + self.written


class Worker:
    """The process; a context manager.

    Attributes:
        launches: the kernels that ran so far, in order.
    """

    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lowmem_compile.gpu_free.interpret"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.launches: list[Traffic] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, source: str, args: Sequence[Any]) -> list[Any]:
        """Run the ``call`` of an Inductor wrapper on CPU tensors; memory it allocates is filled with NaN.

        Inputs that it changes in place are changed in the worker only.

        Raises:
            RuntimeError: the wrapper or a kernel raised; the message holds the traceback.
        """
        return list(self._ask("wrapper", source, tuple(args)))

    def call(self, function: str, *args: Any) -> Any:
        """Call ``module:function`` in the worker, where kernels are interpreted.

        Raises:
            RuntimeError: it raised; the message holds the traceback.
        """
        return self._ask("function", function, args)

    def _ask(self, kind: str, what: str, args: tuple[Any, ...]) -> Any:
        given, taken = self._process.stdin, self._process.stdout
        assert given is not None
        assert taken is not None
        pickle.dump((kind, what, args), given)
        given.flush()
        try:
            failure, result, launches = pickle.load(taken)  # noqa: S301 (our own process)
        except EOFError as error:
            raise RuntimeError(f"the interpreting process ended with status {self._process.wait()}") from error
        self.launches += [Traffic(*launch) for launch in launches]
        if failure:
            raise RuntimeError(failure)
        return result
