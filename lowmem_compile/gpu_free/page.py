"""``python -m lowmem_compile.gpu_free.page``: the tables of ``docs/kernels.md``, counted and compiled without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lowmem_compile._torch import FakeTensorMode, offer_prologue
from lowmem_compile.gpu_free.blocks import BLOCKS, REAL, example, model
from lowmem_compile.gpu_free.generate import Generated, generate
from lowmem_compile.gpu_free.operations import TEMPLATES, operations, products
from lowmem_compile.gpu_free.resources import TARGETS, Resources, compile_for, of_inductor
from lowmem_compile.gpu_free.specialised import Specialised
from lowmem_compile.gpu_free.steps import BANDWIDTH, Step, eager, least, loss_of, moved
from lowmem_compile.gpu_free.worker import Worker
from lowmem_compile.kernels.activation_codes.tables import step_table
from lowmem_compile.kernels.group_codes import codec_named

HEAD = """\
# Kernels without a GPU

Written by `make kernels`; what was measured on a GPU is in [gpu.md](gpu.md). Nothing on this page is a time: code is generated
and compiled for GPUs that are not there, and run by Triton's interpreter on CPU tensors, which counts every byte.

Which kernels the pipeline runs on a GPU: Inductor's, but for encodes and decodes that Inductor can fuse with nothing. Those are
`lowmem::encode_many` and `lowmem::decode_many`, one launch for several tensors
([launch_together](passes/launch_together.md)); with `options["launches"] = "shared"` these too are Inductor's, and join the
launch of a kernel nearby ([shared launches](launches.md)). `lowmem::encode_groups` (stochastic codes with random numbers of
their own), `lowmem::step_activation` and `lowmem::gated_codes` are emitted by no pass: their outputs differ from Inductor's in
the last bit of the activation, and the forward result is Inductor's. They are operations to call.

| claim | shown by |
| --- | --- |
| our kernels compute their definitions, codes bit for bit | Triton's interpreter against plain PyTorch: `test_own_kernels.py` |
| they compile; registers, spills, shared memory | Triton's compilers and ptxas, ahead of time; no launch |
| Inductor's kernels of whole models compute what eager does | its own wrapper, interpreted in float32: `test_whole_models.py` |
| numbers of kernels, bytes moved | the generated wrapper, and its loads and stores in the interpreter |
| bytes of whole steps at real sizes | Inductor's count of each launch's buffers; the interpreter's at small sizes is near |

The files are in `tests/gpu_free`.

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
    from lowmem_compile.kernels.group_codes import many_triton as many

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
    several = [codec_named(name) for name in ("int10", "int10", "int8", "int8", "int8")]
    made["encode five tensors, int10 and int8"] = many.specialised(several, 4096, "bf16")
    made["decode five tensors, int10 and int8"] = many.specialised(several, 4096, "bf16", decode=True)
    made["encode two tensors, int4"] = many.specialised([codec_named("int4")] * 2, 4096, "bf16")
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
    loss_of(generated(x)).backward()
    return generated


def fake_step(name: str, variant: str, layers: int) -> list[Sequence[Step]]:
    """The launches of one training step of a published model's layers, of fake tensors, graph by graph."""
    torch.compiler.reset()
    kind, size = REAL[name]
    backend, options = VARIANTS.get(variant, ("", {}))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            net, x = model(kind, layers, size), example(torch.bfloat16, size)
            if variant == "eager":
                return [eager(net, x)]
            generated = generate(net, backend=backend, options=options)
            loss_of(generated(x)).backward()
    finally:
        torch.set_default_dtype(before)
    return [code.steps for code in generated.codes]


def steps_table() -> Iterator[str]:
    """Bytes of whole steps at real sizes, against the least, and their times at an H100's bandwidth."""
    head = (
        "model",
        "variant",
        "launches",
        "MiB moved",
        "least",
        "moved / least",
        "µs at 3.35 TB/s",
        "library calls",
        "MiB moved",
    )
    yield "| " + " | ".join(head) + " |"
    yield "| --- |" + " --- |" * (len(head) - 1)
    for name in REAL:
        for variant in ("eager", "inductor", "lowmem", "lowmem, shared", "lowmem, exact"):
            graphs = fake_step(name, variant, 2)  # buffers of one graph share no names with those of the other
            steps, bound = [step for graph in graphs for step in graph], sum(map(least, graphs))
            loops = [s for s in steps if s.loop]
            total = moved(steps)
            floor = "–" if variant == "eager" else f"{bound / 2**20:.0f}"
            share = "–" if variant == "eager" else f"{total / bound:.2f}"
            row = [name, variant, len(loops), f"{total / 2**20:.0f}", floor, share, f"{total / BANDWIDTH * 1e6:.0f}"]
            yield "| " + " | ".join(map(str, [*row, len(steps) - len(loops), f"{moved(steps, loops=False) / 2**20:.0f}"])) + " |"


def products_table() -> Iterator[str]:
    """Launches of matrix products and the codes beside them: with the library's product, and with a template."""
    offer_prologue(torch.ops.lowmem.in_prologue.default)
    yield "| operation | library product: launches | template: launches |"
    yield "| --- | --- | --- |"
    for name, operation in products().items():
        counts = []
        for options in ({}, TEMPLATES):
            torch.compiler.reset()
            generated = generate(operation.function, backend="inductor", options=options)
            generated(*operation.args)
            code = generated.code("inference")
            counts.append(len(code.launches) + len(code.extern))
        yield f"| {name} | {counts[0]} | {counts[1]} |"


def _launches(generated: Generated) -> tuple[int, int]:
    return len(generated.code("forward").launches), len(generated.code("backward").launches)


def models_table() -> Iterator[str]:
    """Kernels and bytes of whole models, and what the generated kernels of lowmem take; the comparison below."""
    yield (
        "| model | backend | kernels forward | backward | a block: forward | backward | library calls | MiB moved | distinct | "
        "sm_90: most registers · spilled |"
    )
    yield "| --- |" + " --- |" * 9
    more: dict[str, list[str]] = {}
    for kind in BLOCKS:
        base = (0, 0.0)
        for variant in VARIANTS:
            one, two = _launches(step(kind, variant, 1, None)), step(kind, variant, 2, None)
            launches, codes = _launches(two), two.codes
            block = [b - a for a, b in zip(one, launches, strict=True)]
            kernels = {source: name for c in codes for name, source in c.kernels.items()}
            taken = _most([compile_for(of_inductor(n, s), "sm_90") for s, n in kernels.items()]) if variant == "lowmem" else "–"
            calls, total = sum(len(c.extern) for c in codes), sum(moved(c.steps) for c in codes) / 2**20
            row = [kind, variant, *launches, *block, calls, f"{total:.2f}", len(kernels), taken]
            yield "| " + " | ".join(map(str, row)) + " |"
            if variant == "inductor":
                base = (sum(launches), total)
            else:
                more.setdefault(variant, []).append(f"{kind} {sum(launches) - base[0]:+d} ({total / base[1]:.2f} × the bytes)")
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
    yield "Whole models", _with(MODELS, models_table())
    yield "Whole steps at real sizes: counted, not timed", _with(STEPS, steps_table())
    yield "Matrix products as templates", _with(PRODUCTS, products_table())


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
attention; *moved* is Inductor's count of the buffers of all Triton kernels; *distinct* counts different kernels that it
generated. Those of lowmem are compiled in the first configuration that Inductor would try on an H100. *exact* is
`gradients="exact"` with `codec="none"`; *shared* is `launches="shared"`; *combo* is Inductor's
`combo_kernels=True, combo_kernel_peak_memory_pct_threshold=None`.
"""
MORE = """\
With its default options lowmem launches one kernel a layer more than Inductor in the forward pass, the encode of what library
calls and norms read and write, and one more at the end of the graph for what is left (in the table, a part of the second block
of the ViT). In the backward pass it launches one a layer more, the decode of what the attention reads, and one for the input of
the last linear; with grouped queries two more repeat keys and values, which Inductor keeps repeated; the rest is what Inductor
splits otherwise. Codes of an activation's input are written and read by kernels that the model has anyway.

Inductor's `combo_kernels` (with the threshold above; experimental in torch 2.13) puts independent kernels into one launch, ours
excepted. With it lowmem launches fewer kernels than Inductor does without it, and more than Inductor does with it. It is no
default: without the threshold Inductor does not look at memory when it combines, and with it its estimate of the peak fails on
these graphs (`KeyError` in `compute_memory_timeline`). `launches="shared"` combines only what is named in
[shared launches](launches.md), and looks at memory.

Other sizes give other counts: here rows are short, scales are a larger share, and Inductor splits sums differently than in a
real model.
"""
STEPS = """\
Two layers with the sizes of a published model and a linear behind them, in bfloat16: ViT-B with 64 images of 197 tokens,
LLaMA-7B with 2 × 2048 tokens (no rotary embedding), RoBERTa-base with 32 × 512. *Launches* are Triton kernels (eager:
operations that are no library calls), *moved* is what they read and write, each buffer once a launch. *Least*: what a library
call made, or the graph was given, and a kernel reads, once; what a kernel makes and a library call reads, or the graph
returns, once; codes that cross from forward to backward are counted in both. All other traffic would go if one kernel did all
the work between two library calls, which no fusion can do where that work reduces twice. Time is that of *moved* at an H100's
bandwidth. The library calls' bytes are their inputs and outputs.
"""
PRODUCTS = """\
Products of [64, 64] with what encodes or decodes beside them: launches with the library's product, and with Inductor's Triton
templates (`mode="max-autotune"`: the autotuner chooses by measurement, here the templates are forced). Where a pass decodes
for one product alone it marks the tensor with `lowmem::in_prologue`: Inductor then offers the template that decodes as it
loads its tiles.

- In one launch: the weight gradient from codes of up to 8 bits; the projected one in its two products; the backward of an
  activation from codes in the epilogue of dY W; the forward of an activation with 8-bit slope codes in the epilogue of x Wᵀ.
- Not in one launch: group codes in the epilogue of the product that writes the tensor. An epilogue is pointwise
  (`TritonScheduling.can_fuse_vertical` refuses a reduction behind a template), and a scale is a reduction. 10 bits as a
  prologue: two planes of codes are put together in a kernel before. 2-bit step codes in an epilogue: a byte holds elements
  that are a quarter of the tensor apart.
- dYᵀ (x R) in one kernel would compute x R once for each tile of dYᵀ's rows, or hold N×r of it: two products move less.
"""
COMBO: Mapping[str, Any] = {"combo_kernels": True, "combo_kernel_peak_memory_pct_threshold": None}
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "inductor": ("inductor", {}),
    "lowmem": ("lowmem", {}),
    "lowmem, shared": ("lowmem", {"launches": "shared"}),
    "lowmem, exact": ("lowmem", {"gradients": "exact", "codec": "none"}),
    "inductor, combo": ("inductor", COMBO),
    "lowmem, combo": ("lowmem", {"inductor": COMBO}),
}
"""Backend and options, by name."""

if __name__ == "__main__":
    sys.exit(main())
