"""Dataclasses as JSON values and back."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints


def to_json(value: Any) -> Any:
    """Return a dataclass as JSON values, without fields that have their default."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != get_default(field)
        }
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, tuple | list) else value


def get_default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; a value that equals nothing if it has none."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def construct(kind: Any, value: Any) -> Any:
    """Return the value of a type from JSON that `check_value` has accepted."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = next((one for one in arguments if dataclasses.is_dataclass(one)), None)
        return value if inner is None or value is None else construct(inner, value)
    if origin is tuple:
        return tuple(construct(arguments[0], item) for item in value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{name: construct(hints[name], item) for name, item in value.items()})
    return value
