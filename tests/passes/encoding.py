"""What the tests of encode_saved share: small models, and distances of gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from lowmem_compile.kernels.group_codes import codec_named
from lowmem_compile.options import Options
from tests.helpers import Graphs, check_gradients, compile_graphs, run, run_double

NAME = "encode_saved"
ROWS, WIDE = 128, 96
Function = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """A function between two linears; its input or its output is saved: [128, 96]."""

    def __init__(self, function: Function = F.gelu, last: int = WIDE, wide: int = WIDE) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(64, wide), nn.Linear(last, 64), function

    def forward(self, x: Tensor) -> Any:
        return self.down(self.function(self.up(x)))


class Attention(nn.Module):
    """Self-attention with one linear for query, key and value."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(64, 192), nn.Linear(64, 64), fused

    def forward(self, x: Tensor) -> Any:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True) if self.fused else (q @ k.mT * 0.25).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(-2))


def rows(n: int = ROWS) -> Tensor:
    return torch.randn(n, 64, requires_grad=True)


def tokens() -> Tensor:
    return torch.randn(8, 128, 64, requires_grad=True)


def nbytes(name: str, n: int, width: int) -> int:
    return codec_named(name, group=Options().codec_group).nbytes(n, width)


def distances(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """|got - want| / |want| of every tensor, in the Euclidean norm."""
    assert set(got) == set(want)
    return {k: ((got[k].double() - want[k].double()).norm() / (want[k].double().norm() + 1e-30)).item() for k in want}


def check(graphs: Graphs, model: nn.Module, inputs: Sequence[Tensor], bound: float, **how: Any) -> dict[str, Tensor]:
    """Outputs are exact to rounding; gradients are as close to float64 as the codec is."""
    got, want = run(graphs, model, inputs, **how), run_double(model, inputs)
    near = distances(got, want)
    far = {k: d for k, d in near.items() if not d <= (1e-5 if k.startswith("output") else bound)}
    assert not far, f"above {bound}: {far}"
    return got


def check_exact(model: nn.Module, inputs: Sequence[Tensor], codes: list[str], **options: Any) -> None:
    """Nothing is encoded, for these reasons, and gradients are exact."""
    graphs = compile_graphs(model, **{"codec": "int8", **options})
    check_gradients(graphs, model, inputs, inputs[0].dtype)
    assert graphs.codes(NAME) == codes


def held(graphs: Graphs, model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages that autograd really keeps, parameters and inputs left out."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    graphs(*inputs)
    with saved_tensors_hooks(pack, lambda t: t):
        out = graphs(*inputs)
    del out
    given = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *inputs)}
    return sum(size for pointer, size in storages.items() if pointer not in given)
