"""Optimizers for LoQT: AdamW with moments in 8 bits, and updates as soon as a gradient is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowmem_compile.errors import OptionError
from lowmem_compile.optim.base import LowRankOptimizer
from lowmem_compile.optim.projector import Factors
from lowmem_compile.optim.settings import Common, ParamsLike
from lowmem_compile.optim.units import Refresh


class AdamW(LowRankOptimizer):
    """AdamW without a projection, moments in any storage (``bits=8``: block-wise 8 bits); Adafactor with ``base="adafactor"``.

    The update is that of :mod:`lowmem_compile.optim` (ε beside √v, decay last), the state is plain tensors and resumes exactly.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate.
        **common: see :class:`lowmem_compile.optim.settings.Common`.

    Raises:
        OptionError: a wrong option.
    """

    def __init__(self, params: ParamsLike, lr: float = 1e-3, **common: Unpack[Common]) -> None:
        entries: list[Any] = list(params)
        groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
        options = {"lr": lr, "rank": None, "rank_ratio": None, "update_interval": 1, "scale": 1.0}
        super().__init__([{**group, "rank": None} for group in groups], options, common)

    def new_factors(self, refresh: Refresh) -> Factors:
        """Never asked for: nothing is projected."""
        raise AssertionError(refresh)


class PerLayerUpdates:
    """One optimizer for each parameter, stepped as soon as its gradient is complete; the gradient is dropped right after.

    In eager mode the gradient of one parameter exists at a time. A compiled backward pass gives all gradients at its end, so
    there it saves little. Not with gradient accumulation, clipping over several parameters or ``torch.amp.GradScaler``: each
    needs gradients that are gone. Do not call ``step`` or ``zero_grad``; ``backward()`` does both.

    Args:
        named_parameters: the trained parameters with their names, as ``model.named_parameters()`` gives them; frozen ones are
            left alone.
        make: builds the optimizer of one parameter from a list of one.

    Raises:
        OptionError: no trained parameter.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], make: Callable[[list[Tensor]], Optimizer]) -> None:
        trained = {name: p for name, p in named_parameters if p.requires_grad}
        if not trained:
            raise OptionError("PerLayerUpdates got no parameter that requires a gradient.")
        self.optimizers: dict[str, Optimizer] = {name: make([p]) for name, p in trained.items()}
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._stepper(self.optimizers[name])) for name, p in trained.items()
        ]

    @staticmethod
    def _stepper(optimizer: Optimizer) -> Callable[[Tensor], None]:
        def step(p: Tensor) -> None:
            optimizer.step()
            p.grad = None

        return step

    def set_lr(self, lr: float) -> None:
        """Give all optimizers a learning rate."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' state dicts by parameter name."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint.

        Raises:
            OptionError: it is of other parameters.
        """
        if set(state) != set(self.optimizers):
            odd = sorted(set(state) ^ set(self.optimizers))
            raise OptionError(f"the checkpoint and this PerLayerUpdates have other parameters: {', '.join(odd[:5])}.")
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])

    def remove(self) -> None:
        """Take the hooks away: gradients stay where they are from then on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
