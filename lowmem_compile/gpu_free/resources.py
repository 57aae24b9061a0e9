"""Registers, spills and shared memory of Triton kernels, compiled ahead of time for GPUs that are not there.

NVIDIA: Triton's PTX assembled by the ptxas of Triton's wheel, resources read from the binary. AMD: read from the assembly's
metadata. A kernel that Inductor generated for the stubbed H100 is compiled with the first configuration that Inductor would
try; on other targets Inductor might choose other block sizes.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
import unittest.mock
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lowmem_compile._torch import code_generation
from lowmem_compile.gpu_free.specialised import Specialised
from lowmem_compile.gpu_free.stub import stub_device

TARGETS: Mapping[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Backend, architecture and threads a warp, by name."""


@dataclass(frozen=True)
class Resources:
    """What one thread, and one block, of a compiled kernel takes.

    Attributes:
        registers: 32-bit registers a thread (vector registers on AMD).
        spilled: bytes of local memory a thread; on AMD the number of spilled registers. 0 for none.
        shared: bytes of shared memory a block.
    """

    registers: int
    spilled: int
    shared: int


def compile_for(kernel: Specialised, target: str) -> Resources:
    """Compile for one of :data:`TARGETS` and read the resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel.function, dict(kernel.signature), dict(kernel.constants), kernel.attributes)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": kernel.enable_fp_fusion}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    if TARGETS[target][0] == "hip":
        return _of_assembly(compiled.asm["amdgcn"])
    return _of_binary(compiled.asm["cubin"])


def of_inductor(name: str, source: str) -> Specialised:
    """A kernel that Inductor generated, from its source, in its first configuration."""
    private = code_generation()
    with stub_device(), unittest.mock.patch.object(private.triton_helpers, "set_driver_to_gpu", return_value=None):
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False, encoding="utf-8") as file:
            file.write(source)  # Triton reads a function's source from its file when the function is made
        spec = importlib.util.spec_from_file_location(name, file.name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuned = getattr(module, name)
        config = tuned.configs[0]
        meta = tuned._create_compile_meta(config)
    Path(file.name).unlink()
    return Specialised(tuned.fn, meta["signature"], meta["constants"], meta["configs"][0], meta["num_warps"], meta["num_stages"])


def _of_binary(binary: bytes) -> Resources:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"])


def _of_assembly(assembly: str) -> Resources:
    found = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    spilled = found["vgpr_spill_count"] + found["sgpr_spill_count"]
    return Resources(found["vgpr_count"], spilled, found["group_segment_fixed_size"])
