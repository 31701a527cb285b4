"""Right-hand sides of a table of public configuration keys: plain data for `fieldguide.checkpoints.load`.

A table maps a public key to our config's field, one row a key: `"hidden_size": "dim"`. A dot goes into a nested part:
`"text_config.hidden_size": "text_dim"`. Other rows stand for keys that are no field of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Is:
    """The key must have this value, or the network would compute another thing; where it is absent, it has, or else it has
    the value `absent`.

    A function takes our config and says what the value must be. `written=False`: it need not stand in our files. `among`:
    all that a function may say, for keys that say whose configuration this is.
    """

    value: Any | Callable[[Any], Any]
    written: bool = True
    among: tuple = ()
    absent: Any = ...


@dataclass(frozen=True)
class Fixed:
    """There is no key: such networks always have this value in our field, and one that has another cannot be written so.
    What stands in the table as the key, in angle brackets, is for readers."""

    ours: str
    value: Any


@dataclass(frozen=True)
class Known:
    """The key is our field, and its values are called otherwise there."""

    ours: str
    values: Mapping[Any, Any]  # theirs -> ours


@dataclass(frozen=True)
class Absent:
    """The key is our field, which has this value where the key is absent."""

    ours: str
    value: Any


@dataclass(frozen=True)
class Counted:
    """Our field is how many entries stand there: names of labels. transformers does not write down two."""

    ours: str
    absent: int = 2


@dataclass(frozen=True)
class Derived:
    """What several public keys say together: `read` makes fields of ours from the whole public configuration, `write` the
    key's value from our config."""

    read: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    write: Callable[[Any], Any]


ConfigRow = Derived | str | Is | Fixed | Known | Absent | Counted
