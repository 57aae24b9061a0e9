"""What :func:`lowmem_compile.loqt` returns: the schedule, merges, the report, exact resume and export of a LoQT model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_compile.errors import GradientError, LowMemError, OptionError
from lowmem_compile.optim.loqt.linear import LoQTLinear, layers_of
from lowmem_compile.optim.loqt.merge import Merge, MergeSettings
from lowmem_compile.optim.loqt.report import LoQTReport, report_of
from lowmem_compile.optim.loqt.schedule import next_merge


@dataclass(frozen=True)
class Settings:
    """The options of :func:`lowmem_compile.loqt`, as they were given."""

    rank: int
    scale: float
    interval: int
    growth: float
    compensation: int
    quantise: bool
    block: int
    double_quantise: bool
    side: str
    svd: str
    seed: int


STRUCTURE = ("rank", "scale", "quantise", "block", "double_quantise", "side")
"""Settings that decide what the stored tensors are and mean."""
NO_LAYER = (
    "the loss of a merge's batch does not depend on any LoQT layer. Return the loss itself: not detached, not after backward(),"
    " and not from a copy of the model made before lowmem_compile.loqt. Checkpointing needs use_reentrant=False."
)


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        step: before which it took place.
        loss: of its batch.
        errors: ‖W - what is stored‖_F / ‖W‖_F of each merged layer, by name.
        untouched: layers that the batch gave no gradient (experts that were not used); they stay as they were.
    """

    step: int
    loss: float
    errors: Mapping[str, float]
    untouched: tuple[str, ...]


class LoQT:
    """A model under LoQT.

    Attributes:
        model: the model, changed in place.
        layers: its LoQT layers by name.
        settings: the options.
        left_out: the reason for each linear that was not converted, by name.
        step: training steps begun (calls of :meth:`before_step`).
        merges: merges done.
        last: what the last merge did.
    """

    def __init__(self, model: nn.Module, settings: Settings, left_out: Mapping[str, str]) -> None:
        self.model, self.settings, self.left_out = model, settings, dict(left_out)
        self.layers = dict(layers_of(model))
        self.step = 0
        self.merges = 0
        self.last: Merged | None = None

    @property
    def next_merge(self) -> int:
        """The step before which the next merge is due."""
        return next_merge(self.step, self.settings.interval, self.settings.growth)

    @property
    def due(self) -> bool:
        """Whether the next step begins with a merge."""
        return self.next_merge == self.step

    def before_step(self, closure: Callable[[], Tensor]) -> bool:
        """Begin a training step: merge first if it is due. Call it at the start of every step.

        Args:
            closure: runs the model on one batch and returns the loss, without ``backward()``; called only if a merge is due.

        Returns:
            Whether there was a merge.

        Raises:
            GradientError: see :meth:`merge`.
        """
        due = self.due
        if due:
            self.merge(closure)
        self.step += 1
        return due

    def merge(self, closure: Callable[[], Tensor]) -> Merged:
        """Merge every layer and give it a new basis from the gradient of one batch, whatever the schedule says.

        The model runs eagerly, also if it was compiled. No other parameter gets a gradient, and existing gradients stay. Each
        layer is merged inside the backward pass as soon as its gradient is complete, so that the whole weight and the whole
        gradient of one layer exist at a time.

        Args:
            closure: runs the model on one batch and returns the loss, without ``backward()``.

        Raises:
            GradientError: the loss or a layer's gradient is not finite (such a layer stays as it was, the others are merged); or
                no gradient reached any layer.
            LowMemError: the model runs in several processes, which would make different bases.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise LowMemError(
                "LoQT merges in one process only: the gradients of several processes are not averaged for a merge, and their "
                "weights would drift apart. Train in one process, or merge in one and broadcast the model's state_dict()."
            )
        s = self.settings
        names = {layer: name for name, layer in self.layers.items()}
        merge = Merge(MergeSettings(s.compensation, s.svd, s.seed), self.merges, names)
        frozen = [p for p in self.model.parameters() if p.requires_grad]
        try:
            for p in frozen:
                p.requires_grad_(False)
            for layer in self.layers.values():
                layer.intercept = merge.intercept
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                loss = closure()
                _check_loss(loss)
                merge.backward = True
                loss.backward()
            merge.finish_pending()
            if not merge.errors and not merge.refused:
                raise GradientError(NO_LAYER)
        finally:
            for layer in self.layers.values():
                layer.intercept = None
            for p in frozen:
                p.requires_grad_(True)
        if merge.refused:
            raise GradientError(
                f"the gradient of {', '.join(merge.refused)} is not finite at a merge; the basis is made from it. Merged: "
                f"{len(merge.errors)} of {len(self.layers)} layers; the others are as they were. Merge again with another batch."
            )
        self.merges += 1
        for layer in self.layers.values():
            layer.started = True
        untouched = tuple(name for name in self.layers if name not in merge.errors)
        self.last = Merged(
            self.step, float(loss.detach()), {n: merge.errors[n] for n in self.layers if n in merge.errors}, untouched
        )
        return self.last

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters: every layer's B, and what else of the model requires a gradient."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def report(self, *, bits: int | None = None) -> LoQTReport:
        """What each layer holds, in bytes, once merged: see :mod:`lowmem_compile.optim.loqt.report`.

        Args:
            bits: how the optimizer stores Adam's moments: in the parameter's dtype (``None``), in 32 or in block-wise 8 bits.
        """
        return report_of(self.model, self.layers, self.left_out, bits)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is. Save it beside the model's and the optimizer's ``state_dict()``."""
        return {"step": self.step, "merges": self.merges, "settings": asdict(self.settings)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was.

        Raises:
            OptionError: a setting that decides what is stored differs.
        """
        for name in STRUCTURE:
            ours, theirs = getattr(self.settings, name), state["settings"][name]
            if ours != theirs:
                raise OptionError(
                    f"loqt was called with {name}={ours!r}, the checkpoint has {name}={theirs!r}: its tensors would not fit or "
                    f"would mean another weight. Call loqt with {name}={theirs!r}."
                )
        self.step, self.merges = int(state["step"]), int(state["merges"])

    def merge_and_export(self, *, inplace: bool = False) -> nn.Module:
        """The model with plain linears again: W = deq(W_q) + s·B Pᵀ in the weights' dtype.

        Its ``state_dict()`` has the names, shapes and dtypes of the original model's.

        Args:
            inplace: change this model, a layer at a time, and end its training with LoQT; otherwise make a copy.
        """
        model = self.model if inplace else copy.deepcopy(self.model)
        for name, layer in list(layers_of(model)):
            _replace(model, name, layer, plain_linear(layer))
        return model


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise OptionError(f"the closure of a merge returns the loss, a tensor of one element; this one returned {type(loss)}.")
    if not bool(loss.detach().isfinite()):
        raise GradientError(f"the loss of a merge's batch is {float(loss.detach())}; nothing has been changed.")
    if not loss.requires_grad:
        raise GradientError(NO_LAYER)


def plain_linear(layer: LoQTLinear) -> nn.Linear:
    """The ``nn.Linear`` that a LoQT layer stands for, with the layer's own bias."""
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=layer.B.dtype)
    made.weight = nn.Parameter(layer.weight, requires_grad=layer.weight_was_trained)
    made.register_parameter("bias", layer.bias)
    return made.train(layer.training)


def _replace(model: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    """Put a module in another's place, under every name that it has."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
    assert model.get_submodule(name) is new
