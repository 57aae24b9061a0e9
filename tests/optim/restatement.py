"""The published updates, restated step by step from papers and packages, for comparison with lowmem_compile.optim.

Nothing here uses lowmem_compile. Gradients come as a list; each function returns the weights after the last.

lowmem_compile.optim has been run once against galore-torch 1.0, fira 1.0.2 (at α = 1) and COAP's released code (deabc3a, with
tensorly 0.10: AdamW and Adafactor, with and without restore_state, and Tucker-2 convolutions with AdamW), on three shapes
each over 25 steps: weights agree to 8e-7 in float32. For convolutions the gradients of COAP's factors were cleared at each
step, which its code forgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss

Draw = Callable[[int], Tensor]


def is_right(W: Tensor, side: str) -> bool:
    return side == "input" or W.shape[0] >= W.shape[1]


@dataclass
class Adam:
    """AdamW as Hugging Face's transformers had it: ε beside √v, bias correction in the step size."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    t: int = 0
    m: Tensor | None = None
    v: Tensor | None = None

    def direction(self, R: Tensor) -> Tensor:
        if self.m is None or self.v is None:
            self.m, self.v = torch.zeros_like(R), torch.zeros_like(R)
        self.t += 1
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * R
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * R**2
        return self.m / (torch.sqrt(self.v) + self.eps)

    def size(self) -> float:
        return self.lr * math.sqrt(1 - self.betas[1] ** self.t) / (1 - self.betas[0] ** self.t)


@dataclass
class Adafactor:
    """Adafactor with the learning rate inside its momentum, as in transformers."""

    lr: float
    beta1: float = 0.9
    t: int = 0
    m: Tensor | None = None
    row: Tensor | None = None
    col: Tensor | None = None
    rate: float = field(default=0.0)

    def update(self, R: Tensor, W: Tensor) -> Tensor:
        if self.m is None or self.row is None or self.col is None:
            self.m = torch.zeros_like(R)
            self.row, self.col = torch.zeros(R.shape[:-1]), torch.zeros(R.shape[:-2] + R.shape[-1:])
        self.t += 1
        self.rate = self.lr * max(1e-3, float(W.norm() / W.numel() ** 0.5))
        beta2 = 1 - self.t**-0.8
        square = R**2 + 1e-30
        self.row = beta2 * self.row + (1 - beta2) * square.mean(-1)
        self.col = beta2 * self.col + (1 - beta2) * square.mean(-2)
        V = self.row.unsqueeze(-1) * self.col.unsqueeze(-2) / self.row.mean(-1)[..., None, None]
        u = R / V.sqrt()
        u = u / max(1.0, float(u.norm() / u.numel() ** 0.5))
        self.m = self.beta1 * self.m + (1 - self.beta1) * self.rate * u
        return self.m


def galore(W: Tensor, grads: Sequence[Tensor], *, rank: int, gap: int, lr: float, scale: float, wd: float, side: str) -> Tensor:
    W, adam, right = W.clone(), Adam(lr), is_right(W, side)
    P = torch.empty(0)
    for t, G in enumerate(grads):
        if t % gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            P = Vh[:rank, :] if right else U[:, :rank]
        N = adam.direction(G @ P.t() if right else P.t() @ G)
        W = W - adam.size() * scale * (N @ P if right else P @ N)
        W = W - lr * wd * W
    return W


def fira(W: Tensor, grads: Sequence[Tensor], *, rank: int, gap: int, lr: float, scale: float, wd: float, side: str) -> Tensor:
    """Algorithm 1 of the paper."""
    W, adam, right = W.clone(), Adam(lr), is_right(W, side)
    P, before = torch.empty(0), 0.0
    for t, G in enumerate(grads):
        if t % gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            P = Vh[:rank, :].t() if right else U[:, :rank]
        R = G @ P if right else P.t() @ G
        N = adam.direction(R)
        back, residual = (N @ P.t(), G - R @ P.t()) if right else (P @ N, G - P @ R)
        phi = N.norm(dim=1 if right else 0) / (R.norm(dim=1 if right else 0) + 1e-8)
        S = phi[:, None] * residual if right else residual * phi[None, :]
        norm = float(S.norm())
        if t and norm / (before + 1e-8) > 1.01:
            S = S / (norm / (before + 1e-8)) * 1.01
        before = float(S.norm())
        W = W - adam.size() * scale * (back + S)
        W = W - lr * wd * W
    return W


def rsvd(G: Tensor, omega: Tensor) -> Tensor:
    Q = torch.linalg.qr(G @ omega, "reduced")[0]
    Vh: Tensor = torch.linalg.svd(Q.T @ G, full_matrices=False)[2]
    return Vh.T


def objective(P: Tensor, m: Tensor, G: Tensor, right: bool) -> Tensor:
    """Eq. 5, with everything at full size."""
    up = m @ P.T if right else P @ m
    low = G @ P @ P.T if right else P @ P.T @ G
    loss: Tensor = mse_loss(low, G) * (1 - cosine_similarity(up, G, dim=1).mean())
    return loss


def tucker_objective(factors: Sequence[Tensor], m: Tensor, G: Tensor) -> Tensor:
    projections = [f @ f.T for f in factors]
    spread, low = m, G
    for mode, (f, P) in enumerate(zip(factors, projections, strict=True)):
        spread = torch.tensordot(f, spread, ([1], [mode])).movedim(0, mode)
        low = torch.tensordot(P, low, ([1], [mode])).movedim(0, mode)
    return mse_loss(low, G) * (1 - cosine_similarity(spread, G, dim=1).mean())


def clipped_step(P: Tensor, gradient: Tensor) -> Tensor:
    return P - 0.1 * gradient * min(1.0, 1.0 / (float(gradient.norm()) + 1e-6))


def coap(
    W: Tensor, grads: Sequence[Tensor], *, rank: int, every: int, factor: int, lr: float, scale: float, wd: float,
    side: str, restore: bool, adafactor: bool,
) -> Tensor:  # fmt: skip
    W, right = W.clone(), is_right(W, side)
    adam, ada = Adam(lr), Adafactor(lr)
    P = torch.empty(0)

    def raise_(x: Tensor) -> Tensor:
        return x @ P.T if right else P @ x

    def lower(x: Tensor) -> Tensor:
        return x @ P if right else P.T @ x

    for t, G in enumerate(grads):
        if t == 0:
            omega = torch.randn(G.shape[1 if right else 0], rank, generator=torch.Generator().manual_seed(3407))
            P = rsvd(G if right else G.T, omega.to(G.dtype))
        elif t % every == 0:
            m = ada.m if adafactor else adam.m
            assert m is not None
            wide, root = raise_(m), None if adam.v is None else raise_(adam.v.sqrt())
            if t % (every * factor) == 0:
                P = rsvd(G if right else G.T, P)
            else:
                leaf = P.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(objective(leaf, m, G, right), leaf)
                P = clipped_step(P, gradient)
            if restore:
                if adafactor:
                    ada.m = lower(wide)
                else:
                    assert root is not None
                    adam.m, adam.v = lower(wide), lower(root) ** 2
        if adafactor:
            u = ada.update(lower(G), W)
            W = W - wd * ada.rate * W - scale * raise_(u)
        else:
            N = adam.direction(lower(G))
            W = W - adam.size() * scale * raise_(N)
            W = W - lr * wd * W
    return W


def leading(matrix: Tensor, rank: int) -> Tensor:
    U: Tensor = torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank].clone()
    for column in range(rank):
        if U[U[:, column].abs().argmax(), column] < 0:
            U[:, column] *= -1
    return U


def unfold(G: Tensor, mode: int) -> Tensor:
    return G.movedim(mode, 0).reshape(G.shape[mode], -1)


def hooi(G: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Higher-order orthogonal iteration on the first modes."""
    factors = [leading(unfold(G, mode), rank) for mode, rank in enumerate(ranks)]
    if len(ranks) == 1:
        return factors
    errors: list[float] = []
    for _ in range(100):
        for mode, rank in enumerate(ranks):
            other = 1 - mode
            rest = torch.tensordot(factors[other].T, G, ([1], [other])).movedim(0, other)
            factors[mode] = leading(unfold(rest, mode), rank)
        core = tucker_down(G, factors)
        errors.append(math.sqrt(abs(float(G.norm() ** 2 - core.norm() ** 2))) / float(G.norm()))
        if len(errors) >= 3 and abs(errors[-1] - errors[-2]) < 1e-4:
            break
    return factors


def tucker_down(G: Tensor, factors: Sequence[Tensor]) -> Tensor:
    for mode, f in enumerate(factors):
        G = torch.tensordot(f.T, G, ([1], [mode])).movedim(0, mode)
    return G


def tucker_up(R: Tensor, factors: Sequence[Tensor]) -> Tensor:
    return tucker_down(R, [f.T for f in factors])


def coap_convolution(
    W: Tensor, grads: Sequence[Tensor], *, ratio: float, every: int, factor: int, lr: float, adafactor: bool, restore: bool
) -> Tensor:
    W = W.clone()
    adam, ada = Adam(lr), Adafactor(lr)
    ranks = [int(W.shape[0] // ratio)] if W.shape[-1] == 1 else [int(s // ratio**0.5) for s in W.shape[:2]]
    factors: list[Tensor] = []
    for t, G in enumerate(grads):
        if t % every == 0:
            m, old = ada.m if adafactor else adam.m, factors
            if t % (every * factor) == 0:
                factors = hooi(G, ranks)
            else:
                assert m is not None
                leaves = [f.clone().requires_grad_() for f in factors]
                gradients = torch.autograd.grad(tucker_objective(leaves, m, G), leaves)
                factors = [clipped_step(f, g) for f, g in zip(factors, gradients, strict=True)]
            if restore and m is not None:
                back = tucker_down(tucker_up(m, old), factors)
                if adafactor:
                    ada.m = back
                else:
                    assert adam.v is not None
                    adam.m, adam.v = back, tucker_down(tucker_up(adam.v.sqrt(), old), factors) ** 2
        R = tucker_down(G, factors)
        W = W - (tucker_up(ada.update(R, W), factors) if adafactor else adam_update(adam, R, factors))
    return W


def adam_update(adam: Adam, R: Tensor, factors: Sequence[Tensor]) -> Tensor:
    N = adam.direction(R)
    return adam.size() * tucker_up(N, factors)


def flora(W: Tensor, grads: Sequence[Tensor], *, draw: Draw, kappa: int, lr: float, beta: float, sgd: bool, side: str) -> Tensor:
    """Algorithm 2 of the paper: C in the subspace; its way back replaces the gradient of the base optimizer."""
    W, right = W.clone(), is_right(W, side)
    ada = Adafactor(lr, beta1=0.0)
    A, C = torch.empty(0), torch.empty(0)
    for t, G in enumerate(grads):
        if t % kappa == 0:
            new = draw(t // kappa)
            if t:
                C = C @ A.T @ new if right else new.T @ (A @ C)
            A = new
        R = G @ A if right else A.T @ G
        C = beta * (C if t else torch.zeros_like(R)) + (1 - beta) * R
        M = C @ A.T if right else A @ C
        W = W - (lr * M if sgd else ada.update(M, W))
    return W


def apollo(
    W: Tensor, grads: Sequence[Tensor], *, draw: Draw, gap: int, lr: float, scale: float, wd: float, mini: bool, side: str
) -> Tensor:
    """Algorithm 1 of the paper, N with ε beside √v."""
    W, adam, right = W.clone(), Adam(lr), is_right(W, side)
    A, before = torch.empty(0), 0.0
    for t, G in enumerate(grads):
        if t % gap == 0:
            A = draw(t // gap)
        R = G @ A if right else A.T @ G
        N = adam.direction(R)
        if mini:
            S = G * float(N.norm() / (R.norm() + 1e-8))
        else:
            s = N.norm(dim=1 if right else 0) / (R.norm(dim=1 if right else 0) + 1e-8)
            S = torch.diag(s) @ G if right else G @ torch.diag(s)
        norm = float(S.norm())
        if t and norm > 1.01 * (before + 1e-8):
            S = S * (1.01 * (before + 1e-8) / norm)
        before = float(S.norm())
        W = W - adam.size() * scale * S
        W = W - lr * wd * W
    return W
