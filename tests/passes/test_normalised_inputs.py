"""encode_saved: what the backward pass reads as a frozen norm's input alone takes six bits by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_compile.kernels.group_codes import CODECS
from tests.helpers import Graphs, compile_graphs, run, run_double
from tests.passes.encoding import ROWS, WIDE, distances, rows

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class Normed(nn.Module):
    """linear, norm, frozen linear; ``other`` reads the norm's input as well."""

    def __init__(self, norm: str, other: str = "") -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(64, WIDE), NORMS[norm](WIDE).requires_grad_(False)
        self.down, self.more = nn.Linear(WIDE, 64).requires_grad_(False), nn.Linear(WIDE, 64)
        self.other = other

    def forward(self, x: Tensor) -> Any:
        h = self.up(x)
        y = self.down(self.norm(h)) * torch.linspace(-1, 1, 64)
        if self.other == "linear":
            return y + self.more(h)
        if self.other == "residual":
            return y + F.linear(h, self.down.weight)
        return y.sum() + h.square().sum() if self.other == "square" else y


def decisions(graphs: Graphs) -> set[str]:
    """How tensors as large as the norm's input are kept."""
    return {t.decision for t in graphs.chosen.saved_tensors() if t.nbytes >= ROWS * WIDE // 2 and "scales" not in t.decision}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("other", ["", "residual"])
def test_the_input_of_a_frozen_norm_takes_six_bits(norm: str, other: str) -> None:
    model, x = Normed(norm, other), rows()
    graphs = compile_graphs(model, codec="auto")
    got, want = run(graphs, model, [x]), run_double(model, [x])
    assert "int6 codes" in decisions(graphs)
    assert max(distances(got, want).values()) <= CODECS["int6"].error


@pytest.mark.parametrize("norm", NORMS)
def test_its_error_is_divided_by_the_root_of_the_width(norm: str) -> None:
    """x̂'s term is one direction of D in dx: eight bits for it would change little."""
    model, x = Normed(norm), rows()
    graphs = compile_graphs(model, codec="auto")
    near = distances(run(graphs, model, [x]), run_double(model, [x]))
    assert near["input 0"] <= 3 * CODECS["int6"].error / WIDE**0.5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("other", ["linear", "square"])
def test_another_reader_takes_eight_bits(norm: str, other: str) -> None:
    model, x = Normed(norm, other), rows()
    graphs = compile_graphs(model, codec="auto")
    run(graphs, model, [x])
    assert decisions(graphs) == {"int8 codes"}


@pytest.mark.parametrize("norm", NORMS)
def test_a_trained_norm_takes_eight_bits(norm: str) -> None:
    """dγ = Σ dy∘x̂: there x̂'s error is the gradient's."""
    model, x = Normed(norm), rows()
    model.norm.requires_grad_(True)
    graphs = compile_graphs(model, codec="auto")
    run(graphs, model, [x])
    assert decisions(graphs) == {"int8 codes"}


def test_a_softmax_is_no_norm() -> None:
    """Its backward sums P∘dP over a row and multiplies P by that too, but P∘dP goes on as it is."""
    model, x = Normed("layer"), rows()
    model.norm = nn.Softmax(-1)
    graphs = compile_graphs(model, codec="auto")
    run(graphs, model, [x])
    assert decisions(graphs) == {"int8 codes"}


def test_a_codec_named_in_the_options_is_taken() -> None:
    model, x = Normed("layer"), rows()
    graphs = compile_graphs(model, codec="int5")
    run(graphs, model, [x])
    assert decisions(graphs) == {"int5 codes"}
