"""Rules of a table that maps public weight names to ours: plain data for `fieldguide.checkpoints.weights`.

A table has one row per name: `"layer{s+1}.{b}.bn{k}.*": "stages.{s}.{b}.norm{k}.*"`. `{s}` matches a number, `{s+1}`
that number plus one, `*` one part of a name without dots. If the numbering of public names depends on the depths, a
card holds a function from its config to the table. The rules below handle tensors that are changed on conversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Transposed:
    """The public tensor is transposed (two axes), such as the Conv1D of GPT-2."""

    ours: str


@dataclass(frozen=True)
class PlusOne:
    """The public tensor is ours plus 1, such as the weights of Gemma's norms in GGUF files."""

    ours: str


@dataclass(frozen=True)
class Reshaped:
    """The public tensor has the same elements in the same order in another shape; one length of each shape may be -1."""

    ours: str
    here: tuple[int, ...]  # shape of our tensor
    there: tuple[int, ...]  # shape of the public tensor


@dataclass(frozen=True)
class Fused:
    """The public tensor is one of `parts` equal parts of ours along the first axis, or `span` of them one after the other;
    `pairs` as in `InterleavedRotary`.
    """

    ours: str
    part: int
    parts: int
    pairs: int = 0
    span: int = 1


@dataclass(frozen=True)
class Joined:
    """The public tensor holds several of ours one after the other along the first axis; `sizes` are the relative lengths of its parts."""

    ours: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Swapped:
    """The public tensor has the halves of ours along the first axis in the other order."""

    ours: str


@dataclass(frozen=True)
class Stacked:
    """The public tensor holds ours for all numbers of the group `{axis}` along a first axis of its own, in this order.

    With `transposed`, each of them is transposed (two axes).
    """

    ours: str
    axis: str
    transposed: bool = False


@dataclass(frozen=True)
class Repeated:
    """The public files hold our tensor several times, with equal values: once for each number below `count` of the group
    `{axis}`.
    """

    ours: str
    axis: str
    count: int


@dataclass(frozen=True)
class InterleavedRotary:
    """The public tensor stores the rotary pairs of each head in adjacent rows (Meta's LLaMA files); ours stores them as
    two halves.

    `pairs` is the number of rows per head.
    """

    ours: str
    pairs: int


@dataclass(frozen=True)
class MovedRow:
    """Our first row is row `place` of the public tensor; the other rows have the same order.

    The public tensor has `ones` more axes of length 1 at its end.
    """

    ours: str
    place: int
    ones: int = 0


@dataclass(frozen=True)
class Zeros:
    """There is no public tensor, because the public model lacks this term; ours is zeros.

    Its shape is that of the first `length` rows of our tensor `like`, or of its first column if `column` is True.
    Only zeros can be exported. The row's public name in the table, in angle brackets, is a comment for readers.
    """

    ours: str
    like: str
    length: int = 1
    column: bool = False


@dataclass(frozen=True)
class Dropped:
    """The public tensor is not needed, such as position IDs.

    If only files of one kind have it, `means` holds the config fields that it implies.
    """

    why: str
    means: Mapping[str, Any] = field(default_factory=dict)


def strip_prefix(table: Mapping[str, Row], prefix: str) -> dict[str, Row]:
    """Return the part of a table that describes a submodel, with the names of the submodel's own files."""
    return {name.removeprefix(prefix): row for name, row in table.items()}


def place_submodel(table: Mapping[str, Row], theirs: str, ours: str, without: str, frozen: bool) -> dict[str, Row]:
    """Return the rows of a submodel's table for a network that holds it, with the prefixes `theirs` and `ours`.

    Rows of our names that begin with `without` are left out. With `frozen`, batch counters of norms, which frozen norms do not
    have, are dropped.
    """
    rows: dict[str, Row] = {}
    for public, here in table.items():
        if isinstance(here, str) and not here.startswith(without):
            if frozen and public.endswith(".*"):
                rows[f"{theirs}{public[:-1]}num_batches_tracked"] = Dropped("frozen norms count no batches")
            rows[f"{theirs}{public}"] = f"{ours}{here}"
    return rows


Row = (
    str
    | Transposed
    | PlusOne
    | Reshaped
    | Fused
    | Joined
    | Swapped
    | Stacked
    | Repeated
    | InterleavedRotary
    | MovedRow
    | Dropped
    | Zeros
)
