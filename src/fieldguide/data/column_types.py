"""Column types: inference of what a column of raw text holds. Columns are read as text and typed here, one by one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import polars as pl

from fieldguide.data.dataset import Column, Kind

MISSING_MARKERS = ("", "na", "n/a", "nan", "null", "none", "?", "-", "#n/a")  # lower case
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "y", "t", "on", "1"), ("false", "no", "n", "f", "off", "0")
MIN_TYPE_FRACTION = 0.9  # minimum fraction of values that parse as a type for the column to have it
MAX_INTEGER_CLASSES = 20  # a target with at most this many distinct integers is a class label, not a quantity
IMAGE_FILE_PATTERN = r"(?i)\.(png|jpe?g|bmp|gif|webp|tiff?|pp?m|pgm|ico|jp2|avif)$"
VIDEO_FILE_PATTERN = r"(?i)\.(mp4|avi|mov|mkv|webm|m4v|mpe?g)$"
AUDIO_FILE_PATTERN = r"(?i)\.(wave?|flac|og[ga]|opus|mp3|aiff?|au|m4a|aac|wma)$"
DATE_FORMATS = (
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y/%m/%d",
    "%Y/%m/%d %H:%M:%S",
    "%Y/%m/%d %H:%M",
    "%d.%m.%Y",
    "%d.%m.%Y %H:%M",
    "%d.%m.%Y %H:%M:%S",
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%d/%m/%Y %H:%M",
    "%m/%d/%Y %H:%M",
    "%d/%m/%Y %H:%M:%S",
    "%m/%d/%Y %H:%M:%S",
    "%d-%m-%Y",
    "%d %b %Y",
    "%d %B %Y",
    "%b %d, %Y",
    "%B %d, %Y",
    "%Y%m%dT%H%M%S",
)
TIME_ZONE_PATTERN = r"(Z|[+-]\d\d:?\d\d)$"
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
    expected: int = 0


def blank_missing(series: pl.Series) -> pl.Series:
    """Strip whitespace and replace markers of missing values ("", NA, ?, ...) with null."""
    text = series.str.strip_chars()
    short = text.str.len_bytes() <= 4
    gone = text.set(~short, "x").str.to_lowercase().is_in(MISSING_MARKERS)
    return text.set(gone.fill_null(False), None)


def type_column(series: pl.Series, *, kind: Kind | None = None, target: bool = False) -> TypedColumn:
    """Infer the type of a column, or convert it to `kind`. Values that cannot be converted become missing and are
    kept in `misfits`."""
    name = series.name
    if series.dtype in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
    if series.dtype == pl.String:
        text = blank_missing(series)
        return convert_text(name, text, kind) if kind else infer_type(name, text, target)
    return type_native_column(name, series, kind, target)


def type_native_column(name: str, series: pl.Series, kind: Kind | None, target: bool) -> TypedColumn:
    """Type a column that is not text (from Parquet, JSON or a data frame)."""
    if series.dtype.is_numeric() and kind in (None, "number", "constant"):
        typed = make_number_column(name, series.cast(pl.Float64), "stored as numbers")
        return typed if kind else refine_number(typed, series, target)
    if series.dtype == pl.Boolean and kind in (None, "boolean") and not target:
        return make_typed_column(name, series, "boolean", "stored as true and false")
    if series.dtype.is_temporal() and series.dtype != pl.Duration and kind in (None, "date"):
        if series.dtype == pl.Time:
            return type_column(series.cast(pl.String), kind=kind, target=target)
        if getattr(series.dtype, "time_zone", None):
            series = series.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return make_typed_column(name, series.cast(DATE_DTYPE), "date", "stored as dates")
    if series.dtype.is_nested() and (kind in NESTED_TYPES or is_messages(series.dtype)):
        return make_typed_column(
            name, series, kind or "messages", "as given" if kind else "lists of {role, content}: one conversation per row"
        )
    if series.dtype.is_nested() or series.dtype in (pl.Binary, pl.Object, pl.Duration):
        typed = make_typed_column(name, series, "constant", f"stored as {series.dtype}, which is not supported")
        typed.column.role = "ignored"
        typed.notes.append(f"column {name!r} has type {series.dtype}, which is not supported; it is ignored")
        return typed
    return type_column(series.cast(pl.String), kind=kind, target=target)


def is_messages(dtype: pl.DataType) -> bool:
    """Return whether the values are lists of {role, content}, the usual format of chat data."""
    inner = getattr(dtype, "inner", None)
    return isinstance(inner, pl.Struct) and {"role", "content"} <= {f.name for f in inner.fields}


def infer_type(name: str, text: pl.Series, target: bool) -> TypedColumn:
    """Infer the type of a text column from its values."""
    present = text.drop_nulls()
    n, distinct = present.len(), present.n_unique()
    if n == 0:
        return make_typed_column(name, text, "constant", "every value is missing")
    if distinct == 1 and n == text.len() and not target:
        return make_typed_column(name, text, "constant", f"every row holds {present[0]!r}")
    numbers = as_numbers(text)
    share = numbers.drop_nulls().len() / n
    if share >= MIN_TYPE_FRACTION:
        if present.str.contains(r"^-?0\d").any() and present.str.contains(r"^\d+$").all():
            return make_typed_column(name, text, "category", "digits with leading zeros: a code, not a quantity")
        typed = make_number_column(name, numbers, f"{format_percent(share)} of the values are numbers")
        record_misfits(typed, text, numbers, n)
        return refine_number(typed, text, target)
    low = present.str.to_lowercase()
    if not target and distinct <= 4 and low.is_in(TRUE_WORDS + FALSE_WORDS).all() and low.n_unique() == 2:
        return make_typed_column(name, as_booleans(text), "boolean", f"two values: {', '.join(sorted(present.unique()))}")
    if not target:
        dates, form, other = as_dates(text)
        if dates is not None:
            typed = make_typed_column(name, dates, "date", f"dates in the format {form}")
            record_misfits(typed, text, dates, n)
            if other:
                typed.notes.append(f"column {name!r}: dates match both {form} and {other}; parsed as {form}")
            return typed
    return infer_text_type(name, text, present, n, distinct, share, target)


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
        return make_typed_column(name, text, "category", f"the target has {distinct} classes")
    if long and (distinct > 0.5 * n or n < 20 or length >= 100):
        return make_typed_column(
            name, text, "text", f"{length:.0f} characters per value, {format_percent(distinct / n)} distinct"
        )
    if distinct >= 0.95 * n and n >= 20:
        return make_typed_column(name, text, "identifier", f"{format_percent(distinct / n)} of the values are distinct")
    mixed = f"; only {format_percent(share)} are numbers" if share >= 0.1 else ""
    return make_typed_column(name, text, "category", f"{distinct} distinct values{mixed}")


def mean_value(values: pl.Series) -> float:
    """Return the mean of numbers or truth values; 0 without values."""
    mean = values.mean()
    return float(mean) if isinstance(mean, int | float) else 0.0


def has_sentences(present: pl.Series) -> bool:
    """Return whether the values are phrases or sentences, judged by mean length."""
    length, spaces = mean_value(present.str.len_chars()), mean_value(present.str.count_matches(r"\s"))
    foreign = mean_value(present.str.len_bytes() > 2 * present.str.len_chars())  # scripts without spaces
    return bool((length >= 20 and spaces >= 2) or (length >= 8 and foreign > 0.5))


def are_media_files(values: pl.Series) -> bool:
    """Return whether the values are names of image, video or audio files."""
    present = values.drop_nulls() if values.dtype == pl.String else pl.Series(dtype=pl.String)
    return any(
        mean_value(present.str.strip_chars().str.contains(name)) >= MIN_TYPE_FRACTION
        for name in (IMAGE_FILE_PATTERN, VIDEO_FILE_PATTERN, AUDIO_FILE_PATTERN)
    )


def refine_number(typed: TypedColumn, source: pl.Series, target: bool) -> TypedColumn:
    """Refine a numeric column to boolean, identifier or constant, or to category if it is a target with few values."""
    column, name = typed.column, typed.column.name
    present = typed.values.drop_nulls()
    n, distinct = present.len(), present.n_unique()
    whole = bool((present == present.round()).all())
    if target:
        if whole and distinct <= max(2, min(MAX_INTEGER_CLASSES, n // 4)):
            text = source if source.dtype == pl.String else integers_to_text(typed.values)
            text = text.set(typed.values.is_null(), None)
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
        if bool((step == 1).all()) or re.search(r"(?i)(^|[_\s])(id|index|key|uuid|nr|no)$|[a-z]I[Dd]$", name):
            column.kind, column.why = "identifier", "a distinct integer in every row"
    return typed


def convert_text(name: str, text: pl.Series, kind: Kind) -> TypedColumn:
    """Convert text to a known type, given by the user or by the schema of a trained model."""
    n = text.len() - text.null_count()
    why = "as given"
    if kind == "number":
        values = as_numbers(text)
    elif kind == "boolean":
        values = as_booleans(text)
    elif kind == "date":
        dates, form, _ = as_dates(text, least=0.0)
        values = dates if dates is not None else pl.Series(name, [None] * text.len(), dtype=DATE_DTYPE)
        why = f"as given, in the format {form}" if form else why
    else:
        return make_typed_column(name, text, kind, why)
    typed = make_number_column(name, values, why) if kind == "number" else make_typed_column(name, values, kind, why)
    record_misfits(typed, text, values, n)
    return typed


def make_number_column(name: str, values: pl.Series, why: str) -> TypedColumn:
    """Return a numeric column; infinite values become missing and their rows are kept in `infinite`."""
    values = values.fill_nan(None)
    infinite = values.is_infinite().fill_null(False)
    places = infinite.arg_true().to_list()
    if places:
        values = values.set(infinite, None)
    return TypedColumn(describe_column(name, values, "number", why), values.rename(name), infinite=places)


def make_typed_column(name: str, values: pl.Series, kind: Kind, why: str) -> TypedColumn:
    return TypedColumn(describe_column(name, values, kind, why), values.rename(name))


def describe_column(name: str, values: pl.Series, kind: Kind, why: str) -> Column:
    nested = values.dtype.is_nested() or values.dtype == pl.Object
    distinct = 0 if nested else values.drop_nulls().n_unique()
    return Column(name, kind, why=why, missing=values.null_count(), distinct=distinct)


def record_misfits(typed: TypedColumn, text: pl.Series, values: pl.Series, expected: int) -> None:
    """Record the rows whose text is not empty but could not be converted."""
    wrong = (text.is_not_null() & values.is_null()).arg_true()
    typed.misfits = dict(zip(wrong.to_list(), text[wrong].to_list())) if wrong.len() else {}
    typed.expected = expected


def as_numbers(text: pl.Series) -> pl.Series:
    """Parse numbers from text. Decimal commas are accepted if the column contains no points; NaN is missing."""
    values = text.cast(pl.Float64, strict=False)
    if values.null_count() > text.null_count() and bool(text.str.contains(r"^[+-]?\d+,\d+$").any()):
        commas = text.str.replace(",", ".", literal=True).cast(pl.Float64, strict=False)
        if not bool(text.str.contains(".", literal=True).any()):
            values = commas
    return values.rename(text.name)


def as_booleans(text: pl.Series) -> pl.Series:
    """Parse booleans from text; other values become null."""
    low = text.str.to_lowercase().str.strip_suffix(".0")
    values = low.is_in(TRUE_WORDS)
    return values.set((~low.is_in(TRUE_WORDS + FALSE_WORDS)).fill_null(True), None).rename(text.name)


def as_dates(text: pl.Series, least: float = MIN_TYPE_FRACTION) -> tuple[pl.Series | None, str, str]:
    """Parse dates from text.

    Returns the values (or None), the best matching format, and another format that matches equally well (or "").
    """
    sample = text.drop_nulls()
    if not bool(sample.head(200).str.contains(r"\d").any()):
        return None, "", ""
    few = sample.gather_every(max(1, sample.len() // 200))
    if mean_value(few.str.contains(TIME_ZONE_PATTERN)) > 0.5 and mean_value(few.str.contains(r"\d:\d")) > 0.5:
        values = parse_zoned_dates(text)
        if values.drop_nulls().len() >= max(1, least * sample.len()):
            return values, "ISO with a time zone (kept in UTC)", ""
    fits = {f: parse_dates(few, f).drop_nulls().len() / few.len() for f in DATE_FORMATS}
    good = [f for f in DATE_FORMATS if fits[f] >= min(max(least, 1e-9), 0.5)]
    whole = {f: parse_dates(text, f) for f in good}
    counts = {f: v.drop_nulls().len() for f, v in whole.items()}
    best = max(counts, key=lambda f: counts[f], default=None)
    if best is None or counts[best] < max(1, least * sample.len()):
        return None, "", ""
    other = next(
        (f for f in good if f != best and counts[f] == counts[best] and not whole[f].equals(whole[best], check_names=False)), ""
    )
    return whole[best], best, other


def parse_dates(text: pl.Series, form: str) -> pl.Series:
    return text.str.to_datetime(form, strict=False, time_unit="us")


def parse_zoned_dates(text: pl.Series) -> pl.Series:
    iso = text.str.replace(r"^(\S+) (\d)", "${1}T${2}").str.replace(r"([+-]\d\d)(\d\d)$", "${1}:${2}")
    values = iso.str.to_datetime("%+", strict=False, time_unit="us", time_zone="UTC")
    return values.dt.replace_time_zone(None)


def integers_to_text(values: pl.Series) -> pl.Series:
    return values.cast(pl.Int64).cast(pl.String)


def format_percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share > 0.995 or share < 0.985 else f"{100 * share:.1f} %"
