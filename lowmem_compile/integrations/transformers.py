"""``LowMemCallback``: training with :class:`transformers.Trainer` through the lowmem backend.

    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[LowMemCallback()])

The model is compiled in place (``model.compile``), so the trainer still sees its class and signature, and the
keys of its ``state_dict()``, checkpoints and ``from_pretrained`` folders stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem_compile.errors import OptionError
from lowmem_compile.options import Options


class LowMemCallback(TrainerCallback):
    """Compile the model with lowmem while it is trained, and leave it as it was found.

    During training everything goes through the compiled model, evaluation included. When training ends the
    model is what it was before: ``generate()`` would otherwise compile anew for other lengths. To keep it
    compiled, call ``model.compile(backend="lowmem")`` instead of using this callback.

    Args:
        options: as for ``torch.compile(..., backend="lowmem", options=...)``.
        dynamic: as for ``torch.compile``; ``None`` makes a size symbolic when it changes for the first time.

    Raises:
        OptionError: unknown or ill-typed option, at once; or, when training begins, ``torch_compile`` among
            the training arguments, which would compile the compiled model again.
    """

    def __init__(self, options: Mapping[str, Any] | None = None, *, dynamic: bool | None = None) -> None:
        Options.from_dict(options)
        self.options = dict(options or {})
        self.dynamic = dynamic
        self._before: tuple[nn.Module, Any] | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Compile the model in place; nothing is traced before the first batch."""
        if args.torch_compile:
            raise OptionError(
                "LowMemCallback and torch_compile=True (or torch_compile_backend, torch_compile_mode) both "
                "compile the model; leave one of them out."
            )
        self._restore()
        model: nn.Module = kwargs["model"]
        self._before = (model, model._compiled_call_impl)
        model.compile(backend="lowmem", options=self.options, dynamic=self.dynamic)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Put the model back to how it was called before."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            model, compiled = self._before
            model._compiled_call_impl = compiled
            self._before = None
