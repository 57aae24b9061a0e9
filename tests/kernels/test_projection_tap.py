"""lowmem::projection_tap and lowmem::refresh_tap: identity forward, projected gradient backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowmem_compile.errors import GradientError
from lowmem_compile.kernels.projection_tap import (
    Refresher,
    projected_gradient_reference,
    projection_tap,
    refresh_basis,
    refresh_tap,
)

I, O, R = 7, 5, 2


def inputs(rows: tuple[int, ...], left: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.randn(*rows, O, dtype=dtype, requires_grad=True)
    x = torch.randn(*rows, I, dtype=dtype)
    basis = torch.randn(O if left else I, R, dtype=dtype)
    zero = torch.zeros((), dtype=dtype).expand((R, I) if left else (O, R)).requires_grad_()
    return y, x, basis, zero


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("rows", [(6,), (2, 3), (0,), (1, 1, 4)])
def test_gradients(rows: tuple[int, ...], left: bool) -> None:
    y, x, basis, zero = inputs(rows, left)
    out = projection_tap(y, x, basis, zero, left)
    assert torch.equal(out, y)
    grad = torch.randn_like(out)
    out.backward(grad)
    G = grad.reshape(-1, O).T @ x.reshape(-1, I)
    assert y.grad is not None
    assert zero.grad is not None
    assert torch.equal(y.grad, grad)
    torch.testing.assert_close(zero.grad, basis.T @ G if left else G @ basis)


@pytest.mark.parametrize("left", [False, True])
def test_strided_inputs_and_a_wider_input(left: bool) -> None:
    """Autocast: the linear ran in bfloat16, x and the basis are float32."""
    _, x, basis, _ = inputs((6,), left, torch.float32)
    grad = torch.randn(O, 6).T.to(torch.bfloat16)
    low = projected_gradient_reference(grad, x, basis, left)
    G = grad.double().T @ x.double()
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), basis.double().T @ G if left else G @ basis.double(), rtol=0.03, atol=0.1)


@pytest.mark.parametrize("left", [False, True])
def test_opcheck(left: bool) -> None:
    y, x, basis, zero = inputs((6,), left)
    torch.library.opcheck(projection_tap, (y, x, basis, zero.detach().clone().requires_grad_(), left))
    refresher = Refresher(lambda G: basis.T @ G if left else G @ basis)
    torch.library.opcheck(refresh_basis, (y.detach(), x, refresher.ticket, R, left))


@pytest.mark.parametrize("left", [False, True])
def test_a_refresher_sees_the_whole_gradient_once(left: bool) -> None:
    y, x, basis, zero = inputs((2, 3), left)
    seen: list[Tensor] = []

    def take(G: Tensor) -> Tensor:
        seen.append(G)
        return basis.T @ G if left else G @ basis

    refresher = Refresher(take)
    grad = torch.randn_like(y)
    refresh_tap(y, x, refresher.ticket, zero, left).backward(grad)
    G = grad.reshape(-1, O).T @ x.reshape(-1, I)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], G)
    torch.testing.assert_close(zero.grad, basis.T @ G if left else G @ basis)


def test_a_refresher_that_is_gone() -> None:
    y, x, _, zero = inputs((6,), left=False)
    ticket = Refresher(lambda G: G).ticket
    out = refresh_tap(y, x, ticket, zero, False)
    with pytest.raises(GradientError, match="deleted after the forward pass"):
        out.sum().backward()
