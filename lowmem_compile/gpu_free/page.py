"""``python -m lowmem_compile.gpu_free.page``: the tables of ``docs/kernels.md``, counted and compiled without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import torch

from lowmem_compile.gpu_free.blocks import BLOCKS, example, model
from lowmem_compile.gpu_free.generate import Generated, generate
from lowmem_compile.gpu_free.operations import operations
from lowmem_compile.gpu_free.resources import TARGETS, Resources, compile_for, of_inductor
from lowmem_compile.gpu_free.specialised import Specialised
from lowmem_compile.gpu_free.worker import Worker
from lowmem_compile.kernels.activation_codes.tables import step_table
from lowmem_compile.kernels.group_codes import codec_named

HEAD = """\
# Kernels without a GPU

Written by `make kernels`; what was measured on a GPU is in [gpu.md](gpu.md). Nothing on this page is a time: code is generated
and compiled for GPUs that are not there, and run by Triton's interpreter on CPU tensors, which counts every byte.

**Our kernels are not used by the pipeline yet.** `lowmem::encode_groups`, `lowmem::step_activation` and `lowmem::gated_codes`
are emitted by no pass: `torch.compile(model, backend="lowmem")` runs kernels that Inductor generated. The first two tables
count what ours would move and take; the third is about the pipeline as it is.

| claim | shown by |
| --- | --- |
| our kernels compute their definitions, codes bit for bit | Triton's interpreter against plain PyTorch: `test_own_kernels.py` |
| they compile; registers, spills, shared memory | Triton's compilers and ptxas, ahead of time; no launch |
| Inductor's kernels of whole models compute what eager does | its own wrapper, interpreted in float32: `test_whole_models.py` |
| numbers of kernels, bytes moved | the generated wrapper, and its loads and stores in the interpreter |

Both files are in `tests/gpu_free`.

What only a GPU can tell:

- time: launches, occupancy, caches, coalescing, how the kernels overlap with library calls;
- which configuration autotuning picks, and whether that one spills; here it is the first that Inductor would try on an H100;
- the library calls: cuBLAS's and the GPU's flash attention, whose kernels and bytes are not counted. Operations that PyTorch
  chooses by device are the CPU's here, so the attention's saved tensors and layouts may differ;
- the last bits of floating-point functions (numpy's stand for libdevice's) and the order of sums;
- races and misaligned accesses: the interpreter runs one program after another;
- peak memory with a GPU's allocator.
"""


def own_kernels() -> dict[str, Specialised]:
    """Our kernels in the variants that are compiled ahead of time, rows of 4096 bfloat16 elements."""
    from lowmem_compile.kernels.activation_codes import forward_triton as steps
    from lowmem_compile.kernels.gated_codes import forward_triton as gated
    from lowmem_compile.kernels.group_codes import encode_triton as groups

    made = {f"encode int{b}": groups.specialised(codec_named(f"int{b}"), 4096, "bf16") for b in (3, 4, 5, 6, 7, 8, 10)}
    made["encode int4, stochastic"] = groups.specialised(codec_named("int4", stochastic=True), 4096, "bf16")
    made["encode int8, stochastic"] = groups.specialised(codec_named("int8", stochastic=True), 4096, "bf16")
    for name, kind, bits in (
        ("gelu", "derivative", 2),
        ("gelu", "derivative", 4),
        ("silu", "derivative", 4),
        ("mish", "primitive", 2),
    ):
        made[f"{name}, {kind} codes of {bits} bits"] = steps.specialised(name, step_table(name, kind, bits), "bf16")
    made["SwiGLU, encode int4"] = gated.specialised("silu", codec_named("int4"), 4096, "bf16")
    made["GeGLU, encode int4"] = gated.specialised("gelu", codec_named("int4"), 4096, "bf16")
    return made


def resources_table() -> Iterator[str]:
    """Registers, spills and shared memory of our kernels."""
    yield "| kernel | " + " | ".join(f"{t}: registers · spilled · shared" for t in TARGETS) + " |"
    yield "| --- |" + " --- |" * len(TARGETS)
    for name, kernel in own_kernels().items():
        cells = [compile_for(kernel, target) for target in TARGETS]
        yield f"| {name} | " + " | ".join(f"{r.registers} · {r.spilled} · {r.shared}" for r in cells) + " |"


def operations_table(worker: Worker) -> Iterator[str]:
    """What Inductor moves for each operation, and what our kernel does."""
    yield "| operation | Inductor: kernels | moved / least | asked for / least | ours: kernels | moved / least |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, operation in operations().items():
        torch.compiler.reset()
        worker.launches.clear()
        results = generate(operation.function, worker, backend="inductor")(*operation.args)
        tensors = [*operation.args, *(results if isinstance(results, tuple) else (results,))]
        least = sum(t.numel() * t.element_size() for t in tensors)
        row = [len(worker.launches), *_shares(worker, least)]
        ours = ["–", "–"]
        if operation.kernel:
            worker.launches.clear()
            worker.call(*operation.kernel)
            ours = [str(len(worker.launches)), _shares(worker, least)[0]]
        yield f"| {name} | " + " | ".join(map(str, [*row, *ours])) + " |"


def _shares(worker: Worker, least: int) -> tuple[str, str]:
    moved = sum(launch.moved for launch in worker.launches) / least
    asked = sum(launch.loads + launch.stores for launch in worker.launches) / least
    return f"{moved:.2f}", f"{asked:.2f}"


def step(kind: str, variant: str, layers: int, worker: Worker | None) -> Generated:
    """One training step of a model in bfloat16, its code generated and, with a worker, interpreted."""
    torch.compiler.reset()
    torch.manual_seed(0)
    net, x = model(kind, layers).bfloat16(), example(torch.bfloat16)
    backend, options = VARIANTS[variant]
    generated = generate(net, worker, backend=backend, options=options)
    if worker is not None:
        worker.launches.clear()
    generated(x).float().square().mean().backward()
    return generated


def _launches(generated: Generated) -> tuple[int, int]:
    return len(generated.code("forward").launches), len(generated.code("backward").launches)


def models_table(worker: Worker) -> Iterator[str]:
    """Kernels and bytes of whole models, and what their generated kernels take; the comparison below."""
    yield (
        "| model | backend | kernels forward | backward | a block: forward | backward | library calls | MiB moved | distinct | "
        + " | ".join(f"{t}: most registers · spilled" for t in ("sm_80", "sm_90"))
        + " |"
    )
    yield "| --- |" + " --- |" * 10
    more: dict[str, list[str]] = {}
    for kind in BLOCKS:
        base = (0, 0.0)
        for variant in VARIANTS:
            one, two = _launches(step(kind, variant, 1, None)), step(kind, variant, 2, worker)
            launches, codes = _launches(two), two.codes
            block = [b - a for a, b in zip(one, launches, strict=True)]
            kernels = {source: name for c in codes for name, source in c.kernels.items()}
            cells = [_most([compile_for(of_inductor(n, s), t) for s, n in kernels.items()]) for t in ("sm_80", "sm_90")]
            calls, moved = sum(len(c.extern) for c in codes), sum(launch.moved for launch in worker.launches) / 2**20
            row = [kind, variant, *launches, *block, calls, f"{moved:.2f}", len(kernels), *cells]
            yield "| " + " | ".join(map(str, row)) + " |"
            if variant == "inductor":
                base = (sum(launches), moved)
            else:
                more.setdefault(variant, []).append(f"{kind} {sum(launches) - base[0]:+d} ({moved / base[1]:.2f} × the bytes)")
    yield ""
    yield "Kernels a step of two layers, against Inductor:"
    yield ""
    for variant, found in more.items():
        yield f"- {variant}: {', '.join(found)}."
    yield ""
    yield MORE


def _most(found: list[Resources]) -> str:
    return f"{max(r.registers for r in found)} · {sum(r.spilled for r in found)}"


def main() -> int:
    """Print the page."""
    print(HEAD)  # noqa: T201
    with Worker() as worker:
        for title, lines in sections(worker):
            print(f"\n## {title}\n", flush=True)  # noqa: T201
            for line in lines:
                print(line, flush=True)  # noqa: T201
    return 0


def sections(worker: Worker) -> Iterator[tuple[str, Iterator[str]]]:
    """Titles and the lines below each."""
    yield "Our kernels", _with(RESOURCES, resources_table())
    yield "Inductor's kernel or ours", _with(OPERATIONS, operations_table(worker))
    yield "Whole models", _with(MODELS, models_table(worker))


def _with(text: str, table: Iterator[str]) -> Iterator[str]:
    yield text
    yield from table


RESOURCES = """\
Compiled ahead of time by Triton's own compilers for rows of 4096 bfloat16 elements and 64-bit sizes. Registers a thread
(vector registers on gfx942), spilled bytes a thread (registers on gfx942), bytes of shared memory a block (on sm_90 1024 of
them are the system's).
"""
OPERATIONS = """\
On bfloat16 [64, 1024]. *Least* is the size of all inputs and outputs. *Moved* counts each distinct byte that a kernel loads or
stores once a kernel; *asked for* counts every load. Where Inductor moves the least ours is not listed, if
there is one.
"""
MODELS = """\
Two hand-written layers of width 128 and a linear behind them, batch 2 × 32, in bfloat16: one training step. Kernels are
launches of Triton kernels; *a block* is what the second layer adds to a model of one; library calls are matrix products and
attention; *moved* as above, over all Triton kernels; *distinct* counts different kernels. They are compiled in the first
configuration that Inductor would try on an H100. *exact* is `gradients="exact"` with `codec="none"`.
"""
MORE = """\
With its default options lowmem launches more Triton kernels than Inductor, and they move more bytes: the price of the memory
that the codes save. In the ViT most of the further kernels belong to tensors that library calls write or read, with no Triton
kernel beside them to be fused with: forward they encode the values, the attention's output and the input of the last linear,
backward they decode them. Two more compute scales of the residual stream in front of a normalisation: they add the same
tensors once more. Codes of an activation's input are written and read by kernels that the model has anyway. Other sizes give
other counts: here rows are short, scales are a larger share, and Inductor splits sums differently than in a real model.
"""
VARIANTS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "inductor": ("inductor", {}),
    "lowmem": ("lowmem", {}),
    "lowmem, exact": ("lowmem", {"gradients": "exact", "codec": "none"}),
}
"""Backend and options, by name."""

if __name__ == "__main__":
    sys.exit(main())
