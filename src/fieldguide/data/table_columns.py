"""Which columns of a raw table are used and for what: roles from the user, the reader, names, or a trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError, nearest
from fieldguide.data import column_types, text_values, time_parts
from fieldguide.data.column_spec import ColumnSpec, normalize_name
from fieldguide.data.dataset import (
    BOOKKEEPING,
    CellProblems,
    Column,
    Finding,
    Kind,
    Role,
)
from fieldguide.data.media import media_types
from fieldguide.data.readers import delimited
from fieldguide.data.source import Options as RawOptions
from fieldguide.data.source import RawTable

RENAMABLE_TYPES = ("image", "text", "audio", "video")  # types whose column may be renamed to match a trained model
INTERACTION_ROLES: tuple[Role, ...] = ("user", "item")  # a table with columns of these names holds user-item interactions
REQUIRED_ROLES = ("feature", "user", "item", "series")  # roles of columns that prediction requires


class TableColumns:
    """A raw table whose columns are named and assigned roles, with the findings about them."""

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
        self.time_parts: dict[str, dict[str, Any]] = {}  # timestamp -> fields of its format: the columns that form it
        self.problems: list[CellProblems] = []
        self.name, self.raw, self.options, self.allow_bad, self.column_spec = name, raw, options, allow_bad, column_spec
        self.findings = list(raw.findings)
        self.names = [c for c in raw.rows.columns if c not in BOOKKEEPING]
        self.bad = np.zeros(raw.rows.height, dtype=bool)

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
            chosen = self.choose_target([n for n in self.names if n not in roles and n not in self.raw.optional_media])
            if chosen:
                roles[chosen] = "target"
        return roles

    def join_time_parts(self, roles: dict[str, Role], column_spec: ColumnSpec) -> None:
        """Form one timestamp from columns named year, month, day, hour, ..., if no other column holds the time."""
        given = [n for n, role in roles.items() if role == "time"]
        parts = time_parts.find_parts(given or [n for n in self.names if n not in roles], self.raw.rows, normalize_name)
        other = None if given else column_spec.by_name("time", [n for n in self.names if n not in (*roles, *parts)])
        if not parts or other or len(given) == 1:
            return
        hhmm = time_parts.plain_name(parts[0]) in time_parts.DATES and time_parts.is_hhmm(self.raw.rows[parts[1]])
        name = self.replace_parts(parts, next(n for n in ("timestamp", "-".join(parts)) if n not in self.names), hhmm)
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

    def replace_parts(self, parts: list[str], name: str, hhmm: bool) -> str:
        """Replace columns that are parts of a timestamp by the timestamp, and return its name."""
        joined = time_parts.join_parts([self.raw.rows[p] for p in parts], name, hhmm)
        self.time_parts = {name: {"parts": parts, **({"hhmm": True} if hhmm else {})}}
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
        values = [n for n in reversed(names) if not text_values.are_media_files(self.raw.rows[n])]
        target = by_name or next(
            (n for n in values if not text_values.is_identifier(n, self.raw.rows[n])), [*values, names[-1]][0]
        )
        rest = "" if target == names[-1] else " that holds neither files nor identifiers"
        why = "by its name" if by_name else f"because it is the last column{rest}"
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
                    self.replace_parts(list(parts), column.name, bool((column.date_format or {}).get("hhmm")))
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
