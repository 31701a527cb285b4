"""`read`: load any source as `Data`: select a reader, infer column types, assign roles and run the data checks."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError, nearest
from fieldguide.core.files import expand_home
from fieldguide.core.validation import guard
from fieldguide.data import caption_lists, column_types, timestamps
from fieldguide.data.column_spec import ColumnSpec, normalize_name
from fieldguide.data.conversation_formats import MESSAGES, to_messages
from fieldguide.data.dataset import (
    BOOKKEEPING,
    FILE,
    HEIGHT,
    LINE,
    MASK_HEIGHT,
    MASK_WIDTH,
    WIDTH,
    CellProblems,
    Column,
    Data,
    FileEntry,
    Finding,
    Kind,
    Manifest,
    Role,
    SkippedInput,
)
from fieldguide.data.media import media_types
from fieldguide.data.readers import delimited
from fieldguide.data.source import Options as RawOptions
from fieldguide.data.source import RawTable, is_inside, relative_path
from fieldguide.data.source import load as load_raw
from fieldguide.data.validation import checks, findings

RENAMABLE_TYPES = (
    "image",
    "text",
    "audio",
    "video",
)  # types whose column may be renamed to match the schema of a trained model
INTERACTION_ROLES: tuple[Role, ...] = ("user", "item")  # a table with columns of these names holds user-item interactions
MIN_EQUAL_LENGTHS = 0.9  # fraction of rows in which two lists must be equally long to belong together
REQUIRED_ROLES = ("feature", "user", "item", "series")  # roles of columns that prediction requires
NOT_OF_TYPE = {"number": "not numbers as in training", "date": "not dates as in training", "boolean": "neither true nor false"}
FAR_FACTOR = 10  # values of a positive column below its training minimum divided by this are far outside the training range


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
) -> LoadedSource:
    """Read a source without interpreting its columns. The parameters are those of `read`.

    `names` are expected columns; `target_kind` is the type of the target that the task requires, for sources that can be read in
    several ways. Raises DataError for a path that does not exist and for an unsupported format.
    """
    where, name = locate(source)
    options = RawOptions(target, header, names, labels_optional, target_kind)
    raw = load_raw(where, options)
    with guard(name, remedy="") if raw.files else nullcontext():
        convert_columns(raw, target, names)
    return LoadedSource(name, raw, options)


def convert_columns(raw: RawTable, target: str | None, names: tuple[str, ...]) -> None:
    """Convert conversations and lists of captions to the form in which they are used."""
    if target is None and (not names or MESSAGES in names) and (found := to_messages(raw.rows)):
        raw.rows, raw.message_problems = found.rows, found.problems
        raw.kinds = {**{n: k for n, k in raw.kinds.items() if n in raw.rows.columns}, MESSAGES: "messages"}
    expand_captions(raw, target, names)


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
        with guard(self.name, remedy="") if raw.files else nullcontext():
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


def find_paired_lists(rows: pl.DataFrame) -> dict[str, Kind]:
    """Return the type "list" for two list columns of equal lengths, such as words and their tags."""
    lists = [
        name
        for name, kind in rows.schema.items()
        if isinstance(kind, pl.List) and (kind.inner == pl.String or kind.inner.is_integer())
    ]
    if len(lists) != 2:
        return {}
    first, second = (rows[name].list.len().fill_null(0) for name in lists)
    is_pair = bool(len(rows)) and float((first == second).to_numpy().mean()) > MIN_EQUAL_LENGTHS
    return dict.fromkeys(lists, "list") if is_pair else {}


class TableReader:
    """Converts a raw table to `Data`, collecting findings and unusable rows."""

    def __init__(
        self,
        name: str,
        raw: RawTable,
        options: RawOptions,
        allow_bad: bool,
        column_spec: ColumnSpec,
        lenient: bool,
        media: dict[tuple[str, str], Any],
    ) -> None:
        self.media = media
        self.lenient, self.why = lenient, dict[int, str]()  # row -> reason why it is unusable
        self.known: dict[str, Column] = {}  # columns of a trained model
        self.time_parts: dict[str, tuple[str, ...]] = {}  # timestamp -> columns that it was formed from
        self.problems: list[CellProblems] = []
        self.name, self.raw, self.options, self.allow_bad, self.column_spec = name, raw, options, allow_bad, column_spec
        self.findings = list(raw.findings)
        self.names = [c for c in raw.rows.columns if c not in BOOKKEEPING]
        self.bad = np.zeros(raw.rows.height, dtype=bool)

    def run(self, requested_kinds: Mapping[str, str], known: list[Column], requested_roles: dict[Role, str]) -> Data:
        """Assign roles, type columns, run all checks and return the usable rows."""
        overrides: dict[str, str] = dict(requested_kinds)
        self.known = {c.name: c for c in known}
        inputs = self.raw.rows.clone() if known and self.lenient else None
        if known:
            roles = self.apply_schema(known)
            overrides = {c.name: c.kind for c in known}
        else:
            roles = self.assign_roles(requested_roles)
            self.require_columns(overrides, "kinds")
            self.check_kinds(overrides)
            unassigned = [n for n in self.names if n not in roles]
            input_roles: dict[str, Role] = {
                **roles,
                **({unassigned[0]: "feature"} if len(unassigned) == 1 else {}),
            }  # the only input of a single-input task
            required = {
                name: kind for name, role in input_roles.items() if (kind := self.column_spec.kind(role, self.raw.rows[name]))
            }
            known_by_name = {n: self.column_spec.columns[n] for n in self.names if n in self.column_spec.columns}
            overrides = {**find_paired_lists(self.raw.rows), **known_by_name, **required, **self.raw.kinds, **overrides}
        columns = self.type_columns(overrides, roles)
        if known:
            columns = {c.name: c for c in known if c.name in columns}
        elif self.column_spec.target == "numbers" and "target" not in roles.values():
            for column in columns.values():
                if column.role == "feature" and column.kind == "number":
                    column.role = "target"
        self.data = Data(
            self.name,
            self.raw.rows,
            columns,
            Manifest(str(self.raw.root), self.raw.files),
            self.findings,
            self.raw.splits,
            self.raw.context,
        )
        for column in columns.values():
            is_absent_target = (
                column.role == "target"
                and self.options.labels_optional
                and column.name in self.data.rows.columns
                and self.data.rows[column.name].null_count() == len(self.data)
            )
            if column.kind in media_types.MEDIA and column.role != "ignored" and not is_absent_target:
                self.check_media(column)
        self.check_masks()
        self.check_messages()
        self.check_paired_lists()
        self.report_misfits()
        if known:
            self.check_cells()
        self.merge_class_names()
        self.check_target()
        self.check_keys()
        self.check_inputs()
        total = len(self.data) + self.raw.unusable
        data = self.data.drop_rows(self.bad)
        data.problems = self.usable_problems()
        if not known:
            found = checks.check(data, self.column_spec.checks)
            data.findings += [replace(f, severity="warning") if f.check == "leak" and self.allow_bad else f for f in found]
        checks.enforce(data.findings, total, self.allow_bad or (self.lenient and len(data) > 0), self.name, offer=not known)
        data.inputs = inputs
        if self.lenient:
            data.skipped = self.collect_skipped()
        return data

    def mark_invalid(self, bad: np.ndarray, why: str | Callable[[int], str]) -> None:
        """Mark rows as unusable, with a reason for all or one that depends on the row. The first reason of a row is kept."""
        self.why |= {int(i): why if isinstance(why, str) else why(int(i)) for i in np.flatnonzero(bad & ~self.bad)}
        self.bad |= bad

    def collect_skipped(self) -> list[SkippedInput]:
        """Return the skipped inputs in order, followed by those that the reader could not turn into rows."""
        before = np.cumsum(~self.bad)
        return [SkippedInput(int(before[row]), self.data.locate_row(row), self.why[row]) for row in sorted(self.why)] + [
            SkippedInput(int((~self.bad).sum()), ", ".join(f.places), f"{f.count:,} x {f.what}" if f.count > 1 else f.what)
            for f in self.raw.findings
            if f.unusable
        ]

    def check_kinds(self, kinds: Mapping[str, str]) -> None:
        """Raise DataError for a type that does not exist."""
        for name, given in kinds.items():
            try:
                kind, _ = column_types.split_kind(given)
            except ValueError as error:
                raise DataError(f"{self.name}: column {name!r}: {error}") from None
            if kind not in get_args(Kind):
                known = get_args(Kind)
                raise DataError(
                    f"{self.name}: column {name!r}: {given!r} is no type.{nearest(given, known)} Types: {', '.join(known)}."
                )

    def add_finding(self, *finding: Any) -> None:
        """Append a finding."""
        self.findings.append(Finding(*finding))

    def require_columns(self, wanted: Any, what: str) -> None:
        """Raise DataError if one of the columns does not exist."""
        for name in wanted:
            if name not in self.names:
                raise DataError(
                    f"{self.name}: {what} refers to the column {name!r}, which does not exist."
                    f"{nearest(name, self.names)} The columns are: {', '.join(self.names)}."
                )

    def assign_roles(self, requested_roles: dict[Role, str]) -> dict[str, Role]:
        """Return column -> role for all columns that are not features: from the user, the reader, or column names."""
        roles: dict[str, Role] = {}
        for role, name in requested_roles.items():
            several = [name] if name in self.names else [n.strip() for n in name.split(",")]
            self.require_columns(several, role)
            roles |= dict.fromkeys(several, role)
        if self.raw.split_column:
            roles.setdefault(self.raw.split_column, "split")
        for name, role in self.raw.roles.items():
            if role not in roles.values():
                roles.setdefault(name, role)
        target = self.find_targets(roles)
        roles |= dict.fromkeys(target, "target")
        column_spec = self.column_spec
        if (
            column_spec == ColumnSpec()
            and not target
            and not column_spec.by_name("target", self.names)
            and all(column_spec.by_name(role, self.names) for role in INTERACTION_ROLES)
        ):
            column_spec = ColumnSpec("none", roles=INTERACTION_ROLES)  # user-item interactions have no target column
        if "time" in (*column_spec.roles, *roles.values()):
            self.join_time_parts(roles, column_spec)
        for role in column_spec.roles:
            free = [n for n in self.names if n not in roles]
            if role not in roles.values() and (found := column_spec.by_name(role, free)):
                roles[found] = role
        if not target and column_spec.target in ("last", "named"):
            chosen = self.choose_target([n for n in self.names if n not in roles])
            if chosen:
                roles[chosen] = "target"
        return roles

    def join_time_parts(self, roles: dict[str, Role], column_spec: ColumnSpec) -> None:
        """Form one timestamp from columns named year, month, day, hour, ..., if no other column holds the time."""
        given = [n for n, role in roles.items() if role == "time"]
        parts = timestamps.find_parts(given or [n for n in self.names if n not in roles], normalize_name)
        other = None if given else column_spec.by_name("time", [n for n in self.names if n not in (*roles, *parts)])
        if not parts or other or len(given) == 1:
            return
        name = self.replace_parts(parts, next(n for n in ("timestamp", "-".join(parts)) if n not in self.names))
        for part in parts:
            roles.pop(part, None)
        roles[name] = "time"
        self.add_finding(
            "timestamp-parts",
            "note",
            f"the columns {', '.join(map(repr, parts))} form the timestamp {name!r}",
            tuple(f"column {p!r}" for p in parts),
            1,
        )

    def replace_parts(self, parts: list[str], name: str) -> str:
        """Replace columns that are parts of a timestamp by the timestamp, and return its name."""
        joined = timestamps.join_parts([self.raw.rows[p] for p in parts], name)
        self.time_parts = {name: tuple(parts)}
        self.raw.rows = self.raw.rows.drop(parts).with_columns(joined)
        self.names = [*(n for n in self.names if n not in parts), name]
        return name

    def is_coordinate(self, name: str, names: list[str]) -> bool:
        """Return whether a numeric column `y` belongs to `x` and `z`, or follows `x`, and so is no target."""
        plain = [normalize_name(n) for n in names]
        at = names.index(name)
        if plain[at] != "y" or at == len(names) - 1 or "x" not in plain or not ("z" in plain or plain[at - 1] == "x"):
            return False
        first = self.raw.rows[name].head(100).drop_nulls()
        return bool(first.dtype.is_numeric() or first.cast(pl.String).cast(pl.Float64, strict=False).null_count() == 0)

    def find_targets(self, roles: dict[str, Role]) -> list[str]:
        """Return the targets given by the user (separated by commas) or by the reader."""
        named = self.options.target
        if named is not None:
            several = [n.strip() for n in named.split(",")] if named not in self.names else [named]
            self.require_columns(several, "target")
            return several
        if self.column_spec.target == "none":
            return []
        if self.raw.target in self.names:
            is_label = self.raw.target not in self.raw.kinds  # boxes and masks may well be equal in all images
            if self.column_spec.target == "named" and is_label and self.raw.rows[self.raw.target].n_unique() < 2:
                roles[self.raw.target] = "ignored"  # a single folder of images defines no classes
                return []
            return [self.raw.target]
        if self.column_spec.target == "numbers":
            free = [n for n in self.names if n not in roles]
            return [name] if (name := self.column_spec.by_name("target", free)) else []
        return []

    def choose_target(self, names: list[str]) -> str | None:
        """Choose a target by its name or position, and add a note about the choice."""
        by_name = self.column_spec.by_name("target", names)
        if by_name is not None and self.is_coordinate(by_name, names):
            by_name = self.column_spec.by_name("target", [n for n in names if n != by_name])
        if by_name is None and (self.options.labels_optional or len(names) < 2 or self.column_spec.target != "last"):
            return None
        target = by_name or next((n for n in reversed(names) if not column_types.are_media_files(self.raw.rows[n])), names[-1])
        why = "by its name" if by_name else "because it is the last column"
        self.add_finding(
            "target-chosen",
            "note",
            f"no target was specified: column {target!r} was chosen {why}",
            (f"column {target!r}",),
            1,
            "Specify another with --target (in Python: target=).",
        )
        return target

    def apply_schema(self, known: list[Column]) -> dict[str, Role]:
        """Match the table to the columns of a trained model: rename, drop extra columns, and require the needed ones."""
        for found in (n for n, kind in self.raw.kinds.items() if kind in RENAMABLE_TYPES):
            ours = [c.name for c in known if c.role == "feature" and c.kind == self.raw.kinds[found]]
            if len(ours) == 1 and found not in ours and ours[0] not in self.names:
                self.rename_column(found, ours[0])
        target = self.options.target
        if self.raw.target in self.names and target and target not in self.names:
            self.rename_column(str(self.raw.target), target)
        self.match_names([c.name for c in known])
        for column in known:
            parts = (column.date_format or {}).get("parts", ())
            if parts and column.name not in self.names:
                self.match_names(list(parts))
                if set(parts) <= set(self.names):
                    self.replace_parts(list(parts), column.name)
        needed = [c.name for c in known if c.role in REQUIRED_ROLES]
        missing = [n for n in needed if n not in self.names]
        if missing:
            self.check_medium(known, needed, missing)
            others = [n for n in self.names if n not in needed]
            listed = "\n".join(f"  - {n!r}.{nearest(n, others)}" for n in missing)
            raise DataError(
                f"{self.name}: {len(missing)} of the {len(needed)} columns that the model needs "
                f"are missing:\n{listed}\nThe columns are: {', '.join(self.names)}."
                + (
                    " If the first line holds data, put a line with the names of the training columns before it."
                    if self.raw.delimiter and len(missing) == len(needed)
                    else ""
                )
            )
        wanted = {c.name for c in known}
        extra = [n for n in self.names if n not in wanted]
        if extra:
            self.add_finding(
                "extra-columns",
                "note",
                "columns that the model does not use; they are ignored",
                tuple(f"column {n!r}" for n in extra[:5]),
                len(extra),
            )
            self.raw.rows = self.raw.rows.drop(extra)
            self.names = [n for n in self.names if n in wanted]
        return {c.name: c.role for c in known}

    def check_medium(self, known: list[Column], needed: list[str], missing: list[str]) -> None:
        """Raise `DataError` if the source is images, recordings or texts and the model needs a table, or the reverse."""
        if len(missing) < len(needed):
            return
        wanted = {c.kind for c in known if c.role in REQUIRED_ROLES} & {*media_types.MEDIA}
        found = {k for k in self.raw.kinds.values() if k in media_types.MEDIA}
        if found and not wanted:
            listed = ", ".join(map(repr, needed[:8])) + (f" and {len(needed) - 8} more" if len(needed) > 8 else "")
            raise DataError(
                f"{self.name}: the model predicts from a table with the columns {listed}, not from files of the type "
                f"{' and '.join(sorted(found))}. Pass such a table."
            )
        if wanted and not found:
            raise DataError(
                f"{self.name} is a table with the columns {', '.join(self.names[:8])}, but the model predicts from files of the type "
                f"{' and '.join(sorted(wanted))}. Pass such files or a folder, or a table with the column {needed[0]!r}."
            )

    def match_names(self, wanted: Sequence[str]) -> None:
        """Rename columns whose names differ from those of the training data only in case, spaces, underscores and hyphens."""
        lacking: dict[str, list[str]] = {}
        for name in wanted:
            if name not in self.names:
                lacking.setdefault(delimited.simplify_name(name), []).append(name)
        found: dict[str, list[str]] = {}
        for name in self.names:
            if name not in wanted:
                found.setdefault(delimited.simplify_name(name), []).append(name)
        pairs = [(found[key][0], names[0]) for key, names in lacking.items() if len(names) == 1 == len(found.get(key, ()))]
        for old, new in pairs:
            self.rename_column(old, new)
        if pairs:
            shown = ", ".join(f"{old!r} as {new!r}" for old, new in pairs[:5])
            self.add_finding(
                "column-names",
                "note",
                f"columns spelled differently than in training were matched by name: {shown}",
                tuple(f"column {old!r}" for old, _ in pairs[:5]),
                len(pairs),
            )

    def rename_column(self, old: str, new: str) -> None:
        self.raw.rows = self.raw.rows.rename({old: new})
        self.raw.kinds = {new if n == old else n: k for n, k in self.raw.kinds.items()}
        self.names = [new if n == old else n for n in self.names]

    def type_columns(self, overrides: Mapping[str, str], roles: dict[str, Any]) -> dict[str, Column]:
        """Type the columns one by one, releasing the text of each, so that memory holds the table about once."""
        rows, columns, self.typed = self.raw.rows, {}, []
        hints = None if self.known else column_types.find_hints([rows[n] for n in self.names], self.raw.delimiter)
        self.raw.rows = pl.DataFrame([rows[c] for c in rows.columns if c in BOOKKEEPING])
        values = []
        for name in self.names:
            role = roles.get(name, "feature")
            text = rows.drop_in_place(name)
            typed = column_types.type_column(
                text,
                kind=overrides.get(name),
                target=role == "target",
                is_time=role == "time",
                hints=hints,
                known=self.known.get(name),
            )
            column = typed.column
            if name in self.time_parts:
                column.date_format = {**(column.date_format or {}), "parts": list(self.time_parts[name])}
            column.kind = self.column_spec.media.get(column.kind, column.kind)
            if role != "feature":
                column.role = role
                if role == "time" and column.kind in ("identifier", "constant") and typed.values.dtype.is_numeric():
                    column.kind = "number"  # a step counter is a valid time
            elif column.kind in ("constant", "identifier"):
                column.role = "ignored"
            if column.kind in media_types.MEDIA:
                typed.values = self.resolve_paths(typed.values)
            columns[name] = column
            values.append(typed.values)
            typed.values = pl.Series()
            self.typed.append(typed)
        table = pl.DataFrame(values)
        self.raw.rows = table.hstack(self.raw.rows) if self.raw.rows.width else table
        return columns

    def resolve_paths(self, paths: pl.Series) -> pl.Series:
        """Resolve paths relative to the root of the source."""
        root = self.raw.root.absolute()
        unique = paths.drop_nulls().unique().to_list()
        full = [str(root / p) for p in unique]
        return paths.replace_strict(unique, full, default=None, return_dtype=pl.String)

    def check_media(self, column: Column) -> None:
        """Decode every file of a media column; add its findings and bookkeeping columns, and mark unusable rows."""
        medium = media_types.MEDIA[column.kind]
        rows = self.data.rows
        paths = rows[column.name].fill_null("").to_list()
        unique = sorted(set(paths) - {""})
        unseen = [path for path in unique if (column.kind, path) not in self.media]
        allowed = []
        for path in unseen:
            if problem := self.find_place_problem(path):
                self.media[column.kind, path] = replace(medium.missing, problem=problem, detail="")
            else:
                allowed.append(path)
        self.media |= {(column.kind, path): found for path, found in zip(allowed, medium.check(allowed))}
        seen = {path: self.media[column.kind, path] for path in unique}
        checked = [seen.get(p, medium.missing) for p in paths]
        bad = np.array([bool(c.problem) for c in checked], dtype=bool)
        files = self.data.manifest.files
        own = FILE not in rows.columns  # a folder of images: one file per row
        root = self.raw.root.absolute()
        entries = [FileEntry(relative_path(Path(p), root), seen[p].bytes, seen[p].sha256, rows=1 if own else 0) for p in unique]
        if own:
            index = {p: i + len(files) for i, p in enumerate(unique)}
            rows = rows.with_columns(
                pl.Series(FILE, [index[p] for p in paths], dtype=pl.Int32), pl.lit(None, pl.Int64).alias(LINE)
            )
        files += entries
        rows = rows.with_columns(
            pl.Series(fact, [getattr(c, attribute) for c in checked], dtype=kind)
            for fact, (attribute, kind) in medium.facts.items()
            if fact not in rows.columns
        )
        self.data.rows = rows
        self.findings += findings.media_findings(self.data, medium, checked, self.bad)
        self.mark_invalid(
            bad, lambda i: checked[i].problem.replace("-", " ") + (f" ({checked[i].detail})" if checked[i].detail else "")
        )

    def find_place_problem(self, path: str) -> str:
        """Return why a path must not be opened, a key of `media_types.PLACE_PROBLEMS`, or ""."""
        if self.raw.boundary is not None and not is_inside(path, self.raw.boundary):
            return "outside-data"
        try:
            mode = os.stat(path).st_mode
        except (OSError, ValueError):
            return ""  # reported when it is opened
        return "" if stat.S_ISREG(mode) else "not-a-file"

    def check_masks(self) -> None:
        """Mark rows whose mask differs in size from the image."""
        rows = self.data.rows
        if not {WIDTH, MASK_WIDTH} <= set(rows.columns):
            return
        other = ((rows[WIDTH] != rows[MASK_WIDTH]) | (rows[HEIGHT] != rows[MASK_HEIGHT])).to_numpy() & ~self.bad
        if other.any():
            first = rows.row(int(np.flatnonzero(other)[0]), named=True)
            self.add_finding(
                "mask-size",
                "warning",
                f"masks that differ in size from their image (such as {first[MASK_WIDTH]} x "
                f"{first[MASK_HEIGHT]} for {first[WIDTH]} x {first[HEIGHT]})",
                findings.places(self.data, other),
                int(other.sum()),
                "Export them in the size of the image.",
                int(other.sum()),
            )
            self.mark_invalid(other, "mask differs in size from its image")

    def check_messages(self) -> None:
        """Mark conversations that have no messages, unknown roles or messages without content."""
        for name in [c.name for c in self.data.columns.values() if c.kind == "messages" and c.role != "ignored"]:
            messages, part = self.data.rows[name], pl.element().struct.field
            if not column_types.is_messages(messages.dtype):
                continue
            tests = {
                "no-messages": ("conversations without messages", messages.list.len().fill_null(0) == 0),
                "unknown-speaker": (
                    f"conversations with a role other than {', '.join(column_types.CHAT_ROLES)}",
                    messages.list.eval(~part("role").is_in(column_types.CHAT_ROLES).fill_null(False)).list.any(),
                ),
                "no-content": (
                    "conversations with a message without content",
                    messages.list.eval(part("content").is_null()).list.any(),
                ),
            }
            masks = {check: (what, wrong.fill_null(False).to_numpy()) for check, (what, wrong) in tests.items()}
            for what, where in self.raw.message_problems.items():
                mask = np.zeros(len(messages), dtype=bool)
                mask[where] = True
                masks[f"messages-with-{what.replace(' ', '-')}"] = f"conversations with {what}, which are not supported", mask
            for check, (what, wrong_rows) in masks.items():
                bad = wrong_rows & ~self.bad
                if bad.any():
                    self.add_finding(
                        check,
                        "warning",
                        f"{what} (column {name!r})",
                        findings.places(self.data, bad),
                        int(bad.sum()),
                        "Correct or remove them.",
                        int(bad.sum()),
                    )
                    self.mark_invalid(bad, what.replace("conversations", "a conversation"))

    def check_paired_lists(self) -> None:
        """Mark rows whose target list is not as long as the list it belongs to."""
        target, features = self.data.target, self.data.features("list")
        if target is None or target.kind != "list" or len(features) != 1 or target.name not in self.data.rows.columns:
            return
        first, second = (self.data.rows[n].list.len().fill_null(0) for n in (features[0].name, target.name))
        bad = (first != second).to_numpy() & ~self.bad
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            self.add_finding(
                "list-lengths",
                "warning",
                f"rows in which {features[0].name!r} and {target.name!r} differ in length (such as {first[row]} and {second[row]})",
                findings.places(self.data, bad),
                int(bad.sum()),
                "Each word needs one tag.",
                int(bad.sum()),
            )
            self.mark_invalid(bad, f"{features[0].name!r} and {target.name!r} differ in length")

    def report_misfits(self) -> None:
        """Add the findings about values that do not match the type of their column."""
        for typed in self.typed:
            self.findings += findings.value_findings(self.data, typed)

    def check_cells(self) -> None:
        """Collect the cells that do not fit the columns of a trained model.

        A malformed cell is predicted like an empty one. A row is unusable if it has malformed cells and no other feature.
        """
        malformed = np.zeros(len(self.bad), dtype=bool)
        for typed in self.typed:
            column = self.known[typed.column.name]
            if column.role in ("ignored", "split", "group"):
                continue
            wrong = dict(sorted({**typed.misfits, **dict.fromkeys(typed.infinite, "inf")}.items()))
            if wrong:
                fate = "read as missing" + ("" if column.missing else ", although training had no missing values there")
                self.add_problem(column.name, "malformed", f"{NOT_OF_TYPE.get(column.kind, 'malformed')} ({fate})", wrong)
                if column.role == "feature":
                    malformed[list(wrong)] = True
            if column.role == "feature" and column.range is not None and column.kind in ("number", "date"):
                values = self.data.rows[column.name]
                low, high = far_bounds(column)
                far = ((values < low) | (values > high)).fill_null(False).arg_true().to_list()
                if far:
                    lowest, highest = (
                        f"{v:g}" if isinstance(v, float) else str(v).replace("T00:00:00", "") for v in column.range
                    )
                    found = {i: format_cell(values[i]) for i in far}
                    self.add_problem(
                        column.name, "out-of-range", f"far outside the training range {lowest} to {highest}", found
                    )
            self.note_empty_cells(column, len(wrong))
        if self.lenient:
            self.reject_empty(malformed)

    def note_empty_cells(self, column: Column, malformed: int) -> None:
        """Note empty cells of a column that had none in training."""
        if column.role != "feature" or column.missing or column.kind not in ("number", "date", "category", "boolean"):
            return
        empty = self.data.rows[column.name].null_count() - malformed
        if empty > 0:
            self.add_finding(
                "missing-cells",
                "note",
                f"empty cells in column {column.name!r}, which had none in training",
                findings.places(self.data, self.data.rows[column.name].is_null().to_numpy()),
                empty,
            )

    def reject_empty(self, malformed: np.ndarray) -> None:
        """Mark rows with malformed cells that have no value in any feature."""
        features = [self.data.rows[c.name] for c in self.data.features() if c.name in self.data.rows.columns]
        if self.column_spec.gaps or not malformed.any() or not features:
            return
        bad = malformed & delimited.find_blank_rows(features).to_numpy() & ~self.bad
        if bad.any():
            self.add_finding(
                "malformed",
                "warning",
                "rows whose only values are malformed",
                findings.places(self.data, bad),
                int(bad.sum()),
                "Correct them.",
                int(bad.sum()),
            )
            self.mark_invalid(bad, "malformed cells and no other value")

    def add_problem(
        self, name: str, what: Literal["malformed", "unseen", "out-of-range"], detail: str, cells: dict[int, str]
    ) -> None:
        """Note cells that do not fit a column of a trained model."""
        shown = [(self.data.locate_row(i), cells[i]) for i in list(cells)[: findings.MAX_PROBLEM_EXAMPLES]]
        self.problems.append(CellProblems(name, what, detail, len(cells), tuple(cells), tuple(shown)))

    def usable_problems(self) -> list[CellProblems]:
        """Return the problems with rows counted after unusable rows were dropped."""
        kept = np.cumsum(~self.bad) - 1
        return [replace(p, rows=tuple(int(kept[i]) for i in p.rows if not self.bad[i])) for p in self.problems]

    def merge_class_names(self) -> None:
        """Map spelling variants of class names in other splits ("<=50K." for "<=50K") to the spelling in train."""
        data, target = self.data, self.data.target
        if target is None or data.splits is None or target.kind != "category":
            return
        values = data.rows[target.name]
        train = set(values.filter(pl.Series(data.splits == "train")).drop_nulls().unique())
        if not train:
            return
        plain: dict[str, set[str]] = {}
        for label in train:
            plain.setdefault(findings.simplify_label(label), set()).add(label)
        other = sorted(set(values.drop_nulls().unique()) - train)
        same = {
            o: next(iter(plain[findings.simplify_label(o)]))
            for o in other
            if len(plain.get(findings.simplify_label(o), ())) == 1
        }
        if same:
            rows = values.is_in(list(same)).arg_true()
            data.rows = data.rows.with_columns(values.replace(same))
            target.distinct = data.rows[target.name].drop_nulls().n_unique()
            shown = ", ".join(f"{a!r} as {b!r}" for a, b in list(same.items())[:5])
            target.why = f"the target has {target.distinct} classes"
            self.add_finding(
                "class-spelling",
                "warning",
                f"rows with a class spelled differently than in train: read {shown}",
                findings.places(data, rows.to_list()),
                len(rows),
                "Use the same spelling.",
            )
        unknown = values.is_in([o for o in other if o not in same]).fill_null(False).to_numpy()
        new = unknown & ~self.bad
        if new.any():
            names = ", ".join(repr(o) for o in other if o not in same)
            self.add_finding(
                "class-not-in-train",
                "warning",
                f"rows with classes that do not occur in train, which count as wrong predictions: {names[:200]}",
                findings.places(data, new),
                int(new.sum()),
                "Add examples of them to train.",
            )

    def check_target(self) -> None:
        """Mark rows without a target value."""
        target = self.data.target
        if target is None or self.options.labels_optional or self.column_spec.gaps:
            return
        missing = self.data.rows[target.name].is_null().to_numpy() & ~self.bad
        if missing.any():
            count = int(missing.sum())
            self.add_finding(
                "target-missing",
                "warning",
                f"rows without a value in the target column {target.name!r}",
                findings.places(self.data, missing),
                count,
                "Fill in the values or remove the rows." + self.describe_markers(target.name),
                count,
            )
            self.mark_invalid(missing, f"no value in {target.name!r}")

    def describe_markers(self, name: str) -> str:
        """Return the remedy if words such as NA in the target, read as missing values, may be classes."""
        words = next((typed.markers for typed in self.typed if typed.column.name == name), ())
        if not words:
            return ""
        shown = ", ".join(map(repr, words))
        if len(words) == 1:
            return f" {shown} is read as a missing value; if it is a class, use --set 'column.{name}=category'."
        return f" {shown} are read as missing values; if they are classes, rename them."

    def check_keys(self) -> None:
        """Mark rows without a user, item or series."""
        for role in ("user", "item", "series"):
            for column in self.data.columns_with_role(role):
                if column.name not in self.data.rows.columns:
                    continue
                missing = self.data.rows[column.name].is_null().to_numpy() & ~self.bad
                if missing.any():
                    count = int(missing.sum())
                    self.add_finding(
                        "missing-key",
                        "warning",
                        f"rows without a value in the {role} column {column.name!r}",
                        findings.places(self.data, missing),
                        count,
                        "Fill in the values or remove the rows.",
                        count,
                    )
                    self.mark_invalid(missing, f"no value in {column.name!r}")

    def check_inputs(self) -> None:
        """Mark rows in which every feature is missing."""
        features = [c.name for c in self.data.features()]
        if not features or self.options.labels_optional or self.column_spec.gaps:
            return
        empty = delimited.find_blank_rows([self.data.rows[c] for c in features]).to_numpy() & ~self.bad
        if empty.any() and not empty.all():
            count = int(empty.sum())
            self.add_finding(
                "empty-input",
                "warning",
                "rows in which every feature is missing",
                findings.places(self.data, empty),
                count,
                "Fill in the values or remove the rows.",
                count,
            )
            self.mark_invalid(empty, "every feature is missing")


def far_bounds(column: Column) -> tuple[Any, Any]:
    """Return the bounds outside of which a value is far from the training range: one more range on both sides.

    Columns of positive numbers also have a lower bound of a tenth of their minimum.
    """
    assert column.range is not None
    low, high = column.range
    if isinstance(low, str) or isinstance(high, str):
        first, last = datetime.fromisoformat(str(low)), datetime.fromisoformat(str(high))
        try:
            return first - (last - first), last + (last - first)
        except OverflowError:
            return datetime.min, datetime.max
    span = high - low
    return (max(low - span, low / FAR_FACTOR) if low > 0 else low - span), high + span


def format_cell(value: Any) -> str:
    """Return a number or date as text."""
    return f"{value:.15g}" if isinstance(value, float) else str(value).removesuffix(" 00:00:00")
