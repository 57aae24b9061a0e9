"""Measure on a CUDA device: our kernels, the optimizers and, where the backend imports (torch 2.13), models.

    python benchmarks/gpu.py                                        # everything there is
    python benchmarks/gpu.py --parts kernels,optimizers --output docs/gpu-tables.md

Writes one JSON file, and prints the tables. A time of a kernel is the median of replays of a CUDA graph, with the caches
flushed in between (``triton.testing.do_bench``): the GPU's work without Python's. A time of an optimizer is that of a call.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.demo.workload import one_of
from lowmem_compile.kernels.activation_codes import forward_triton as steps
from lowmem_compile.kernels.activation_codes import reference
from lowmem_compile.kernels.activation_codes.op import ACTIVATIONS
from lowmem_compile.kernels.activation_codes.tables import step_table
from lowmem_compile.kernels.gated_codes import forward_triton as gated
from lowmem_compile.kernels.gated_codes import gated_reference
from lowmem_compile.kernels.group_codes import codec_named
from lowmem_compile.kernels.group_codes import encode_triton as groups
from lowmem_compile.kernels.group_codes import many_triton as many
from lowmem_compile.optim import APOLLO, COAP, Fira, Flora, GaLore, LowRankOptimizer, report

Row = dict[str, Any]
SHAPES = ((8192, 1024), (8192, 4096), (16384, 4096))
DTYPE = torch.bfloat16
RANK = 128
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Case:
    """One operation.

    Attributes:
        ours: launches our kernel.
        definition: the same in plain PyTorch, which Inductor compiles.
        inputs: how many tensors it takes.
        kernel: the Triton function that ``ours`` launches.
    """

    ours: Callable[..., Any]
    definition: Callable[..., Any]
    inputs: int
    kernel: Any


def cases() -> dict[str, Case]:
    """All operations, by name."""
    made = {}
    for name in ("int8", "int6", "int4"):
        codec = codec_named(name)
        made[f"encode {name}"] = Case(lambda x, c=codec: groups.encode(x, c), codec.encode, 1, groups.encode_kernel)
    for bits in (2, 4):
        table = step_table("gelu", "derivative", bits)
        made[f"GELU, {bits}-bit codes"] = Case(
            lambda h, t=table: steps.forward(h, "gelu", t), step_definition(bits), 1, steps.activation_codes_kernel
        )
    codec = codec_named("int4")
    made["SwiGLU, int4 codes of both"] = Case(
        lambda a, b: gated.forward(a, b, "silu", codec),
        lambda a, b: (gated_reference(a, b, "silu"), *codec.encode(a), *codec.encode(b)),
        2,
        gated.gated_codes_kernel,
    )
    several = [codec_named(name) for name in ("int10", "int10", "int8", "int8", "int8")]
    made["encode five, int10 and int8"] = Case(
        lambda *xs: many.encode_many(xs, several),
        lambda *xs: tuple(part for x, c in zip(xs, several, strict=True) for part in c.encode(x)),
        len(several),
        many.encode_many_kernel,
    )
    return made


def step_definition(bits: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """GELU and its codes, as the pass writes them; as the reference does where the pass cannot be imported."""
    table = step_table("gelu", "derivative", bits)
    try:
        from lowmem_compile.passes.approximate_activation import pack, poison
    except ImportError:
        return lambda h: (F.gelu(h), reference.pack(reference.encode(h, table), bits), reference.row_poison(h))
    return lambda h: (F.gelu(h), *pack(h, tuple(table.thresholds)), poison(h))


# Kernels


def gpu_time(call: Callable[[], Any], *, replayed: bool = True) -> float:
    """Median milliseconds of a call; replayed from a CUDA graph, or called from Python each time."""
    from triton.testing import do_bench

    call()
    torch.cuda.synchronize()
    if not replayed:
        return float(do_bench(call, warmup=25, rep=100, return_mode="median"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    found = float(do_bench(graph.replay, warmup=25, rep=100, return_mode="median"))
    del kept
    return found


def kernels() -> Iterator[Row]:
    """Ours, Inductor's, and a copy of the same number of bytes."""
    for rows, width in SHAPES:
        for name, case in cases().items():
            torch.compiler.reset()
            args = [torch.randn(rows, width, device="cuda", dtype=DTYPE) for _ in range(case.inputs)]
            least = sum(t.nbytes for t in (*args, *case.ours(*args)))
            source = torch.randint(256, (least // 2,), device="cuda", dtype=torch.uint8)
            target = torch.empty_like(source)
            compiled = torch.compile(case.definition, fullgraph=True, dynamic=False)
            times = {}
            for who, call in {
                "ours": lambda case=case, args=args: case.ours(*args),
                "inductor": lambda compiled=compiled, args=args: compiled(*args),
                "copy": lambda source=source, target=target: target.copy_(source),
            }.items():
                times[f"{who}_ms"] = gpu_time(call)
                times[f"{who}_called_ms"] = gpu_time(call, replayed=False)
            launches = count_launches(compiled, args)
            yield {"operation": name, "shape": [rows, width], "bytes": least, "inductor_kernels": launches, **times}


def count_launches(call: Callable[..., Any], args: Sequence[Tensor]) -> int:
    """GPU kernels, copies and fills of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(*args)
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())


def resources() -> Iterator[Row]:
    """What the kernels take as they were compiled for this GPU at the last shape."""
    for name, case in cases().items():
        case.kernel.device_caches.clear()
        case.ours(*(torch.randn(SHAPES[-1], device="cuda", dtype=DTYPE) for _ in range(case.inputs)))
        ((compiled,),) = [tuple(caches[0].values()) for caches in case.kernel.device_caches.values()]
        yield {
            "operation": name,
            "registers": compiled.n_regs,
            "spilled": compiled.n_spills,
            "shared": compiled.metadata.shared,
            "warps": compiled.metadata.num_warps,
        }


def agreement() -> Iterator[Row]:
    """Codes that differ from the CPU's, and how far activations are from float64: a million Gaussian numbers of each dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
        for name in ("int10", "int8", "int7", "int6", "int5", "int4", "int3"):
            codec = codec_named(name)
            yield _compare(f"encode {name}", dtype, groups.encode(x.cuda(), codec), codec.encode(x), None)
        h = x * 3
        for name, function in ACTIVATIONS.items():
            table = step_table(name, "derivative", 4)
            y, *got = steps.forward(h.cuda(), name, table)
            codes = reference.pack(reference.encode(h, table), 4)
            yield _compare(f"{name}, 4-bit codes", dtype, got, [codes, reference.row_poison(h)], (y, function(h.double())))
        for name in ("silu", "gelu"):
            codec = codec_named("int4")
            y, *got = gated.forward(x.cuda(), b.cuda(), name, codec)
            exact = ACTIVATIONS[name](x.double()) * b.double()
            yield _compare(f"{name}·b, int4 codes", dtype, got, [*codec.encode(x), *codec.encode(b)], (y, exact))


def _compare(
    name: str, dtype: torch.dtype, got: Sequence[Tensor], want: Sequence[Tensor], y: tuple[Tensor, Tensor] | None
) -> Row:
    differ = sum(int((g.cpu() != w).sum()) for g, w in zip(got, want, strict=True))
    row = {"operation": name, "dtype": str(dtype).removeprefix("torch."), "codes": sum(w.numel() for w in want)}
    row["codes_that_differ"] = differ
    if y is not None:
        found, exact = y[0].cpu(), y[1]
        rounded = exact.to(dtype)
        row["outputs_not_nearest"] = int((found != rounded).sum())
        row["largest_error"] = float((found.double() - exact).abs().max())
        row["largest_error_of_nearest"] = float((rounded.double() - exact).abs().max())
    return row


# Optimizers

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: Mapping[str, tuple[Make, int]] = {
    "AdamW, foreach": (lambda p: torch.optim.AdamW(p, foreach=True), 50),
    "AdamW, fused": (lambda p: torch.optim.AdamW(p, fused=True), 50),
    "COAP": (lambda p: COAP(p, rank=RANK), 160),
    "COAP, 8-bit moments": (lambda p: COAP(p, rank=RANK, bits=8), 160),
    "GaLore": (lambda p: GaLore(p, rank=RANK), 200),
    "GaLore, randomised SVD": (lambda p: GaLore(p, rank=RANK, svd="randomised"), 200),
    "Fira": (lambda p: Fira(p, rank=RANK), 200),
    "Flora": (lambda p: Flora(p, rank=RANK, update_interval=200), 200),
    "APOLLO": (lambda p: APOLLO(p, rank=RANK), 200),
    "APOLLO-Mini": (lambda p: APOLLO(p, mini=True), 200),
}
"""How it is made, and the steps after which its refreshes repeat."""


def llama_60m(device: str) -> list[nn.Parameter]:
    """The linear weights of eight layers, with gradients."""
    shapes = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]
    made = [nn.Parameter(torch.randn(s, device=device, dtype=DTYPE) * 0.02) for _ in range(8) for s in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def optimizers(device: str = "cuda", limit: int = 1000) -> Iterator[Row]:
    """Milliseconds of a step, and bytes of state, on given gradients."""
    square = torch.ones(512, 512, device=device, dtype=DTYPE)
    for dtype in (DTYPE, torch.float32):  # the workspace of a first matrix product is no optimizer's state
        square.to(dtype).mm(square.to(dtype))
    for name, (make, cycle) in OPTIMIZERS.items():
        params = llama_60m(device)
        optimizer = make(params)
        gc.collect()
        before = _allocated(device)
        optimizer.step()
        gc.collect()
        state = _allocated(device) - before
        times = [_timed(optimizer.step, device) for _ in range(min(cycle, limit))]
        start = _allocated(device)
        _peak(device, reset=True)
        optimizer.step()
        low_rank = isinstance(optimizer, LowRankOptimizer)
        yield {
            "optimizer": name,
            "steps": len(times),
            "median_ms": statistics.median(times),
            "mean_ms": statistics.fmean(times),
            "longest_ms": max(times),
            "times_ms": times,
            "state_bytes": state,
            "reported_bytes": report(optimizer).state_bytes if isinstance(optimizer, LowRankOptimizer) else None,
            "scratch_bytes": _peak(device) - start,
            "parameters": sum(p.numel() for p in params),
            "low_rank": low_rank,
        }


def _timed(step: Callable[[], Any], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return (time.perf_counter() - start) * 1e3


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _peak(device: str, *, reset: bool = False) -> int:
    if device != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


# Models


def models(device: str = "cuda", layers: int = 4, repeats: int = 20) -> Iterator[Row]:
    """Step time and peak of a few layers of published sizes: eager, Inductor, lowmem."""
    from lowmem_compile.gpu_free.blocks import REAL, model

    for name, (kind, size) in REAL.items():
        x = torch.randn(size.batch, size.tokens, size.width, device=device, dtype=DTYPE)
        for backend in ("eager", "inductor", "lowmem"):
            torch.compiler.reset()
            torch.manual_seed(0)
            net = model(kind, layers, size).to(device, DTYPE)
            call = net if backend == "eager" else torch.compile(net, backend=backend)

            def step(net: nn.Module = net, call: Callable[..., Any] = call, x: Tensor = x) -> None:
                net.zero_grad()
                call(x).float().square().mean().backward()

            step()
            step()
            gc.collect()
            start = _allocated(device)
            _peak(device, reset=True)
            times = [_timed(step, device) for _ in range(repeats)]
            peak = _peak(device) - start
            yield {"model": name, "layers": layers, "backend": backend, "step_ms": statistics.median(times), "peak_bytes": peak}


# The page


def environment() -> Row:
    """What the figures were measured on."""
    import triton

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return {"gpu": name, "driver": driver, "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}


def render(found: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    env = found["environment"]
    parts = [
        f"{env['gpu']}, driver {env['driver']}, torch {env['torch']}, CUDA {env['cuda']}, Triton {env['triton']}.",
        *(f"## {title}\n\n{TABLES[part](found[part])}" for part, title in TITLES.items() if part in found),
    ]
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _kernels_table(rows: Sequence[Row]) -> str:
    head = ["operation", "shape", "MiB", "ours, µs", "Inductor, µs", "kernels of Inductor", "copy, µs"]
    head += ["Inductor / ours", "copy / ours", "called from Python: ours, µs", "Inductor, µs"]
    lines = []
    for r in rows:
        ours, other, copy = (r[f"{who}_ms"] for who in ("ours", "inductor", "copy"))
        lines.append([r["operation"], "×".join(map(str, r["shape"])), f"{r['bytes'] / 2**20:.1f}", f"{ours * 1e3:.1f}"])
        lines[-1] += [f"{other * 1e3:.1f}", r["inductor_kernels"], f"{copy * 1e3:.1f}"]
        lines[-1] += [f"{other / ours:.2f}", f"{copy / ours:.2f}"]
        lines[-1] += [f"{r[f'{who}_called_ms'] * 1e3:.1f}" for who in ("ours", "inductor")]
    return table(head, lines)


def _resources_table(rows: Sequence[Row]) -> str:
    keys = ("operation", "registers", "spilled", "shared", "warps")
    return table(keys, [[r[k] for k in keys] for r in rows])


def _agreement_table(rows: Sequence[Row]) -> str:
    lines = []
    for r in rows:
        line = [r["operation"], r["dtype"], r["codes"], r["codes_that_differ"]]
        if "largest_error" in r:
            line += [r["outputs_not_nearest"], f"{r['largest_error']:.2e}", f"{r['largest_error_of_nearest']:.2e}"]
        lines.append([*line, *["–"] * (7 - len(line))])
    head = ["operation", "dtype", "bytes and scales", "that differ", "outputs not the nearest", "largest error", "of the nearest"]
    return table(head, lines)


def _optimizers_table(rows: Sequence[Row]) -> str:
    head = ["optimizer", "ordinary step, ms", "mean of a cycle, ms", "longest, ms", "steps of a cycle"]
    head += ["state, MiB", "reported, MiB", "scratch of a step, MiB"]
    lines = []
    for r in rows:
        reported = "–" if r["reported_bytes"] is None else f"{r['reported_bytes'] / 2**20:.2f}"
        lines.append([r["optimizer"], *(f"{r[k]:.2f}" for k in ("median_ms", "mean_ms", "longest_ms")), r["steps"]])
        lines[-1] += [f"{r['state_bytes'] / 2**20:.2f}", reported, f"{r['scratch_bytes'] / 2**20:.2f}"]
    return table(head, lines)


def _models_table(rows: Sequence[Row]) -> str:
    lines = [[r["model"], r["layers"], r["backend"], f"{r['step_ms']:.2f}", f"{r['peak_bytes'] / 2**20:.1f}"] for r in rows]
    return table(["model", "layers", "backend", "step, ms", "peak above the start, MiB"], lines)


PARTS: Mapping[str, Callable[[], Iterator[Row]]] = {
    "kernels": kernels,
    "resources": resources,
    "agreement": agreement,
    "optimizers": optimizers,
    "models": models,
}
TITLES = {
    "kernels": "Times of the kernels",
    "resources": "Registers and spills",
    "agreement": "Agreement with the CPU",
    "optimizers": "Optimizers",
    "models": "Models",
}
TABLES: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "kernels": _kernels_table,
    "resources": _resources_table,
    "agreement": _agreement_table,
    "optimizers": _optimizers_table,
    "models": _models_table,
}


@app.command()
def main(
    parts: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}; models need torch 2.13.")] = ",".join(PARTS),
    results: Annotated[Path, typer.Option(help="JSON file that is written.")] = Path(".cache/bench/gpu.json"),
    output: Annotated[Path | None, typer.Option(help="Write the Markdown here too.")] = None,
) -> None:
    """Measure, write the JSON file, print the tables."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device")
    wanted = [one_of("part", name, PARTS) for name in parts.split(",") if name]
    if torch.__version__ < "2.13" and "models" in wanted:
        wanted.remove("models")
    torch.manual_seed(0)
    found: dict[str, Any] = {"environment": environment()}
    results.parent.mkdir(parents=True, exist_ok=True)
    for part in wanted:
        found[part] = list(PARTS[part]())
        results.write_text(json.dumps(found, indent=1) + "\n")
    text = render(found)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    app()
