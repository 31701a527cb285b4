"""Values of text columns: markers of missing values, names of media files, sentences, and numbers as text."""

from __future__ import annotations

import re
from typing import Any

import polars as pl

# Lower case; the last ones are the errors of spreadsheets.
MISSING_MARKERS: tuple[str, ...] = (
    "",
    "na",
    "n/a",
    "nan",
    "null",
    "none",
    "?",
    "-",
    "#n/a",
    "<na>",
    "\\n",
    "\u2013",
    "\u2014",
    "..",
    "...",
)
MISSING_MARKERS += ("#na", "(null)", "#div/0!", "#value!", "#ref!", "#num!", "#name?", "#null!")
MAX_MARKER_BYTES = max(len(marker.encode()) for marker in MISSING_MARKERS)
# One expression: on single rows, the time is that of the calls of polars. Long values are not converted to lower case.
STRIPPED = pl.first().str.strip_chars()
IS_GIVEN = ~(
    pl.when(STRIPPED.str.len_bytes() <= MAX_MARKER_BYTES)
    .then(STRIPPED.str.to_lowercase())
    .is_in(list(MISSING_MARKERS))
    .fill_null(False)
)
IDENTIFIER_NAME = r"(?i:(^|[_\s])(id|index|key|uuid|guid|nr|no)$)|[a-z]I[Dd]$"
MIN_IDENTIFIERS = 20  # minimum number of rows in which distinct values show that a column identifies them
MIN_TYPE_FRACTION = 0.9  # minimum fraction of values that parse as a type for the column to have it
# Formats that are not read are recognized as well, so that they are named as the problem.
IMAGE_FILE_PATTERN = r"(?i)\.(png|jpe?g|bmp|gif|webp|tiff?|pp?m|pgm|ico|jp2|avif|dcm|dicom|hei[cf]|dng|svs|nii(\.gz)?)$"
VIDEO_FILE_PATTERN = r"(?i)\.(mp4|avi|mov|mkv|webm|m4v|mpe?g)$"
AUDIO_FILE_PATTERN = r"(?i)\.(wave?|flac|og[ga]|opus|mp3|aiff?|au|m4a|aac|wma)$"


def blank_missing(series: pl.Series, keep: tuple[str, ...] = ()) -> pl.Series:
    """Strip whitespace and replace markers of missing values ("", NA, ?, ...) with null, except the words in `keep`."""
    given = IS_GIVEN | STRIPPED.is_in(list(keep)) if keep else IS_GIVEN
    return series.to_frame().select(pl.when(given).then(STRIPPED)).to_series()


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


def count_values(values: pl.Series) -> tuple[list[Any], list[int]]:
    """Return the distinct values, the most frequent first and equally frequent ones in order, and how often each occurs."""
    counted = (
        values.rename("value").value_counts().sort(["count", "value"], descending=[True, False])
    )  # a column may be called count
    return counted["value"].to_list(), counted["count"].to_list()


def numbers_to_text(series: pl.Series) -> pl.Series:
    """Return values as text; whole floats without the decimal places that a missing value elsewhere adds: 20, not 20.0."""
    if not series.dtype.is_float():
        return series.cast(pl.String)
    whole = (series.is_finite() & (series == series.round()) & (series.abs() < 2**53)).fill_null(False)
    return series.cast(pl.String).zip_with(~whole, series.set(~whole, None).cast(pl.Int64).cast(pl.String))


def integers_to_text(values: pl.Series) -> pl.Series:
    return values.cast(pl.Int64).cast(pl.String)


def is_identifier(name: str, values: pl.Series) -> bool:
    """Return whether a column has the name of an identifier and another value in every row."""
    few = values.len() < MIN_IDENTIFIERS or values.dtype.is_nested() or values.dtype == pl.Object
    return not few and re.search(IDENTIFIER_NAME, name) is not None and values.n_unique() == values.len()
