"""``register()``: make the backend known to Accelerate, and so to ``torch_compile_backend="lowmem"``.

Accelerate's ``DynamoBackend`` is a closed enumeration: a backend registered with PyTorch alone is refused.
``register()`` adds the one member that is missing. It is opt-in and changes Accelerate for the whole process;
nothing happens on import.
"""

from __future__ import annotations

from accelerate.utils import DynamoBackend

NAME = "LOWMEM"


def register() -> None:
    """Add ``LOWMEM`` to Accelerate's ``DynamoBackend``; a second call does nothing.

    Afterwards these work, in this process::

        TrainingArguments(torch_compile_backend="lowmem")
        Accelerator(dynamo_backend="lowmem")
        Accelerator(dynamo_plugin=TorchDynamoPlugin(backend="lowmem", options={"gradients": "exact"}))
    """
    if NAME in DynamoBackend.__members__:
        return
    member = str.__new__(DynamoBackend, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = DynamoBackend
    member._sort_order_ = len(DynamoBackend.__members__)
    DynamoBackend._member_names_.append(NAME)
    DynamoBackend._member_map_[NAME] = member
    DynamoBackend._value2member_map_[NAME] = member
    type.__setattr__(DynamoBackend, NAME, member)
