"""Rules of a table that maps public configuration keys to ours: plain data for `fieldguide.checkpoints.load`.

A table has one row per key: `"hidden_size": "dim"` maps the public key to a field of our config. A dot selects a
nested key: `"text_config.hidden_size": "text_dim"`. The other rows handle keys that are not simply renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Expect:
    """The key must have this value, otherwise the model would compute something else. A missing key has the value
    `absent`, or by default the required value.

    A function receives our config and returns the required value. With `written=False` the key is not written to our
    files. `among` lists all possible return values of the function, for keys that identify the model type.
    """

    value: Any | Callable[[Any], Any]
    written: bool = True
    among: tuple[Any, ...] = ()
    absent: Any = ...


@dataclass(frozen=True)
class Constant:
    """A field without a public key: these models always have this value, and a config with another value cannot be
    exported.

    The row's key in the table, in angle brackets, is a comment for readers.
    """

    ours: str
    value: Any


@dataclass(frozen=True)
class ValueMap:
    """The key is our field, with values that are named differently."""

    ours: str
    values: Mapping[Any, Any]  # public value -> our value


@dataclass(frozen=True)
class WithDefault:
    """The key is our field, with this value if the key is missing."""

    ours: str
    value: Any


@dataclass(frozen=True)
class LabelCount:
    """Our field is the number of entries of the key (label names). transformers omits the key for two labels."""

    ours: str
    absent: int = 2


@dataclass(frozen=True)
class Derived:
    """`read` computes fields of ours from the whole public configuration, `write` the value of the key from our config."""

    read: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    write: Callable[[Any], Any]


ConfigRow = Derived | str | Expect | Constant | ValueMap | WithDefault | LabelCount
