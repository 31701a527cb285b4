"""Conversion of a raw table to `Data`: roles, types, and the checks of cells, media and targets."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from fieldguide.data import column_types
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
    Kind,
    Manifest,
    Role,
    SkippedInput,
)
from fieldguide.data.former_formats import holds_words
from fieldguide.data.media import media_types
from fieldguide.data.readers import delimited
from fieldguide.data.source import is_inside, relative_path
from fieldguide.data.table_columns import TableColumns
from fieldguide.data.validation import checks, findings

MIN_EQUAL_LENGTHS = 0.9  # fraction of rows in which two lists must be equally long to belong together
NOT_OF_TYPE = {"number": "not numbers as in training", "date": "not dates as in training", "boolean": "neither true nor false"}
FAR_FACTOR = 10  # values of a positive column below its training minimum divided by this are far outside the training range


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


class TableReader(TableColumns):
    """Converts a raw table to `Data`, collecting findings and unusable rows."""

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
        else:
            self.choose_time(columns)
            self.choose_series(columns, requested_roles)
        if not known and self.column_spec.target == "numbers" and "target" not in roles.values():
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
        for column in sorted(
            columns.values(), key=lambda c: c.role == "target"
        ):  # sizes are those of the input, if both are images
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

    def choose_time(self, columns: dict[str, Column]) -> None:
        """Take the only column of dates as the time if the task needs one and no name implies it."""
        dates = [c for c in columns.values() if c.kind == "date" and c.role == "feature"]
        if "time" in self.column_spec.roles and len(dates) == 1 and all(c.role != "time" for c in columns.values()):
            dates[0].role = "time"
            self.add_finding(
                "time-chosen",
                "note",
                f"column {dates[0].name!r} is the time, because it is the only column of dates",
                (f"column {dates[0].name!r}",),
                1,
                "Specify another with --time.",
            )

    def choose_series(self, columns: dict[str, Column], requested_roles: dict[Role, str]) -> None:
        """Choose the column that names the series by its values, if none was requested.

        With one series per row, the only column of distinct names, although another one is called like a series. With several series in
        one column, the only column of categories, if times repeat, but not within one of its values.
        """
        if "series" not in self.column_spec.roles or "series" in requested_roles:
            return
        if by_name := [c for c in columns.values() if c.role == "series"]:
            self.prefer_distinct_names(by_name[0], columns)
            return
        times = [c.name for c in columns.values() if c.role == "time"]
        names = [c for c in columns.values() if c.kind == "category" and c.role == "feature"]
        if len(times) != 1 or len(names) != 1 or not self.raw.rows[times[0]].is_duplicated().any():
            return
        name = names[0].name
        if self.raw.rows.select(times[0], name).is_duplicated().any():
            return
        names[0].role = "series"
        self.add_finding(
            "series-chosen",
            "note",
            f"column {name!r} names the series, because times repeat only between its values",
            (f"column {name!r}",),
            1,
            "Specify another with --set role.series=COLUMN.",
        )

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
                column.date_format = {**(column.date_format or {}), **self.time_parts[name]}
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
        absent = replace(medium.missing, problem="", detail="") if column.name in self.raw.optional_media else medium.missing
        checked = [seen.get(p, absent) for p in paths]
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
            pl.Series(fact, [getattr(c, attribute) if p else None for p, c in zip(paths, checked)], dtype=kind)
            for fact, (attribute, kind) in medium.facts.items()
            if fact not in rows.columns
        )
        self.data.rows = rows
        self.findings += findings.media_findings(self.data, medium, checked, self.bad, column.name)
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
                least, most = values.min(), values.max()
                if least is not None and (least < low or most > high):
                    far = ((values < low) | (values > high)).fill_null(False).arg_true().to_list()
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
        if self.column_spec.new_classes:
            return
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

    def prefer_distinct_names(self, column: Column, columns: dict[str, Column]) -> None:
        """Let another column name the series if `column` repeats, and there is no time that tells its rows apart."""
        rows = self.raw.rows
        if any(c.role == "time" for c in columns.values()) or not rows[column.name].is_duplicated().any():
            return
        words = [c for c in columns.values() if c.role in ("feature", "ignored") and holds_words(rows[c.name])]
        distinct = [c for c in words if not rows[c.name].is_duplicated().any()]
        if len(distinct) == 1:
            column.role, distinct[0].role = "feature", "series"
            self.add_finding(
                "series-chosen",
                "note",
                f"column {distinct[0].name!r} names the series, because {column.name!r} repeats and there is no time",
                (f"column {distinct[0].name!r}",),
                1,
                "Specify another with --set role.series=COLUMN.",
            )

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
