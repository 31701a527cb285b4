"""The fields of option classes as data: type, default, limits, and the meaning, which is the comment behind the field."""

from __future__ import annotations

import inspect
import io
import tokenize
from dataclasses import MISSING, fields
from typing import Any

from fieldguide.core.options import option_limits, option_types
from fieldguide.core.signature import OptionSpec

TYPE_NAMES: dict[type, Any] = {int: "integer", float: "number", str: "string", bool: "boolean"}


def describe_fields(kind: type) -> list[dict[str, Any]]:
    """Return key, default and meaning of a dataclass's fields. The meaning is the comment behind the field."""
    meanings = read_meanings(kind)
    return [{"key": f.name, "default": f.default, "meaning": meanings.get(f.name, "")} for f in fields(kind)]


def describe_options(kind: type) -> tuple[OptionSpec, ...]:
    """Return the fields of a dataclass of options."""
    meanings, types, limits = read_meanings(kind), option_types(kind), option_limits(kind)
    found = []
    for field in fields(kind):
        kinds = getattr(types[field.name], "__args__", (types[field.name],))
        bounds = limits.get(field.name)
        found.append(
            OptionSpec(
                field.name,
                TYPE_NAMES[next(one for one in kinds if one is not type(None))],
                None if field.default is MISSING else field.default,
                required=field.default is MISSING,
                nullable=type(None) in kinds,
                about=meanings.get(field.name, ""),
                low=bounds.least if bounds else None,
                high=bounds.most if bounds else None,
            )
        )
    return tuple(found)


def read_meanings(kind: type) -> dict[str, str]:
    """Return the comments behind the fields of a dataclass and of its base classes, by name."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("fieldguide"):
            meanings |= read_field_comments(inspect.getsource(base))
    return meanings


def read_field_comments(source: str) -> dict[str, str]:
    """Return the comment at the end of each line `name: type = default  # comment`, and of comment lines that follow it."""
    comments: dict[str, str] = {}
    name, last = "", 0
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc(source)).readline):
        if token.type == tokenize.NAME and token.line.strip().startswith(f"{token.string}:"):
            name, last = token.string, token.start[0]
        elif token.type == tokenize.COMMENT and name and token.start[0] in (last, last + 1):
            comments[name] = f"{comments.get(name, '')} {token.string.lstrip('# ')}".strip()
            last = token.start[0]
    return comments
