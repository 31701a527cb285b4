"""Number formats: how the numbers of a column are written, decided from all of its values.

`1,299` is 1299 or 1.299. The mark that is decimal follows, in this order, from values that allow one reading only
(`1,299.50`, `12,5`, `1,234,567`, `0,512`), from the delimiter of the file and its other columns, and from whether the column
also has values below 1,000 without a mark. A column that stays ambiguous is read one way and reported. The decision is stored
with the column, so that prediction reads numbers as training did.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl

CURRENCIES = (
    *"$€£¥₹₽₩₺₪₫฿₴₦₱₡₲₵₸₭₮",
    *(
        "US$",
        "R$",
        "A$",
        "C$",
        "CA$",
        "AU$",
        "NZ$",
        "HK$",
        "S$",
        "NT$",
        "MX$",
        "RM",
        "Rs",
        "Rs.",
        "kr",
        "kr.",
        "zł",
        "Kč",
        "Ft",
    ),
    *("USD", "EUR", "GBP", "JPY", "CHF", "CNY", "RMB", "INR", "BRL", "RUB", "KRW", "TRY", "SEK", "NOK", "DKK", "PLN", "CZK"),
    *("HUF", "CAD", "AUD", "NZD", "MXN", "ZAR", "HKD", "SGD", "THB", "ILS", "IDR", "MYR", "PHP", "AED", "SAR"),
)
PERCENT = ("%", "‰", "pct")
UNITS = (  # suffixes that are removed if every value of a column has the same one
    *("kg", "mg", "lb", "lbs", "oz", "km", "cm", "mm", "µm", "nm", "mi", "ft", "km²", "m²", "m³", "cm³", "sqm", "sqft"),
    *("ml", "cl", "km/h", "mph", "m/s", "ms", "sec", "min", "kW", "kWh", "MW", "MWh", "hp", "bhp", "Hz", "kHz", "MHz", "GHz"),
    *("KB", "kB", "MB", "GB", "TB", "°", "°C", "°F", "hPa", "mbar", "bar", "psi", "kcal", "kJ", "g", "m", "l", "cc", "CC"),
    *("kmpl", "km/kg", "mpg", "rpm", "Nm", "dB", "px", "bps", "years", "yrs", "days", "hours", "hrs", "mins"),
)
SPACES = "[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]"
INVISIBLE = "[\u200b\u200e\u200f\u2060\ufeff]"
MINUS_SIGNS = "[\u2010-\u2013\u2212\ufe63\uff0d]"
APOSTROPHES = "[\u2019\u02bc\u00b4`\u2032]"
OTHER_DIGITS = {  # digits and marks of other scripts
    chr(start + value): str(value) for start in (0x0660, 0x06F0, 0x0966, 0xFF10) for value in range(10)
} | {"\u066b": ".", "\u066c": ",", "\uff0e": ".", "\uff0c": ",", "\uff05": "%", "\uff0b": "+"}
OTHER_DIGITS_PATTERN = f"[{''.join(OTHER_DIGITS)}]"
SPECIAL_CHARACTERS = f"{SPACES}|{INVISIBLE}|{MINUS_SIGNS}|{APOSTROPHES}|{OTHER_DIGITS_PATTERN}"
NO_CENTS = r"(\d)[.,][-\u2013\u2014]{1,2}(\s*[^\d\s]*)$"  # 5,- and 5,- €
NO_CENTS_MARK = r"(?:(?<=\d)[.,][-\u2013\u2014]{1,2})?"  # the same, after the digits
SAMPLE_VALUES = 1000  # values that are inspected before a whole column is
MIN_NUMBER_FRACTION = 0.9  # minimum fraction of the values of a column that are numbers in its format
MIN_STRONG_VALUES = 2  # minimum number of distinct values with a mark, and of values from 100 to 999 without one
EXPONENT = r"(?:[eE][+-]?\d+)?"
GROUPED_OR_SHORT = r"^[+-]?\d{1,3}(?:\.\d{3})*$"
NUMBER_LIKE = (
    r"^[^\p{L}\d]{0,3}[\p{L}.]{0,4}\p{Sc}?[\s+\-(]*[.,]?\d[\d.,'_\s]*(?:[eE][+-]?\d+)?\s*[)\-]?\s*[\p{L}\p{S}%‰°/²³.]{0,6}\)?$"
)


@dataclass(frozen=True)
class NumberFormat:
    """How a column writes numbers: marks, a prefix or suffix that is removed, and negative numbers as (5) or 5-."""

    decimal: str = "."
    grouping: str = ""
    prefix: str = ""
    suffix: str = ""
    accounting: bool = False
    clean: bool = False  # special spaces, minus signs, apostrophes and digits are normalized

    @property
    def is_plain(self) -> bool:
        """Whether numbers are written as in Python: 1299.5."""
        return self == NumberFormat()

    def parse(self, text: pl.Series) -> pl.Series:
        """Return the numbers, float64; null where the text is not a number in this format.

        Special spaces, minus signs and digits leave no doubt and are accepted in every format.
        """
        values = self.parse_as_written(text)
        if self.clean or values.null_count() == text.null_count():
            return values
        failed = values.is_null() & text.is_not_null()
        if not bool(text.filter(failed).str.contains(SPECIAL_CHARACTERS).any()):
            return values
        return values.zip_with(~failed, self.parse_as_written(normalize(text).set(~failed, None)))

    def parse_as_written(self, text: pl.Series) -> pl.Series:
        """Return the numbers without normalizing characters first, unless the format does."""
        if self.is_plain:
            return text.cast(pl.Float64, strict=False)
        core = strip_affixes(normalize(text) if self.clean else text, self.prefix, self.suffix, self.accounting)
        if self.suffix in PERCENT:  # "0.08" in a column of percentages has an unknown unit
            bare = ~text.str.contains(re.escape(self.suffix)).fill_null(True) & ~text.str.contains(r"^[+-]?0+(?:[.,]0*)?$")
            core = core.set(bare.fill_null(False), None)
        return parse_marks(core, self.decimal, self.grouping).rename(text.name)

    def build_pattern(self) -> str:
        """Return the regular expression of a whole number in this format, with three groups: signs, digits with marks, signs.

        It is for programs without this library. A number is negative if a group of signs has - or (.
        """
        core, sign = build_core_pattern(self.decimal, self.grouping), r"[+\-(]?" if self.accounting else "[+-]?"
        if self.is_plain:
            return rf"([+-]?)({core})()"
        before, after = (rf"(?:{re.escape(part)})?" if part else "" for part in (self.prefix, self.suffix))
        gap, end = (r"\s*" if before or after or self.accounting else ""), r"\s*(?:\)|(?<![.,])-)?" if self.accounting else ""
        signs = rf"{sign}{gap}{before}{gap}|{before}{gap}{sign}{gap}" if before else sign + gap
        unit = rf"(?=.*{re.escape(self.suffix)}|[+-]?0+(?:[.,]0*)?$)" if self.suffix in PERCENT else ""
        return rf"{unit}({signs})({core}){NO_CENTS_MARK}({gap}{after}{end})"

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from the plain format, and the decimal mark."""
        plain = asdict(NumberFormat())
        return {k: v for k, v in asdict(self).items() if k == "decimal" or v != plain[k]}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> NumberFormat:
        """Restore from `to_json`."""
        return cls(**saved)

    def describe(self) -> str:
        """Describe the format, or return "" for plain numbers."""
        words = []
        if self.grouping:
            shown = {" ": "spaces", "'": "apostrophes", "_": "underscores"}.get(self.grouping, repr(self.grouping))
            words.append(f"thousands are separated by {shown}")
        if self.decimal == ",":
            words.append("the decimal mark is ','")
        if self.suffix in PERCENT:
            words.append(f"percentages keep their numbers: 8.18{self.suffix} is 8.18")
        elif self.prefix or self.suffix:
            words.append(f"{self.prefix or self.suffix!r} is removed".replace("''", "'"))
        if self.accounting:
            words.append("(5) and 5- are negative")
        return "; ".join(words)


@dataclass
class FileHints:
    """What a file says about the formats of its columns: its delimiter, and the readings of unambiguous columns."""

    delimiter: str | None = None
    decimals: Counter[str] = field(default_factory=Counter)  # decimal mark -> columns that allow no other
    orders: Counter[str] = field(default_factory=Counter)  # "dmy" or "mdy" -> columns that allow no other

    @property
    def decimal(self) -> str | None:
        """The decimal mark that the unambiguous columns share, or None."""
        return next(iter(self.decimals)) if len(self.decimals) == 1 else None


@dataclass(frozen=True)
class InferredFormat:
    """The format of a column and its numbers.

    `doubt` is a value that could also be read in another way, if the format is unclear; `note` says why the column is not read
    as numbers although it looks like numbers.
    """

    format: NumberFormat
    values: pl.Series
    doubt: str = ""
    note: str = ""


def infer_format(text: pl.Series, hints: FileHints | None = None) -> InferredFormat:
    """Return the number format of a column. `text` is stripped, missing values are null.

    If the values are not numbers in any format, the format is plain and most values are null.
    """
    hints = hints or FileHints()
    plain = text.cast(pl.Float64, strict=False).rename(text.name)
    failed = text.filter(text.is_not_null() & plain.is_null())
    result = InferredFormat(NumberFormat(), plain)
    if not failed.len():
        return decide_points(text, result, hints) if may_be_grouped(text) else result
    present = text.len() - text.null_count()
    clean = bool(failed.str.contains(f"{SPECIAL_CHARACTERS}|{NO_CENTS}").any())
    failed = failed.str.replace(NO_CENTS, "${1}${2}")
    if failed.len() > (1 - MIN_NUMBER_FRACTION) * present:  # then most of these values must be numbers; a sample shows it
        sample = failed.gather_every(max(1, failed.len() // SAMPLE_VALUES)).head(SAMPLE_VALUES)
        if may_be_numbers(sample) < 0.5 * sample.len():
            return result
    elif not bool(failed.str.contains(NUMBER_LIKE).any()):
        return result
    prefixes, suffixes = find_affixes(failed)
    if len(prefixes) > 1 or len(suffixes) > 1:
        several = prefixes if len(prefixes) > 1 else suffixes
        note = f"the values are in several units ({', '.join(map(repr, several[:4]))}), which cannot be compared"
        return InferredFormat(result.format, plain, note=note)
    prefix, suffix = "".join(prefixes), "".join(suffixes)
    accounting = bool(failed.str.contains(r"\(.*\)$|\d\s*-$").any())
    core = strip_affixes(normalize(text) if clean else text, prefix, suffix, accounting)
    decimal, grouping, doubt = decide_marks(core.drop_nulls(), hints)
    found = NumberFormat(decimal, grouping, prefix, suffix, accounting, clean)
    values = found.parse(text)
    if values.drop_nulls().len() < max(MIN_NUMBER_FRACTION * present, 1) or values.null_count() >= plain.null_count():
        return result
    return InferredFormat(found, values, doubt)


def may_be_numbers(sample: pl.Series) -> int:
    """Return how many values of a sample may be numbers with some marks, currency or unit."""
    like = sample.filter(sample.str.contains(NUMBER_LIKE))
    prefixes, suffixes = find_affixes(like)
    if len(prefixes) > 1 or len(suffixes) > 1:
        return like.len()  # to be reported
    core = strip_affixes(normalize(like), "".join(prefixes), "".join(suffixes), True)
    return int(core.str.contains(rf"^[+-]?[\d.,' _]*\d[.,]?{EXPONENT}$").sum())


def find_decisive_mark(text: pl.Series) -> str | None:
    """Return the decimal mark if some value of a column allows no other reading, else None."""
    core = strip_affixes(normalize(text.drop_nulls()), "", "", True)
    core = core.str.replace(r"^([+-]?)[\p{Sc}\s]+", "${1}").str.replace(r"\s*[%‰\p{Sc}]$", "")
    core = core.filter(core.str.contains(rf"^[+-]?[\d.,' _]*\d{EXPONENT}$"))
    if core.len() < 0.5 * text.len():
        return None
    counts = count_evidence(core)
    return next((d for d in ".," if counts[d] and not counts["," if d == "." else "."]), None)


def normalize(text: pl.Series) -> pl.Series:
    """Replace special spaces, minus signs, apostrophes and digits by those of ASCII; remove invisible characters."""
    if bool(text.str.contains(OTHER_DIGITS_PATTERN).any()):
        text = text.str.replace_many(list(OTHER_DIGITS), list(OTHER_DIGITS.values()))
    text = text.str.replace_all(INVISIBLE, "").str.replace_all(SPACES, " ")
    return text.str.replace_all(MINUS_SIGNS, "-").str.replace_all(APOSTROPHES, "'").str.strip_chars()


def strip_affixes(text: pl.Series, prefix: str, suffix: str, accounting: bool) -> pl.Series:
    """Remove a prefix and suffix; (5) and 5- become -5 if `accounting`. A dash for no cents is removed: 5,-"""
    text = text.str.replace(NO_CENTS, "${1}${2}")
    if accounting:
        text = text.str.replace(r"^\(\s*([^-+]*?)\s*\)$", "-${1}").str.replace(r"^([^-+(]*\d[^-+]*?)\s*-$", "-${1}")
    if prefix:
        text = text.str.replace(rf"^([+-]?)\s*{re.escape(prefix)}\s*([+-]?)\s*", "${1}${2}")
        if accounting:  # $(5)
            text = text.str.replace(r"^\(\s*([^-+()]*?)\s*\)$", "-${1}")
    if suffix:
        text = text.str.replace(rf"\s*{re.escape(suffix)}$", "")
    return text.str.replace(r"^([+-])\s+", "${1}") if prefix or suffix or accounting else text


def build_core_pattern(decimal: str, grouping: str) -> str:
    """Return the regular expression of a number without its sign."""
    point, group = re.escape(decimal), re.escape(grouping)
    whole = rf"(?:\d{{1,3}}(?:{group}\d{{2,3}})*{group}\d{{3}}|\d+)" if grouping else r"\d+"
    return rf"(?:{whole}(?:{point}\d*)?|{point}\d+){EXPONENT}"


def list_replacements() -> dict[str, str]:
    """Return the characters that `normalize` replaces, with their replacements."""
    found = dict(OTHER_DIGITS)
    for pattern, new in ((INVISIBLE, ""), (SPACES, " "), (MINUS_SIGNS, "-"), (APOSTROPHES, "'")):
        found |= {chr(code): new for code in range(0x80, 0x10000) if re.fullmatch(pattern, chr(code))}
    return found | {"`": "'"}


def parse_marks(core: pl.Series, decimal: str, grouping: str) -> pl.Series:
    """Parse numbers with these marks; null where groups or marks are wrong."""
    fits = core.str.contains(rf"^[+-]?{build_core_pattern(decimal, grouping)}$|(?i)^[+-]?inf(?:inity)?$")
    core = core.set(~fits.fill_null(True), None)
    if grouping:
        core = core.str.replace_all(grouping, "", literal=True)
    if decimal != ".":
        core = core.str.replace(decimal, ".", literal=True)
    return core.cast(pl.Float64, strict=False)


def find_affixes(failed: pl.Series) -> tuple[list[str], list[str]]:
    """Return the prefixes and suffixes of values that are currencies or units."""
    text = normalize(failed)
    before = text.str.extract(r"^\(?\s*[+-]?\s*([^\d\s.,'+\-()][^\d\s,'+\-()]{0,3})\s*[+-]?\s*[.,]?\d").drop_nulls().unique()
    after = text.str.extract(r"[\d.,]\s*([^\d\s.,'+\-()_][^\s,'+\-()_\d]{0,4})\s*[)\-]?$").drop_nulls()
    after = after.filter(~after.is_in(["e", "E"])).unique()
    known = {*CURRENCIES, *PERCENT, *UNITS}
    return sorted(p for p in before if p in CURRENCIES), sorted(s for s in after if s in known)


def may_be_grouped(text: pl.Series) -> bool:
    """Return whether every point of a column of plain numbers could separate thousands: 2.499 next to 802."""
    first = text.drop_nulls().head(SAMPLE_VALUES)
    if not first.len() or not bool(first.str.contains(GROUPED_OR_SHORT).all()):
        return False
    return bool(text.str.contains(".", literal=True).any()) and bool(text.drop_nulls().str.contains(GROUPED_OR_SHORT).all())


def decide_points(text: pl.Series, plain: InferredFormat, hints: FileHints) -> InferredFormat:
    """Decide between points as decimal marks and as separators of thousands, for values that allow both."""
    decimal, grouping, doubt = decide_marks(text.drop_nulls(), hints)
    if not grouping:
        return InferredFormat(plain.format, plain.values, doubt)
    found = NumberFormat(decimal, grouping)
    return InferredFormat(found, found.parse(text), doubt)


def count_evidence(core: pl.Series) -> Counter[str]:
    """Count the values that show that a mark is the decimal mark; `.` and `,` are the keys."""
    counts: Counter[str] = Counter()
    for mark, other in ((".", ","), (",", ".")):
        m, o = re.escape(mark), re.escape(other)
        once = rf"^[+-]?\d*{m}\d*{EXPONENT}$"
        grouped = rf"^[+-]?[1-9]\d{{0,2}}{m}\d{{3}}$"
        sure = core.str.contains(once) & ~core.str.contains(grouped) & core.str.contains(mark, literal=True)
        sure |= core.str.contains(rf"^[+-]?\d{{1,3}}(?:{o}\d{{2,3}})*{o}\d{{3}}{m}\d*{EXPONENT}$")  # 1,299.50
        sure |= core.str.contains(rf"^[+-]?\d{{1,3}}(?:{o}\d{{2,3}})+{o}\d{{3}}$")  # 1,234,567
        sure |= core.str.contains(rf"^[+-]?\d{{1,3}}(?:[ '_]\d{{3}})+{m}\d*{EXPONENT}$")  # 1 299.500
        counts[mark] = int(sure.sum())
    return counts


def decide_marks(core: pl.Series, hints: FileHints) -> tuple[str, str, str]:
    """Return the decimal mark, the mark of thousands ("" without one), and another possible reading of a value or ""."""
    has = {mark: bool(core.str.contains(mark, literal=True).any()) for mark in ".,"}
    for mark in " '_":
        if bool(core.str.contains(rf"^[+-]?\d{{1,3}}(?:{mark}\d{{3}})+(?:[.,]\d*)?{EXPONENT}$").any()):
            return ("," if has[","] and not has["."] else "."), mark, ""
    counts = count_evidence(core)
    if counts["."] or counts[","]:
        decimal = "." if counts["."] >= counts[","] else ","
        other = "," if decimal == "." else "."
        return decimal, other if has[other] else "", ""
    if not has["."] and not has[","]:
        return ".", "", ""
    if has["."] and has[","]:  # 1.299 next to 1,299: no reading fits both
        decimal = hints.decimal or ("," if hints.delimiter == ";" else ".")
        return decimal, "," if decimal == "." else ".", first_with(core, decimal)
    # One mark, with groups of three throughout.
    mark = "." if has["."] else ","
    other = "," if mark == "." else "."
    if hints.decimal is not None:
        return (mark, "", "") if hints.decimal == mark else (other, mark, "")
    marked = core.filter(core.str.contains(mark, literal=True))
    bare = core.filter(core.str.contains(r"^[+-]?\d+$"))
    short = bool(bare.str.contains(r"^[+-]?\d{1,3}$").all()) if bare.len() else True
    hundreds = bare.filter(bare.str.contains(r"^[+-]?[1-9]\d{2}$")).n_unique() if bare.len() else 0
    strong = short and marked.n_unique() >= MIN_STRONG_VALUES and hundreds >= MIN_STRONG_VALUES
    if not short:  # 1.299 next to 12000: thousands are not separated
        return mark, "", (first_with(core, mark) if mark == "," else "")
    if mark == ".":
        if hints.delimiter == ";":
            return ",", ".", "" if bare.len() else first_with(core, mark)
        if strong and hints.delimiter != ",":
            return ",", ".", first_with(core, mark)
        return ".", "", first_with(core, mark) if strong else ""
    if hints.delimiter == ";" and not strong:
        return ",", "", first_with(core, mark)
    return ".", ",", "" if bare.len() and hints.delimiter != ";" else first_with(core, mark)


def first_with(core: pl.Series, mark: str) -> str:
    """Return the first value with this mark, as an example."""
    return str(core.filter(core.str.contains(mark, literal=True))[0])
