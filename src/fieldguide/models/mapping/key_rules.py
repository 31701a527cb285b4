"""Right-hand sides of a weights table whose tensors change on the way: plain data for `fieldguide.checkpoints.weights`.

A table maps public names to ours, one row a name: `"layer{s+1}.{b}.bn{k}.*": "stages.{s}.{b}.norm{k}.*"`.
`{s}` stands for a number, `{s+1}` for that number plus one, `*` for one part of a name without dots.
Where public names count layers in a way that depends on depths, a card holds a function from its config to the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Transposed:
    """The public tensor with its two axes swapped, such as the Conv1D of GPT-2."""

    ours: str


@dataclass(frozen=True)
class Reshaped:
    """The public tensor holds the same numbers in the same order in another shape; one length of each may be -1."""

    ours: str
    here: tuple[int, ...]  # shape of ours
    there: tuple[int, ...]  # shape of the public tensor


@dataclass(frozen=True)
class Fused:
    """The public tensor is one of several equal parts that lie along the first axis of ours; `pairs` as in `Paired`."""

    ours: str
    part: int
    parts: int
    pairs: int = 0


@dataclass(frozen=True)
class Paired:
    """The rows of every head, `pairs` of them, turn by rotary positions in neighbouring pairs there, and here each in the
    first half with its like in the second: as Meta's files of LLaMA lie."""

    ours: str
    pairs: int


@dataclass(frozen=True)
class Zeros:
    """There is no public tensor: where ours stands, theirs adds nothing. Ours is zeros, as the first `length` of another
    of ours along its first axis, or as its first `column`. Only zeros can be written to such files. What stands in the
    table as the public name, in angle brackets, is for readers."""

    ours: str
    like: str
    length: int = 1
    column: bool = False


@dataclass(frozen=True)
class Dropped:
    """The public tensor holds nothing that is needed, such as position ids. Where only files of one kind have it, `means`
    says what fields of the config are in these."""

    why: str
    means: Mapping[str, Any] = field(default_factory=dict)


def unprefixed(table: Mapping[str, Row], prefix: str) -> dict[str, Row]:
    """The names of a network that is a part of another in the table, as its own files have them."""
    return {name.removeprefix(prefix): row for name, row in table.items()}


Row = str | Transposed | Reshaped | Fused | Paired | Dropped | Zeros
