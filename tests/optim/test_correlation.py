"""COAP's step on the projector: the closed-form gradients against autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_compile.optim.bases import gaussian, mix, randomised_vectors, singular_vectors
from lowmem_compile.optim.correlation import correlation_gradient, descend, left_gradient, right_gradient
from lowmem_compile.optim.projector import Side
from lowmem_compile.optim.tucker import higher_order_basis, tucker_gradients
from tests.optim.restatement import clipped_step, objective, tucker_objective

SIDES: list[Side] = ["right", "left"]


def problem(O: int, I: int, r: int, side: Side) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A projector that is not orthonormal, a momentum and a gradient."""
    right, dtype = side == "right", torch.float64
    P = torch.randn(I if right else O, r, dtype=dtype) / (I if right else O) ** 0.5
    return P, torch.randn((O, r) if right else (r, I), dtype=dtype), torch.randn(O, I, dtype=dtype)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("O", "I", "r"), [(12, 9, 3), (9, 12, 3), (7, 7, 1), (5, 30, 4)])
def test_closed_form_equals_autograd(O: int, I: int, r: int, side: Side) -> None:
    P, m, G = problem(O, I, r, side)
    leaf = P.clone().requires_grad_()
    (expected,) = torch.autograd.grad(objective(leaf, m, G, side == "right"), leaf)
    found = correlation_gradient(P, m, G, side)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(descend(P, 100 * found), clipped_step(P, 100 * expected), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("side", SIDES)
def test_rows_of_zeros(side: Side) -> None:
    """Rows that got no gradient (embeddings), and a momentum of zero, count with a cosine of zero."""
    P, m, G = problem(10, 8, 3, side)
    G[2:5] = 0
    if side == "right":
        m[4:7] = 0
    leaf = P.clone().requires_grad_()
    (expected,) = torch.autograd.grad(objective(leaf, m, G, side == "right"), leaf)
    torch.testing.assert_close(correlation_gradient(P, m, G, side), expected, rtol=1e-10, atol=1e-13)
    nothing = correlation_gradient(P, torch.zeros_like(m), G, side)
    assert nothing.isfinite().all()
    assert correlation_gradient(P, m, torch.zeros_like(G), side).abs().max() < 1e-12


class Sizes(TorchDispatchMode):
    """Collects the sizes of everything that is computed, views of the gradient aside."""

    def __init__(self, G: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = G.untyped_storage().data_ptr()
        self.sizes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != self.place:
            self.sizes.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("side", SIDES)
def test_nothing_larger_than_the_projected_tensors_is_formed(side: Side) -> None:
    """Neither GᵀG [I, I] nor anything [O, I]: given H, row norms and the product with G, as a compiled backward has them."""
    O, I, r = 50, 40, 3
    P, m, G = problem(O, I, r, side)
    norms = G.norm(dim=1)
    products: list[torch.Tensor] = []

    def product(Y: torch.Tensor) -> torch.Tensor:
        result = (G.T if side == "right" else G) @ Y
        products.append(result)
        return result

    H = G @ P if side == "right" else P.T @ G
    with Sizes(G) as seen:
        found = right_gradient(P, m, H, norms, product) if side == "right" else left_gradient(P, m, H, norms, product)
    torch.testing.assert_close(found, correlation_gradient(P, m, G, side))
    assert [tuple(x.shape) for x in products] == [(I if side == "right" else O, 2 * r)]
    assert seen.sizes
    assert max(torch.Size(size).numel() for size in seen.sizes) <= 2 * r * max(O, I)


@pytest.mark.parametrize("shape", [(9, 7, 3, 3), (7, 9, 2, 1), (8, 6, 5)])
@pytest.mark.parametrize("modes", [1, 2])
def test_tucker_gradients_equal_autograd(shape: tuple[int, ...], modes: int) -> None:
    G = torch.randn(*shape, dtype=torch.float64)
    G[1] = 0
    factors = tuple(torch.randn(n, 3, dtype=torch.float64) / n**0.5 for n in shape[:modes])
    m = torch.randn(*(3,) * modes, *shape[modes:], dtype=torch.float64)
    leaves = [f.clone().requires_grad_() for f in factors]
    expected = torch.autograd.grad(tucker_objective(leaves, m, G), leaves)
    for found, wanted in zip(tucker_gradients(factors, m, G), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_a_tensor_of_low_rank_is_found_whole() -> None:
    U, V = (torch.linalg.qr(torch.randn(n, 2, dtype=torch.float64)).Q for n in (9, 7))
    G = torch.einsum("mnk,am,bn->abk", torch.randn(2, 2, 9, dtype=torch.float64), U, V).reshape(9, 7, 3, 3)
    for found, wanted in zip(higher_order_basis(G, (2, 2)), (U, V), strict=True):
        torch.testing.assert_close(found @ found.T, wanted @ wanted.T)
        torch.testing.assert_close(found.T @ found, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("side", SIDES)
def test_randomised_vectors_span_what_the_exact_ones_do(side: Side) -> None:
    U, V = (torch.linalg.qr(torch.randn(n, 30)).Q for n in (60, 40))
    G = U @ torch.diag(2.0 ** -torch.arange(30)) @ V.T
    exact, found = singular_vectors(G, 5, side), randomised_vectors(G, 5, side, seed=3)
    torch.testing.assert_close(found @ found.T, exact @ exact.T, rtol=0, atol=1e-3)
    assert torch.equal(found, randomised_vectors(G, 5, side, seed=3))


def test_gaussian_projectors_are_right_on_average() -> None:
    """E[A Aᵀ] = I: entries have variance 1/r, and draws of different numbers are independent."""
    device, dtype = torch.device("cpu"), torch.float32
    draws = [gaussian(20, 5, mix(1, k), device, dtype) for k in range(4000)]
    mean = torch.stack([A @ A.T for A in draws]).mean(0)
    assert (mean - torch.eye(20)).abs().max() < 5 * (2 / 5 / 4000) ** 0.5
    assert len({mix(seed, k) for seed in range(50) for k in range(50)}) == 2500
