"""Time zones in timestamps: what is read in UTC, what stays in its zone, and what is reported as unclear."""

from __future__ import annotations

import datetime as dt
import json

import numpy as np
import polars as pl
import pytest

from damage import checks, finding, write
from fieldguide.data import read
from fieldguide.data.timeseries.panel import build_panel
from fieldguide.data.timestamps import DateFormat, infer_dates
from fieldguide.tasks import task

SPEC = task("time-series-forecasting").column_spec


def dates(*values):
    return infer_dates(pl.Series("t", values))


def iso(series):
    return [None if v is None else v.isoformat().removesuffix("T00:00:00") for v in series]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["2023-05-01 10:00 UTC", "2023-05-02 11:30 utc"], ["2023-05-01T10:00:00", "2023-05-02T11:30:00"]),  # as reported
        (["2023-05-01 10:00 Europe/Berlin", "2023-12-01 10:30 Europe/Berlin"], ["2023-05-01T08:00:00", "2023-12-01T09:30:00"]),
        (["Mon, 01 May 2023 10:00:00 GMT", "Tue, 02 May 2023 11:00:00 GMT"], ["2023-05-01T10:00:00", "2023-05-02T11:00:00"]),
        (["2023-05-01T10:00:00Z", "2023-05-02T11:00z"], ["2023-05-01T10:00:00", "2023-05-02T11:00:00"]),
        (["2023-05-01 10:00 CEST", "2023-12-01 10:30 (CET)"], ["2023-05-01T08:00:00", "2023-12-01T09:30:00"]),  # siblings
        (["2023-05-01 10:00 UTC+2", "2023-05-01 10:20 GMT-03:30"], ["2023-05-01T08:00:00", "2023-05-01T13:50:00"]),
        (["Mon May 01 10:00:00 +0100 2023", "Tue May 02 10:30:00 +0100 2023"], ["2023-05-01T09:00:00", "2023-05-02T09:30:00"]),
        (
            ["Mon May 01 2023 10:00:00 GMT+0200 (Central European Summer Time)", "Tue May 02 2023 11:00:00 GMT+0200 (CEST)"],
            ["2023-05-01T08:00:00", "2023-05-02T09:00:00"],
        ),
        (["Mon May  1 10:00:00 CEST 2023", "Mon Dec  4 10:30:00 CET 2023"], ["2023-05-01T08:00:00", "2023-12-04T09:30:00"]),
        (["2023-05-01T10:00+02:00[Europe/Berlin]", "2023-05-01T10:30+02:00[MESZ]"], ["2023-05-01T08:00:00", "2023-05-01T08:30:00"]),
        (["5/1/2023 10:00 AM EDT", "5/13/2023 11:00 p.m. EDT"], ["2023-05-01T14:00:00", "2023-05-14T03:00:00"]),
        (["2023-05-01 10:00 America/Argentina/Ushuaia", "2023-05-01 11:00 Asia/Kolkata"], ["2023-05-01T13:00:00", "2023-05-01T05:30:00"]),
        (["2023-05-01 10:00 ET", "2023-12-02 11:00 ET"], ["2023-05-01T14:00:00", "2023-12-02T16:00:00"]),
        (["20230501T100000Z", "20230501T110000Z"], ["2023-05-01T10:00:00", "2023-05-01T11:00:00"]),
        (["2023-05-01 10:00 +0200", "2023-05-01 10:00 -05"], ["2023-05-01T08:00:00", "2023-05-01T15:00:00"]),
        (["2023-01-01 10:00 EST", "2023-05-01 11:00 EDT"], ["2023-01-01T15:00:00", "2023-05-01T15:00:00"]),  # EDT decides
        (["2023-01-01 10:00 CST", "2023-05-01 11:00 PDT"], ["2023-01-01T16:00:00", "2023-05-01T18:00:00"]),
        (["2023-05-01 10:00 BST", "2023-12-01 11:00 GMT"], ["2023-05-01T09:00:00", "2023-12-01T11:00:00"]),
        (["2023-01-01 10:00 IST", "2023-05-01 11:00 IDT"], ["2023-01-01T08:00:00", "2023-05-01T08:00:00"]),
    ],
)  # fmt: skip
def test_clear_time_zones(values, expected):
    found = dates(*values)
    assert iso(found.values) == expected and found.format.zone == "UTC" and not found.doubt
    stored = DateFormat.from_json(json.loads(json.dumps(found.format.to_json())))
    assert iso(stored.parse(pl.Series(values))) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["2023-05-01 10:00 Uhr", "2023-05-01 11:30 Uhr"], ["2023-05-01T10:00:00", "2023-05-01T11:30:00"]),
        (["2023-05-01 10h30", "2023-05-01 11 h 05"], ["2023-05-01T10:30:00", "2023-05-01T11:05:00"]),
        (["2023-05-01Z", "2023-05-02Z"], ["2023-05-01", "2023-05-02"]),  # dates of XML
        (["2023-05-01+02:00", "2023-05-02+02:00"], ["2023-05-01", "2023-05-02"]),
        (["2023年5月1日", "2023年12月31日 10:00"], ["2023-05-01", "2023-12-31T10:00:00"]),
        (["1 de enero de 2021", "12 de agosto del 2021"], ["2021-01-01", "2021-08-12"]),
        (["2015 week 1", "KW 53/2015", "W02-2016"], ["2014-12-29", "2015-12-28", "2016-01-11"]),
    ],
)
def test_words_and_marks_that_are_no_zones(values, expected):
    found = dates(*values)
    assert iso(found.values) == expected and found.format.zone == "" and not found.doubt


@pytest.mark.parametrize("zone", ["EST", "IST", "CST", "BST", "XYZ"])
def test_a_column_in_one_unclear_zone_stays_in_it(tmp_path, zone):
    times = [dt.datetime(2023, 5, 1) + dt.timedelta(hours=i) for i in range(60)]
    data = read(
        write(tmp_path / "t.csv", ["when,value", *(f"{t} {zone},{10 + 3 * np.sin(i / 3):.3f}" for i, t in enumerate(times))]),
        column_spec=SPEC,
    )
    assert data.rows["when"].to_list() == times
    warning = finding(data, "ambiguous-dates")
    assert warning.severity == "warning" and "'when'" in warning.what and f"'{zone}'" in warning.what
    meanings = {"EST": "UTC-5 (North America) or UTC+10 (Australia)", "IST": "UTC+5.5 (India)", "CST": "UTC+8 (China)"}
    assert meanings.get(zone, "") in warning.what and "offset" in warning.remedy
    assert "'when' is the time" in finding(data, "time-chosen").what  # although its name says nothing
    panel = build_panel(data)
    assert panel.frequency.label(panel.times[1]) == f"2023-05-01 01:00:00 {zone}"
    again = read({"when": [f"2023-05-09 10:00 {zone}", "2023-05-09 10:00 UTC"], "value": [1.0, 2.0]}, schema=data.schema())
    assert again.rows["when"].to_list() == [dt.datetime(2023, 5, 9, 10), None]


def test_times_in_an_unclear_zone_next_to_others_become_missing(tmp_path):
    rows = [f"2023-05-{d:02d} 10:00 {'IST' if d % 4 == 0 else 'UTC'},{d / 7:.3f},{'ab'[d % 2]}" for d in range(1, 29)]
    data = read(write(tmp_path / "t.csv", ["when,x,y", *rows]))
    assert data.columns["when"].kind == "date" and data.rows["when"].null_count() == 7
    warning = finding(data, "ambiguous-dates")
    assert "'when'" in warning.what and "India" in warning.what and "become missing" in warning.what
    assert finding(data, "mixed-types").count == 7 and finding(data, "mixed-types").places[0] == "t.csv:5"


def test_hours_that_occur_twice_are_reported():
    found = dates(*(f"2023-10-29 0{h}:00 Europe/Berlin" for h in range(5)))
    assert "occur twice, when the clock is set back (1)" in found.doubt and iso(found.values)[2] == "2023-10-29"
    skipped = dates("2023-03-26 02:30 Europe/Berlin", "2023-03-26 03:30 Europe/Berlin")
    assert iso(skipped.values) == [None, "2023-03-26T01:30:00"]


@pytest.mark.parametrize("zoned", ["offset", "name", "parquet"])
def test_midnights_under_changing_offsets_are_days(tmp_path, zoned):
    days = [dt.date(2023, 3, 1) + dt.timedelta(i) for i in range(60)]
    values = [10 + 3 * np.sin(i / 3) for i in range(60)]
    if zoned == "parquet":
        times = pl.Series("time", days).cast(pl.Datetime("us")).dt.replace_time_zone("Europe/Berlin")
        pl.DataFrame({"time": times, "value": values}).write_parquet(path := tmp_path / "t.parquet")
    else:
        last = "{}T00:00:00+0{}:00" if zoned == "offset" else "{} 00:00 Europe/Berlin"
        rows = [f"{last.format(d, 1 if d < dt.date(2023, 3, 27) else 2)},{v:.3f}" for d, v in zip(days, values)]
        path = write(tmp_path / "t.csv", ["time,value", *rows])
    data = read(path, column_spec=SPEC)
    panel = build_panel(data)
    assert panel.frequency.words == "day" and "missing-steps" not in checks(data) and len(panel.times) == 60
    assert panel.frequency.label(panel.times[-1]) == "2023-04-29"


@pytest.mark.parametrize(
    "values", [["2023-05-01 10:00 -", "2023-05-02 10:00 x"], [f"2023-05-01 10:00 Q{c}" for c in "ABCDEFGHI"]]
)
def test_what_is_no_time_zone(values):
    assert dates(*values) is None
