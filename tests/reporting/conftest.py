"""A made-up but realistic report: a 6-layer sentence encoder, hidden size 384, batch of 16 x 128, float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lowmem_compile.reporting import GraphReport, PassRun, Report, SavedTensor, Site, TimelinePoint
from lowmem_compile.reporting.model import CONTENDERS, Action, Kind, Numerics, Phase

LAYERS = 6
B, T, H, F, HEADS = 16, 128, 384, 1536, 12
TENSOR, WIDE = B * T * H * 4, B * T * F * 4
MODELING = "transformers/models/bert/modeling_bert.py"


def _saved(
    name: str,
    op: str,
    shape: tuple[int, ...],
    nbytes: int,
    module: str,
    line: int,
    kind: Kind = "activation",
    decision: str = "exact",
    dtype: str = "float32",
) -> SavedTensor:
    return SavedTensor(name, op, shape, dtype, nbytes, module, f"{MODELING}:{line}", kind, decision)


def _layer(i: int, contender: str) -> list[SavedTensor]:
    at = f"encoder.layer.{i}"
    wide, low = (B, T, F), contender == "lowmem"
    hidden, stats = (B, T, H), (B, T, 1)
    tensors = [
        _saved(f"{n}_{i}", "aten.addmm", (B, HEADS, T, H // HEADS), TENSOR, f"{at}.attention.self.{n}", 155)
        for n in ("query", "key", "value")
    ]
    tensors += [
        _saved(
            f"attn_{i}",
            "aten._scaled_dot_product_flash_attention_for_cpu",
            hidden,
            TENSOR,
            f"{at}.attention.self",
            171,
        ),
        _saved(
            f"logsumexp_{i}",
            "aten._scaled_dot_product_flash_attention_for_cpu",
            (B, HEADS, T),
            B * HEADS * T * 4,
            f"{at}.attention.self",
            171,
            "statistic",
        ),
        _saved(
            f"xhat1_{i}",
            "aten.native_layer_norm",
            hidden,
            TENSOR,
            f"{at}.attention.output.LayerNorm",
            212,
            decision="normalised output" if low else "exact",
        ),
        _saved(
            f"rstd1_{i}",
            "aten.native_layer_norm",
            stats,
            B * T * 4,
            f"{at}.attention.output.LayerNorm",
            212,
            "statistic",
        ),
        _saved(
            f"rstd2_{i}",
            "aten.native_layer_norm",
            stats,
            B * T * 4,
            f"{at}.output.LayerNorm",
            264,
            "statistic",
        ),
        _saved(
            f"xhat2_{i}",
            "aten.native_layer_norm",
            hidden,
            TENSOR,
            f"{at}.output.LayerNorm",
            264,
            decision="normalised output" if low else "exact",
        ),
    ]
    masks = [(f"{at}.attention.output.dropout", 211), (f"{at}.output.dropout", 263)]
    for n, (module, line) in enumerate(masks):
        nbytes, how = (B * T * H // 8, "1-bit mask") if low else (B * T * H, "exact")
        tensors.append(_saved(f"mask{n}_{i}", "aten.native_dropout", hidden, nbytes, module, line, "mask", how, "bool"))
    if low and i != LAYERS - 1:
        tensors.append(
            _saved(
                f"codes_{i}",
                "lowmem.gelu_codes",
                wide,
                WIDE // 16,
                f"{at}.intermediate.intermediate_act_fn",
                237,
                decision="2-bit codes",
                dtype="uint8",
            )
        )
    else:
        tensors.append(_saved(f"gelu_in_{i}", "aten.addmm", wide, WIDE, f"{at}.intermediate.dense", 236))
    if contender in ("eager", "lowmem"):
        tensors.append(
            _saved(
                f"gelu_out_{i}",
                "aten.gelu",
                wide,
                WIDE if contender == "eager" else WIDE // 2,
                f"{at}.intermediate.intermediate_act_fn",
                237,
                decision="exact" if contender == "eager" else "bf16",
                dtype="float32" if contender == "eager" else "bfloat16",
            )
        )
    if contender == "eager":
        tensors += [
            _saved(f"ln_in{n}_{i}", "aten.add", hidden, TENSOR, f"{at}.{m}", line)
            for n, (m, line) in enumerate([("attention.output", 212), ("output", 264)])
        ]
    if contender in ("eager", "inductor"):
        tensors.append(_saved(f"wt_{i}", "aten.permute", (F, H), F * H * 4, f"{at}.output.dense", 262, "weight copy"))
    return tensors


def saved(contender: str) -> tuple[SavedTensor, ...]:
    tensors = [
        _saved(
            "input_ids",
            "placeholder",
            (B, T),
            B * T * 8,
            "embeddings.word_embeddings",
            88,
            "index",
            dtype="int64",
        ),
        _saved(
            "position_ids",
            "aten.slice",
            (1, T),
            T * 8,
            "embeddings.position_embeddings",
            101,
            "index",
            dtype="int64",
        ),
        _saved("rng", "inductor_seeds", (25,), 200, "embeddings.dropout", 104, "rng", dtype="int64"),
        _saved("emb_xhat", "aten.native_layer_norm", (B, T, H), TENSOR, "embeddings.LayerNorm", 103),
    ]
    for i in range(LAYERS):
        tensors += _layer(i, contender)
    tensors.append(_saved("pooled", "aten.tanh", (B, H), B * H * 4, "pooler.activation", 418))
    return tuple(tensors)


def timeline(contender: str, points: int = 300) -> tuple[TimelinePoint, ...]:
    kept = sum(tensor.nbytes for tensor in saved(contender))
    ops = (
        "aten.addmm",
        "aten.native_layer_norm",
        "aten.gelu",
        "aten._scaled_dot_product",
        "aten.native_dropout",
    )
    forward = int(points * (0.36 if contender == "eager" else 0.42))
    result = []
    for step in range(points):
        phase: Phase = "forward" if step < forward else "backward"
        done = step / forward if phase == "forward" else 1 - (step - forward) / (points - forward)
        bump = (1.0 + math.sin(step * 0.9)) * WIDE * (0.35 if phase == "forward" else 0.8 if step < points - 3 else 0)
        grads = 0 if phase == "forward" else int((1 - done) * 43 * 2**20)
        op = ops[step % len(ops)] + ("" if phase == "forward" else "_backward")
        live = int(kept * done + bump) + grads
        result.append(TimelinePoint(f"{op} in encoder.layer.{int(done * 5.99)}", phase, live))
    return tuple(result)


def _site(
    name: str,
    module: str,
    line: int,
    action: Action,
    code: str,
    reason: str,
    numerics: Numerics,
    before: int,
    after: int,
) -> Site:
    return Site(name, module, f"{MODELING}:{line}", action, code, reason, numerics, before, after)


def sites() -> tuple[Site, ...]:
    found = []
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        act, norms = f"{at}.intermediate.intermediate_act_fn", (f"{at}.attention.output", f"{at}.output")
        why = f"an intermediate of gelu_{i} is used elsewhere"
        found.append(_site("recognise_activation", act, 237, "declined", "LM206", why, "reassociated", 0, 0))
        for norm in [f"{parent}.LayerNorm" for parent in norms]:
            found.append(_site("recognise_norm", norm, 264, "rewritten", "LM100", "", "reassociated", 0, 0))
            found.append(
                _site(
                    "norm_from_output",
                    norm,
                    264,
                    "rewritten",
                    "LM100",
                    "",
                    "reassociated",
                    2 * TENSOR,
                    TENSOR,
                )
            )
        if i == LAYERS - 1:
            why = "the partitioner would not keep fewer bytes with this rewrite"
            found.append(_site("approximate_activation", act, 237, "declined", "LM300", why, "approximate", WIDE, WIDE))
        else:
            found.append(
                _site(
                    "approximate_activation",
                    act,
                    237,
                    "rewritten",
                    "LM100",
                    "",
                    "approximate",
                    WIDE,
                    WIDE // 16,
                )
            )
        for norm in norms:
            mask = (B * T * H, B * T * H // 8)
            found.append(_site("pack_masks", f"{norm}.dropout", 211, "rewritten", "LM100", "", "exact", *mask))
    why = "KeyError: 'val' at node permute_3"
    found.append(_site("pack_masks", "embeddings.dropout", 104, "failed", "LM900", why, "exact", 0, 0))
    return tuple(found)


def passes() -> tuple[PassRun, ...]:
    return (
        PassRun("recognise_activation", "dynamo", "reassociated", 0.0412, 6, 0, 6, 412, 412),
        PassRun("recognise_norm", "dynamo", "reassociated", 1.27, 12, 12, 0, 412, 436),
        PassRun("norm_from_output", "joint", "reassociated", 0.0931, 12, 12, 0, 1204, 1183),
        PassRun("approximate_activation", "joint", "approximate", 0.1873, 6, 5, 1, 1183, 1219),
        PassRun("pack_masks", "saved", "exact", 0.0007, 13, 12, 1, 1219, 1231),
    )


def training_graph(graph_id: str = "0", contenders: Sequence[str] = CONTENDERS) -> GraphReport:
    return GraphReport(
        graph_id,
        "training",
        sites(),
        {name: saved(name) for name in contenders},
        {name: timeline(name) for name in contenders},
        passes(),
        f"lowmem_dumps/graph_{graph_id}",
        False,
    )


def report_of(*graphs: GraphReport) -> Report:
    options = {
        "approximate": True,
        "budget": None,
        "strict": False,
        "pin_exact": ["pooler"],
        "codes": "derivative",
    }
    versions = {"lowmem": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.9"}
    return Report(graphs, options, versions)


@pytest.fixture(scope="session")
def sample() -> Report:
    """One training graph with everything in it."""
    return report_of(training_graph())


@pytest.fixture(scope="session")
def several() -> Report:
    """A training graph, a variant without some contenders, an inference graph, a bare cached graph."""
    full = training_graph("0")
    return report_of(
        full,
        replace(training_graph("1", ("inductor", "lowmem")), sites=()),
        GraphReport("2", "inference", passes=passes()[:1]),
        GraphReport("3", "training", from_cache=True),
    )
