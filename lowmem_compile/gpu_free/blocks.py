"""Small transformers of three kinds, written by hand: what the proofs without a GPU run.

Shapes: x [B, S, D] in, the same out; D is ``WIDTH``. Two heads share a key and a value head in the LLaMA-like one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, SHAPE = 128, 4, (2, 32, 128)


class Attention(nn.Module):
    """Self-attention with ``kv_heads`` key and value heads."""

    def __init__(self, kv_heads: int, *, bias: bool, causal: bool) -> None:
        super().__init__()
        self.size, self.causal = WIDTH // HEADS, causal
        self.q = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * self.size, bias=bias) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) if t.shape[1] < q.shape[1] else t for t in (k, v))
        made: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return made


class RMSNorm(nn.Module):
    """As LLaMA's code writes it: the statistic in float32, the result in x's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class ViTBlock(nn.Module):
    """LayerNorm before attention and a GELU MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(HEADS, bias=True, causal=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class LlamaBlock(nn.Module):
    """RMSNorm before causal grouped-query attention and a SwiGLU MLP; no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(), RMSNorm()
        self.attention = Attention(HEADS // 2, bias=False, causal=True)
        self.gate, self.up = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        y: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return y


class BertBlock(nn.Module):
    """LayerNorm behind attention and behind a GELU MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(HEADS, bias=True, causal=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        y: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return y


BLOCKS: dict[str, type[nn.Module]] = {"vit": ViTBlock, "llama": LlamaBlock, "bert": BertBlock}


def model(kind: str, layers: int = 2) -> nn.Sequential:
    """``layers`` blocks and a linear layer behind them."""
    return nn.Sequential(*(BLOCKS[kind]() for _ in range(layers)), nn.Linear(WIDTH, WIDTH))


def example(dtype: torch.dtype = torch.float32) -> Tensor:
    """An input of the models, differentiable."""
    return torch.randn(SHAPE, dtype=dtype).requires_grad_()
