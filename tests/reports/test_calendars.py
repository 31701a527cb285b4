"""Calendars: forecasts continue the pattern of the dates, and short files to predict are read as in training."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest

import fieldguide
from damage import checks, finding, write
from fieldguide.core.errors import DataError
from fieldguide.data import read
from fieldguide.data.timeseries.frequency import DAY, SECOND, Frequency, continues, infer_frequency
from fieldguide.data.timeseries.panel import build_panel
from fieldguide.data.timestamps import DateFormat, integers_as_dates
from fieldguide.tasks import task

MONTH_NAMES = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
SPEC = task("time-series-forecasting").column_spec


def microseconds(dates):
    return np.array(dates, dtype="M8[us]").astype(np.int64)


def days_of_months(days, months=30, roll=""):
    """The given days of every month from 2021 on; 31 is the last. Weekends are moved if `roll` says so."""
    month = np.arange(np.datetime64("2021-01"), np.datetime64("2021-01") + months)
    last = (month + 1).astype("M8[D]") - 1
    dates = np.sort(np.concatenate([np.minimum(month.astype("M8[D]") + (d - 1), last) for d in days]))
    return np.busday_offset(dates, 0, roll=roll) if roll else dates


def weekdays(days, weeks=20):
    return [dt.date(2021, 1, 4) + dt.timedelta(7 * w + d) for w in range(weeks) for d in days]


def series(path, times, name="time"):
    return write(path, [f"{name},value", *(f"{t},{10 + 3 * np.sin(i / 3):.3f}" for i, t in enumerate(times))])


@pytest.mark.parametrize("gaps", [(), (7, 20)])
@pytest.mark.parametrize(
    ("days", "roll", "words"),
    [
        ((1, 15), "", "one half-month (day 1 and day 15 of every month)"),  # as reported
        ((15, 31), "", "one half-month (day 15 and the last day of every month)"),
        ((1, 16), "", "one half-month (day 1 and day 16 of every month)"),  # siblings
        ((5, 20), "", "one half-month (day 5 and day 20 of every month)"),
        ((15, 30), "", "one half-month (day 15 and day 30 of every month)"),
        ((15, 31), "preceding", "or the business day before of weekends"),
        ((1, 15), "following", "or the business day after of weekends"),
        ((1, 11, 21), "", "one third of a month (day 1 and day 11 and day 21 of every month)"),
        ((10, 20, 31), "", "one third of a month (day 10 and day 20 and the last day of every month)"),
    ],
)
def test_days_of_every_month(tmp_path, days, roll, words, gaps):
    dates = days_of_months(days, roll=roll)
    known, following = np.delete(dates[:-5], gaps), dates[-5:]
    data = read(series(tmp_path / "t.csv", known), column_spec=SPEC)
    panel = build_panel(data)
    assert words in panel.frequency.article and words in finding(data, "frequency").what
    assert len(panel.times) == len(dates) - 5 and int(np.isnan(panel.values).sum()) == len(gaps)
    labels = [panel.frequency.label(t) for t in panel.frequency.times(panel.times[-1], 6)[1:]]
    assert labels == following.astype(str).tolist()
    assert panel.frequency.season == 12 * len(days)


@pytest.mark.parametrize(
    ("days", "words"),
    [
        ((0, 1, 2, 3, 6), "one day of the week (Monday, Tuesday, Wednesday, Thursday, Sunday)"),
        ((0, 1, 2, 3, 4, 5), "one day of the week (Monday, Tuesday, Wednesday, Thursday, Friday, Saturday)"),
        ((0, 2, 4), "one day of the week (Monday, Wednesday, Friday)"),
        ((1, 3), "one day of the week (Tuesday, Thursday)"),
        ((5, 6), "one day of the week (Saturday, Sunday)"),
        ((0, 1, 2, 3, 4), "one business day"),
        ((0, 1, 2, 3, 4, 5, 6), "one day"),
        ((3,), "one week"),
    ],
)
def test_days_of_the_week(tmp_path, days, words):
    dates = weekdays(days)
    data = read(series(tmp_path / "t.csv", dates[:-7]), column_spec=SPEC)
    panel = build_panel(data)
    assert panel.frequency.article == words and "missing-steps" not in checks(data)
    assert [panel.frequency.label(t) for t in panel.frequency.times(panel.times[-1], 8)[1:]] == [str(d) for d in dates[-7:]]


@pytest.mark.parametrize("days", [(30,), (29,), (31,), (28,), (5,)])
def test_months_after_a_short_february(tmp_path, days):
    dates = days_of_months(days, months=29)
    data = read(series(tmp_path / "t.csv", dates[:26]), column_spec=SPEC)  # until February 2023
    panel = build_panel(data)
    assert str(dates[25]).startswith("2023-02") and panel.frequency.words == "month"
    assert [panel.frequency.label(t) for t in panel.frequency.times(panel.times[-1], 4)[1:]] == dates[26:].astype(str).tolist()


@pytest.mark.parametrize(
    "times",
    [
        dt.datetime(2021, 1, 4) + np.cumsum(np.random.default_rng(0).integers(10, 20, 60)) * dt.timedelta(1),
        [dt.datetime(2021, 1, 4 + d, h) for d in range(5) for h in range(9, 17)],
    ],
)
def test_times_without_a_frequency_are_an_error(tmp_path, times):
    with pytest.raises(DataError, match=r"the times are irregular: with steps of"):
        read(series(tmp_path / "t.csv", times), column_spec=SPEC)


@pytest.mark.parametrize(
    ("hours", "weekdays_only", "words"),
    [
        (np.arange(9.5, 16, 0.5), True, "from 09:30 to 15:30 on Monday to Friday"),
        (np.arange(8, 18), False, "from 08:00 to 17:00 "),
        (np.arange(9.5, 16, 1 / 12), True, "from 09:30 to 15:55 on Monday to Friday"),
    ],
)
def test_opening_hours_are_named_as_the_cause(tmp_path, hours, weekdays_only, words):
    days = [dt.datetime(2023, 3, 1) + dt.timedelta(d) for d in range(28)]
    times = [d + dt.timedelta(minutes=round(60 * h)) for d in days if d.weekday() < 5 or not weekdays_only for h in hours]
    with pytest.raises(DataError, match=f"because there are rows only {words}") as caught:
        read(series(tmp_path / "t.csv", times), column_spec=SPEC)
    assert "--time COLUMN" in str(caught.value)
    rows = "".join(f"{i},{i % 7}\n" for i in range(len(times)))
    (tmp_path / "n.csv").write_text("row,value\n" + rows)
    assert build_panel(read(tmp_path / "n.csv", column_spec=SPEC, time="row")).frequency.unit == "number"  # the remedy


def test_gaps_at_random_are_no_opening_hours(tmp_path):
    times = [
        dt.datetime(2023, 3, 1) + dt.timedelta(hours=int(h)) for h in np.cumsum(np.random.default_rng(0).integers(1, 9, 99))
    ]
    with pytest.raises(DataError) as caught:
        read(series(tmp_path / "t.csv", times), column_spec=SPEC)
    assert "there are rows only" not in str(caught.value)


@pytest.mark.parametrize(("mark", "name"), [("-", "time"), ("/", "period"), (" ", "yearweek")])
def test_years_and_weeks_without_a_letter(tmp_path, mark, name):
    weeks = [f"{year}{mark}{week:02d}" for year in (2018, 2019) for week in range(1, 53)]
    data = read(series(tmp_path / "t.csv", weeks, name=name), column_spec=SPEC)
    assert build_panel(data).frequency.words == "week" and data.rows[name][4] == dt.datetime(2018, 1, 29)
    again = read({name: [f"2019{mark}05"], "value": [1.5]}, schema=data.schema(), column_spec=SPEC, labels_optional=True)
    assert again.rows[name][0] == dt.datetime(2019, 1, 28)  # a week although it could be May


def test_months_seasons_and_named_weeks(tmp_path):
    months = [f"{y}-{m:02d}" for y in range(2015, 2019) for m in range(1, 13)]
    assert build_panel(read(series(tmp_path / "m.csv", months), column_spec=SPEC)).frequency.words == "month"
    seasons = [f"{y}-{y % 100 + 1}" for y in range(2013, 2050)]
    data = read({"time": seasons, "x": [i % 7 / 2 for i in range(37)], "y": ["a", "b"] * 18 + ["a"]}, target="y")
    assert data.columns["time"].kind != "date"
    data = read(series(tmp_path / "w.csv", [f"2019-{w:02d}" for w in range(1, 13)], name="week"), column_spec=SPEC)
    assert build_panel(data).frequency.words == "week"


@pytest.mark.parametrize("days", [14, 15, 10, 7])
def test_equal_steps_of_days_are_no_calendar(days):
    assert infer_frequency([np.arange(60) * days * DAY + 4 * DAY], dates=True).unit == "clock"


def test_steps_below_a_second_are_labelled(tmp_path):
    times = [
        (dt.datetime(2021, 1, 4) + dt.timedelta(milliseconds=250 * i)).isoformat(timespec="milliseconds") for i in range(40)
    ]
    panel = build_panel(read(series(tmp_path / "t.csv", times), column_spec=SPEC))
    assert panel.frequency.article == "250 milliseconds"
    assert panel.frequency.label(panel.times[1]) == "2021-01-04 00:00:00.250"


def test_integers_of_weeks_and_days_of_the_year(tmp_path):
    weeks = [f"{y}{w:02d}" for y in (2018, 2019) for w in range(1, 53)]
    data = read(series(tmp_path / "w.csv", weeks), column_spec=SPEC)
    assert build_panel(data).frequency.words == "week" and data.rows["time"][4] == dt.datetime(2018, 1, 29)
    again = read({"time": [201905], "value": [1.5]}, schema=data.schema(), column_spec=SPEC, labels_optional=True)
    assert again.rows["time"][0] == dt.datetime(2019, 1, 28)  # a week although it could be May
    days = [f"2019{d:03d}" for d in range(300, 366)] + [f"2020{d:03d}" for d in range(1, 30)]
    data = read(series(tmp_path / "d.csv", days), column_spec=SPEC)
    assert build_panel(data).frequency.words == "day" and "missing-steps" not in checks(data)
    assert data.rows["time"][65] == dt.datetime(2019, 12, 31)
    assert DateFormat.from_json(data.columns["time"].date_format) == DateFormat(compact=True)


@pytest.mark.parametrize("values", [[2019400, 2019401], [201954, 201955], [201900, 201901]])
def test_integers_that_are_no_weeks_or_days(values):
    import polars as pl

    assert integers_as_dates(pl.Series(values, dtype=pl.Float64), is_time=True) is None


@pytest.mark.parametrize(
    ("known", "short"),
    [
        (weekdays((0, 1, 2, 3, 4)), weekdays((0, 1, 2, 3, 4), 1)),  # a week alone may be daily
        (days_of_months((1, 15)), days_of_months((1, 15), 1)),
        (days_of_months((31,)), days_of_months((31,), 1)),
        (weekdays((0, 2, 4)), weekdays((0, 2, 4), 1)),
    ],
)
def test_short_series_are_read_with_the_frequency_of_training(known, short):
    frequency = infer_frequency([microseconds(known)], dates=True)
    assert continues(frequency, [microseconds(short)], dates=True)


@pytest.mark.parametrize(
    ("known", "other"),
    [
        (Frequency("business", 1, "business day"), weekdays(range(7), 1)),
        (Frequency("clock", 3600 * SECOND, "hour"), weekdays(range(7), 1)),
        (Frequency("month", 1, "month"), days_of_months((1, 15), 2)),
        (Frequency("number", 1.0, "step"), weekdays(range(7), 1)),
    ],
)
def test_another_frequency_is_noticed(known, other):
    assert not continues(known, [microseconds(other)], dates=True)


def test_forecasts_of_few_rows_continue_the_calendar_of_training(tmp_path):
    path = series(tmp_path / "t.csv", weekdays((0, 1, 2, 3, 4), 30))
    settings = {"steps": 2, "precision": "float32", "task.horizon": 3, "task.length": 12}
    run = fieldguide.fit(path, task="time-series-forecasting", model="dlinear-96-24", out=tmp_path / "run", settings=settings)
    few = series(tmp_path / "few.csv", weekdays((0, 1, 2, 3, 4), 1))
    found = run.predict(str(few))
    assert found[0]["time"] == "2021-01-11", found  # Friday is followed by Monday
    assert not any("frequency" in note for note in found.notes)
    semi = series(tmp_path / "semi.csv", days_of_months((15, 31), 30))
    run = fieldguide.fit(semi, task="time-series-forecasting", model="dlinear-96-24", out=tmp_path / "run2", settings=settings)
    assert run.predict(str(semi))[0]["time"] == "2023-07-15"
    assert run.predict(str(series(tmp_path / "two.csv", ["2024-02-15", "2024-02-29"])))[0]["time"] == "2024-03-15"


# Timestamps in several columns


@pytest.mark.parametrize(
    ("names", "make", "expected", "step"),
    [
        ("year,month,day,hour", lambda i: f"2013,3,{i // 24 + 1},{i % 24}", "2013-03-01T01:00", "hour"),
        ("yr,mo,day", lambda i: f"{98 + i // 336},{i // 28 % 12 + 1},{i % 28 + 1}", "1998-01-02T00:00", "day"),  # not the year 98
        ("Year,Month", lambda i: f"{1990 + i // 12},{MONTH_NAMES[i % 12]}", "1990-02-01T00:00", "month"),
        ("year,quarter", lambda i: f"{1990 + i // 4},{i % 4 + 1}", "1990-04-01T00:00", "quarter"),
        ("year,qtr", lambda i: f"{1990 + i // 4},Q{i % 4 + 1}", "1990-04-01T00:00", "quarter"),
        ("year,week", lambda i: f"{2010 + i // 52},{i % 52 + 1}", "2010-01-11T00:00", "week"),
        ("year,doy", lambda i: f"2013,{i + 1}", "2013-01-02T00:00", "day"),
        ("date,time", lambda i: f"2013-03-{i // 24 + 1:02d},{i % 24:02d}:00", "2013-03-01T01:00", "hour"),
        ("Date,Time", lambda i: f"{i // 24 + 20:02d}/03/2013,{i % 24:02d}.00.00", "2013-03-20T01:00", "hour"),
        ("dteday,hr", lambda i: f"2013-03-{i // 24 + 1:02d},{i % 24}", "2013-03-01T01:00", "hour"),
        ("date,hour", lambda i: f"2013-03-{i // 24 + 1:02d},{i % 24 + 1}", "2013-03-01T02:00", "hour"),  # 1 to 24
        ("date,hhmm", lambda i: f"2013-03-{i // 48 + 1:02d},{i // 2 % 24:02d}{i % 2 * 3}0", "2013-03-01T00:30", "30 minutes"),
        ("date,time", lambda i: f"2013-03-{i // 24 + 1:02d},{i % 24 * 100}", "2013-03-01T01:00", "hour"),
        ("DATE,HrMn", lambda i: f"201303{i // 24 + 1:02d},{i % 24:02d}00", "2013-03-01T01:00", "hour"),
        ("yyyymmdd,hhmm", lambda i: f"20130301,{i // 60}{i % 60:02d}", "2013-03-01T00:01", "minute"),
        ("date,hour_ending", lambda i: f"2013-03-{i // 24 + 1:02d},{i % 24 + 1}00", "2013-03-01T02:00", "hour"),
    ],
)  # fmt: skip
def test_timestamps_in_several_columns(tmp_path, names, make, expected, step):
    rows = [f"{make(i)},{10 + 3 * np.sin(i / 3):.3f}" for i in range(120)]
    data = read(write(tmp_path / "t.csv", [f"{names},value", *rows]), target="value", column_spec=SPEC)
    assert data.rows["timestamp"][1].isoformat(timespec="minutes") == expected
    assert build_panel(data).frequency.words == step and finding(data, "timestamp-parts").severity == "note"
    again = write(tmp_path / "again.csv", [f"{names},value", *rows[:3]])
    assert read(again, schema=data.schema(), column_spec=SPEC).rows["timestamp"][1].isoformat(timespec="minutes") == expected


def test_the_meaning_of_a_time_without_a_colon_is_stored(tmp_path):
    rows = [f"2013-03-01,{i // 60}{i % 60:02d},{np.sin(i):.3f}" for i in range(120)]
    schema = read(write(tmp_path / "t.csv", ["date,time,value", *rows]), target="value", column_spec=SPEC).schema()
    again = write(tmp_path / "again.csv", ["date,time,value", "2013-03-02,10,1.5", "2013-03-02,11,1.5"])
    assert read(again, schema=schema, column_spec=SPEC).rows["timestamp"][0] == dt.datetime(2013, 3, 2, 0, 10)


@pytest.mark.parametrize("top", [1275, 2500])
def test_numbers_that_are_no_times_of_day(tmp_path, top):
    rows = [f"2013-03-{i % 28 + 1:02d},{1200 + i % (top - 1200)},{np.sin(i):.3f}" for i in range(1400)]
    data = read(write(tmp_path / "t.csv", ["date,time,value", *rows]), target="value")
    assert data.columns["time"].kind == "number"


def test_a_column_of_dates_and_times_needs_no_hour(tmp_path):
    rows = [f"2013-03-{i // 24 + 1:02d} {i % 24:02d}:00,{i % 24},{np.sin(i):.3f}" for i in range(120)]
    data = read(write(tmp_path / "t.csv", ["date,hour,value", *rows]), target="value", column_spec=SPEC)
    assert data.require_role("time").name == "date" and data.columns["hour"].role == "feature"
