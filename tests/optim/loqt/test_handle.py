"""Choice of layers, errors, bytes, resume and export."""

from __future__ import annotations

import ast
import copy
import inspect
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowmem_compile
from lowmem_compile.demo.packages import quiet
from lowmem_compile.errors import OptionError
from lowmem_compile.optim.loqt import AdamW, LoQTLinear, PerLayerUpdates, loqt
from lowmem_compile.optim.loqt.linear import PROJECTOR, WEIGHT
from tests.optim.loqt.common import D, H, Mixer, N, R, batch, loss_of, train, under_loqt

GIB = 2**30


# What is converted.


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.attn: nn.Module = nn.Linear(32, 32)
        self.mlp = nn.Linear(32, 80, bias=False)
        self.out = nn.modules.linear.NonDynamicallyQuantizableLinear(80, 32)
        self.hooked = nn.Linear(32, 32)
        self.hooked.register_forward_hook(lambda *_: None)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight


def test_which_linears_are_converted() -> None:
    model = Model()
    training = lowmem_compile.loqt(model, 4)
    assert list(training.layers) == ["attn", "mlp"]
    assert isinstance(model.attn, LoQTLinear)
    assert set(training.left_out) == {"out", "hooked", "head"}
    assert training.left_out["head"] == "its weight is tied to embed"
    assert "computes something of its own" in training.left_out["out"]
    assert "hooks" in training.left_out["hooked"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= {"embed.weight", "attn.B", "attn.bias", "mlp.B"}
    assert list(lowmem_compile.loqt(Model(), 4, include=["*mlp*", "attn"], exclude=["at*"]).layers) == ["mlp"]


def test_a_module_under_two_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 32)})
    model["b"] = model["a"]
    training = lowmem_compile.loqt(model, 4)
    assert model["a"] is model["b"]
    assert list(training.layers) == ["a"]
    plain = training.merge_and_export(inplace=True)
    assert isinstance(plain, nn.ModuleDict)
    assert plain["a"] is plain["b"]
    assert type(plain["b"]) is nn.Linear


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rank": 64},
            r"rank=64 is not below the smaller dimension of first \(64x64\).*Use a rank below 64.*exclude=\['first'\]",
        ),
        ({"rank": 0}, "rank=0; a rank is a whole number from 1"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"scale": 0.0}, "scale=0.0; it is above 0"),
        ({"interval": 0}, "interval=0"),
        ({"growth": -1.0}, "growth=-1.0"),
        ({"compensation": -1}, "compensation=-1"),
        ({"block": 63}, "block=63: NF4 takes a power of two"),
        ({"side": "left"}, "side='left'; the side rules are 'std', 'input'"),
        ({"svd": "fast"}, "svd='fast'; it is 'exact' or 'randomised'"),
        ({"quantise": False, "double_quantise": True}, "double_quantise=True; it needs quantise=True"),
        ({"include": ["attn"]}, r"include: 'attn' matches none of the 3 linears, such as first, up, down.*'\*attn\*'"),
        ({"exclude": ["lm_head"]}, "exclude: 'lm_head' matches none"),
        ({"exclude": ["*"]}, r"found no linear to convert.\n  first: excluded by name"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    model = Mixer()
    with pytest.raises(OptionError, match=message):
        lowmem_compile.loqt(model, **{"rank": R, **options})
    assert not any(isinstance(m, LoQTLinear) for m in model.modules())  # nothing was changed


def test_other_errors() -> None:
    model, training = under_loqt(merge=False)
    with pytest.raises(OptionError, match="has LoQT layers already"):
        lowmem_compile.loqt(model, R)
    with pytest.raises(OptionError, match="none of the 0 linears, such as none at all"):
        lowmem_compile.loqt(nn.LayerNorm(4), 2)
    with pytest.raises(OptionError, match="bits=4"):
        training.report(bits=4)
    with pytest.raises(OptionError, match="no parameter that requires a gradient"):
        PerLayerUpdates(nn.Linear(2, 2).requires_grad_(False).named_parameters(), torch.optim.SGD)


# Bytes.


@pytest.mark.parametrize("options", [{}, {"double_quantise": True, "block": 128}, {"quantise": False}], ids=str)
@pytest.mark.parametrize(("bits", "dtype"), [(None, torch.bfloat16), (8, torch.float32)])
def test_the_bytes_reported_are_the_bytes_held(bits: int | None, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """4-bit(mn + mr) + nr of weights, nr of gradients, 2nr of states; measured on the tensors, known before the first merge."""
    model, training = under_loqt(dtype=dtype, merge=False, **options)
    said = training.report(bits=bits)
    training.merge(lambda: loss_of(model, dtype=dtype))
    optimizer = AdamW(training.parameters(), bits=bits)
    loss_of(model, dtype=dtype).backward()
    optimizer.step()
    for row in said.rows:
        layer = training.layers[row.name]
        assert sum(t.nbytes for t in layer.stored(WEIGHT).values()) == row.weight_bytes
        assert sum(t.nbytes for t in layer.stored(PROJECTOR).values()) == row.projector_bytes
        assert layer.B.grad is not None
        assert (layer.B.nbytes, layer.B.grad.nbytes) == (row.factor_bytes, row.gradient_bytes)
        state = [v for v in optimizer.state[layer.B].values() if isinstance(v, Tensor)]
        assert sum(v.nbytes for v in state) == row.state_bytes
        m, n, e = min(row.shape), max(row.shape), dtype.itemsize
        assert row.factor_bytes == row.gradient_bytes == e * n * R
        if not options:
            assert row.weight_bytes + row.projector_bytes == 4.5 / 8 * (m * n + m * R)
        if bits is None:
            assert row.state_bytes == 2 * e * n * R
    assert said.weight_bytes == sum(t.nbytes for t in model.state_dict().values())
    assert said.gradient_bytes == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    held = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    assert said.state_bytes == held
    assert [row.merged for row in said.rows] == [False] * 3
    assert [row.merged for row in training.report().rows] == [True] * 3


def test_the_text_of_the_report() -> None:
    _, training = under_loqt(merge=False, exclude=["first"])
    lines = str(training.report()).splitlines()
    assert lines[0].startswith("LoQT: 2 layers; weights 43.6 KiB, gradients 29.5 KiB, state 59.0 KiB; together 132 KiB, AdamW's")
    assert lines[1].strip() == (
        "up  192 x 64 float32  right, rank 8  weight 6.75 KiB, P 288 B, B 6.00 KiB, gradient 6.00 KiB, state 12.0 KiB "
        "(whole weight 48.0 KiB; whole until its first merge)"
    )
    assert lines[-1] == "  first: not converted, excluded by name"


def llama(hidden: int, intermediate: int, layers: int, heads: int) -> nn.Module:
    """LLaMA in bfloat16 without memory."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=32000
    )
    with torch.device("meta"), quiet():
        model: nn.Module = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


def test_llama_7b_and_13b() -> None:
    """Weights, gradients and 8-bit states: 7B at rank 1024 below 24 GiB without per-layer updates, 13B with them."""
    include = ["*self_attn*", "*mlp*"]
    seven = lowmem_compile.loqt(llama(4096, 11008, 32, 32), 1024, include=include, double_quantise=True).report(bits=8)
    assert len(seven.rows) == 7 * 32
    assert 14 < seven.total_bytes / GIB < 16
    assert seven.adamw_bytes / GIB > 37
    thirteen = lowmem_compile.loqt(llama(5120, 13824, 40, 40), 1024, include=include, double_quantise=True).report(bits=8)
    assert thirteen.per_layer_bytes < thirteen.total_bytes < 24 * GIB


# State.


def resumable(seed: int, **options: Any) -> tuple[Mixer, Any, torch.optim.Optimizer]:
    model, training = under_loqt(seed=seed, merge=False, interval=3, **options)
    return model, training, AdamW(training.parameters(), 1e-2, bits=8, quantise_from=100)


@pytest.mark.parametrize("options", [{"double_quantise": True}, {"svd": "randomised", "side": "input"}], ids=str)
def test_exact_resume(options: dict[str, Any]) -> None:
    """Five steps, all state through a file into a model from another seed, five steps: the same bits as ten steps."""
    model, training, optimizer = resumable(0, **options)
    train(model, training, optimizer, range(5))
    file = io.BytesIO()
    torch.save([model.state_dict(), training.state_dict(), optimizer.state_dict()], file)
    losses = train(model, training, optimizer, range(5, 10))
    other, fresh, another = resumable(1, **options)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    for target, state in zip((other, fresh, another), states, strict=True):
        target.load_state_dict(state)
    assert train(other, fresh, another, range(5, 10)) == losses
    assert fresh.merges == training.merges == 3
    assert list(model.state_dict()) == list(other.state_dict())
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_state_dicts_of_other_forms() -> None:
    """A plain checkpoint loads before the first merge; an unmerged one into a merged model; a merged one only if it fits."""
    plain = Mixer()
    model, training = under_loqt(seed=5, merge=False)
    unmerged = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(plain.state_dict())
    x, _ = batch()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    training.merge(lambda: loss_of(model))
    assert all(isinstance(v, Tensor) for v in model.state_dict().values())
    model.load_state_dict(unmerged)
    assert not model.up.merged
    training.merge(lambda: loss_of(model))
    other, _ = under_loqt(rank=4)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*B"):
        other.load_state_dict(model.state_dict())
    with pytest.raises(OptionError, match=r"loqt was called with rank=4, the checkpoint has rank=8.*Call loqt with rank=8"):
        under_loqt(rank=4)[1].load_state_dict(training.state_dict())


@pytest.mark.parametrize("inplace", [False, True])
def test_export(inplace: bool) -> None:
    """The exported state dict has the original's names, shapes and dtypes, and loads into the original class."""
    model, training = under_loqt(dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in training.layers.values():
            layer.B.add_(0.02)
    x, _ = batch(dtype=torch.bfloat16)
    before = model(x)
    plain = training.merge_and_export(inplace=inplace)
    assert (plain is model) is inplace
    assert any(isinstance(m, LoQTLinear) for m in model.modules()) is not inplace
    original = Mixer(torch.bfloat16)
    assert list(plain.state_dict()) == list(original.state_dict())
    original.load_state_dict(plain.state_dict(), strict=True)
    assert all(p.requires_grad for p in plain.parameters())
    after = original(x)
    assert (after - before).float().norm() < 0.02 * before.float().norm()  # one rounding of the weights to bfloat16
    assert type(plain.get_submodule("up")) is nn.Linear


def test_the_exported_llama_loads_into_its_class(tmp_path: Any) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, use_cache=False
    )
    with quiet():
        model = LlamaForCausalLM(config)
        training = lowmem_compile.loqt(model, 4, include=["*self_attn*", "*mlp*"])
        ids = torch.randint(40, (2, 12))
        training.before_step(lambda: model(input_ids=ids, labels=ids).loss)
        exported: Any = training.merge_and_export()
        exported.save_pretrained(tmp_path)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


# The page.


def test_the_page_has_every_option_with_its_default() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "loqt.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", page, re.MULTILINE)
    parameters = inspect.signature(loqt).parameters
    assert {name: ast.literal_eval(default) for name, default in rows} == {
        name: p.default for name, p in parameters.items() if name not in ("model", "rank")
    }


# Optimizers.


def test_per_layer_updates_equal_one_optimizer() -> None:
    """The same weights as with one optimizer over all; gradients are gone after backward; it resumes."""
    model, training = under_loqt()
    other = copy.deepcopy(model)
    updates = PerLayerUpdates(model.named_parameters(), lambda params: AdamW(params, 1e-2))
    optimizer = AdamW(other.parameters(), 1e-2)
    for number in range(3):
        loss_of(model, number).backward()
        assert all(p.grad is None for p in model.parameters())
        loss_of(other, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    training.merge(lambda: loss_of(model))
    updates.set_lr(0.5)
    state = copy.deepcopy(updates.state_dict())
    assert state["up.B"]["param_groups"][0]["lr"] == 0.5
    updates.load_state_dict(state)
    with pytest.raises(OptionError, match=r"other parameters: up\.B"):
        updates.load_state_dict({k: v for k, v in state.items() if k != "up.B"})
    updates.remove()
    loss_of(model).backward()
    assert model.up.B.grad is not None


def test_adamw_is_the_unprojected_base_update() -> None:
    p = nn.Parameter(torch.randn(H, D))
    optimizer = AdamW([{"params": [p], "lr": 0.1}], weight_decay=0.01, bits=8)
    p.grad = torch.randn(H, D).sign() * (0.5 + torch.rand(H, D))
    before = p.detach().clone()
    optimizer.step()
    direction = p.grad.sign()  # the first step of Adam, whatever β: η = lr·√(1-β₂)/(1-β₁), m/√v = (1-β₁)/√(1-β₂)·sign
    assert ((before - 0.1 * direction) * (1 - 0.1 * 0.01) - p).abs().max() < 1e-5
    assert optimizer.state[p]["exp_avg"].dtype == torch.uint8
    with pytest.raises(OptionError, match="AdamW has no option 'betaz'; did you mean 'betas'"):
        AdamW([p], betaz=1)  # type: ignore[call-arg]
    assert N == 40
