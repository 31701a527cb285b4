"""Column roles: what the columns of a table are used for, and which roles and types a task requires.

A column's role comes from the user, else from the reader (for example the transcripts of a folder of recordings), else,
if the task uses that role, from the column's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from fieldguide.data.dataset import Data, Finding, Kind, Role

TARGET_NAMES = ("target", "label", "labels", "class", "y", "sentiment", "category", "outcome", "species")
CAPTION_NAMES = ("caption", "captions", "prompt")  # names of columns with image captions
ROLE_NAMES: dict[Role, tuple[str, ...]] = {  # common names of columns with these roles, most likely first
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
    "time": (
        "time",
        "timestamp",
        "date",
        "datetime",
        "ds",
        "unix_time",
        "date_time",
        "step",
        "timestep",
        "time_step",
        "period",
        "yearmonth",
        "year_month",
        "yearweek",
        "year_week",
        "year_quarter",
        "year",
        "t",
        "time_idx",
        "time_index",
        "tick",
    ),
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
    """What a task requires of a table's columns.

    target   "last": chosen by name, else the last column; "named": only by name; "numbers": by name, else every
             remaining numeric column; "none": no target
    names    additional target names, most likely first
    roles    roles assigned to columns by name
    kinds    role -> type of the columns with this role, or a function of their values that returns it (None: inferred)
    columns  name -> type, for columns with a conventional meaning
    media    type -> type, for media that are read as another type, such as images that are strips of video frames
    new_classes  the test may hold classes that do not occur in training, such as kinds of anomalies
    gaps     keep rows without a target value; the task handles them
    checks   data checks that replace the default ones, which assume that rows are examples
    """

    target: Literal["last", "named", "numbers", "none"] = "last"
    names: tuple[str, ...] = ()
    roles: tuple[Role, ...] = ()
    kinds: Mapping[Role, Kind | Callable[[pl.Series], Kind | None]] = field(default_factory=dict)
    columns: Mapping[str, Kind] = field(default_factory=dict)
    media: Mapping[Kind, Kind] = field(default_factory=dict)
    gaps: bool = False
    new_classes: bool = False
    checks: tuple[Callable[[Data], Iterator[Finding]], ...] | None = None

    def kind(self, role: Role, values: pl.Series) -> Kind | None:
        """Return the type of a column with this role, or None if it is inferred from the values."""
        kind = self.kinds.get(role)
        return kind(values) if callable(kind) else kind

    def by_name(self, role: Role, columns: Sequence[str]) -> str | None:
        """Return the column whose name implies this role, or None."""
        names = (*self.names, *TARGET_NAMES) if role == "target" else ROLE_NAMES.get(role, ())
        return next((c for name in names for c in columns if normalize_name(c) == name), None)


def normalize_name(name: str) -> str:
    """Normalize a column name: lower case, words joined by "_", without the type suffix of RecBole's atomic files
    (`user_id:token`)."""
    return name.partition(":")[0].strip().lower().replace(" ", "_").replace("-", "_")
