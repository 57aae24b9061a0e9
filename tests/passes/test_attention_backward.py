"""attention_backward: the gradients of a fused attention without its output and logsumexp, on a CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile._torch import narrow_products
from lowmem_compile.contract import Context
from lowmem_compile.options import Options
from lowmem_compile.passes import attention_backward as module
from lowmem_compile.passes.attention_backward import AttentionBackward
from tests.helpers import Graphs, check_gradients, compile_graphs

NAME = "attention_backward"
OWN = torch.ops.lowmem.attention_backward.default
D, HEADS = 16, 2


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this processor can do does not matter here."""
    monkeypatch.setattr(module, "narrow_products", lambda dtype: "none" if dtype == torch.float32 else "tiles")


class Attention(nn.Module):
    """Self-attention; ``frozen``: only the queries' linear is trained."""

    def __init__(self, frozen: bool = False, **how: Any) -> None:
        super().__init__()
        self.q, self.v, self.o = (nn.Linear(D, D) for _ in range(3))
        self.k = nn.Linear(D, D, bias=False)  # which scores do not depend on
        self.how = how
        for linear in (self.k, self.v, self.o) if frozen else ():
            linear.requires_grad_(False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.how).transpose(1, 2).flatten(2))


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*(shape or (2, 7)), D).to(dtype).requires_grad_()


def calls(graphs: Graphs) -> int:
    return len(graphs.chosen.backward.graph.find_nodes(op="call_function", target=OWN))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"scale": 0.7}], ids=["plain", "causal", "scale"])
def test_fires_once_and_matches_float64(how: dict[str, Any], dtype: torch.dtype) -> None:
    model = Attention(**how).to(dtype)
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [rows(dtype=dtype)], dtype)
    assert graphs.rewritten(NAME) == 1
    assert calls(graphs) == 1


def test_a_mask() -> None:
    model = Attention().bfloat16()
    graphs = compile_graphs(model)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[1, :, :, 5:] = False
    check_gradients(graphs, model, [rows()], torch.bfloat16, kwargs={"mask": mask})
    assert calls(graphs) == 1


def test_several_layers() -> None:
    model = nn.Sequential(*(Attention() for _ in range(3))).bfloat16()
    graphs = compile_graphs(model)
    graphs(rows()).sum().backward()
    assert graphs.rewritten(NAME) == calls(graphs) == 3


def test_under_autocast() -> None:
    model = Attention()
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [rows(dtype=torch.float32)], torch.bfloat16, autocast=torch.bfloat16)
    assert calls(graphs) == 1


class Returning(Attention):
    """Returns the attention's output beside its linear's."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        found: list[Tensor] = []
        handle = self.o.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        result = super().forward(x, mask)
        handle.remove()
        return result, found[0]


class Squared(Attention):
    """Its output's gradient depends on its output."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2) ** 3


LOGSUMEXP, OUTPUT = 4 * 2 * HEADS * 7, 2 * 2 * 7 * D


@pytest.mark.parametrize(("case", "gone"), [("trained", OUTPUT), ("frozen", OUTPUT), ("returned", 0), ("read before", 0)])
def test_what_is_saved(case: str, gone: int) -> None:
    """Never the logsumexp; the output only where the user gets it or its gradient depends on it."""
    kinds: dict[str, Any] = {
        "trained": Attention,
        "frozen": partial(Attention, frozen=True),
        "returned": Returning,
        "read before": Squared,
    }
    model: nn.Module = kinds[case]()
    model, kept = model.bfloat16(), {}
    for disable in ([], [NAME]):
        graphs = compile_graphs(model, disable=disable)
        result = graphs(rows())
        (result[0] if case == "returned" else result).sum().backward()
        kept[bool(disable)] = graphs.chosen.saved_bytes()
    assert kept[True] - kept[False] == LOGSUMEXP + gone


@pytest.mark.parametrize("kind", [Attention, Returning, Squared])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_behind_the_output_matches_float64(kind: type[Attention], dtype: torch.dtype) -> None:
    """O made again, for one weight or for several that read other views of it."""
    model = kind().to(dtype)
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [rows(dtype=dtype)], dtype)
    made = [n for n in graphs.chosen.backward.graph.find_nodes(op="call_function", target=OWN) if n.args[-1] is True]
    assert len(made) == (kind is Attention)


def test_a_dynamic_batch() -> None:
    model = Attention().bfloat16()
    graphs = compile_graphs(model)
    for batch in (2, 5, 3):
        check_gradients(graphs, model, [rows(batch, 7)], torch.bfloat16, mark=0)
    assert graphs.rewritten(NAME) == 1


def test_a_dynamic_length_is_declined() -> None:
    model = Attention().bfloat16()
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [rows(2, 7)], torch.bfloat16, mark=1)
    assert graphs.codes(NAME) == ["LM203"]


def test_float32_is_declined() -> None:
    model = Attention()
    graphs = compile_graphs(model)
    check_gradients(graphs, model, [rows(dtype=torch.float32)], torch.float32)
    assert graphs.codes(NAME) == ["LM311"]


@pytest.mark.parametrize(("causal", "limit"), [(False, "LARGEST"), (True, "LARGEST_CAUSAL")])
def test_many_keys_are_declined(causal: bool, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention(is_causal=causal).bfloat16()
    for scores, codes in ((49, ["LM100"]), (48, ["LM311"])):
        monkeypatch.setattr(module, limit, scores)
        graphs = compile_graphs(model)
        graphs(rows()).sum().backward()
        assert graphs.codes(NAME) == codes


@pytest.mark.parametrize(("products", "codes"), [("none", ["LM311"]), ("vectors", ["LM100"]), ("tiles", ["LM100"])])
def test_the_processor_decides(products: str, codes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "narrow_products", lambda _: products)
    graphs = compile_graphs(Attention().bfloat16())
    graphs(rows()).sum().backward()
    assert graphs.codes(NAME) == codes
    monkeypatch.setattr(module, "LARGEST", 4 * 48)
    graphs = compile_graphs(Attention().bfloat16())
    graphs(rows()).sum().backward()
    assert graphs.codes(NAME) == (["LM100"] if products == "tiles" else ["LM311"])


def test_float32_matrices_are_no_narrow_ones() -> None:
    assert narrow_products(torch.float32) == "none"
    assert narrow_products(torch.bfloat16) in ("none", "vectors", "tiles")


def test_other_devices_do_not_match() -> None:
    model = Attention().bfloat16()
    graphs = compile_graphs(model, disable=[NAME])
    graphs(rows()).sum().backward()
    graph = graphs.chosen.backward.graph
    assert len(AttentionBackward().find(graph, Context(Options()))) == 1
    assert not AttentionBackward().find(graph, Context(Options(), device="cuda"))


def test_without_a_gradient_nothing_matches() -> None:
    model = Attention().bfloat16()
    graphs = compile_graphs(model)
    with torch.no_grad():
        graphs(rows())
    assert not graphs.sites(NAME)


def test_exact_gradients_keep_the_pass() -> None:
    graphs = compile_graphs(Attention().bfloat16(), gradients="exact")
    graphs(rows()).sum().backward()
    assert calls(graphs) == 1


def test_idempotent() -> None:
    graphs = compile_graphs(Attention().bfloat16())
    graphs(rows()).sum().backward()
    assert not AttentionBackward().find(graphs.chosen.backward.graph, Context(Options()))


@pytest.mark.parametrize("own", [True, False])
def test_codes_of_queries_keys_and_values(own: bool) -> None:
    """Seven bits for our operation, ten for the library's."""
    model = Attention().bfloat16()
    graphs = compile_graphs(model, codec="auto", disable=[] if own else [NAME])
    graphs(rows(8, 128)).sum().backward()
    kinds = {n.meta.get("lowmem_kind", "") for n in graphs.chosen.forward.graph.nodes}
    assert ("int10 codes" in kinds, "int7 codes" in kinds) == (not own, own)


@pytest.mark.e2e
def test_end_to_end_it_is_eagers_gradient() -> None:
    torch.manual_seed(0)
    model, x = Attention(is_causal=True).bfloat16(), rows(4, 64)
    found = []
    for call in (model, torch.compile(model, backend="lowmem", options={"gradients": "exact", "strict": True})):
        model.zero_grad()
        call(x).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double())
    assert F.cosine_similarity(found[0], found[1], dim=0) > 0.9999
