"""Tables as series: four layouts, complete and damaged. Each error has its location, count and remedy."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from damage import checks, finding, refused, write
from fieldguide.core.errors import DataError
from fieldguide.data import read
from fieldguide.data.timeseries.panel import build_panel, find_layout
from fieldguide.tasks.timeseries.forecasting import Forecasting

HOURS = [f"2024-03-{1 + h // 24:02d} {h % 24:02d}:00" for h in range(240)]


def long(sites=("north", "south")) -> list[str]:
    return ["site,time,value", *(f"{s},{t},{10 * i + h % 24}.5" for i, s in enumerate(sites) for h, t in enumerate(HOURS))]


def wide() -> list[str]:
    return ["time,a,b", *(f"{t},{h % 24}.5,{100 + h % 24}.5" for h, t in enumerate(HOURS))]


def rows() -> list[str]:
    """Return rows as in M4: series of different length with blanks at their end."""
    return [
        "V1,V2," + ",".join(f"V{i}" for i in range(3, 42)),
        *(f"H{i}," + ",".join(str(i * 10 + t % 7) if t < 30 + i % 11 else "" for t in range(40)) for i in range(40)),
    ]


def got(path, **more):
    return read(path, column_spec=Forecasting.column_spec, **more)


# Layouts


def test_long_tables(tmp_path):
    data = got(write(tmp_path / "t.csv", long()))
    assert find_layout(data) == "long" and data.columns["site"].role == "series" and data.columns["value"].role == "target"
    found = build_panel(data)
    assert found.names == ["north", "south"] and found.frequency.words == "hour" and len(found.values) == 480
    assert found.series_values(1)[:3].tolist() == [10.5, 11.5, 12.5] and checks(data) == {"frequency"}
    pl.read_csv(tmp_path / "t.csv", try_parse_dates=True).write_parquet(tmp_path / "t.parquet")
    again = build_panel(got(tmp_path / "t.parquet"))
    assert again.names == found.names and (again.values == found.values).all() and (again.times == found.times).all()
    two = [line + ("," + str(h % 5) + ".25" if h else ",other") for h, line in enumerate(long())]
    several = build_panel(got(write(tmp_path / "two.csv", two), target="value,other"))
    assert several.names == ["north: value", "north: other", "south: value", "south: other"]
    keys = [line.replace("north", "n,1").replace("south", "n,2").replace("site,", "store,family,") for line in long()]
    both = build_panel(got(write(tmp_path / "keys.csv", keys), roles={"series": "store,family"}))
    assert both.names == ["n, 1", "n, 2"]


def test_wide_tables(tmp_path):
    data = got(write(tmp_path / "t.csv", wide()))
    found = build_panel(data)
    assert find_layout(data) == "wide" and found.names == ["a", "b"] and len(found.values) == 240
    assert (
        found.series_values(1)[:2].tolist() == [100.5, 101.5]
        and found.frequency.label(found.times[25]) == "2024-03-02 01:00:00"
    )
    one = got(write(tmp_path / "one.csv", [line.partition(",")[2] for line in wide()]))  # no time: steps in their order
    assert build_panel(one).names == ["a", "b"] and finding(one, "no-time").severity == "note"
    only = got(tmp_path / "t.csv", target="b")  # then a stands beside it
    assert build_panel(only).names == ["b"] and only.columns["a"].role == "feature"


def test_one_series_per_row(tmp_path):
    data = got(write(tmp_path / "t.csv", rows()))
    found = build_panel(data)
    assert find_layout(data) == "rows" and found.names[3] == "H3" and len(found) == 40
    assert (
        found.series_values(3).tolist() == [30 + t % 7 for t in range(33)]
        and "one series per row" in finding(data, "layout").what
    )
    assert "missing-values" not in checks(data)
    cells = [line.split(",") for line in rows()]
    for row, line in enumerate(cells[1:]):
        line[4], line[6], line[-1] = str(row % 2), "0", ""  # steps that look like truth values, a constant, nothing
    odd = build_panel(got(write(tmp_path / "t.csv", [",".join(line) for line in cells])))
    assert odd.names == found.names and odd.series_values(3)[:7].tolist() == [30, 31, 32, 1, 34, 0, 36]


def test_numeric_times_and_other_frequencies(tmp_path):
    steps = got(write(tmp_path / "t.csv", ["step,y", *(f"{1950 + i},{i % 9}.5" for i in range(60))]), time="step")
    assert build_panel(steps).frequency.size == 1 and build_panel(steps).times[0] == 1950
    years = build_panel(got(write(tmp_path / "y.csv", ["year,y", *(f"{1950 + i},{i % 9}.5" for i in range(60))]), time="year"))
    assert years.frequency.words == "year" and years.frequency.label(years.times[0]) == "1950-01-01"
    monthly = [f"20{10 + i // 12}-{1 + i % 12:02d}-01,{i}.5" for i in range(50) if i != 7]
    data = got(write(tmp_path / "m.csv", ["month,y", *monthly]), time="month")
    found = build_panel(data)
    assert found.frequency.words == "month" and len(found.values) == 50 and np.isnan(found.values[7, 0])
    assert found.frequency.label(found.times[7]) == "2010-08-01" and finding(data, "missing-steps").count == 1
    twice = [*monthly[:20], monthly[20].replace("-01,", "-03,"), *monthly[20:]]  # two days of one month are one step
    data = got(write(tmp_path / "m.csv", ["month,y", *twice]), time="month", allow_bad=True)
    assert finding(data, "off-grid").places == ("m.csv:22",)
    assert (build_panel(data).values[:21] == found.values[:21])[np.arange(21) != 7].all()
    days = [str(d) for d in np.busday_offset("2024-01-01", np.arange(60))]
    data = got(write(tmp_path / "b.csv", ["date,y", *(f"{d},{i}.5" for i, d in enumerate(days))]))
    assert build_panel(data).frequency.words == "business day" and "missing-steps" not in checks(data)


# Damage


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_damaged_long_tables(tmp_path, suffix):
    def stored(lines, **more):
        path = write(tmp_path / "t.csv", lines)
        if suffix == "parquet":
            path = tmp_path / "t.parquet"
            pl.read_csv(tmp_path / "t.csv", infer_schema_length=None).write_parquet(path)
        return got(path, **more)

    def line(n):  # a Parquet file has rows, a text its header too
        return f"t.{suffix}:{n if suffix == 'csv' else n - 1}"

    good = long()
    out = good.copy()
    out[5], out[6] = good[6], good[5]  # out of order
    data = stored(out)
    assert finding(data, "time-order").places == (line(7),) and finding(data, "time-order").remedy
    assert (build_panel(data).values == build_panel(stored(good)).values).all()
    data = stored([*good, good[30], good[40]])  # doubles, the same
    found = finding(data, "duplicate-time")
    assert found.places == (f"{line(482)} = {line(31)}", f"{line(483)} = {line(41)}") and not found.unusable
    data = stored([*good, good[30].replace(".5", ".75")])  # doubles that disagree
    found = finding(data, "conflicting-time")
    assert found.places == (f"{line(482)} = {line(31)}",) and found.unusable == 1 and "role.series" in found.remedy
    assert build_panel(data).values[29, 0] == 5.5  # the first is used
    data = stored(good[:100] + good[103:])  # steps are missing
    found = finding(data, "missing-steps")
    assert found.count == 3 and found.places == (f"3 before {line(101)}",) and np.isnan(build_panel(data).values[99:102]).all()
    data = stored([*good[:10], good[10].replace(":00,", ":20,"), *good[11:]])  # between two steps
    found = finding(data, "off-grid")
    assert found.places == (line(11),) and found.unusable == 1 and np.isnan(build_panel(data).values[9, 0])
    data = stored([good[0], good[1].replace(":00,", ":20,"), *good[2:]])  # and so is the first of all
    assert finding(data, "off-grid").places == (line(2),) and build_panel(data).values[0, 0] == 1.5
    data = stored([*good[:10], good[10].rpartition(",")[0] + ",", *good[11:]])  # no value
    assert finding(data, "missing-values").places == (line(11),) and finding(data, "missing-values").count == 1
    data = stored([*good[:10], good[10].replace("north", ""), *good[11:]])  # of no series
    assert finding(data, "missing-key").places == (line(11),) and finding(data, "missing-key").unusable == 1
    data = stored([*good[:10], "north,,1.5", *good[11:]])  # at no time
    assert finding(data, "time-missing").places == (line(11),) and finding(data, "time-missing").unusable == 1
    data = stored([good[0], *(f"east,{t}," for t in HOURS), *good[1:]])  # a series without values
    assert finding(data, "empty-series").count == 1 and "'east'" in finding(data, "empty-series").what
    assert build_panel(data).names == ["north", "south"]
    data = stored([good[0], *(f"east,{t},3" for t in HOURS), *good[1:]])
    assert "'east'" in finding(data, "constant-series").what
    data = stored([good[0], *reversed(good[1:])])  # the latest first
    assert finding(data, "time-backwards").severity == "note" and "time-order" not in checks(data)
    with refused("conflicting-time", "240 of 480 examples are unusable", "--set role.series=COLUMN"):
        stored([line_.replace("south", "north") for line_ in good])  # two series under one name
    with refused("time-unreadable", "time column 'time' contains neither", "2024-12-31"):
        stored([good[0], *(f"{line_.split(',')[0]},day {n},1.5" for n, line_ in enumerate(good[1:]))])
    with refused("irregular-steps", "the times are irregular", "by hour, day"):
        stored([good[0], *(f"north,2024-03-{1 + i // 20:02d} {i % 20:02d}:{i * i * 7 % 60:02d},{i}.5" for i in range(300))])
    with refused("one-moment", "no series has two time steps"):
        stored([good[0], *(f"s{i},2024-03-01 00:00,{i}.5" for i in range(50))])
    with refused("nothing-changes", "all series are constant"):
        stored([good[0], *(f"{line_.rpartition(',')[0]},7.5" for line_ in good[1:])])
    with refused("no-target", "no numeric column"):
        stored([line_.rpartition(",")[0] for line_ in good])


def test_series_of_text_values(tmp_path):
    good = long()
    data = got(write(tmp_path / "t.csv", [*good[:50], good[50].rpartition(",")[0] + ",broken", *good[51:]]))
    assert finding(data, "mixed-types").places == ("t.csv:51",) and "'broken'" in finding(data, "mixed-types").what
    assert np.isnan(build_panel(data).values[49, 0])
    data = got(write(tmp_path / "t.csv", [*good[:50], good[50].replace("2024-03-03", "2024-13-03"), *good[51:]]))
    assert finding(data, "time-missing").places == ("t.csv:51",)
    (tmp_path / "t.csv").write_bytes("\n".join(long(("Zürich", "Köln"))).encode("latin-1"))
    data = got(tmp_path / "t.csv")
    assert build_panel(data).names == ["Zürich", "Köln"] and "t.csv:2" in finding(data, "encoding").places[0]
    with pytest.raises(DataError, match=r"t.csv:\d+"):
        got(write(tmp_path / "t.csv", [*good[:50], good[50] + ",7", *good[51:]]))
    (tmp_path / "t.parquet").write_bytes(b"PAR1" + b"\0" * 50)
    with pytest.raises(DataError, match="not a readable Parquet file"):
        got(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"'sit', which does not exist\. Did you mean 'site'"):
        got(write(tmp_path / "t.csv", good), roles={"series": "sit"})


def test_damaged_wide_tables(tmp_path):
    good = wide()
    out = [*good[:9], good[10], good[9], *good[11:]]
    assert finding(got(write(tmp_path / "t.csv", out)), "time-order").places == ("t.csv:11",)
    assert finding(got(write(tmp_path / "t.csv", [*good, good[20]])), "duplicate-time").count == 1
    assert finding(got(write(tmp_path / "t.csv", [*good, good[20].replace(".5", ".75", 1)])), "conflicting-time").unusable == 1
    assert finding(got(write(tmp_path / "t.csv", good[:20] + good[25:])), "missing-steps").count == 5
    data = got(write(tmp_path / "t.csv", [*good[:20], good[20].rpartition(",")[0] + ",", *good[21:]]))
    assert finding(data, "missing-values").places == ("t.csv:21",)
    assert build_panel(data).observed[19].tolist() == [True, False]  # the other series is there
    late = [line if n in (0, *range(40, 200)) else line.rpartition(",")[0] + "," for n, line in enumerate(good)]
    data = got(write(tmp_path / "t.csv", late))  # one begins later and ends sooner: no fault
    found = build_panel(data)
    assert "missing-values" not in checks(data) and (found.low[1], found.high[1]) == (39, 199)
    data = got(write(tmp_path / "t.csv", [*good[:20], good[20].replace(".5", "x", 1), *good[21:]]))
    assert finding(data, "mixed-types").places == ("t.csv:21",)
    with refused("conflicting-time", "specify the column that identifies them"):
        got(write(tmp_path / "t.csv", [*good, *(line.replace(".5", ".25") for line in good[1:])]))


def test_damaged_rows(tmp_path):
    good = rows()
    cells = good[5].split(",")
    cells[7] = ""
    data = got(write(tmp_path / "t.csv", [*good[:5], ",".join(cells), *good[6:]]))
    assert finding(data, "missing-values").places == ("t.csv:6",) and np.isnan(build_panel(data).series_values(4)[6])
    cells[7] = "x"
    data = got(write(tmp_path / "t.csv", [*good[:5], ",".join(cells), *good[6:]]))
    assert finding(data, "mixed-types").places == ("t.csv:6",)
    data = got(write(tmp_path / "t.csv", [*good, "H99" + "," * 40]))
    assert finding(data, "empty-series").count == 1 and len(build_panel(data)) == 40
    data = got(write(tmp_path / "t.csv", [*good, "H99," + ",".join(["5"] * 40)]))
    assert "'H99'" in finding(data, "constant-series").what
    with pytest.raises(DataError, match=r"t.csv:3 has 42"):
        got(write(tmp_path / "t.csv", [*good[:2], good[2] + ",7", *good[3:]]))
    texts = [good[0] + ",region", *(f"{line},{'north' if i % 2 else 'south'}" for i, line in enumerate(good[1:]))]
    with refused(
        "text-in-series", "column 'region' holds text, such as 'south'", "all columns except 'V1' are steps", "t.csv:2"
    ):
        got(write(tmp_path / "t.csv", texts))
    without = got(tmp_path / "t.csv", kinds={"region": "identifier"})
    assert "'V1' names the series, because 'region' repeats" in finding(without, "series-chosen").what
    assert (
        build_panel(without).series_values(3).tolist()
        == build_panel(got(write(tmp_path / "g.csv", good))).series_values(3).tolist()
    )
    with refused("repeated-series", "rows with a repeated 'V1'", "t.csv:42", "--time"):
        got(write(tmp_path / "t.csv", [*good, good[1]]))
    with refused("repeated-series", "10 x"):
        got(write(tmp_path / "t.csv", [*good, *good[1:11]]), roles={"series": "V1"})
    data = got(write(tmp_path / "t.csv", [*good[:3], good[3].partition(",")[0] + ",7" + "," * 39, *good[4:]]))
    with pytest.raises(DataError, match="too few to train with a horizon of 30"):
        Forecasting.build_examples(data, Forecasting.options_from({"horizon": 30}))
    made = Forecasting.build_examples(data, Forecasting.options_from({"horizon": 4}))
    assert finding(made, "short-series").places == ("'H2'",) and finding(made, "short-series").remedy
