"""`read`: load any source as `Data`: select a reader, infer column types, assign roles and run the data checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError, nearest
from fieldguide.core.files import expand_home
from fieldguide.core.validation import guard
from fieldguide.data import caption_lists, object_columns
from fieldguide.data.caption_lists import find_image_column
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.conversation_formats import MESSAGES, to_messages
from fieldguide.data.conversation_images import MAX_IMAGES, name_columns
from fieldguide.data.dataset import FILE, Column, Data, Finding, Kind, Role
from fieldguide.data.media.media_types import MEDIA
from fieldguide.data.readers.image_folder import has_images
from fieldguide.data.source import Options as RawOptions
from fieldguide.data.source import RawTable, folder_split, relative_path
from fieldguide.data.source import load as load_raw
from fieldguide.data.table_reader import TableReader


def read(
    source: Any,
    *,
    target: str | None = None,
    kinds: Mapping[str, Kind] | None = None,
    schema: Sequence[Column | Mapping[str, Any]] | None = None,
    group: str | None = None,
    time: str | None = None,
    roles: Mapping[Role, str] | None = None,
    column_spec: ColumnSpec | None = None,
    header: bool | None = None,
    allow_bad: bool = False,
    labels_optional: bool = False,
    lenient: bool = False,
) -> Data:
    """Read and check a table, a folder of images or texts, a data frame, or a built-in sample.

    Parameters:
        source: path, name of a sample, data frame or dictionary of arrays.
        target: name of the target column; by default `target`, `label`, ..., else the last column.
        kinds: types of columns, overriding the inferred ones.
        schema: columns of a trained model, applied exactly; the target may then be absent.
        group: column whose equal values must stay in the same split.
        time: column to split by.
        roles: role -> column, for any role (user, item, series, ...); several columns are separated by commas.
        column_spec: what the task requires of the columns.
        header: whether the first line of a CSV holds column names; None detects it.
        allow_bad: accept data with more than 1 % unusable examples.
        labels_optional: keep rows without a target or without values, for prediction.
        lenient: list unusable inputs in `Data.skipped` instead of raising, unless none is usable.

    Raises DataError, listing every problem with its location and remedy, if the data cannot be used, or if more than
    1 % of the examples are unusable and `allow_bad` is False. Dropped rows are counted in the manifest.
    """
    known = [c if isinstance(c, Column) else Column(**c) for c in schema or ()]
    if known:
        target = next((c.name for c in known if c.role == "target"), None)
    required = column_spec.kinds.get("target") if column_spec else None
    wanted = next((str(c.kind) for c in known if c.role == "target"), required if isinstance(required, str) else None)
    loaded = load(
        source,
        target=target,
        header=header,
        names=tuple(c.name for c in known),
        labels_optional=labels_optional,
        target_kind=wanted,
        target_names=column_spec.names if column_spec else (),
    )
    return loaded.interpret(
        kinds=kinds,
        known=known,
        roles={"group": group, "time": time, **(roles or {})},
        column_spec=column_spec,
        allow_bad=allow_bad,
        lenient=lenient,
        last=True,
    )


def load(
    source: Any,
    *,
    target: str | None = None,
    header: bool | None = None,
    names: tuple[str, ...] = (),
    labels_optional: bool = False,
    target_kind: str | None = None,
    target_names: tuple[str, ...] = (),
) -> LoadedSource:
    """Read a source without interpreting its columns. The parameters are those of `read`.

    `names` are expected columns; `target_kind` and `target_names` are the type and the names of the target that the task requires,
    for sources that can be read in several ways. Raises DataError for a path that does not exist and for an unsupported format.
    """
    where, name = locate(source)
    options = RawOptions(target, header, names, labels_optional, target_kind, target_names)
    raw = load_raw(where, options)
    with guard_interpretation(name, raw):
        split_by_folders(raw)
        raw = convert_columns(raw, options)
        check_unused_images(where, raw)
    return LoadedSource(name, raw, options)


def guard_interpretation(name: str, raw: RawTable) -> AbstractContextManager[None]:
    """Return a guard for what is done with a file after it was parsed: what goes wrong may be a fault of this library as well."""
    if not raw.files:
        return nullcontext()
    remedy = "If the file looks right to you, this is a fault of fieldguide: please report it."
    return guard(name, remedy=remedy, problem_is="was read, but could not be interpreted")


def split_by_folders(raw: RawTable) -> None:
    """Use the folders of splits in the paths of a table's images or recordings as the splits (train/1.png, test/2.png)."""
    names = [n for n, kind in raw.kinds.items() if kind in ("image", "audio", "video") and n in raw.rows.columns]
    name = next(iter(names), None) or find_image_column(raw.rows, raw.kinds)
    if raw.splits is not None or name is None or FILE not in raw.rows.columns or raw.rows.schema[name] != pl.String:
        return
    paths = [PurePosixPath(relative_path(raw.root / v, raw.root)).parts if v else () for v in raw.rows[name].to_list()]
    levels = zip(*(parts[:-1] for parts in paths))
    common = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))  # of data/train/1.png and data/test/1.png: 1
    splits = [folder_split(parts[common]) if len(parts) > common + 1 else None for parts in paths]
    if all(splits) and "train" in splits and len(set(splits)) > 1:
        raw.splits = np.array(splits, dtype=object)
        what = f"the folders in {name!r} are used as the splits"
        raw.findings.append(Finding("splits-of-folders", "note", what, (f"column {name!r}",)))


def check_unused_images(where: Any, raw: RawTable) -> None:
    """Add a warning if a folder holds images, but its table names none of them."""
    if not isinstance(where, Path) or not where.is_dir() or FILE not in raw.rows.columns or not raw.files:
        return
    if set(raw.kinds.values()) & {*MEDIA, MESSAGES} or find_image_column(raw.rows, raw.kinds) or not has_images(where):
        return
    what = "the folder holds images, but no column of the table contains their names: only the table is read"
    remedy = "Write the name of the file of each row in a column file_name."
    raw.findings.append(Finding("images-not-used", "warning", what, (raw.files[0].path,), 1, remedy))


def convert_columns(raw: RawTable, options: RawOptions) -> RawTable:
    """Convert conversations, lists of captions and columns of boxes to the form in which they are used."""
    target, names = options.target, options.names
    if target is None and (not names or MESSAGES in names) and (found := to_messages(raw.rows)):
        raw.rows, raw.message_problems = found.rows, found.problems
        raw.kinds = {**{n: k for n, k in raw.kinds.items() if n in raw.rows.columns}, MESSAGES: "messages"}
        if found.images:
            raw.kinds |= dict.fromkeys(found.images, "image")
            raw.optional_media = found.images
            raw.roles[MESSAGES] = "feature"  # the assistant's messages are the targets
        if found.unused:
            listed = tuple(f"column {name!r}" for name in found.unused)
            raw.findings.append(
                Finding("unused-columns", "note", "columns that are no part of conversations", listed, len(listed))
            )
    if MESSAGES in names and MESSAGES in raw.rows.columns:
        add_image_columns(raw, names)
    expand_captions(raw, target, names)
    object_columns.check_embedded(raw.rows)
    return object_columns.convert_objects(raw, target, names, options.target_kind)


def add_image_columns(raw: RawTable, names: tuple[str, ...]) -> None:
    """Add empty columns for those of `names` that conversations with fewer images lack."""
    lacking = [name for name in name_columns(MAX_IMAGES) if name in names and name not in raw.rows.columns]
    raw.rows = raw.rows.with_columns(pl.lit(None, pl.String).alias(name) for name in lacking)
    raw.kinds |= dict.fromkeys(lacking, "image")
    raw.optional_media = (*raw.optional_media, *lacking)


def check_is_data(path: Path) -> None:
    """Raise DataError for a run folder or a checkpoint, which would be read as the tables and texts that it contains."""
    if (path / "run.json").is_file():
        raise DataError(
            f"{path} is a run folder, not data. Predict with `fieldguide predict {path} INPUT`, continue its training with "
            f"`fieldguide fit --resume {path}`."
        )
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        raise DataError(f"{path} is a checkpoint, not data. Start from it with `fieldguide fit DATA --weights {path}`.")


def expand_captions(raw: RawTable, target: str | None, names: tuple[str, ...]) -> None:
    """Convert images with lists of captions to one row per caption."""
    found = caption_lists.find_caption_lists(raw.rows, raw.kinds, target)
    if found is None or (names and found[0] not in names):
        return
    name, before = found[0], raw.rows.height
    raw.rows, former = caption_lists.explode(raw.rows, *found)
    if raw.splits is not None:
        raw.splits = raw.splits[former.to_numpy()]
    if not names:
        raw.findings.append(caption_lists.describe_lists(name, before, raw.rows.height))


@dataclass
class LoadedSource:
    """A source that was read once: its raw table, and what is known about its media files.

    `interpret` can be called again, for example when the inferred task has a column specification of its own. Files are not
    read or decoded a second time.
    """

    name: str
    raw: RawTable
    options: RawOptions
    media: dict[tuple[str, str], Any] = field(default_factory=dict)  # (kind, path) -> result of decoding

    def interpret(
        self,
        *,
        kinds: Mapping[str, Kind] | None = None,
        known: Sequence[Column] = (),
        roles: Mapping[Role, str | None] | None = None,
        column_spec: ColumnSpec | None = None,
        allow_bad: bool = False,
        lenient: bool = False,
        last: bool = False,
    ) -> Data:
        """Return the data with typed columns and roles. The parameters and errors are those of `read`.

        With `last`, raw columns are freed as they are typed, and `interpret` cannot be called again.
        """
        rows = self.raw.rows if last else self.raw.rows.clone()
        raw = replace(
            self.raw, rows=rows, files=list(self.raw.files), findings=list(self.raw.findings), kinds=dict(self.raw.kinds)
        )
        requested_roles = {role: column for role, column in (roles or {}).items() if column}
        reader = TableReader(self.name, raw, self.options, allow_bad, column_spec or ColumnSpec(), lenient, self.media)
        with guard_interpretation(self.name, raw):
            return reader.run(dict(kinds or {}), list(known), requested_roles)


def locate(source: Any) -> tuple[Any, str]:
    """Return the path or object to read and its display name. Raises DataError for a path that does not exist."""
    if not isinstance(source, str | Path):
        return source, "the table in memory"
    path = expand_home(source)
    if path.exists():
        check_is_data(path)
        return path.absolute(), str(source)
    from fieldguide.data import samples

    if isinstance(source, str) and source in samples.SAMPLES:
        return samples.path(source), source
    parent = path.absolute().parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    hint = nearest(path.name, [*samples.SAMPLES, *names] if path.name == str(source) else names)
    raise DataError(f"{source}: no such file, folder or sample.{hint} The samples are: {', '.join(samples.SAMPLES)}.")
