"""Roles: what the columns of a table are for, and what a task wants them to be.

Columns get a role from the user, else from the reader (a folder of recordings knows its transcripts), else, where a
task wants that role, from their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from fieldguide.data.dataset import Data, Finding, Kind, Role

TARGETS = ("target", "label", "labels", "class", "y", "sentiment", "category", "outcome", "species")
CAPTIONS = ("caption", "captions", "prompt")  # of what pictures show
NAMES: dict[Role, tuple[str, ...]] = {  # names that people give to columns of these roles, likeliest first
    "user": ("user", "user_id", "userid", "uid", "customer", "customer_id", "session", "session_id", "reviewer_id"),
    "item": (
        "item",
        "item_id",
        "itemid",
        "iid",
        "movie",
        "movie_id",
        "movieid",
        "product",
        "product_id",
        "asin",
        "song_id",
        "track_id",
        "article_id",
        "book_id",
    ),
    "rating": ("rating", "ratings", "score", "stars", "overall"),
    "time": ("time", "timestamp", "date", "datetime", "ds", "unix_time", "date_time"),
    "series": (
        "unique_id",
        "series",
        "series_id",
        "id",
        "item_id",
        "ts_id",
        "store",
        "sensor",
        "site",
        "station",
        "meter",
        "region",
        "symbol",
        "ticker",
        "location",
    ),
}


@dataclass(frozen=True)
class ColumnSpec:
    """What a task asks of a table's columns.

    target   "last": by its name, else the last column; "named": only by its name; "numbers": by its name, else every
             column of numbers that is left; "none": there is none
    names    further names by which a target is known, likeliest first
    roles    roles that are given to columns by their names
    kinds    role -> the kind that columns of this role hold, whatever they look like; or what says it by their values (None:
             as they look)
    columns  name -> kind, of columns that mean one thing by convention
    media    kind -> kind: pictures that are to be read as something else, such as strips of frames
    gaps     rows without a value of the target are kept: the task knows what to do with them
    checks   what the doctor looks at in place of what it looks at in tables whose rows are examples
    """

    target: Literal["last", "named", "numbers", "none"] = "last"
    names: tuple[str, ...] = ()
    roles: tuple[Role, ...] = ()
    kinds: Mapping[Role, Kind | Callable[[pl.Series], Kind | None]] = field(default_factory=dict)
    columns: Mapping[str, Kind] = field(default_factory=dict)
    media: Mapping[Kind, Kind] = field(default_factory=dict)
    gaps: bool = False
    checks: tuple[Callable[[Data], Iterator[Finding]], ...] | None = None

    def kind(self, role: Role, values: pl.Series) -> Kind | None:
        """The kind that a column of this role holds; None where it is to be seen from its values."""
        kind = self.kinds.get(role)
        return kind(values) if callable(kind) else kind

    def by_name(self, role: Role, columns: Sequence[str]) -> str | None:
        """The column whose name says that it has this role."""
        names = (*self.names, *TARGETS) if role == "target" else NAMES.get(role, ())
        return next((c for name in names for c in columns if plain(c) == name), None)


def plain(name: str) -> str:
    """A column's name as conventions spell it: lower case, words joined by _, without the type that RecBole's atomic
    files write behind a colon (`user_id:token`)."""
    return name.partition(":")[0].strip().lower().replace(" ", "_").replace("-", "_")
