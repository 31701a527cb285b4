"""Column types: inference of what a column of raw text holds. Columns are read as text and typed here, one by one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, cast

import polars as pl

from fieldguide.data.dataset import Column, Kind
from fieldguide.data.former_formats import as_dates, as_numbers
from fieldguide.data.number_formats import NUMBER_LIKE, FileHints, NumberFormat, find_decisive_mark, infer_format
from fieldguide.data.number_words import describe_number_words
from fieldguide.data.text_values import (
    AUDIO_FILE_PATTERN,
    IDENTIFIER_NAME,
    IMAGE_FILE_PATTERN,
    MIN_TYPE_FRACTION,
    MISSING_MARKERS,
    VIDEO_FILE_PATTERN,
    blank_missing,
    count_values,
    has_sentences,
    integers_to_text,
    mean_value,
    numbers_to_text,
)
from fieldguide.data.time_zones import LOCAL, is_local_clock
from fieldguide.data.timestamps import DateFormat, find_decisive_order, infer_dates, numbers_as_dates

TRUE_WORDS, FALSE_WORDS = ("true", "yes", "y", "t", "on", "1"), ("false", "no", "n", "f", "off", "0")
FORMATS: dict[str, tuple[str, str]] = {  # option of a type, as in number:decimal-comma -> type, decimal mark or order of dates
    "decimal-point": ("number", "."),
    "decimal-comma": ("number", ","),
    "day-first": ("date", "dmy"),
    "month-first": ("date", "mdy"),
    "year-first": ("date", "ymd"),
}
MAX_EXACT_INTEGER = 2**53  # larger integers lose digits as numbers
HINT_ROWS = 300  # rows of a file that are inspected for the formats of its other columns
MIN_LITERAL_FRACTION = 0.05  # minimum fraction of rows with a word such as None for it to be a class
MAX_INTEGER_CLASSES = 20  # a target with at most this many distinct integers is a class label, not a quantity
DATE_DTYPE = pl.Datetime("us")
CHAT_ROLES = ("system", "user", "assistant")  # valid roles in a conversation
NESTED_TYPES = ("boxes", "messages", "list")  # types whose values are lists


@dataclass
class TypedColumn:
    """A typed column: description, values, and the rows whose value could not be converted (now missing)."""

    column: Column
    values: pl.Series
    misfits: dict[int, str] = field(default_factory=dict)  # row -> original text
    infinite: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubts: list[tuple[str, str, str]] = field(default_factory=list)  # check, description and remedy of unclear formats
    expected: int = 0
    markers: tuple[str, ...] = ()  # words that were read as missing values, if no cell is empty


@dataclass(frozen=True)
class Context:
    """What is known about a column apart from its values.

    `known` is the column of a trained model, whose formats are applied without guessing; `option` is a key of `FORMATS`.
    """

    kind: Kind | None = None
    option: str = ""
    target: bool = False
    is_time: bool = False
    hints: FileHints = field(default_factory=FileHints)
    known: Column | None = None

    def number_hints(self) -> FileHints:
        """Return the hints for reading numbers, with the decimal mark that the user gave."""
        if self.option in FORMATS:
            hints = FileHints()
            hints.decimals[FORMATS[self.option][1]] += 1
            return hints
        return self.hints


def split_kind(kind: str | None) -> tuple[Kind | None, str]:
    """Return type and option of a type given by the user, such as number:decimal-comma. Raises ValueError for unknown ones."""
    if kind is None:
        return None, ""
    name, _, option = kind.partition(":")
    if option and FORMATS.get(option, ("",))[0] != name:
        fitting = ", ".join(f"{k}:{o}" for o, (k, _) in FORMATS.items())
        raise ValueError(f"{kind!r} is no type. Types with an option are {fitting}.")
    return cast(Kind, name), option


def find_hints(columns: list[pl.Series], delimiter: str | None) -> FileHints:
    """Return what the unambiguous columns of a file say about how it writes numbers and dates."""
    hints = FileHints(delimiter)
    for column in columns:
        if column.dtype != pl.String:
            continue
        present = blank_missing(column.head(HINT_ROWS)).drop_nulls()
        if not present.len() or not bool(present.head(20).str.contains(r"\d").any()):
            continue
        if not bool(present.str.contains(r"\D").any()):
            continue  # digits alone have no marks
        if mark := find_decisive_mark(present):
            hints.decimals[mark] += 1
        elif order := find_decisive_order(present):
            hints.orders[order] += 1
    return hints


def type_column(
    series: pl.Series,
    *,
    kind: str | None = None,
    target: bool = False,
    is_time: bool = False,
    hints: FileHints | None = None,
    known: Column | None = None,
) -> TypedColumn:
    """Infer the type of a column, or convert it to `kind`. Values that cannot be converted become missing and are
    kept in `misfits`.

    `kind` may hold an option, such as number:decimal-comma. `known` is the column of a trained model: its formats are applied.
    """
    name = series.name
    if series.dtype in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
    plain, option = split_kind(kind)
    context = Context(plain, option, target, is_time, hints or FileHints(), known)
    if series.dtype == pl.String:
        text = blank_missing(series)
        literals, markers = ((), ()) if text.null_count() == series.null_count() else find_literals(series, context)
        if literals:
            text = blank_missing(series, literals)
        typed = convert_text(name, text, plain, context) if plain else infer_type(name, text, context)
        if literals and typed.column.kind == "category":
            typed.column.literals = literals
            if not known:
                typed.notes.append(f"column {name!r}: {', '.join(map(repr, literals))} is a class, not a missing value")
        typed.markers = markers
        return typed
    return type_native_column(name, series, context)


def find_literals(series: pl.Series, context: Context) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words of a target that are classes although they usually mark missing values, and those that are read as
    missing values.

    A word such as None is a class if it recurs, is the only such word, no cell is empty, and it is frequent or the user gave
    the type category.
    """
    if context.known is not None:
        return tuple(context.known.literals or ()), ()
    if not context.target or context.kind not in (None, "category"):
        return (), ()
    text = series.str.strip_chars()
    marked = text.str.to_lowercase().is_in(MISSING_MARKERS).fill_null(True)
    words = text.filter(marked).fill_null("")
    if context.kind == "category":  # then only empty cells are missing
        words = words.filter(words != "")
    if not words.len() or bool((words == "").any()):
        return (), ()
    spelled = tuple(sorted(words.unique()))
    others = text.filter(~marked)
    rarest = min(count_values(others)[1], default=0)
    often = words.len() >= MIN_LITERAL_FRACTION * text.len() or words.len() >= rarest / 2
    worded = others.cast(pl.Float64, strict=False).null_count() > (1 - MIN_TYPE_FRACTION) * others.len()
    is_class = len(spelled) == 1 and words.len() >= 2 and (context.kind == "category" or (often and worded))
    return (spelled, ()) if is_class else ((), spelled)


def type_native_column(name: str, series: pl.Series, context: Context) -> TypedColumn:
    """Type a column that is not text (from Parquet, JSON or a data frame)."""
    kind, target = context.kind, context.target
    if series.dtype == pl.Boolean and kind == "number":
        series = series.cast(pl.Float64)
    if series.dtype.is_numeric() and kind in (None, "number", "constant"):
        if kind is None and series.dtype.is_integer() and (mean_value(series.cast(pl.Float64).abs() > MAX_EXACT_INTEGER) > 0):
            return retype(series.cast(pl.String), context)
        numbers = series.cast(pl.Float64)
        if kind is None and not target and (found := numbers_as_dates(numbers, is_time=context.is_time)) is not None:
            return make_date_column(name, found[0], f"numbers that are dates, such as {series.drop_nulls()[0]}", found[1])
        typed = make_number_column(name, numbers, "stored as numbers", NumberFormat())
        return typed if kind else refine_number(typed, series, target)
    if series.dtype == pl.Boolean and kind in (None, "boolean") and not target:
        return make_typed_column(name, series, "boolean", "stored as true and false")
    if series.dtype.is_temporal() and series.dtype != pl.Duration and kind in (None, "date"):
        if series.dtype == pl.Time:
            return retype(series.cast(pl.String), context)
        zone, why = "", "stored as dates"
        if getattr(series.dtype, "time_zone", None):
            series, zone = remove_time_zone(series, context.known)
            why += " with a time zone, " + ("kept in UTC" if zone == "UTC" else "local times at the same time of day")
        return make_date_column(name, series.cast(DATE_DTYPE), why, DateFormat(zone=zone))
    if series.dtype.is_nested() and (kind in NESTED_TYPES or is_messages(series.dtype)):
        return make_typed_column(
            name, series, kind or "messages", "as given" if kind else "lists of {role, content}: one conversation per row"
        )
    if series.dtype.is_nested() or series.dtype in (pl.Binary, pl.Object, pl.Duration):
        typed = make_typed_column(name, series, "constant", f"stored as {series.dtype}, which is not supported")
        typed.column.role = "ignored"
        typed.notes.append(f"column {name!r} has type {series.dtype}, which is not supported; it is ignored")
        return typed
    return retype(numbers_to_text(series), context)


def remove_time_zone(series: pl.Series, known: Column | None) -> tuple[pl.Series, str]:
    """Return dates with a time zone as UTC, or as local times if training did so or all are at the same local time of day."""
    utc = series.dt.convert_time_zone("UTC").dt.replace_time_zone(None).cast(DATE_DTYPE)
    local = series.dt.replace_time_zone(None).cast(DATE_DTYPE)
    if known is not None:
        as_local = (known.date_format or {}).get("zone") == LOCAL
    else:
        numbers = local.drop_nulls().cast(pl.Int64)
        as_local = is_local_clock(numbers, numbers - utc.drop_nulls().cast(pl.Int64))
    return (local, LOCAL) if as_local else (utc, "UTC")


def retype(text: pl.Series, context: Context) -> TypedColumn:
    """Type a column that was converted to text."""
    kind = f"{context.kind}:{context.option}" if context.option else context.kind
    return type_column(
        text, kind=kind, target=context.target, is_time=context.is_time, hints=context.hints, known=context.known
    )


def is_messages(dtype: pl.DataType) -> bool:
    """Return whether the values are lists of {role, content}, the usual format of chat data."""
    inner = getattr(dtype, "inner", None)
    return isinstance(inner, pl.Struct) and {"role", "content"} <= {f.name for f in inner.fields}


def infer_type(name: str, text: pl.Series, context: Context) -> TypedColumn:
    """Infer the type of a text column from its values."""
    target = context.target
    present = text.drop_nulls()
    n, distinct = present.len(), present.n_unique()
    if n == 0:
        return make_typed_column(name, text, "constant", "every value is missing")
    if distinct == 1 and n == text.len() and not target:
        return make_typed_column(name, text, "constant", f"every row holds {present[0]!r}")
    inferred = infer_format(text, context.number_hints())
    numbers = inferred.values
    share = numbers.drop_nulls().len() / n
    if share >= MIN_TYPE_FRACTION and not target and are_long_integers(present):
        return infer_text_type(name, text, present, n, distinct, 0.0, target)
    if share >= MIN_TYPE_FRACTION:
        if present.str.contains(r"^-?0\d").any() and present.str.contains(r"^[0-9A-Za-z]+$").all():
            return make_typed_column(name, text, "category", "digits with leading zeros: a code, not a quantity")
        found = None if target or not inferred.format.is_plain else numbers_as_dates(numbers, is_time=context.is_time)
        if found is not None:
            typed = make_date_column(name, found[0], f"numbers that are dates, such as {present[0]}", found[1])
            record_misfits(typed, text, found[0], n)
            return typed
        words = inferred.format.describe()
        counted = f"all {n:,} values" if share == 1 else f"{format_percent(share)} of the {n:,} values"
        typed = make_number_column(name, numbers, f"{counted} are numbers{'; ' + words if words else ''}", inferred.format)
        if inferred.doubt:
            typed.doubts.append(describe_number_doubt(name, inferred.doubt, inferred.format))
        record_misfits(typed, text, numbers, n)
        return refine_number(typed, text, target)
    low = present.str.to_lowercase()
    if (
        not target
        and distinct <= 4
        and low.n_unique() == 2
        and int(low.unique().is_in(TRUE_WORDS).sum()) == int(low.unique().is_in(FALSE_WORDS).sum()) == 1
    ):
        return make_typed_column(name, as_booleans(text), "boolean", f"two values: {', '.join(sorted(present.unique()))}")
    if not target and (written := infer_dates(text, context.hints)) is not None:
        typed = make_date_column(name, written.values, written.description, written.format)
        record_misfits(typed, text, written.values, n)
        if written.doubt:
            typed.doubts.append(describe_date_doubt(name, written.doubt, written.remedy))
        return typed
    note = inferred.note or describe_number_words(present, distinct)
    if note:
        typed = infer_text_type(name, text, present, n, distinct, share, target)
        remedy = (
            "Write all values of the column in one unit and format"
            + ("" if target or not share else f", or use --set 'column.{name}=number': the others become missing")
            + "."
        )
        typed.doubts.append(("numbers-as-text", f"column {name!r} is not read as numbers: {note}", remedy))
        return typed
    return infer_text_type(name, text, present, n, distinct, share, target)


def are_long_integers(present: pl.Series) -> bool:
    """Return whether the values are integers, some of which a number cannot hold exactly, such as identifiers of 18 digits."""
    first = present.head(HINT_ROWS)
    if not bool(first.str.contains(r"^\d{16,}$").any()) or not bool(present.str.contains(r"^\d+$").all()):
        return False
    return bool((present.cast(pl.Float64, strict=False).abs() > MAX_EXACT_INTEGER).any())


def infer_text_type(
    name: str, text: pl.Series, present: pl.Series, n: int, distinct: int, share: float, target: bool
) -> TypedColumn:
    """Type a column that is not number, date or boolean: media files, free text, identifiers or categories."""
    if not target and mean_value(present.str.contains(IMAGE_FILE_PATTERN)) >= MIN_TYPE_FRACTION:
        return make_typed_column(name, text, "image", "the values are names of image files")
    if not target and mean_value(present.str.contains(VIDEO_FILE_PATTERN)) >= MIN_TYPE_FRACTION:
        return make_typed_column(name, text, "video", "the values are names of video files")
    if not target and mean_value(present.str.contains(AUDIO_FILE_PATTERN)) >= MIN_TYPE_FRACTION:
        return make_typed_column(name, text, "audio", "the values are names of audio files")
    length, spaces = mean_value(present.str.len_chars()), mean_value(present.str.count_matches(r"\s"))
    long = has_sentences(present) or (spaces >= 2 and distinct > 0.9 * n)
    if target and not (long and distinct > 0.5 * n and n >= 20):
        return make_category(name, text, f"the target has {distinct} classes")
    if long and (distinct > 0.5 * n or n < 20 or length >= 100):
        return make_typed_column(
            name, text, "text", f"{length:.0f} characters per value, {format_percent(distinct / n)} distinct"
        )
    if distinct >= 0.95 * n and n >= 20:
        return make_typed_column(name, text, "identifier", f"{format_percent(distinct / n)} of the values are distinct")
    mixed = f"; only {format_percent(share)} are numbers" if share >= 0.1 else ""
    return make_category(name, text, f"{distinct} distinct values{mixed}")


def refine_number(typed: TypedColumn, source: pl.Series, target: bool) -> TypedColumn:
    """Refine a numeric column to boolean, identifier or constant, or to category if it is a target with few values."""
    column, name = typed.column, typed.column.name
    present = typed.values.drop_nulls()
    n, distinct = present.len(), present.n_unique()
    whole = bool((present == present.round()).all())
    if target:
        if whole and distinct <= max(2, min(MAX_INTEGER_CLASSES, n // 4)):
            text = integers_to_text(typed.values).set(typed.values.is_null(), None)
            new = describe_column(name, text, "category", f"the target has {distinct} distinct integers")
            return replace(typed, column=new, values=text)
        return typed
    if distinct == 1 and n == typed.values.len():
        column.kind, column.why = "constant", f"every row holds {present[0]:g}"
    elif whole and distinct == 2 and set(present.unique()) == {0, 1}:
        new = describe_column(name, typed.values, "boolean", "two values: 0, 1")
        return replace(typed, column=new, values=typed.values.cast(pl.Boolean))
    elif whole and distinct == n and n >= 20 and n == typed.values.len():
        step = present.diff().drop_nulls()
        if bool((step == 1).all()) or re.search(IDENTIFIER_NAME, name):
            column.kind, column.why = "identifier", "a distinct integer in every row"
    return typed


def convert_text(name: str, text: pl.Series, kind: Kind, context: Context) -> TypedColumn:
    """Convert text to a known type, given by the user or by the schema of a trained model.

    The formats of a trained model are applied as they are; a column of a run folder without them is read as it was when the
    folder was written.
    """
    n = text.len() - text.null_count()
    known, why = context.known, "as given"
    doubts: list[tuple[str, str, str]] = []
    number_format, date_format = (known.number_format, known.date_format) if known else (None, None)
    if kind == "number":
        if known is None:
            inferred = infer_format(text.set(~text.str.contains(NUMBER_LIKE).fill_null(True), None), context.number_hints())
            values, number_format = inferred.values, inferred.format.to_json()
            why = "; ".join(["as given", *filter(None, [inferred.format.describe()])])
            if inferred.doubt:
                doubts.append(describe_number_doubt(name, inferred.doubt, inferred.format))
        else:
            values = as_numbers(text) if number_format is None else NumberFormat.from_json(number_format).parse(text)
    elif kind == "boolean":
        values = as_booleans(text)
    elif kind == "date":
        if known is None:
            order = FORMATS[context.option][1] if context.option else ""
            found = infer_dates(text, context.hints, least=0.0, order=order)
            empty = pl.Series(name, [None] * text.len(), dtype=DATE_DTYPE)
            values = empty if found is None else found.values
            date_format = DateFormat(order).to_json() if found is None else found.format.to_json()
            why = why if found is None else f"as given, {found.description}"
            if found is not None and found.doubt:
                doubts.append(describe_date_doubt(name, found.doubt, found.remedy))
        elif date_format is None:
            dates, form, _ = as_dates(text, least=0.0)
            values = dates if dates is not None else pl.Series(name, [None] * text.len(), dtype=DATE_DTYPE)
            why = f"as given, in the format {form}" if form else why
        else:
            values = DateFormat.from_json(date_format).parse(text)
    else:
        return make_category(name, text, why) if kind == "category" and not known else make_typed_column(name, text, kind, why)
    typed = make_number_column(name, values, why) if kind == "number" else make_typed_column(name, values, kind, why)
    typed.column.number_format, typed.column.date_format, typed.doubts = number_format, date_format, doubts
    record_misfits(typed, text, values, n)
    return typed


def describe_number_doubt(name: str, example: str, form: NumberFormat) -> tuple[str, str, str]:
    """Return check, description and remedy of a number that can be read in two ways."""
    other = "decimal-point" if form.decimal == "," else "decimal-comma"
    value = form.parse(pl.Series([f"{form.prefix}{example}{form.suffix}"]))[0]
    return (
        "ambiguous-numbers",
        f"column {name!r}: numbers such as {example} can be read in two ways; this one is read as {value:.15g}",
        f"If that is wrong, use --set 'column.{name}=number:{other}' (in Python: kinds={{{name!r}: 'number:{other}'}}).",
    )


def describe_date_doubt(name: str, doubt: str, remedy: str = "") -> tuple[str, str, str]:
    """Return check, description and remedy of dates that can be read in two ways."""
    return (
        "ambiguous-dates",
        f"column {name!r}: {doubt}",
        remedy or f"To choose, use --set 'column.{name}=date:day-first' or 'date:month-first' (in Python: kinds=).",
    )


def make_category(name: str, text: pl.Series, why: str) -> TypedColumn:
    """Return a column of categories; 1.0 becomes 1 if the column has both spellings, and 1 becomes True next to True."""
    first = text.head(HINT_ROWS).drop_nulls().str.to_lowercase().str.replace(r"\.0+$", "")
    if not bool(first.is_in(["true", "false", "1", "0"]).all() or text.str.contains(".0", literal=True).any()):
        return make_typed_column(name, text, "category", why)
    spelled = text.drop_nulls().unique()
    whole = spelled.filter(spelled.str.contains(r"^-?(?:0|[1-9]\d*)\.0+$"))
    shorter = whole.str.replace(r"\.0+$", "")
    if whole.len() and bool(shorter.is_in(spelled.to_list()).any()):
        text = text.replace(dict(zip(whole.to_list(), shorter.to_list())))
    truth = spelled.filter(spelled.str.to_lowercase().str.replace(r"\.0+$", "").is_in(["true", "false", "1", "0"]))
    if 2 < spelled.len() == truth.len() and (words := {v.lower(): v for v in sorted(truth.to_list()) if v[0].isalpha()}):
        key = lambda v: {"1": "true", "0": "false"}.get(v.lower().partition(".")[0], v.lower())
        text = text.replace({v: words.get(key(v), key(v).title()) for v in truth.to_list()})
    typed = make_typed_column(name, text, "category", why)
    if typed.column.distinct != spelled.len():
        typed.column.why = re.sub(rf"^(the target has )?{spelled.len()} ", rf"\g<1>{typed.column.distinct} ", why)
    return typed


def make_number_column(name: str, values: pl.Series, why: str, form: NumberFormat | None = None) -> TypedColumn:
    """Return a numeric column; infinite values become missing and their rows are kept in `infinite`."""
    places: list[int] = []
    if not math.isfinite(values.sum() or 0):  # a sum is quicker than a look at each value, which matters for single rows
        values = values.fill_nan(None)
        infinite = values.is_infinite().fill_null(False)
        if places := infinite.arg_true().to_list():
            values = values.set(infinite, None)
    column = describe_column(name, values, "number", why)
    column.number_format = None if form is None else form.to_json()
    return TypedColumn(column, values.rename(name), infinite=places)


def make_date_column(name: str, values: pl.Series, why: str, form: DateFormat) -> TypedColumn:
    """Return a column of dates."""
    typed = make_typed_column(name, values, "date", why)
    typed.column.date_format = form.to_json()
    return typed


def make_typed_column(name: str, values: pl.Series, kind: Kind, why: str) -> TypedColumn:
    return TypedColumn(describe_column(name, values, kind, why), values.rename(name))


def describe_column(name: str, values: pl.Series, kind: Kind, why: str) -> Column:
    nested = values.dtype.is_nested() or values.dtype == pl.Object
    distinct = 0 if nested else (values.drop_nulls() if values.null_count() else values).n_unique()
    return Column(name, kind, why=why, missing=values.null_count(), distinct=distinct, range=find_range(values))


def find_range(values: pl.Series) -> tuple[float | str, float | str] | None:
    """Return the smallest and largest number or date (as ISO text) of a column, or None."""
    if values.dtype.is_numeric():
        low, high = cast(Any, values.min()), cast(Any, values.max())
        return None if low is None else (float(low), float(high))
    if values.dtype == DATE_DTYPE:
        low, high = cast(Any, values.min()), cast(Any, values.max())
        return None if low is None else (low.isoformat(), high.isoformat())
    return None


def record_misfits(typed: TypedColumn, text: pl.Series, values: pl.Series, expected: int) -> None:
    """Record the rows whose text is not empty but could not be converted."""
    typed.expected = expected
    if values.null_count() > text.null_count():
        wrong = (text.is_not_null() & values.is_null()).arg_true()
        typed.misfits = dict(zip(wrong.to_list(), text[wrong].to_list()))


def as_booleans(text: pl.Series) -> pl.Series:
    """Parse booleans from text; other values become null."""
    low = text.str.to_lowercase().str.strip_suffix(".0")
    values = low.is_in(TRUE_WORDS)
    return values.set((~low.is_in(TRUE_WORDS + FALSE_WORDS)).fill_null(True), None).rename(text.name)


def format_percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share > 0.995 or share < 0.985 else f"{100 * share:.1f} %"
