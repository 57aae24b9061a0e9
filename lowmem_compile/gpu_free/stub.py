"""A CUDA device that is not there: enough of one for Inductor to generate code, nothing to run it on.

Whatever asks for the device asks ``torch.cuda``, Dynamo's device interface or Triton's driver; all three are stubbed.
"""

from __future__ import annotations

import contextlib
import types
import unittest.mock
from collections.abc import Iterator
from typing import Any, Self

import torch

from lowmem_compile._torch import code_generation

H100 = types.SimpleNamespace(
    name="stub of an NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
)
"""The properties that Inductor's heuristics read: those of an H100 SXM."""


@contextlib.contextmanager
def stub_device() -> Iterator[None]:
    """In this context ``cuda:0`` is an H100 that can be compiled for. No tensor can be made on it but fake ones."""
    private = code_generation()
    from triton.runtime import driver

    interfaces: dict[Any, Any] = private.device_interface.device_interfaces
    private.device_interface.get_interface_for_device("cpu")  # its lazy registration would overwrite the stub
    before, interface = dict(interfaces), _interface(private.device_interface.DeviceInterface)
    interfaces.update({"cuda": interface, "cuda:0": interface})
    active = driver._active
    driver._active = _Driver()
    _forget(private)
    try:
        with contextlib.ExitStack() as stack:
            for name, value in _cuda_functions().items():
                stack.enter_context(unittest.mock.patch.object(torch.cuda, name, value))
            null = unittest.mock.patch.object(
                private.compile_fx, "get_cuda_device_context", return_value=contextlib.nullcontext()
            )
            stack.enter_context(null)
            yield
    finally:
        driver._active = active
        interfaces.clear()
        interfaces.update(before)
        _forget(private)


def _forget(private: types.SimpleNamespace) -> None:
    """Forget cached answers about the device."""
    for cached in (private.triton.has_triton, private.hints.DeviceProperties.create):
        clear = getattr(cached, "cache_clear", None)
        if clear is not None:
            clear()


def _cuda_functions() -> dict[str, Any]:
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda _=None: H100,
        "get_device_capability": lambda _=None: (H100.major, H100.minor),
        "get_device_name": lambda _=None: H100.name,
        "is_initialized": lambda: True,
        "synchronize": lambda _=None: None,
        "get_rng_state": lambda _=None: torch.empty(16, dtype=torch.uint8),
        "set_rng_state": lambda _state, _=None: None,
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda *_, **__: True,
    }


class _Driver:
    """Triton's driver of a device that launches nothing."""

    @staticmethod
    def get_current_target() -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", H100.major * 10 + H100.minor, H100.warp_size)

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_active_torch_device() -> torch.device:
        return torch.device("cuda", 0)

    @staticmethod
    def is_active() -> bool:
        return True


def _interface(base: type) -> type:
    """Dynamo's device interface of the stub."""

    class Worker:
        set_device = staticmethod(lambda _: None)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda _=None: H100)

    class Device:
        def __init__(self, _: Any) -> None:
            pass

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    members = {
        "device": Device,
        "Worker": Worker,
        "Event": torch.Event,
        "Stream": torch.Stream,
        "current_device": staticmethod(lambda: 0),
        "set_device": staticmethod(lambda _: None),
        "device_count": staticmethod(lambda: 1),
        "is_available": staticmethod(lambda: True),
        "synchronize": staticmethod(lambda _=None: None),
        "get_raw_stream": staticmethod(lambda _: 0),
        "exchange_device": staticmethod(lambda _: 0),
        "maybe_exchange_device": staticmethod(lambda _: 0),
        "get_device_properties": staticmethod(lambda _=None: H100),
        "get_compute_capability": staticmethod(lambda _=None: H100.major * 10 + H100.minor),
        "is_bf16_supported": staticmethod(lambda **_: True),
        "memory_allocated": staticmethod(lambda _=None: 0),
        "is_triton_capable": staticmethod(lambda _=None: True),
        "raise_if_triton_unavailable": staticmethod(lambda _=None: None),
    }
    return type("StubInterface", (base,), members)
