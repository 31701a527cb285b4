"""Requests for videos: a class or caption, the image that is the first frame, or both."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.media import images
from fieldguide.data.read import load
from fieldguide.data.readers.memory import as_table

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
FIRST_FRAME = "image"  # the column of a request that holds the first frame


@dataclass(frozen=True)
class VideoRequest:
    """What a video shows: a class or caption ("" for none), and the path of its first frame ("" for none)."""

    text: str = ""
    image: str = ""


def read_requests(sources: Sequence[Any], column: str) -> list[VideoRequest]:
    """Return the requests in texts, paths of images, and rows with the columns `column` and `image`, or tables of them.

    Each image is continued as each of the texts says. Paths in a table are relative to its folder. Raises `DataError` for a row with
    other columns, and for an image that cannot be read.
    """
    texts, frames, requests = list[str](), list[str](), list[VideoRequest]()
    for source in sources:
        table = source if isinstance(source, pl.DataFrame) else as_table(source)
        if table is not None:
            requests += read_rows(table, column)
        elif str(source).lower().endswith(TABLE_SUFFIXES) and Path(source).is_file():
            rows = load(Path(source), labels_optional=True).raw.rows
            cells = rows.select(name for name in rows.columns if not name.startswith("#"))
            requests += [replace(r, image=r.image and str(Path(source).parent / r.image)) for r in read_rows(cells, column)]
        elif isinstance(source, Path) or images.find_suffix(str(source)) in images.READABLE_SUFFIXES:
            frames.append(str(source))
        else:
            texts.append(str(source))
    if texts or frames:
        requests += [VideoRequest(*pair) for pair in itertools.product(texts or [""], frames or [""])]
    check_frames(requests)
    return requests


def read_rows(table: pl.DataFrame, column: str) -> list[VideoRequest]:
    """Return the requests of the rows of a table. Raises `DataError` for other columns."""
    if unknown := [name for name in table.columns if name not in (column, FIRST_FRAME)]:
        raise DataError(f"column {unknown[0]!r} is not part of a request for a video. Columns are: {column}, {FIRST_FRAME}.")
    cells = [table[name].to_list() if name in table.columns else [None] * len(table) for name in (column, FIRST_FRAME)]
    return [VideoRequest(str(text or ""), str(image or "")) for text, image in zip(*cells)]


def check_frames(requests: Sequence[VideoRequest]) -> None:
    """Raise `DataError` if an image cannot be read."""
    paths = list(dict.fromkeys(request.image for request in requests if request.image))
    for path, found in zip(paths, images.check(paths)):
        if found.problem:
            detail = f" ({found.detail})" if found.detail else ""
            raise DataError(f"{path}: not a readable image: {found.problem}{detail}. The first frame must be an image file.")
