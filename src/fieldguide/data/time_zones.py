"""Time zones in timestamps: offsets, abbreviations such as CEST and EST, and names such as Europe/Berlin.

Offsets, names and abbreviations with one meaning give times in UTC. Others, such as EST (North America or Australia), follow
from the abbreviations next to them: EDT shows that EST is American. If nothing decides and the whole column has the same
abbreviation, its times stay in that zone, unconverted; otherwise the times in the unclear zone are missing and reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import polars as pl

MINUTE = 60_000_000  # microseconds
MAX_UNKNOWN = 5  # maximum number of distinct words after the time that may be unknown time zones
LOCAL = "local"  # the zone of columns whose offsets follow the clock, at the same local time in every row
# Offset: sign, hours and minutes, perhaps after UTC or GMT. The rest is an abbreviation or a name.
OFFSET = r"^(?:UTC|GMT)?\s*([+-])(\d{1,2}):?(\d{2})?$"
ZONE = r"Z|(?:(?:UTC|GMT)\s*)?[+-]\d{1,2}(?::?\d{2})?|[A-Z]{2,5}|[A-Za-z]{2,14}(?:/[A-Za-z0-9_+\-]{2,30}){1,2}"
COMMENT = r"(?i)((?:Z|UTC|GMT|[+-]\d{1,2}(?::?\d{2})?))\s*(?:\([^()]*\)|\[[^\[\]]*\])$"  # +02:00[Europe/Berlin], +0200 (CEST)
DATE_ZONE = r"(?i)^(\d{4}-\d{2}-\d{2})\s*(?:Z|UTC|GMT|[+-]\d{2}:\d{2})$"  # the offset of a date without a time changes nothing
ENCLOSED = r"\s*[\(\[](\p{L}[\p{L}_/+\-]*\d*)[\)\]]$"  # 10:00 (CET)
UNITED = {  # abbreviation -> hours from UTC, if it has one meaning
    "UTC": 0.0, "GMT": 0.0, "UT": 0.0, "Z": 0.0, "WET": 0.0, "WEST": 1.0, "CET": 1.0, "CEST": 2.0, "MEZ": 1.0, "MESZ": 2.0,
    "EET": 2.0, "EEST": 3.0, "MSK": 3.0, "MSD": 4.0, "JST": 9.0, "KST": 9.0, "SGT": 8.0, "HKT": 8.0, "PHT": 8.0, "WIB": 7.0,
    "PKT": 5.0, "NPT": 5.75, "SAST": 2.0, "CAT": 2.0, "EAT": 3.0, "WAT": 1.0, "BRT": -3.0, "ART": -3.0, "AEST": 10.0,
    "AEDT": 11.0, "ACST": 9.5, "ACDT": 10.5, "AWST": 8.0, "NZST": 12.0, "NZDT": 13.0, "EDT": -4.0, "MDT": -6.0, "PDT": -7.0,
    "AKST": -9.0, "AKDT": -8.0, "HST": -10.0, "NDT": -2.5, "IDT": 3.0,
}  # fmt: skip
REGIONS = {  # region -> abbreviations that are used together there
    "North America": {
        "EST": -5.0, "EDT": -4.0, "CST": -6.0, "CDT": -5.0, "MST": -7.0, "MDT": -6.0, "PST": -8.0, "PDT": -7.0,
        "AKST": -9.0, "AKDT": -8.0, "HST": -10.0, "AST": -4.0, "ADT": -3.0, "NST": -3.5, "NDT": -2.5,
    },
    "the United Kingdom": {"GMT": 0.0, "BST": 1.0},
    "Israel": {"IST": 2.0, "IDT": 3.0},
    "Ireland": {"GMT": 0.0, "IST": 1.0},
    "India": {"IST": 5.5},
    "Australia": {"EST": 10.0, "CST": 9.5, "WST": 8.0, "AEST": 10.0, "ACST": 9.5, "AWST": 8.0},
    "China": {"CST": 8.0},
    "Cuba": {"CST": -5.0, "CDT": -4.0},
    "the Philippines": {"PST": 8.0},
    "Pakistan": {"PST": 5.0},
    "Malaysia": {"MST": 8.0},
    "Bangladesh": {"BST": 6.0},
    "Arabia": {"AST": 3.0},
    "Samoa": {"SST": -11.0, "WST": 13.0},
    "Singapore": {"SST": 8.0},
    "the Gulf": {"GST": 4.0},
    "South Georgia": {"GST": -2.0},
    "Armenia": {"AMT": 4.0},
    "the Amazon": {"AMT": -4.0},
}  # fmt: skip
PLACES = {"ET": "America/New_York", "CT": "America/Chicago", "MT": "America/Denver", "PT": "America/Los_Angeles"}


@dataclass(frozen=True)
class ZoneChoice:
    """How the zones of a column are read.

    `zone` is "UTC" if times are converted, else the name of the zone in which they stay. `region` decides abbreviations with
    several meanings. `doubt` says what is unclear or "", `words` what was decided.
    """

    zone: str = ""
    region: str = ""
    doubt: str = ""
    words: str = ""


def tidy_zones(text: pl.Series) -> pl.Series:
    """Remove comments after an offset, such as [Europe/Berlin], brackets around a zone, and words such as Uhr after the time."""
    text = text.str.replace(COMMENT, "${1}").str.replace(ENCLOSED, " ${1}")
    text = text.str.replace(r"(?i)(\d)\s*(?:uhr|o'clock|hrs?)\.?$", "${1}").str.replace(r"(\d)\s?[hH]\s?(\d{2})$", "${1}:${2}")
    return text.str.replace(DATE_ZONE, "${1}")


def normalize_zones(zone: pl.Series) -> pl.Series:
    """Return zones in one spelling: abbreviations in upper case."""
    plain = zone.str.replace_all(r"\s", "")
    return plain.zip_with(plain.str.contains("/", literal=True).fill_null(False), plain.str.to_uppercase())


def fixed_offset(zone: str, region: str) -> float | None:
    """Return the hours from UTC of an offset or abbreviation, or None if it is unclear, unknown or the name of a place."""
    known = REGIONS.get(region, {})
    return known[zone] if zone in known else UNITED.get(zone)


def offsets(zone: pl.Series, local: pl.Series, region: str) -> tuple[pl.Series, pl.Series]:
    """Return the offset from UTC in microseconds (0 without a zone), and which zones have no known offset at that time.

    `local` is the local time in microseconds. Times that occur twice when the clock is set back are the first of the two.
    """
    parts = zone.str.extract_groups(OFFSET).struct.unnest()
    sign, hour, minute = (parts[c] for c in parts.columns)
    size = (hour.cast(pl.Int64).fill_null(0) * 60 + minute.cast(pl.Int64).fill_null(0)) * MINUTE
    size = size.zip_with(~(sign == "-").fill_null(False), -size)
    wrong = (size.abs() > 15 * 60 * MINUTE).fill_null(False)
    for name in zone.filter(zone.is_not_null() & sign.is_null()).unique():
        here = (zone == name).fill_null(False)
        hours = fixed_offset(name, region)
        if hours is not None:
            size = size.set(here, int(hours * 60) * MINUTE)
        elif (found := place_offsets(local, PLACES.get(name, name))) is not None:
            size = size.zip_with(~here, found)
            wrong = wrong | (here & found.is_null())
        else:
            wrong = wrong | here
    return size.fill_null(0), wrong


def place_offsets(local: pl.Series, name: str, ambiguous: Literal["earliest", "latest"] = "earliest") -> pl.Series | None:
    """Return the offsets at local times of a place such as Europe/Berlin; None if there is no such place."""
    if "/" not in name:
        return None
    times = local.cast(pl.Datetime("us"))
    try:
        utc = times.dt.replace_time_zone(name, ambiguous=ambiguous, non_existent="null").dt.convert_time_zone("UTC")
    except pl.exceptions.PolarsError:
        return None
    return local - utc.dt.replace_time_zone(None).cast(pl.Int64)


def decide_zones(zone: pl.Series, local: pl.Series) -> ZoneChoice | None:
    """Return how the zones of a column are read; None if the words after the times are no time zones.

    `zone` and `local` are the zones and local times of the distinct values that are dates.
    """
    names = sorted(zone.drop_nulls().unique())
    unclear = [n for n in names if n in LONE and fixed_offset(n, "") is None]
    unknown = [n for n in names if n not in unclear and bool(offsets(pl.Series([n]), pl.Series([0]), "")[1].all())]
    if not names:
        return ZoneChoice()
    if len(unknown) > MAX_UNKNOWN:
        return None
    region = find_region(names, unclear)
    decided = [n for n in unclear if n in REGIONS.get(region, {})]
    left = [n for n in [*unclear, *unknown] if n not in decided]
    if left and len(names) == 1 and not zone.null_count():
        meanings = f"means {describe_meanings(left[0])}" if left[0] in unclear else "is unknown"
        return ZoneChoice(
            left[0], "", f"the time zone {left[0]!r} {meanings}; the times stay in it and are not converted to UTC"
        )
    if left:
        words = [f"{n!r} means {describe_meanings(n)}" if n in unclear else f"{n!r} is unknown" for n in left]
        return ZoneChoice("UTC", region, f"time zones are unclear ({'; '.join(words)}); times in them become missing")
    size, wrong = offsets(zone, local, region)
    if not zone.null_count() and is_local_clock(local.filter(~wrong), size.filter(~wrong)):
        return ZoneChoice(LOCAL, region, "", "local times, since they are at the same time of day under changing offsets")
    decisions = [f"{n} is UTC{REGIONS[region][n]:+g} ({region})" for n in decided]
    twice = count_twice(zone, local)
    doubt = f"local times occur twice, when the clock is set back ({twice:,}); they are read as the first" if twice else ""
    return ZoneChoice("UTC", region, doubt, ", ".join(["times with a time zone are kept in UTC", *decisions]))


def is_local_clock(local: pl.Series, size: pl.Series) -> bool:
    """Return whether times are at one local time of day, such as midnight, under offsets that differ by one hour.

    In UTC, such days would be 23, 24 or 25 hours apart. `local` are local times and `size` offsets, in microseconds.
    """
    return (local % (1440 * MINUTE)).n_unique() == 1 and sorted((size - size.min()).unique()) == [0, 60 * MINUTE]


def count_twice(zone: pl.Series, local: pl.Series) -> int:
    """Return how many local times of places occur twice there."""
    total = 0
    for name in zone.filter(zone.str.contains("/", literal=True) | zone.is_in(list(PLACES))).unique():
        times = local.filter((zone == name).fill_null(False))
        first, second = (place_offsets(times, PLACES.get(name, name), a) for a in ("earliest", "latest"))
        total += 0 if first is None or second is None else int((first != second).sum())
    return total


LONE = frozenset(name for region in REGIONS.values() for name in region if name not in UNITED)


def find_region(names: list[str], unclear: list[str]) -> str:
    """Return the region whose abbreviations explain every unclear one, with another as evidence; "" if none or several do."""
    fits = []
    for region, known in REGIONS.items():
        others = [n for n in names if n in known]
        if unclear and all(n in known for n in unclear) and len(others) > 1:
            fits.append((len(others), region))
    best = max(fits, default=(0, ""))
    return best[1] if sum(count == best[0] for count, _ in fits) == 1 else ""


def describe_meanings(name: str) -> str:
    """Return the meanings of an abbreviation: "UTC-5 (North America) or UTC+10 (Australia)"."""
    return " or ".join(f"UTC{known[name]:+g} ({region})" for region, known in REGIONS.items() if name in known)
