"""`read`: any source as one `Data`. Find the reader, type the columns, give them roles, check, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError, nearest
from fieldguide.data import column_types, source
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import (
    BOOKKEEPING,
    FILE,
    HEIGHT,
    LINE,
    MASK_HEIGHT,
    MASK_WIDTH,
    WIDTH,
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
from fieldguide.data.validation import checks, findings

LONE = ("image", "text", "audio", "video")  # a reader's own name for a column of these gives way to the model's
EVENTS = ("user", "item")  # a table with columns so called tells who met what
NEEDED = ("feature", "user", "item", "series")  # roles without whose columns a model cannot predict


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
    """Read a table, a folder of pictures or texts, a data frame, or a sample by its name, and check it.

    `target` names the column to learn (by convention `target`, `label`, ..., else the last); `group` one
    whose rows must stay on one side of a split; `time` one to split by; `roles` columns for any role (user, item,
    series, ...), several with commas between. `kinds` overrules what columns hold. `wants` is what a task asks of the columns.
    `schema` (from a trained model) applies known columns exactly: the target may then be absent. With
    `labels_optional` (to predict), rows are kept that have no target or no values. `header` says whether a
    CSV's first line is names; None looks.

    Where it is `lenient`, inputs that cannot be used are named in `Data.unread`, and are an error only if none is left.

    Raises DataError, listing every problem with its places and remedy, if the data cannot be used, or if over
    1 % of the examples cannot and `allow_bad` is False. What is dropped below that the manifest counts.
    """
    known = [c if isinstance(c, Column) else Column(**c) for c in schema or ()]
    if known:
        target = next((c.name for c in known if c.role == "target"), None)
    where, name = locate(source)
    options = _options(target, header, known, labels_optional)
    raw = _load(where, options)
    asked = {role: column for role, column in {"group": group, "time": time, **(roles or {})}.items() if column}
    return Reading(name, raw, options, allow_bad, column_spec or ColumnSpec(), lenient).run(dict(kinds or {}), known, asked)


def locate(source: Any) -> tuple[Any, str]:
    """The path or object to read, and what to call it. Raises DataError for a path that is not there."""
    if not isinstance(source, str | Path):
        return source, "the table in memory"
    path = Path(source).expanduser()
    if path.exists():
        return path.absolute(), str(source)
    from fieldguide.data import samples

    if isinstance(source, str) and source in samples.SAMPLES:
        return samples.path(source), source
    parent = path.absolute().parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    hint = nearest(path.name, [*samples.SAMPLES, *names] if path.name == str(source) else names)
    raise DataError(f"{source}: there is no such file, folder or sample.{hint} The samples are: {', '.join(samples.SAMPLES)}.")


def _options(target: str | None, header: bool | None, known: list[Column], optional: bool) -> source.Options:
    return source.Options(target, header, tuple(c.name for c in known), optional)


def _load(where: Any, options: source.Options) -> source.Raw:
    return source.load(where, options)


class Reading:
    """One reading, from the raw table to `Data`; collects findings and the rows that cannot be used."""

    def __init__(
        self,
        name: str,
        raw: source.Raw,
        options: source.Options,
        allow_bad: bool,
        column_spec: ColumnSpec,
        lenient: bool = False,
    ) -> None:
        self.lenient, self.why = lenient, dict[int, str]()  # of a row that cannot be used
        self.name, self.raw, self.options, self.allow_bad, self.column_spec = name, raw, options, allow_bad, column_spec
        self.findings = list(raw.findings)
        self.names = [c for c in raw.rows.columns if c not in BOOKKEEPING]
        self.bad = np.zeros(raw.rows.height, dtype=bool)

    def run(self, overrides: dict[str, Kind], known: list[Column], asked: dict[Role, str]) -> Data:
        if known:
            roles = self.apply_schema(known)
            overrides = {c.name: c.kind for c in known}
        else:
            roles = self.roles(asked)
            self.require(overrides, "kinds")
            lone = [n for n in self.names if n not in roles]
            asks = {**roles, **({lone[0]: "feature"} if len(lone) == 1 else {})}  # the one input of a task that has one
            wanted = {name: kind for name, role in asks.items() if (kind := self.column_spec.kind(role, self.raw.rows[name]))}
            known_by_name = {n: self.column_spec.columns[n] for n in self.names if n in self.column_spec.columns}
            overrides = {**known_by_name, **wanted, **self.raw.kinds, **overrides}
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
            asked = (
                column.role == "target"
                and self.options.labels_optional
                and column.name in self.data.rows.columns
                and self.data.rows[column.name].null_count() == len(self.data)
            )
            if column.kind in media_types.MEDIA and column.role != "ignored" and not asked:
                self.check_media(column)
        self.check_masks()
        self.check_messages()
        self.report_misfits()
        self.merge_class_names()
        self.check_target()
        self.check_keys()
        self.check_inputs()
        total = len(self.data) + self.raw.unusable
        data = self.data.without(self.bad)
        if not known:
            data.findings += checks.check(data, self.column_spec.checks)
        checks.enforce(data.findings, total, self.allow_bad or (self.lenient and len(data) > 0), self.name, offer=not known)
        if self.lenient:
            data.skipped = self.skipped()
        return data

    def mark_invalid(self, bad: np.ndarray, why: Callable[[int], str]) -> None:
        """Marks rows as unusable; the first reason holds."""
        self.why |= {int(i): why(int(i)) for i in np.flatnonzero(bad & ~self.bad)}
        self.bad |= bad

    def skipped(self) -> list[SkippedInput]:
        """What was left out, in order; last what the reader could not make a row of."""
        before = np.cumsum(~self.bad)
        return [SkippedInput(int(before[row]), self.data.place(row), self.why[row]) for row in sorted(self.why)] + [
            SkippedInput(int((~self.bad).sum()), ", ".join(f.places), f"{f.count:,} x {f.what}" if f.count > 1 else f.what)
            for f in self.raw.findings
            if f.unusable
        ]

    def find(self, *finding: Any) -> None:
        self.findings.append(Finding(*finding))

    def require(self, wanted: Any, what: str) -> None:
        for name in wanted:
            if name not in self.names:
                raise DataError(
                    f"{self.name}: {what} names the column {name!r}, which is not there."
                    f"{nearest(name, self.names)} The columns are: {', '.join(self.names)}."
                )

    def roles(self, asked: dict[Role, str]) -> dict[str, Role]:
        """Column -> role, for all that are no features: as asked, as the reader knows, as their names say."""
        roles: dict[str, Role] = {}
        for role, name in asked.items():
            several = [name] if name in self.names else [n.strip() for n in name.split(",")]
            self.require(several, role)
            roles |= dict.fromkeys(several, role)
        if self.raw.split_column:
            roles.setdefault(self.raw.split_column, "split")
        for name, role in self.raw.roles.items():
            if role not in roles.values():
                roles.setdefault(name, role)
        target = self.targets(roles)
        roles |= dict.fromkeys(target, "target")
        column_spec = self.column_spec
        if (
            column_spec == ColumnSpec()
            and not target
            and not column_spec.by_name("target", self.names)
            and all(column_spec.by_name(role, self.names) for role in EVENTS)
        ):
            column_spec = ColumnSpec("none", roles=EVENTS)  # who met what: no column of it is an answer
        for role in column_spec.roles:
            free = [n for n in self.names if n not in roles]
            if role not in roles.values() and (name := column_spec.by_name(role, free)):
                roles[name] = role
        if not target and column_spec.target in ("last", "named"):
            chosen = self.choose_target([n for n in self.names if n not in roles])
            if chosen:
                roles[chosen] = "target"
        return roles

    def targets(self, roles: Mapping[str, Role]) -> list[str]:
        """The targets that the user or the reader names; several are written with commas between."""
        named = self.options.target
        if named is not None:
            several = [n.strip() for n in named.split(",")] if named not in self.names else [named]
            self.require(several, "target")
            return several
        if self.column_spec.target == "none":
            return []
        if self.raw.target in self.names:
            if self.column_spec.target == "named" and self.raw.rows[self.raw.target].n_unique() < 2:
                roles[self.raw.target] = "ignored"  # one folder of pictures: no classes
                return []
            return [self.raw.target]
        if self.column_spec.target == "numbers":
            free = [n for n in self.names if n not in roles]
            return [name] if (name := self.column_spec.by_name("target", free)) else []
        return []

    def choose_target(self, names: list[str]) -> str | None:
        by_name = self.column_spec.by_name("target", names)
        if by_name is None and (self.options.labels_optional or len(names) < 2 or self.column_spec.target != "last"):
            return None
        target = by_name or next((n for n in reversed(names) if not column_types.are_files(self.raw.rows[n])), names[-1])
        why = "by its name" if by_name else "because it is the last"
        self.find(
            "target-chosen",
            "note",
            f"no target was named: column {target!r} is taken, {why}",
            (f"column {target!r}",),
            1,
            "Name another with --target (in Python: target=).",
        )
        return target

    def apply_schema(self, known: list[Column]) -> dict[str, str]:
        """Bring the table into the columns of a trained model."""
        for found in (n for n, kind in self.raw.kinds.items() if kind in LONE):
            ours = [c.name for c in known if c.role == "feature" and c.kind == self.raw.kinds[found]]
            if len(ours) == 1 and found not in ours and ours[0] not in self.names:
                self.rename(found, ours[0])
        target = self.options.target
        if self.raw.target in self.names and target and target not in self.names:
            self.rename(str(self.raw.target), target)
        needed = [c.name for c in known if c.role in NEEDED]
        lacking = [n for n in needed if n not in self.names]
        if lacking:
            others = [n for n in self.names if n not in needed]
            listed = "\n".join(f"  - {n!r}.{nearest(n, others)}" for n in lacking)
            raise DataError(
                f"{self.name}: {len(lacking)} of the {len(needed)} columns that the model needs "
                f"are missing:\n{listed}\nThe columns are: {', '.join(self.names)}."
            )
        wanted = {c.name for c in known}
        extra = [n for n in self.names if n not in wanted]
        if extra:
            self.find(
                "extra-columns",
                "note",
                "columns ignored, because the model does not know them",
                tuple(f"column {n!r}" for n in extra[:5]),
                len(extra),
            )
            self.raw.rows = self.raw.rows.drop(extra)
            self.names = [n for n in self.names if n in wanted]
        return {c.name: c.role for c in known}

    def rename(self, old: str, new: str) -> None:
        self.raw.rows = self.raw.rows.rename({old: new})
        self.raw.kinds = {new if n == old else n: k for n, k in self.raw.kinds.items()}
        self.names = [new if n == old else n for n in self.names]

    def type_columns(self, overrides: dict[str, Kind], roles: dict[str, Any]) -> dict[str, Column]:
        """Type one column after the other, letting go of its text: memory holds the table about once."""
        rows, columns, self.typed = self.raw.rows, {}, []
        self.raw.rows = pl.DataFrame([rows[c] for c in rows.columns if c in BOOKKEEPING])
        values = []
        for name in self.names:
            role = roles.get(name, "feature")
            text = rows.drop_in_place(name)
            typed = column_types.type_column(text, kind=overrides.get(name), target=role == "target")
            column = typed.column
            column.kind = self.column_spec.media.get(column.kind, column.kind)
            if role != "feature":
                column.role = role
                if role == "time" and column.kind in ("identifier", "constant") and typed.values.dtype.is_numeric():
                    column.kind = "number"  # a count of steps is a time, too
            elif column.kind in ("constant", "identifier"):
                column.role = "ignored"
            if column.kind in media_types.MEDIA:
                typed.values = self.absolute(typed.values)
            columns[name] = column
            values.append(typed.values)
            typed.values = pl.Series()
            self.typed.append(typed)
        table = pl.DataFrame(values)
        self.raw.rows = table.hstack(self.raw.rows) if self.raw.rows.width else table
        return columns

    def absolute(self, paths: pl.Series) -> pl.Series:
        root = self.raw.root.absolute()
        unique = paths.drop_nulls().unique().to_list()
        full = [str(root / p) for p in unique]
        return paths.replace_strict(unique, full, default=None, return_dtype=pl.String)

    def check_media(self, column: Column) -> None:
        """Decode every file of a column; note what its medium notes, and the rows whose file cannot be used."""
        medium = media_types.MEDIA[column.kind]
        rows = self.data.rows
        paths = rows[column.name].fill_null("").to_list()
        unique = sorted(set(paths) - {""})
        seen = dict(zip(unique, medium.check(unique)))
        checked = [seen.get(p, medium.missing) for p in paths]
        bad = np.array([bool(c.problem) for c in checked], dtype=bool)
        files = self.data.manifest.files
        own = FILE not in rows.columns  # a folder of pictures: a file a row
        root = self.raw.root.absolute()
        entries = [
            FileEntry(source.relative(Path(p), root), seen[p].bytes, seen[p].sha256, rows=1 if own else 0) for p in unique
        ]
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
        self.findings += findings.of_media(self.data, medium, checked, self.bad)
        self.mark_invalid(bad, lambda i: f"{checked[i].problem.replace('-', ' ')} ({checked[i].detail})")

    def check_masks(self) -> None:
        """Masks of another size than their picture."""
        rows = self.data.rows
        if not {WIDTH, MASK_WIDTH} <= set(rows.columns):
            return
        other = ((rows[WIDTH] != rows[MASK_WIDTH]) | (rows[HEIGHT] != rows[MASK_HEIGHT])).to_numpy() & ~self.bad
        if other.any():
            first = rows.row(int(np.flatnonzero(other)[0]), named=True)
            self.find(
                "mask-size",
                "warning",
                f"masks of another size than their picture (such as {first[MASK_WIDTH]} x "
                f"{first[MASK_HEIGHT]} for {first[WIDTH]} x {first[HEIGHT]})",
                findings.places(self.data, other),
                int(other.sum()),
                "Export them in the picture's size.",
                int(other.sum()),
            )
            self.mark_invalid(other, lambda i: "mask of another size than its picture")

    def check_messages(self) -> None:
        """Conversations without a message, of speakers that nobody knows, or of messages without a content."""
        for name in [c.name for c in self.data.columns.values() if c.kind == "messages" and c.role != "ignored"]:
            said, part = self.data.rows[name], pl.element().struct.field
            if not column_types.is_messages(said.dtype):
                continue
            tests = {
                "no-messages": ("conversations without a message", said.list.len().fill_null(0) == 0),
                "unknown-speaker": (
                    f"conversations with a role other than {', '.join(column_types.SPEAKERS)}",
                    said.list.eval(~part("role").is_in(column_types.SPEAKERS).fill_null(False)).list.any(),
                ),
                "no-content": (
                    "conversations with a message whose content is missing",
                    said.list.eval(part("content").is_null()).list.any(),
                ),
            }
            for check, (what, wrong) in tests.items():
                bad = wrong.fill_null(False).to_numpy() & ~self.bad
                if bad.any():
                    self.find(
                        check,
                        "warning",
                        f"{what} (column {name!r})",
                        findings.places(self.data, bad),
                        int(bad.sum()),
                        "Mend them, or take them out.",
                        int(bad.sum()),
                    )
                    self.mark_invalid(bad, lambda i, what=what: what.replace("conversations", "a conversation"))

    def report_misfits(self) -> None:
        for typed in self.typed:
            self.findings += findings.of_values(self.data, typed)

    def merge_class_names(self) -> None:
        """Splits may spell classes differently ("<=50K." for "<=50K"): spell them as train does."""
        data, target = self.data, self.data.target
        if target is None or data.splits is None or target.kind != "category":
            return
        values = data.rows[target.name]
        train = set(values.filter(pl.Series(data.splits == "train")).drop_nulls().unique())
        if not train:
            return
        plain: dict[str, set[str]] = {}
        for label in train:
            plain.setdefault(findings.simplified(label), set()).add(label)
        other = sorted(set(values.drop_nulls().unique()) - train)
        same = {o: next(iter(plain[findings.simplified(o)])) for o in other if len(plain.get(findings.simplified(o), ())) == 1}
        if same:
            rows = values.is_in(list(same)).arg_true()
            data.rows = data.rows.with_columns(values.replace(same))
            target.distinct = data.rows[target.name].drop_nulls().n_unique()
            shown = ", ".join(f"{a!r} as {b!r}" for a, b in list(same.items())[:5])
            target.why = f"the target has {target.distinct} classes"
            self.find(
                "class-spelling",
                "warning",
                f"rows whose class is spelt otherwise than in train: read {shown}",
                findings.places(data, rows.to_list()),
                len(rows),
                "Spell them alike.",
            )
        unknown = values.is_in([o for o in other if o not in same]).fill_null(False).to_numpy()
        new = unknown & ~self.bad
        if new.any():
            names = ", ".join(repr(o) for o in other if o not in same)
            self.find(
                "class-not-in-train",
                "warning",
                f"rows of classes that train does not have: {names[:200]}",
                findings.places(data, new),
                int(new.sum()),
                "Add examples to train, or remove these.",
                int(new.sum()),
            )
            self.mark_invalid(unknown, lambda i: "class that is not in train")

    def check_target(self) -> None:
        target = self.data.target
        if target is None or self.options.labels_optional or self.column_spec.gaps:
            return
        missing = self.data.rows[target.name].is_null().to_numpy() & ~self.bad
        if missing.any():
            count = int(missing.sum())
            self.find(
                "target-missing",
                "warning",
                f"rows without a value of the target {target.name!r}",
                findings.places(self.data, missing),
                count,
                "Fill it in or remove the rows.",
                count,
            )
            self.mark_invalid(missing, lambda i: f"no value of {target.name!r}")

    def check_keys(self) -> None:
        """Rows that do not say whose they are."""
        for role in ("user", "item", "series"):
            for column in self.data.role(role):
                if column.name not in self.data.rows.columns:
                    continue
                missing = self.data.rows[column.name].is_null().to_numpy() & ~self.bad
                if missing.any():
                    count = int(missing.sum())
                    self.find(
                        "missing-key",
                        "warning",
                        f"rows that do not say which {role} they are of (column {column.name!r})",
                        findings.places(self.data, missing),
                        count,
                        "Fill it in or remove the rows.",
                        count,
                    )
                    self.mark_invalid(missing, lambda i, name=column.name: f"no value of {name!r}")

    def check_inputs(self) -> None:
        """Rows in which every feature is missing."""
        features = [c.name for c in self.data.features()]
        if not features or self.options.labels_optional or self.column_spec.gaps:
            return
        empty = delimited.blank([self.data.rows[c] for c in features]).to_numpy() & ~self.bad
        if empty.any() and not empty.all():
            count = int(empty.sum())
            self.find(
                "empty-input",
                "warning",
                "rows with nothing to learn from: every feature is missing",
                findings.places(self.data, empty),
                count,
                "Fill them in or remove the rows.",
                count,
            )
            self.mark_invalid(empty, lambda i: "every feature is missing")
