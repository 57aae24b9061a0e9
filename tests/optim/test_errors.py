"""What a user can get wrong: the message names the option, the value and the way out, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowmem_compile.errors import GradientError, LowMemError, OptionError
from lowmem_compile.optim import APOLLO, COAP, Fira, Flora, GaLore, LowRankOptimizer, split
from tests.optim.common import METHODS, build, gradients, run, weight

ALL = [COAP, GaLore, Fira, Flora, APOLLO]


@pytest.mark.parametrize("kind", ALL)
def test_no_rank(kind: type[LowRankOptimizer]) -> None:
    make: Any = kind
    with pytest.raises(OptionError, match=rf"{kind.__name__}: group 0 has no rank\. Pass rank=\.\.\. or rank_ratio=\.\.\."):
        make([weight((24, 16))])
    with pytest.raises(OptionError, match="group 1 has no rank"):
        make([{"params": [weight((24, 16))], "rank": 4}, {"params": [weight((24, 16))]}])


@pytest.mark.parametrize("side", ["std", "input"])
@pytest.mark.parametrize("rank", [16, 17, 1000])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_a_rank_that_is_not_below_the_projected_dimension(shape: tuple[int, int], rank: int, side: str) -> None:
    with pytest.raises(OptionError, match=rf"rank={rank} of group 0, parameter 0 .* {shape[0]}x{shape[1]}.* below 16.*rank=None"):
        GaLore([weight(shape)], rank=rank, side=side)
    GaLore([weight(shape)], rank=15, side=side)


def test_a_rank_that_is_not_below_the_channels() -> None:
    with pytest.raises(OptionError, match=r"rank=32 of conv\.weight is not below its 32 channels"):
        COAP([("conv.weight", weight((40, 32, 3, 3)))], rank=32)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4"])
def test_a_rank_that_is_no_rank(rank: Any) -> None:
    with pytest.raises(OptionError, match="a rank is a whole number from 1, or None"):
        GaLore([weight((24, 16))], rank=rank)


@pytest.mark.parametrize("ratio", [1, 0.5, 0, -2.0])
def test_a_ratio_that_is_no_ratio(ratio: float) -> None:
    with pytest.raises(OptionError, match=r"rank_ratio=.*above 1"):
        GaLore([weight((24, 16))], rank_ratio=ratio)


def test_rank_and_ratio() -> None:
    with pytest.raises(OptionError, match="both rank=4 and rank_ratio=2; give one"):
        GaLore([weight((24, 16))], rank=4, rank_ratio=2)
    with pytest.raises(OptionError, match="group 0 has both rank=4 and rank_ratio=2"):
        GaLore([{"params": [weight((24, 16))], "rank": 4, "rank_ratio": 2}])


def test_a_group_that_matches_nothing() -> None:
    """A projected group without parameters is an error; an empty group for the rest is not."""
    model = nn.Linear(16, 24)
    wanted = [p for name, p in model.named_parameters() if "attn" in name]
    groups: list[dict[str, Any]] = [{"params": wanted, "rank": 4}, {"params": list(model.parameters()), "rank": None}]
    with pytest.raises(OptionError, match=r"group 0 \(rank=4\) has no parameters: the filter that made it matched nothing"):
        GaLore(groups)
    groups = [{"params": [model.weight], "rank": 4}, {"params": [], "rank": None}]
    GaLore(groups)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "left"}, "side='left'; the side rules are 'std', 'input'"),
        ({"base": "sgd"}, "base='sgd'; GaLore has the base updates 'adamw', 'adafactor'"),
        ({"bits": 4}, "bits=4"),
        ({"projector_bits": 4}, "projector_bits=4"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"update_interval": 0}, "update_interval=0"),
        ({"update_interval": 1.5}, "update_interval=1.5"),
        ({"block_size": 0}, "block_size=0"),
        ({"clip_threshold": 0.0}, "clip_threshold=0.0"),
        ({"decay_rate": 0.8}, "decay_rate=0.8"),
        ({"svd": "fast"}, "svd='fast'; it is 'exact' or 'randomised'"),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match="group 0 has ") as caught:
        GaLore([{"params": [weight((24, 16))], "rank": 4, **options}])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"), [("update_proj_gap", "update_interval"), ("proj_type", "side"), ("rnak", "rank"), ("lrate", None)]
)
def test_unknown_options(name: str, hint: str | None) -> None:
    make: Any = GaLore
    with pytest.raises(OptionError, match=f"has no option '{name}'.*The options are base, betas") as caught:
        GaLore([{"params": [weight((24, 16))], "rank": 4, name: 1}])
    assert (f"did you mean '{hint}'" in str(caught.value)) == (hint is not None)
    with pytest.raises((OptionError, TypeError), match=name):
        make([weight((24, 16))], rank=4, **{name: 1})


def test_methods_without_an_adafactor() -> None:
    with pytest.raises(OptionError, match="Fira has the base updates 'adamw'"):
        Fira([weight((24, 16))], rank=4, base="adafactor")
    with pytest.raises(OptionError, match="APOLLO has the base updates 'adamw'"):
        APOLLO([weight((24, 16))], rank=4, base="adafactor")


def test_coap_with_adafactor_needs_a_momentum_for_its_step() -> None:
    """COAP's released code fails with a KeyError at step T_u; here refreshing by SVD alone is a way out."""
    with pytest.raises(OptionError, match=r"base='adafactor' and betas=\(0.0, 0.999\).*reproject_factor=1"):
        COAP([weight((24, 16))], rank=4, base="adafactor", betas=(0.0, 0.999))
    W = weight((24, 16))
    optimizer = COAP([W], rank=4, base="adafactor", betas=(0.0, 0.999), reproject_factor=1, update_interval=2)
    run(optimizer, W, gradients((24, 16), 5))
    assert "exp_avg" not in optimizer.state[W]


CHANGES: list[dict[str, Any]] = [
    {"rank": 5},
    {"rank": None, "rank_ratio": 4},
    {"side": "input"},
    {"bits": 8},
    {"projector_bits": 8},
    {"base": "adafactor"},
]


@pytest.mark.parametrize("changed", CHANGES, ids=list(map(str, CHANGES)))
def test_another_structure_on_resume(changed: dict[str, Any]) -> None:
    """Refused before anything is loaded."""
    W, fresh = weight((16, 24)), weight((16, 24))
    first = COAP([W], rank=4)
    run(first, W, gradients((16, 24), 2))
    second = COAP([fresh], **{"rank": 4, **changed})
    name = next(iter(changed))
    with pytest.raises(OptionError, match=f"group 0 has {name}=.* the checkpoint {name}=.*Build COAP with {name}="):
        second.load_state_dict(first.state_dict())
    assert second.param_groups[0][name] == changed[name]
    assert not second.state


def test_other_options_come_from_the_checkpoint() -> None:
    """As in every PyTorch optimizer."""
    first, second = COAP([weight((24, 16))], 0.5, rank=4), COAP([weight((24, 16))], 0.1, rank=4)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("name", ["COAP", "GaLore", "Fira"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_cannot_give_a_basis(name: str, bad: float) -> None:
    """Nothing is changed, of no parameter; a later step goes on as if it had not been."""
    params, grads = [weight((24, 16)), weight((24, 16))], gradients((24, 16), 3)
    optimizer = build(name, params, update_interval=1)
    for p, G in zip(params, grads, strict=False):
        p.grad = G.clone()
    optimizer.step()
    kept = [p.detach().clone() for p in params]
    state = {k: v for k, v in optimizer.state_dict()["state"][0].items() if isinstance(v, int)}
    assert params[1].grad is not None
    params[1].grad[3, 4] = bad
    with pytest.raises(GradientError, match="the gradient of group 0, parameter 1 is not finite at a step that computes a basis"):
        optimizer.step()
    assert all(torch.equal(p, k) for p, k in zip(params, kept, strict=True))
    assert {k: v for k, v in optimizer.state_dict()["state"][0].items() if isinstance(v, int)} == state


@pytest.mark.parametrize("name", METHODS)
def test_sparse_gradients(name: str) -> None:
    table = nn.Embedding(24, 16, sparse=True)
    optimizer = build(name, table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(GradientError, match="is sparse; make it dense"):
        optimizer.step()


def test_an_error_in_a_group_adds_no_group() -> None:
    W, late = weight((24, 16)), weight((40, 30))
    optimizer = COAP([W], rank=4)
    with pytest.raises(OptionError):
        optimizer.add_param_group({"params": [late], "rank": 30})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [late], "rank": 29})


def test_shared_parameters() -> None:
    a, b, c = weight((24, 16)), weight((8, 16)), weight((24, 20))
    with pytest.raises(OptionError, match="shapes 24x16, 24x20; it must hold matrices that read one input width"):
        GaLore([a, b, c], rank=4, shared=[[a, c]])
    with pytest.raises(OptionError, match="put all that share into one group"):
        GaLore([{"params": [a]}, {"params": [b]}], rank=4, shared=[[a, b]])
    with pytest.raises(OptionError, match="named twice"):
        GaLore([a, b], rank=4, shared=[[a, b], [b, a]])
    with pytest.raises(OptionError, match="a parameter that no group holds"):
        GaLore([a, b], rank=4, shared=[[c]])
    with pytest.raises(OptionError, match=r"rank=None; give it a rank"):
        GaLore([{"params": [a, b], "rank": None, "shared": [[a, b]]}])


def test_split_says_what_there_is() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    with pytest.raises(OptionError, match=r"include: 'attn' matches none of the 2 weights.*0.weight, 1.weight.*'\*attn\*'"):
        split(model, rank=4, include=["attn"])
    with pytest.raises(OptionError, match=r"exclude: 'lm_head.\*' matches none"):
        split(model, rank=4, exclude=["lm_head.*"])
    with pytest.raises(OptionError, match="rank=16 is not below its smaller dimension, 16"):
        split(model, rank=16)
    with pytest.raises(OptionError, match="split needs one of rank and rank_ratio"):
        split(model)
    assert issubclass(GradientError, LowMemError)
