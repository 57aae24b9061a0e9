"""Small transformers of three kinds, written by hand: what the proofs without a GPU run.

Shapes: x [B, S, D] in, the same out. In the small LLaMA-like one two heads share a key and a value head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Size:
    """Sizes of a model and its batch.

    Attributes:
        width: D.
        heads: of the queries.
        kv_heads: of keys and values.
        hidden: width of the MLP.
        batch: B.
        tokens: S.
    """

    width: int
    heads: int
    kv_heads: int
    hidden: int
    batch: int
    tokens: int


WIDTH = 128
SMALL: Mapping[str, Size] = {
    "vit": Size(WIDTH, 4, 4, 4 * WIDTH, 2, 32),
    "llama": Size(WIDTH, 4, 2, 3 * WIDTH, 2, 32),
    "bert": Size(WIDTH, 4, 4, 4 * WIDTH, 2, 32),
}
"""What the interpreter can run, by kind of block."""
REAL: Mapping[str, tuple[str, Size]] = {
    "ViT-B": ("vit", Size(768, 12, 12, 3072, 64, 197)),
    "LLaMA-7B": ("llama", Size(4096, 32, 32, 11008, 2, 2048)),
    "RoBERTa-base": ("bert", Size(768, 12, 12, 3072, 32, 512)),
}
"""Kind of block and sizes of published models, by name."""


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self, size: Size, *, bias: bool, causal: bool) -> None:
        super().__init__()
        width = size.width
        self.size, self.causal = width // size.heads, causal
        self.q = nn.Linear(width, width, bias=bias)
        self.k, self.v = (nn.Linear(width, size.kv_heads * self.size, bias=bias) for _ in range(2))
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) if t.shape[1] < q.shape[1] else t for t in (k, v))
        made: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return made


class RMSNorm(nn.Module):
    """As LLaMA's code writes it: the statistic in float32, the result in x's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class ViTBlock(nn.Module):
    """LayerNorm before attention and a GELU MLP."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.attention = Attention(size, bias=True, causal=False)
        self.up, self.down = nn.Linear(size.width, size.hidden), nn.Linear(size.hidden, size.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class LlamaBlock(nn.Module):
    """RMSNorm before causal grouped-query attention and a SwiGLU MLP; no biases."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(size.width), RMSNorm(size.width)
        self.attention = Attention(size, bias=False, causal=True)
        self.gate, self.up = (nn.Linear(size.width, size.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        y: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return y


class BertBlock(nn.Module):
    """LayerNorm behind attention and behind a GELU MLP."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.attention = Attention(size, bias=True, causal=False)
        self.up, self.down = nn.Linear(size.width, size.hidden), nn.Linear(size.hidden, size.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        y: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return y


BLOCKS: dict[str, type[nn.Module]] = {"vit": ViTBlock, "llama": LlamaBlock, "bert": BertBlock}


def model(kind: str, layers: int = 2, size: Size | None = None) -> nn.Sequential:
    """``layers`` blocks and a linear layer behind them; small without a size."""
    size = size or SMALL[kind]
    return nn.Sequential(*(BLOCKS[kind](size) for _ in range(layers)), nn.Linear(size.width, size.width))


def example(dtype: torch.dtype = torch.float32, size: Size | None = None) -> Tensor:
    """An input of the models, differentiable."""
    size = size or SMALL["vit"]
    return torch.randn(size.batch, size.tokens, size.width, dtype=dtype).requires_grad_()
