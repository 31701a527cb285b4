"""Columns that look like numbers but are not read as such, and the reason."""

from __future__ import annotations

import polars as pl

from fieldguide.data.text_values import MIN_TYPE_FRACTION, mean_value

SAMPLED_ROWS = 300
MIN_DISTINCT_NUMBERS = 20  # columns with at most so many distinct numbers or ranges may well be categories
MIN_FORM_FRACTION = 0.3  # minimum fraction of values in such a form; the others are plain numbers
MAX_FILLERS = 3  # maximum number of distinct words, such as unknown, that replace numbers in a column
MIN_NUMERIC_FRACTION = 0.5  # minimum fraction of numbers in a column whose other values are reported
DURATION = r"^-?\d{1,3}:\d{2}(?::\d{2})?(?:\.\d+)?$"
MEASURED = r"^[^\p{L}\d]{0,2}[-+]?\d[\d.,' ]*(?:\s*\p{L}[\p{L}\d/²³.%+]{0,9}|[^\p{L}\d\s,.\-/:][^\s,]{0,6})?$"
GROUPED_NUMBER = r"^[+-]?\d+(?:[.,' ]\d{3})*(?:[.,]\d+)?$"
NUMBER_WITH_UNIT = r"^[\s+\-(]*\p{Sc}?\s*\d[\d.,'\s]*(?:\p{Sc}|%|[kKMB]|bn|mn)?\)?$"
UNIT_MARK = r"\p{Sc}|%|\d\s*(?:[kKMB]|bn|mn)$"
NUMBER = r"\d[\d.,]*"
FORMS = {  # numbers in words or symbols -> pattern
    "fractions": r"^-?(?:\d+\s+)?(?:0|[1-9]\d*)\s*/\s*[1-9]\d{0,2}$|^-?\d*\s?[\u00bc-\u00be\u2150-\u215e]$",
    "numbers with a margin of error": rf"^[+-]?{NUMBER}\s*(?:\u00b1|\+/-|\+-)\s*{NUMBER}$",
    "numbers after a sign": rf"^(?:#|\u2116|(?i:no\.?|nr\.?))\s*{NUMBER}$",
    "limits or approximate numbers": r"^[~\u2248<>\u2264\u2265]\s*\d+$",
    "numbers with a plus sign at the end": rf"^{NUMBER}\s?\+$",
    "powers of ten": rf"^[+-]?{NUMBER}\s*[x\u00d7*\u00b7]\s*10\s*(?:\^|\*\*)?\s*[+-]?\d+$",
    "feet and inches": r"^\d{1,2}\s*(?:'|\u2032|ft\.?)\s*(?:\d{1,2}(?:\.\d+)?\s*(?:\"|\u2033|''|in\.?)?)?$",
}
PAIR = rf"^({NUMBER})\s*(?:-|\u2013|\u2014|\.\.+|~|to|x|\u00d7|/|\*)\s*({NUMBER})$"


def describe_number_words(present: pl.Series, distinct: int) -> str:
    """Return why a column of numbers with other marks, words or units is not read as numbers; "" for other text.

    Such are 27k and 1.2M, a mix of 8 % and 0.08, <0.5, 5 ppm, durations, and numbers with a few words, such as unknown.
    """
    if distinct < 3:
        return ""
    is_number = present.str.contains(GROUPED_NUMBER)
    known, others = present.filter(is_number), present.filter(~is_number)
    if 1 > known.len() / present.len() >= MIN_NUMERIC_FRACTION and known.n_unique() > MIN_DISTINCT_NUMBERS:
        like = others.filter(others.str.contains(r"^[<>~≤≥≈=±\s]+[+-]?\d|\d\s*[*†‡?+]+$|\d\[\w+\]$"))
        if others.n_unique() <= MAX_FILLERS or like.len() >= 0.5 * others.len():
            return f"{others.len():,} of {present.len():,} values are none, such as {others[0]!r}"
    if known.len() >= MIN_TYPE_FRACTION * present.len() and bool(known.str.contains(r"[.,' ]").any()):
        marks = [known.filter(known.str.contains(rf"\d{m}\d+$")) for m in (r"\.", ",")]
        if all(m.len() for m in marks):
            return f"the decimal mark is not clear, such as in {marks[0][0]!r} and {marks[1][0]!r}"
    sample = present.gather_every(max(1, present.len() // SAMPLED_ROWS)).head(SAMPLED_ROWS)
    if mean_value(sample.str.contains(DURATION)) >= MIN_TYPE_FRACTION:
        return f"the values are times of day or durations, such as {sample[0]!r}"
    if mean_value(sample.str.contains(NUMBER_WITH_UNIT)) >= MIN_TYPE_FRACTION:
        units = sample.filter(sample.str.contains(UNIT_MARK))
        if units.len() >= 0.3 * sample.len():
            return f"some values have a unit or multiplier that others lack, such as {units[0]!r}"
    if form := describe_forms(sample):
        return form
    fractions = sample.filter(sample.str.contains(r"\d[.,]\d"))
    few_marks = mean_value(sample.str.count_matches(r"[.,]")) < 1.5  # addresses and versions have more
    measured = few_marks and mean_value(sample.str.contains(MEASURED)) >= MIN_TYPE_FRACTION
    if measured and fractions.len() >= 0.5 * sample.len():
        return f"they have marks or units that are not known, such as {fractions[0]!r}"
    return ""


def describe_forms(sample: pl.Series) -> str:
    """Return the reason for values such as 1 1/2, 5±0.5, #1688, 10+, 1.5x10^3 and 5'11", and for ranges such as 1688-1738; else ""."""
    for words, pattern in FORMS.items():
        fits = sample.str.contains(pattern)
        others = sample.filter(~fits)
        if mean_value(fits) >= MIN_FORM_FRACTION and bool(others.str.contains(GROUPED_NUMBER).all()):
            return f"the values are {words}, such as {sample.filter(fits)[0]!r}"
    pairs = sample.str.extract_groups(PAIR).struct.unnest()
    first, second = (pairs[c].str.replace_all(",", "").cast(pl.Float64, strict=False) for c in pairs.columns)
    if first.null_count() or second.null_count() or sample.n_unique() <= MIN_DISTINCT_NUMBERS:
        return ""
    if bool((first > second).any() or sample.str.contains(r"^0\d").any()):  # codes
        return ""
    return f"the values are ranges or pairs of numbers, such as {sample[0]!r}"
