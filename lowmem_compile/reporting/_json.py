"""JSON for frozen dataclasses: encode any, decode by the declared field types, refuse everything else."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints


class JsonRecord:
    """Base of the report's dataclasses; gives `to_dict`, `from_dict`, `to_json` and `from_json`."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain dicts, lists, strings, numbers and None."""
        encoded = _encode(self)
        assert isinstance(encoded, dict)
        return encoded

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build the record from what `to_dict` returned.

        Raises ValueError, naming the offending field, where a field is missing, unknown or of another type.
        """
        record = _decode_record(cls, data, cls.__name__)
        assert isinstance(record, cls)
        return record

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the record as standard JSON text (ASCII, no NaN)."""
        return json.dumps(self.to_dict(), allow_nan=False, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError on text that is not such a record."""
        return cls.from_dict(json.loads(text))


def plain(value: object) -> Any:
    """Return `value` as JSON can hold it; what JSON has no word for becomes its `str`."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, str)):
        return value if type(value) in (int, str) else str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(item) for item in value)
    return str(value)


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    return value


def _decode_record(cls: Any, data: object, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    hints = _hints(cls)
    names = list(hints)
    unknown = sorted(set(data) - set(names))
    missing = [name for name in names if name not in data]
    if unknown or missing:
        raise ValueError(f"{where}: missing fields {missing}, unknown fields {unknown}; expected {names}")
    return cls(**{name: _decode(hints[name], data[name], f"{where}.{name}") for name in names})


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value in args:
            return value
    elif origin in (Union, types.UnionType):
        for option in args:
            if _fits(option, value):
                return _decode(option, value, where)
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, dict):
            return {key: _decode(args[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _decode_record(hint, value, where)
    elif _fits(hint, value):
        return float(value) if hint is float else value
    raise ValueError(f"{where}: {value!r} is not a {hint}")


def _fits(hint: Any, value: Any) -> bool:
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)
    return type(value) is hint
