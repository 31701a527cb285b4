"""Types of values that come from JSON, checked before they are used: plain types, unions, lists, dictionaries, dataclasses."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fieldguide.core.validation import name_kind

MAX_SEED = 1 << 40  # a million times this still fits into the 64 bits of a generator's seed
MAX_INTEGER = 1 << 53  # beyond this, floats no longer hold all integers


@dataclasses.dataclass(frozen=True)
class Limits:
    """The smallest and the largest number of a field: `Annotated[int, Limits(1, 100)]`."""

    least: float
    most: float


def check_value(value: Any, kind: Any, place: str) -> None:
    """Raise `ValueError`, which names the place, if a value from JSON is not of a type.

    Supported are the types of JSON, `Any`, unions, `Literal`, `list[X]`, `tuple[X, ...]` (lists in JSON), `dict[str, X]`, `Annotated`
    with `Limits`, dataclasses (objects with their fields), and mappings from keys to types, in which keys that end in "?" may be
    missing. Numbers must be finite.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or (kind in (None, types.NoneType) and value is None):
        return
    if isinstance(kind, Mapping):
        check_fields(value, kind, place)
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        check_fields(value, list_fields(kind), place)
        if unknown := value.keys() - {name.rstrip("?") for name in list_fields(kind)}:
            raise ValueError(f"{place} has the unknown key {min(unknown)!r}")
    elif origin is Annotated:
        check_value(value, arguments[0], place)
        for limits in arguments[1:]:
            if isinstance(limits, Limits) and value is not None and not limits.least <= value <= limits.most:
                raise ValueError(f"{place}={value} must be between {limits.least:,} and {limits.most:,}")
    elif origin in (Union, types.UnionType):
        if not any(matches(value, one) for one in arguments):
            raise ValueError(
                f"{place} must be {' or '.join(describe_type(one) for one in arguments)}, but is {describe_value(value)}"
            )
    elif origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise ValueError(f"{place}={describe_value(value)} must be one of {', '.join(map(repr, arguments))}")
    elif origin in (list, tuple) or kind in (list, tuple):
        check_items(value, origin, arguments, place)
    elif origin is dict:
        check_plain(value, dict, place)
        for key, item in value.items():
            check_value(item, arguments[1], f"{place}.{key[:40]}")
    else:
        check_plain(value, kind, place)


def check_fields(value: Any, structure: Mapping[str, Any], place: str) -> None:
    """Check an object with known keys."""
    check_plain(value, dict, place)
    for key, kind in structure.items():
        name = key.removesuffix("?")
        if name in value:
            check_value(value[name], kind, f"{place}.{name}".lstrip("."))
        elif not key.endswith("?"):
            raise ValueError(f"{place} lacks {name!r}".lstrip())


def check_items(value: Any, origin: Any, arguments: tuple[Any, ...], place: str) -> None:
    """Check a list, each of whose items has the type that `list[X]`, `tuple[X, ...]` or `tuple[X, Y]` gives."""
    if not isinstance(value, list | tuple):  # tuples are values that were not read from JSON
        raise ValueError(f"{place} must be a list, but is {describe_value(value)}")
    if not arguments:
        return
    if origin is tuple and arguments[-1] is not ...:
        if len(value) != len(arguments):
            raise ValueError(f"{place} must have {len(arguments)} items, but has {len(value)}")
        kinds = arguments
    else:
        kinds = arguments[:1] * len(value)
    if kinds and kinds[0] is str and set(map(type, value)) == {str}:
        return  # the usual case, without a call for each of perhaps a million items
    for number, (item, kind) in enumerate(zip(value, kinds)):
        check_value(item, kind, f"{place}[{number}]")


def check_plain(value: Any, kind: Any, place: str) -> None:
    """Check a value of a type of JSON; `float` includes integers."""
    allowed = (int, float) if kind is float else (kind,)
    is_number = type(value) in (int, float)
    if type(value) not in allowed or (is_number and not (math.isfinite(value) and abs(value) <= get_limit(value))):
        raise ValueError(f"{place} must be {describe_type(kind)}, but is {describe_value(value)}")


def get_limit(number: float) -> float:
    """Return the largest absolute value of a number of this type."""
    return MAX_INTEGER if isinstance(number, int) else math.inf


def matches(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type."""
    try:
        check_value(value, kind, "")
    except ValueError:
        return False
    return True


@cache
def list_fields(kind: type) -> dict[str, Any]:
    """Return the types of the fields of a dataclass; "?" marks those with a default."""
    hints = get_type_hints(kind, include_extras=True)
    missing = dataclasses.MISSING
    return {
        field.name + "?" * (field.default is not missing or field.default_factory is not missing): hints[field.name]
        for field in dataclasses.fields(kind)
    }


def describe_type(kind: Any) -> str:
    """Return the name of a type for messages."""
    origin = get_origin(kind)
    if origin is Annotated:
        return describe_type(get_args(kind)[0])
    if origin is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if origin in (list, tuple):
        return "a list"
    return name_kind(dict if origin is dict or isinstance(kind, Mapping) or dataclasses.is_dataclass(kind) else kind)


def describe_value(value: Any) -> str:
    """Return a short form of a value for messages."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        shown = repr(value) if not isinstance(value, int) or abs(value) <= MAX_INTEGER else "a very large integer"
        return shown if len(shown) <= 40 else f"{shown[:40]}..."
    return name_kind(type(value))
