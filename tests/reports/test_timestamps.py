"""One definition of a timestamp: what column types, splits by time and forecasting read from the ways people write dates."""

from __future__ import annotations

import datetime as dt
import json

import numpy as np
import polars as pl
import pytest

import fieldguide
from damage import checks, finding, write
from fieldguide.core.errors import DataError
from fieldguide.data import read
from fieldguide.data.splits import split
from fieldguide.data.timeseries.frequency import DAY, infer_frequency
from fieldguide.data.timeseries.panel import arrange_series, build_panel
from fieldguide.data.timestamps import DateFormat, infer_dates, integers_as_dates
from fieldguide.tasks import task

SPEC = task("time-series-forecasting").column_spec


def dates(values, **options):
    return infer_dates(pl.Series("t", values), **options)


def iso(series):
    return [None if v is None else v.isoformat().removesuffix("T00:00:00") for v in series]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1/15/97", "2/3/05"], ["1997-01-15", "2005-02-03"]),  # the reported cases
        (["15.01.69", "15.01.68"], ["1969-01-15", "2068-01-15"]),
        (["2005-01", "2005-12"], ["2005-01-01", "2005-12-01"]),
        (["2000Q1", "2000Q4"], ["2000-01-01", "2000-10-01"]),
        (["2015-W01", "2015-W53"], ["2014-12-29", "2015-12-28"]),
        (["Jan-05", "Dec-99"], ["2005-01-01", "1999-12-01"]),
        (
            ["1/13/2020 3:05 PM", "1/14/2020 12:00 AM", "1/15/2020 12:30 pm"],
            ["2020-01-13T15:05:00", "2020-01-14", "2020-01-15T12:30:00"],
        ),
        (["2020-01-01 24:00", "2020-01-01 23:30"], ["2020-01-02", "2020-01-01T23:30:00"]),
        (["2020-02-28 24:00:00", "2020-12-31 24:00:00"], ["2020-02-29", "2021-01-01"]),
        (["2024-01-01T05:00:00+02:00", "2024-01-01T03:00:00Z"], ["2024-01-01T03:00:00", "2024-01-01T03:00:00"]),
        (["2020 Q3", "2021-Q1", "Q2 2021", "Q4'21"], ["2020-07-01", "2021-01-01", "2021-04-01", "2021-10-01"]),  # siblings
        (["2016W02", "2015-W01-3"], ["2016-01-11", "2014-12-31"]),
        (["Jan 2005", "Sept. 2006", "May-2007"], ["2005-01-01", "2006-09-01", "2007-05-01"]),
        (["2005 Jan", "2006-Feb"], ["2005-01-01", "2006-02-01"]),
        (["2005M01", "2005M12"], ["2005-01-01", "2005-12-01"]),
        (["01/2005", "12/2006"], ["2005-01-01", "2006-12-01"]),
        (["2020H1", "2020-H2"], ["2020-01-01", "2020-07-01"]),
        (["2020-001", "2020-366"], ["2020-01-01", "2020-12-31"]),
        (
            ["5 March 2020", "12 Mär 2020", "3rd of May 2021", "1. août 2021"],
            ["2020-03-05", "2020-03-12", "2021-05-03", "2021-08-01"],
        ),
        (["March 5, 2020", "Mar. 5 2020", "Monday, March 9, 2020"], ["2020-03-05", "2020-03-05", "2020-03-09"]),
        (["05-Jan-2020 10:00", "06-JAN-20 11:30"], ["2020-01-05T10:00:00", "2020-01-06T11:30:00"]),
        (["01/Jan/2020:10:00:00 +0100", "02/Jan/2020:10:00:00 +0100"], ["2020-01-01T09:00:00", "2020-01-02T09:00:00"]),
        (["20190101T103000", "20190102 1040"], ["2019-01-01T10:30:00", "2019-01-02T10:40:00"]),
        (["97-01-15", "98-12-30"], ["1997-01-15", "1998-12-30"]),
        (["2020-01-01 3 PM", "2020-01-01 11 am"], ["2020-01-01T15:00:00", "2020-01-01T11:00:00"]),
        (["2024-01-01 05:00:00 -0530", "2024-01-01 05:00:00 UTC"], ["2024-01-01T10:30:00", "2024-01-01T05:00:00"]),
        (["Mon Jan  1 10:00:00 2024", "Tue Jan 12 11:30:00 2024"], ["2024-01-01T10:00:00", "2024-01-12T11:30:00"]),
        (["1Q2020", "4Q21", "3Q2020"], ["2020-01-01", "2021-10-01", "2020-07-01"]),
        (["2024-1-5", "2024/11/06", "2024.03.07"], ["2024-01-05", "2024-11-06", "2024-03-07"]),
        (["2024-01-01T00:00:00.123456", "2024-01-01 01:00"], ["2024-01-01T00:00:00.123456", "2024-01-01T01:00:00"]),
    ],
)
def test_dates(values, expected):
    found = dates(values * 3)
    assert iso(found.values)[: len(values)] == expected


@pytest.mark.parametrize(
    "values",
    [
        ["12:30", "11:00"],
        ["2010/11", "2011/12", "2012/13"],  # seasons
        ["10.1.12.4", "10.1.12.5"],
        ["1-2", "3-4"],
        ["A-12", "B-13"],
        ["2020-13", "2020-14"],
        ["2020-02-30", "2021-02-31"],
        ["25:00 2020-01-01", "1"],
        ["555-0123", "555-0124"],
    ],
)
def test_what_only_looks_like_dates(values):
    assert dates(values * 3) is None


def test_the_pivot_of_short_years_is_stated():
    found = dates(["1/15/97", "2/3/05"])
    assert "years of two digits are 1969 to 2068" in found.description and found.format.two_digit_years


@pytest.mark.parametrize(
    ("values", "order", "doubt"),
    [
        (["12/05/2023", "12/25/2023"], "mdy", False),
        (["12/05/2023", "25/12/2023"], "dmy", False),
        (["12.05.2023", "01.02.2023"], "dmy", False),
        (["12/05/2023", "11/05/2023"], "dmy", True),
        (["12-05-2023", "11-05-2023"], "dmy", True),
        (["1/2/2020 3:05 PM", "1/3/2020 4:00 AM"], "mdy", True),
        (["02/01/23", "13/01/23"], "dmy", False),
        (["05/05/2023", "06/06/2023"], "dmy", False),
        ([f"{m:02d}/{d:02d}/2023" for m in (1, 2, 3) for d in (1, 5, 9)], "mdy", True),  # ascend only with the month first
    ],
)
def test_the_order_of_day_and_month(values, order, doubt):
    found = dates(values)
    assert found.format.order == order and bool(found.doubt) == doubt


def test_an_iso_date_among_others_changes_nothing():
    found = dates(["12/05/2023", "12/25/2023", "2023-05-12"] * 4)
    assert iso(found.values)[:3] == ["2023-12-05", "2023-12-25", "2023-05-12"]


def test_both_orders_in_one_column_are_reported_row_by_row(tmp_path):
    values = ["12/25/2023", "25/12/2023", "05/06/2023", "07/07/2023"] * 10
    data = read(write(tmp_path / "t.csv", ["day,z,y", *(f"{v},{i % 9},{'ab'[i % 3 == 0]}" for i, v in enumerate(values))]))
    assert data.columns["day"].kind == "date"
    assert iso(data.rows["day"])[:4] == ["2023-12-25", "2023-12-25", None, "2023-07-07"]
    assert finding(data, "mixed-types").count == 10 and finding(data, "mixed-types").places[0] == "t.csv:4"
    assert "both readings" in finding(data, "ambiguous-dates").what


def test_a_single_date_in_the_other_order_is_a_mistake():
    found = dates([f"12/{d}/2023" for d in range(13, 32)] * 3 + ["25/12/2023"])
    assert found.format.order == "mdy" and found.values[-1] is None and found.values.null_count() == 1


def test_ambiguous_dates_are_reported_and_can_be_set(tmp_path):
    rows = ["day,z,y"] + [f"0{i % 9 + 1}/0{(i * 7) % 5 + 1}/2023,{i % 9},{'ab'[i % 3 == 0]}" for i in range(40)]
    data = read(write(tmp_path / "t.csv", rows))
    warning = finding(data, "ambiguous-dates")
    assert warning.severity == "warning" and "read with the day first" in warning.what and "date:month-first" in warning.remedy
    assert iso(data.rows["day"])[1] == "2023-03-02"
    chosen = read(tmp_path / "t.csv", kinds={"day": "date:month-first"})
    assert iso(chosen.rows["day"])[1] == "2023-02-03" and "ambiguous-dates" not in checks(chosen)
    with pytest.raises(DataError, match=r"'date:decimal-comma' is no type"):
        read(tmp_path / "t.csv", kinds={"day": "date:decimal-comma"})
    with pytest.raises(DataError, match=r"'dat' is no type. Did you mean 'date'"):
        read(tmp_path / "t.csv", kinds={"day": "dat"})


def test_another_column_decides_the_order(tmp_path):
    rows = ["a,b,y"] + [f"0{i % 9 + 1}/05/2023,{i % 9 + 1}/{13 + i % 9}/2023,{'ab'[i % 3 == 0]}" for i in range(40)]
    data = read(write(tmp_path / "t.csv", rows))
    assert data.columns["a"].date_format["order"] == "mdy" and "ambiguous-dates" not in checks(data)


def test_a_format_is_stored_and_applied_without_guessing():
    form = DateFormat.from_json(json.loads(json.dumps(dates(["12/05/2023", "12/25/2023"]).format.to_json())))
    values = ["12/05/2023", "25/12/2023", "2023-01-02", "5 May 2023", None, "x", "2023-01-02T00:00Z", "20230102"]
    assert iso(form.parse(pl.Series(values))) == [
        "2023-12-05",
        None,
        "2023-01-02",
        "2023-05-05",
        None,
        None,
        None,
        "2023-01-02",
    ]
    undecided = DateFormat()  # training had only ISO dates
    assert iso(undecided.parse(pl.Series(["05/12/2023", "25/12/2023", "2023-01-02"]))) == [None, "2023-12-25", "2023-01-02"]


def test_integers_that_are_dates(tmp_path):
    days = pl.date_range(dt.date(2019, 1, 1), dt.date(2019, 2, 9), eager=True).dt.strftime("%Y%m%d")
    rows = ["day,z,y"] + [f"{d},{i % 9},{'ab'[i % 3 == 0]}" for i, d in enumerate(days)]
    data = read(write(tmp_path / "t.csv", rows))
    assert data.columns["day"].kind == "date" and data.rows["day"][31] == dt.datetime(2019, 2, 1)
    whole = read({"day": days.cast(pl.Int64), "z": [1.5, 2, 3, 4] * 10, "y": list("abab") * 10}, target="y")
    assert whole.rows["day"].to_list() == data.rows["day"].to_list()
    for source in ({"day": [20190305]}, {"day": [20190305.0]}, {"day": ["20190305"]}, {"day": ["2019-03-05"]}):
        again = read({**source, "z": [1]}, schema=data.schema(), labels_optional=True)
        assert again.rows["day"][0] == dt.datetime(2019, 3, 5)


@pytest.mark.parametrize(
    ("values", "is_time", "expected"),
    [
        ([201901, 201912], True, ["2019-01-01", "2019-12-01"]),
        ([201901, 201912], False, None),
        ([2019010113, 2019010114], True, ["2019-01-01T13:00:00", "2019-01-01T14:00:00"]),
        ([20190101103000, 20190101113000], True, ["2019-01-01T10:30:00", "2019-01-01T11:30:00"]),
        ([1546300800, 1546300801], True, None),  # seconds since 1970
        ([20190101, 20190199, 20190103], False, None),
        ([12345678, 23456789, 34567890], False, None),
        ([2019, 2020, 2021], True, None),  # years stay numbers
    ],
)
def test_which_integers_are_dates(values, is_time, expected):
    found = integers_as_dates(pl.Series(values, dtype=pl.Float64), is_time=is_time)
    assert (None if found is None else iso(found)) == expected


def test_splits_by_time_use_the_same_definition(tmp_path):
    rows = ["when,x,y"] + [f"{m}/{d}/97,{m + d / 7},{'ab'[d % 2]}" for m in range(1, 13) for d in range(9, 15)]
    data = read(write(tmp_path / "t.csv", rows), target="y", time="when")
    parts = split(data)
    latest = data.rows["when"][parts.train].max()
    assert latest.year == 1997 and data.rows["when"][parts.test].min() > latest


# Series


def series(path, times, columns="time,value"):
    return write(path, [columns, *(f"{t},{10 + 3 * np.sin(i / 3):.3f}" for i, t in enumerate(times))])


def frequency_of(path, **options):
    return build_panel(read(path, column_spec=SPEC, **options)).frequency


@pytest.mark.parametrize(
    ("times", "step"),
    [
        ([f"{1990 + i // 4}Q{i % 4 + 1}" for i in range(40)], "one quarter"),
        ([f"{1990 + i // 12}-{i % 12 + 1:02d}" for i in range(60)], "one month"),
        ([f"{1990 + i // 12}{i % 12 + 1:02d}" for i in range(60)], "one month"),
        ([(dt.date(2015, 1, 1) + dt.timedelta(7 * i)).strftime("%G-W%V") for i in range(60)], "one week"),
        ([(dt.date(2019, 1, 1) + dt.timedelta(i)).strftime("%Y%m%d") for i in range(60)], "one day"),
        (
            [
                f"{'Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec'.split()[i % 12]}-{95 + i // 12 if i < 60 else '00'}"
                for i in range(60)
            ],
            "one month",
        ),
        ([f"2020-01-{i // 24 + 1:02d} {i % 24 + 1}:00" for i in range(240)], "one hour"),  # 1:00 to 24:00
        ([f"1/{i // 24 + 1}/2020 {(i % 24 - 1) % 12 + 1}:00 {'AM' if i % 24 < 12 else 'PM'}" for i in range(480)], "one hour"),
    ],
)
def test_series_of_every_definition(tmp_path, times, step):
    assert frequency_of(series(tmp_path / "t.csv", times)).article == step


@pytest.mark.parametrize(
    ("rule", "unit", "words", "following"),
    [
        ("last", 1, "one month (on the last business day)", "2024-03-29"),
        ("first", 1, "one month (on the first business day)", "2024-03-01"),
        ("last", 3, "one quarter (on the last business day)", "2024-05-31"),
        ("last", 12, "one year (on the last business day)", "2025-02-28"),
        ("friday", 1, "one month", None),  # the last Friday: monthly, on no fixed day
    ],
)
def test_business_days_of_months(tmp_path, rule, unit, words, following):
    months = np.arange("2014-02" if unit < 12 else "1994-02", "2024-03", unit, dtype="M8[M]")
    ends = (months + 1).astype("M8[D]")
    if rule == "last":
        days = np.busday_offset(ends, -1, roll="forward")
    elif rule == "first":
        days = np.busday_offset(months.astype("M8[D]"), 0, roll="forward")
    else:
        days = np.busday_offset(ends - 1, 0, roll="backward", weekmask="Fri")
    frequency = frequency_of(series(tmp_path / "t.csv", days))
    assert frequency.article == words
    panel = build_panel(read(tmp_path / "t.csv", column_spec=SPEC))
    assert len(panel.times) == len(months) and np.isfinite(panel.values).all()
    if following:
        last = frequency.times(panel.times[-1], 2)[1]
        assert frequency.label(last) == following


def test_four_weeks_are_not_a_month():
    times = np.arange(40) * 28 * DAY
    assert infer_frequency([times], dates=True).article == "4 weeks"


def test_series_with_another_step_are_named(tmp_path):
    rows = ["series,time,value"]
    for name, step in (("A", 1), ("B", 1), ("C", 1), ("D", 7)):
        rows += [f"{name},{dt.date(2024, 1, 1) + dt.timedelta(step * i)},{np.sin(i):.3f}" for i in range(60 // step)]
    _, findings = arrange_series(read(write(tmp_path / "t.csv", rows), column_spec=SPEC, allow_bad=True))
    warning = finding(findings, "mixed-steps")
    assert "'D' (one week)" in warning.what and "one day" in warning.what
    rows = ["series,time,value"]
    for name, step in (("A", 1), ("B", 168)):
        rows += [f"{name},{dt.datetime(2024, 1, 1) + dt.timedelta(hours=step * i)},{np.sin(i):.3f}" for i in range(60)]
    with pytest.raises(DataError, match=r"differs from that of the others, one hour: 'B' \(one week\)"):
        read(write(tmp_path / "t.csv", rows), column_spec=SPEC)


def parts_table(path, names="year,month,day,hour", hours=400):
    rows = [f"No,{names},value"]
    for i in range(hours):
        t = dt.datetime(2013, 3, 1) + dt.timedelta(hours=i)
        rows.append(f"{i + 1},{t.year},{t.month},{t.day},{t.hour},{10 + 3 * np.sin(i / 4):.3f}")
    return write(path, rows)


def test_columns_of_year_month_day_hour_form_a_timestamp(tmp_path):
    data = read(parts_table(tmp_path / "t.csv"), target="value", column_spec=SPEC)
    time = data.require_role("time")
    assert time.name == "timestamp" and time.date_format["parts"] == ["year", "month", "day", "hour"]
    assert data.rows["timestamp"][30] == dt.datetime(2013, 3, 2, 6)
    assert {"year", "month", "day", "hour"}.isdisjoint(data.columns) and "timestamp-parts" in checks(data)
    assert build_panel(data).frequency.words == "hour"
    named = read(parts_table(tmp_path / "n.csv", "Year,Month,Day,Hour"), target="value", time="Year,Month,Day,Hour")
    assert named.require_role("time").name == "timestamp"  # for any task, if the user names them


@pytest.mark.parametrize("unit", ["year,month", "yr,mo,dd"])
def test_other_parts(tmp_path, unit):
    rows = [f"{unit},value"]
    for i in range(60):
        t = dt.date(2013 + i // 12, i % 12 + 1, 1) if unit == "year,month" else dt.date(2013, 1, 1) + dt.timedelta(i)
        rows.append(",".join(map(str, [t.year, t.month, t.day][: unit.count(",") + 1])) + f",{np.sin(i):.3f}")
    data = read(write(tmp_path / "t.csv", rows), column_spec=SPEC)
    assert build_panel(data).frequency.words == ("month" if unit == "year,month" else "day")


def test_a_continued_table_suggests_forecasting(tmp_path):
    for name, steps in (("train", range(60)), ("test", range(60, 72))):
        rows = [f"{s},{i},{10 + 3 * np.sin(i / 4 + len(s)):.3f}" for s in ("a", "bb", "ccc") for i in steps]
        write(tmp_path / f"{name}.csv", ["series,step,value", *rows])
    found = finding(read(tmp_path), "looks-like-series")
    assert "time in column 'step'" in found.what and "test rows continue" in found.what
    assert "--task time-series-forecasting" in found.remedy
    data = read(tmp_path, column_spec=SPEC)
    assert data.require_role("time").name == "step" and data.require_role("series").name == "series"
    assert len(build_panel(data)) == 3


@pytest.mark.parametrize("name", ["t", "week", "time_idx", "when"])
def test_a_test_file_that_continues_a_series_under_another_name(tmp_path, name):
    for split_name, steps in (("train", range(80)), ("test", range(80, 100))):
        at = [dt.date(2024, 1, 1) + dt.timedelta(i) if name == "when" else i for i in steps]
        rows = [f"{s},{t},{10 + 3 * np.sin(i / 4 + len(s)):.3f}" for s in ("a", "bb", "ccc") for i, t in zip(steps, at)]
        write(tmp_path / f"{split_name}.csv", [f"series,{name},value", *rows])
    found = finding(read(tmp_path), "looks-like-series")
    assert f"time in column {name!r}" in found.what and "test rows continue" in found.what
    assert f"--task time-series-forecasting --time {name}" in found.remedy
    assert len(build_panel(read(tmp_path, column_spec=SPEC, time=name))) == 3


def test_ordinary_tables_suggest_nothing():
    for sample in ("iris", "diabetes"):
        assert "looks-like-series" not in checks(read(sample))


@pytest.fixture(scope="module")
def forecast(tmp_path_factory):
    """A forecaster of a series whose times have offsets, in columns of another order at prediction."""
    home = tmp_path_factory.mktemp("zoned")
    times = [dt.datetime(2024, 1, 1) + dt.timedelta(hours=i) for i in range(200)]
    series(home / "t.csv", [f"{t.isoformat()}+02:00" for t in times])
    settings = {"steps": 2, "precision": "float32", "task.horizon": 3, "task.length": 12}
    return home, fieldguide.fit(
        home / "t.csv", task="time-series-forecasting", model="dlinear-96-24", out=home / "run", settings=settings
    )


def test_forecasts_state_their_time_zone(forecast):
    home, run = forecast
    assert run.predict(str(home / "t.csv"))[0]["time"] == "2024-01-09 06:00:00 UTC"
    assert run.task.frequency.zone == "UTC"


def test_forecasts_of_local_times_state_none(tmp_path):
    path = series(tmp_path / "t.csv", [dt.datetime(2024, 1, 1) + dt.timedelta(hours=i) for i in range(60)])
    assert frequency_of(path).label(0.0) == "1970-01-01 00:00:00"


def test_forecasts_from_year_month_day_hour(tmp_path):
    path = parts_table(tmp_path / "t.csv", hours=200)
    settings = {"steps": 2, "precision": "float32", "task.horizon": 3, "task.length": 12}
    run = fieldguide.fit(
        path, target="value", task="time-series-forecasting", model="dlinear-96-24", out=tmp_path / "run", settings=settings
    )
    found = run.predict(str(path))
    assert found[0]["time"] == "2013-03-09 08:00:00"
    assert found.notes == []
