"""flatten_saved_inputs: a convolution's inputs cross as they are, not as channels-last copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowmem_compile.demo.measure import resident_tensors, saved_bytes
from tests.helpers import check_gradients, compile_graphs

NAME = "flatten_saved_inputs"


def patches(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 4, stride=4), nn.Flatten(), nn.Linear(width * 16, 4))


def test_image_and_weight_cross_flat() -> None:
    model, image = patches(), torch.randn(2, 3, 16, 16, requires_grad=True)
    graphs = compile_graphs(model)  # the convolution is too small to become a matrix product
    check_gradients(graphs, model, [image])
    assert graphs.rewritten(NAME) == 2
    flat = {tuple(n.meta["val"].shape) for n in graphs.chosen.saved_nodes() if n.op != "placeholder" and n.meta["val"].dim() == 1}
    assert flat == {(1536,), (384,)}


def test_what_inductor_would_not_copy_does_not_match() -> None:
    for image in (torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last), torch.randn(2, 3, 16, 32)[..., ::2]):
        graphs = compile_graphs(patches())
        graphs(image).sum().backward()
        assert graphs.codes(NAME) == ["LM100"]  # the weight
    line = nn.Sequential(nn.Conv1d(3, 8, 4), nn.Flatten(), nn.LazyLinear(4))
    line(torch.randn(2, 3, 16))
    graphs = compile_graphs(line)
    graphs(torch.randn(2, 3, 16)).sum().backward()
    assert graphs.codes(NAME) == []


def test_an_input_of_dynamic_size_declines() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2))
    graphs = compile_graphs(model, dynamic=True)
    graphs(torch.randn(2, 3, 16, 16)).sum().backward()
    assert sorted(graphs.codes(NAME)) == ["LM100", "LM203"]  # the image, the weight


@pytest.mark.e2e
def test_autograd_keeps_no_copy() -> None:
    image = torch.randn(2, 3, 16, 16)

    def kept(backend: str, **options: bool) -> int:
        torch.manual_seed(0)
        model = patches()

        def call() -> Tensor:
            compiled: Tensor = step(image)
            return compiled.sum()

        step = torch.compile(model, backend=backend, options={**options} or None)
        call().backward()
        return saved_bytes(call, exclude=resident_tensors(model, [image])).total

    lean, stock = kept("lowmem", report=False), kept("inductor")
    assert stock - lean >= image.nbytes
