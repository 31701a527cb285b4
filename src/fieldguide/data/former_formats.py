"""Numbers and dates as they were read when run folders did not store formats: the columns of such folders are still read so."""

from __future__ import annotations

import polars as pl

from fieldguide.data.text_values import MIN_TYPE_FRACTION, mean_value

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


def as_numbers(text: pl.Series) -> pl.Series:
    """Parse numbers from text. Decimal commas are accepted if the column contains no points; NaN is missing."""
    values = text.cast(pl.Float64, strict=False)
    if values.null_count() > text.null_count() and bool(text.str.contains(r"^[+-]?\d+,\d+$").any()):
        commas = text.str.replace(",", ".", literal=True).cast(pl.Float64, strict=False)
        if not bool(text.str.contains(".", literal=True).any()):
            values = commas
    return values.rename(text.name)


def holds_words(values: pl.Series) -> bool:
    """Return whether a column holds words. Text may hold numbers alone: a step at which all series are 0 or have ended, for example."""
    return values.dtype == pl.String and as_numbers(values).null_count() > values.null_count()


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
