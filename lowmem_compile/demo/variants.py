"""The ways of training that are compared: eager, its rivals at their best settings, and lowmem.

A variant makes a trained model's callable and knows the configuration under which it must run. That
configuration is entered around every call and every backward pass, because Inductor compiles the backward
graph at the first backward pass only.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from lowmem_compile import _torch
from lowmem_compile.errors import LowMemError

Kind = Literal["eager", "checkpointing", "inductor", "lowmem"]

# The most accurate 8-bit type. use_scaling is set on purpose: PyTorch's default differs between the forward
# and the backward graph, and the gradients are then off by a factor of 10^4. size_in_mb is set by
# Variant.fitted.
_FP8_PASS = {
    "quant_type": "torch.float8_e4m3fn",
    "use_scaling": True,
    "exclude_primals": True,
    "allowed_dtypes": "torch.bfloat16;torch.float32",
}


@dataclass(frozen=True)
class Variant:
    """One way of training.

    ``functorch`` and ``inductor`` are configuration that is active in every call; ``options`` go to the
    lowmem backend. ``fp8`` switches PyTorch's pass on that saves activations in 8 bits.
    """

    name: str
    label: str
    kind: Kind
    functorch: Mapping[str, Any] = field(default_factory=dict)
    inductor: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    fp8: bool = False

    @property
    def compiled(self) -> bool:
        """Whether this variant compiles the model."""
        return self.kind in {"inductor", "lowmem"}

    def fitted(self, unit_bytes: int) -> Variant:
        """This variant at its best setting, if the smallest hidden states take ``unit_bytes`` in bfloat16.

        The fp8 pass may take tensors of half that size and more. Below are attention masks, whose -inf make
        it return NaN gradients, and row statistics, which it would make larger.
        """
        if not self.fp8:
            return self
        settings = {"activation_quantization_aten_pass": {**_FP8_PASS, "size_in_mb": unit_bytes / 2**21}}
        return dataclasses.replace(self, inductor={**self.inductor, "post_grad_fusion_options": settings})

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The variant's configuration; forward and backward passes run inside."""
        with (
            _torch.functorch_config.patch(dict(self.functorch)),
            _torch.inductor_config.patch(dict(self.inductor)),
        ):
            yield

    def prepare(
        self,
        model: nn.Module,
        observe: Callable[[], None] | None = None,
        function: Callable[..., Any] | None = None,
    ) -> Callable[..., Any]:
        """Make ``model`` train this way and return what to call: ``function`` (of the model), or the model itself.

        ``model`` must be this variant's own copy: gradient checkpointing is switched on in place.
        ``observe``, a hook for tests, is called whenever Inductor compiles a forward or backward graph (kind
        ``"inductor"`` only).
        """
        target = model if function is None else function
        if self.kind == "checkpointing":
            _checkpoint(model)
        elif self.kind == "inductor":
            # A backend object of its own: Dynamo would take one variant's code for another's, were both
            # compiled with the same one, because configuration of functorch and Inductor is no part of its
            # guards.
            return torch.compile(target, backend=_torch.own_inductor(observe))
        elif self.kind == "lowmem":
            return torch.compile(target, backend="lowmem", options=dict(self.options))
        return target


def _checkpoint(model: nn.Module) -> None:
    """Switch on Hugging Face's gradient checkpointing, non-reentrant, of every block."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        switch = getattr(model, f"{name}_enable", None)
        if switch is not None:
            switch(**{f"{name}_kwargs": {"use_reentrant": False}})
            return
    raise LowMemError(f"{type(model).__name__} has no gradient checkpointing")


def _budget(share: float) -> Variant:
    settings = {"activation_memory_budget": share}
    return Variant(f"budget_{share}", f"Inductor, budget {share}", "inductor", functorch=settings)


def _lowmem_budget(share: float) -> Variant:
    return Variant(f"lowmem_{share}", f"lowmem, budget {share}", "lowmem", options={"memory_budget": share})


_ONE_FLAG = {"ban_recompute_materialized_backward": False}
VARIANTS: Mapping[str, Variant] = {
    v.name: v
    for v in (
        Variant("inductor", "Inductor", "inductor"),
        Variant("eager", "eager", "eager"),
        Variant("checkpointing", "eager, gradient checkpointing", "checkpointing"),
        Variant("one_flag", "Inductor, one flag", "inductor", functorch=_ONE_FLAG),
        _budget(0.7),
        _budget(0.5),
        _budget(0.3),
        Variant("fp8", "Inductor, fp8 saved activations", "inductor", fp8=True),
        Variant("fp8_one_flag", "Inductor, one flag and fp8", "inductor", functorch=_ONE_FLAG, fp8=True),
        Variant("lowmem", "lowmem", "lowmem"),
        _lowmem_budget(0.25),
        _lowmem_budget(0.15),
        Variant("lowmem_calibrated", "lowmem, calibrated", "lowmem", options={"calibrate": True}),
        Variant("lowmem_no_codecs", "lowmem, no codecs", "lowmem", options={"codec": "none"}),
        Variant(
            "lowmem_derivative",
            "lowmem, derivative table",
            "lowmem",
            options={"codec": "none", "table": "derivative"},
        ),
        Variant("lowmem_exact", "lowmem, exact gradients", "lowmem", options={"gradients": "exact"}),
        Variant("lowmem_primitive", "lowmem, primitive table", "lowmem", options={"codec": "none", "table": "primitive"}),
    )
}
BASELINE = "inductor"


def select(names: list[str] | None = None) -> list[Variant]:
    """The variants of these names, the baseline first; all of them by default.

    Raises:
        LowMemError: an unknown name (the valid ones are listed).
    """
    unknown = sorted(set(names or ()) - set(VARIANTS))
    if unknown:
        raise LowMemError(f"unknown variants {', '.join(unknown)}; the valid ones are {', '.join(VARIANTS)}")
    wanted = {BASELINE, *(names or VARIANTS)}
    return [v for v in VARIANTS.values() if v.name in wanted]
