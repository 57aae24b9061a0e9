"""``lowmem_compile.loqt``: chosen linears of a model become LoQT layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Literal

from torch import nn

from lowmem_compile.errors import OptionError
from lowmem_compile.optim.loqt.handle import LoQT, Settings, _replace
from lowmem_compile.optim.loqt.linear import LoQTLinear
from lowmem_compile.optim.loqt.nf4 import NF4, Format, Plain, check_block
from lowmem_compile.optim.projector import choose_side
from lowmem_compile.optim.settings import SIDES

SVDS = ("exact", "randomised")


def loqt(
    model: nn.Module,
    rank: int,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    scale: float = 0.5,
    interval: int = 100,
    growth: float = 1.2,
    compensation: int = 5,
    quantise: bool = True,
    block: int = 64,
    double_quantise: bool = False,
    side: Literal["std", "input"] = "std",
    svd: Literal["exact", "randomised"] = "exact",
    seed: int = 0,
) -> LoQT:
    """Put a model under LoQT (arXiv:2405.16528): 4-bit weights, a frozen 4-bit projector P and a trained factor B.

    The chosen linears are replaced in place; everything else, biases included, is trained as before. The weights stay whole until
    the first merge, which takes place at the start of the first step::

        training = lowmem_compile.loqt(model, rank=128, include=["*attn*", "*mlp*"])
        optimizer = torch.optim.AdamW(training.parameters(), lr=1e-2)
        model.compile(backend="lowmem")
        for batch in batches:
            training.before_step(lambda: model(**batch).loss)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        model: any module with ``nn.Linear``s; changed in place. Build the optimizer afterwards.
        rank: r, below min(O, I) of every chosen linear.
        include: patterns (``*``, ``?``, ``[...]``) for whole names of linears, such as ``"*mlp*"``.
        exclude: patterns for names to leave out, such as ``"lm_head"``.
        scale: s of y = x deq(W_q)ᵀ + s·(x P) Bᵀ, not divided by r; 0.4, 0.5 and 0.25 in the published runs.
        interval: τ, steps to the second merge and the least gap.
        growth: ψ: the gap after merge k is τ + ⌊ψᵏ⌋.
        compensation: C, rounds of error compensation; 0 for none.
        quantise: ``False`` keeps W and P whole in the weight's dtype: GaLore by other means.
        block: values that share a scale in NF4, a power of two.
        double_quantise: NF4's scales in 8 bits.
        side: ``"std"`` puts P on the shorter side (published), ``"input"`` on the input side, where backward keeps x P alone.
        svd: ``"exact"``, or ``"randomised"`` (cost O·I·r in place of O·I·min(O, I)).
        seed: of the randomised SVD.

    Raises:
        OptionError: a wrong value; a rank that is not below a chosen linear's smaller dimension; a pattern that matches no
            linear; nothing to convert; a model that is under LoQT already.
    """
    settings = Settings(rank, scale, interval, growth, compensation, quantise, block, double_quantise, side, svd, seed)
    check_settings(settings)
    if any(isinstance(m, LoQTLinear) for m in model.modules()):
        raise OptionError("loqt: the model has LoQT layers already. Use what the first call returned.")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not fnmatch.filter(linears, pattern):
                raise OptionError(
                    f"loqt: {option}: {pattern!r} matches none of the {len(linears)} linears, such as "
                    f"{', '.join(list(linears)[:5]) or 'none at all'}. Patterns are for whole names: '*attn*', not 'attn'."
                )
    others = _weights_elsewhere(model)
    left_out: dict[str, str] = {}
    chosen: dict[str, nn.Linear] = {}
    for name, linear in linears.items():
        reason = _reason(name, linear, include, exclude, others)
        if reason:
            left_out[name] = reason
        else:
            _check_rank(name, linear, rank)
            chosen[name] = linear
    if not chosen:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in left_out.items())
        raise OptionError(f"loqt found no linear to convert.{reasons}")
    for name, linear in chosen.items():
        _replace(model, name, linear, new_layer(linear, settings))
    return LoQT(model, settings, left_out)


def new_layer(linear: nn.Linear, settings: Settings) -> LoQTLinear:
    """The layer for a linear, not merged yet."""
    shape = (linear.out_features, linear.in_features)
    side = choose_side(shape, settings.side)
    projector = (shape[1] if side == "right" else shape[0], settings.rank)

    def form(of: tuple[int, ...]) -> Format:
        return NF4(of, settings.block, settings.double_quantise) if settings.quantise else Plain(of, linear.weight.dtype)

    return LoQTLinear(
        linear, side=side, rank=settings.rank, scale=settings.scale, weight_format=form(shape), projector_format=form(projector)
    )


def check_settings(settings: Settings) -> None:
    """Refuse values outside their range.

    Raises:
        OptionError: names the option, the value and what is allowed.
    """

    def require(name: str, allowed: bool, what: str) -> None:
        if not allowed:
            raise OptionError(f"loqt: {name}={getattr(settings, name)!r}; {what}.")

    def whole(value: object, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    require("rank", whole(settings.rank, 1), "a rank is a whole number from 1")
    require("scale", 0 < settings.scale < float("inf"), "it is above 0 (B is divided by it at each merge)")
    require("interval", whole(settings.interval, 1), "it is a whole number of steps from 1")
    require("growth", 0 <= settings.growth < float("inf"), "it is 0 or more (the published value is 1.2)")
    require("compensation", whole(settings.compensation, 0), "it is a whole number of rounds from 0")
    require("side", settings.side in SIDES, f"the side rules are {', '.join(map(repr, SIDES))}")
    require("svd", settings.svd in SVDS, f"it is {' or '.join(map(repr, SVDS))}")
    require("double_quantise", not settings.double_quantise or settings.quantise, "it needs quantise=True")
    check_block(settings.block)


def _check_rank(name: str, linear: nn.Linear, rank: int) -> None:
    limit = min(linear.weight.shape)
    if rank >= limit:
        shape = "x".join(map(str, linear.weight.shape))
        raise OptionError(
            f"loqt: rank={rank} is not below the smaller dimension of {name} ({shape}): nothing would be saved. Use a rank below "
            f"{limit}, or leave the layer out with exclude=[{name!r}]."
        )


def _weights_elsewhere(model: nn.Module) -> dict[int, str]:
    """Parameters that another module than one ``nn.Linear`` uses, by identity, with the name of the other."""
    owner: dict[int, tuple[nn.Module, str]] = {}
    shared: dict[int, str] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if id(p) in owner and owner[id(p)][0] is not module:
                shared[id(p)] = name if isinstance(owner[id(p)][0], nn.Linear) else owner[id(p)][1]
            owner.setdefault(id(p), (module, name))
    return shared


def _reason(name: str, linear: nn.Linear, include: Sequence[str], exclude: Sequence[str], others: dict[int, str]) -> str:
    """Why a linear is not converted; empty if it is."""
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded by name"
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return "its name matches no pattern of include"
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}, which computes something of its own"
    if id(linear.weight) in others:
        return f"its weight is tied to {others[id(linear.weight)]}"
    if not linear.weight.is_floating_point():
        return f"its weight is {str(linear.weight.dtype).removeprefix('torch.')}"
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks:
        return "it has hooks, which another module would not have"
    if min(linear.weight.shape) < 2:
        return "one of its dimensions is 1"
    return ""
