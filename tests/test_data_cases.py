"""Labeled series: `.ts` files, long and wide tables, and damaged ones."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from damage import checks, finding, refused, write
from fieldguide.core.errors import DataError
from fieldguide.data import read
from fieldguide.data.timeseries.cases import CASE, build_cases, group_columns
from fieldguide.tasks import infer_task
from fieldguide.tasks.timeseries.classification import SeriesClassification

HEADER = ["#made by hand", "@problemName Test", "@timeStamps false", "@univariate false", "@classLabel true up down", "@data"]
SPEC = SeriesClassification.column_spec


def ts(path, lines=None, header=HEADER):
    lines = lines or ["1,2,3:4,5,6:up", "3,2,1:6,?,4:down", "1,2:7,8:up"]
    return write(path, [*header, *lines])


def test_ts_file(tmp_path):
    data = read(ts(tmp_path / "a.ts"), column_spec=SPEC)
    made = build_cases(data)
    assert made.rows["label"].to_list() == ["up", "down", "up"] and made.context.channels == ["channel_1", "channel_2"]
    first, second, third = made.context.values
    assert first.tolist() == [[1, 2, 3], [4, 5, 6]] and third.tolist() == [[1, 2], [7, 8]]
    assert np.isnan(second[1, 1]) and second[1, 2] == 4
    assert made.locate_row(1) == "a.ts:8" and checks(data) >= {"missing-values", "unequal-lengths", "layout"}
    assert infer_task(read(tmp_path / "a.ts"))[0] is SeriesClassification


def test_ts_splits_and_time_stamps(tmp_path):
    ts(tmp_path / "x_TRAIN.ts")
    ts(tmp_path / "x_TEST.ts", ["(0,1.5),(1,2.5),(2,3.5):(0,4),(1,5),(2,6):up"])
    write(tmp_path / "x.txt", ["a description"])
    made = build_cases(read(tmp_path, column_spec=SPEC))
    assert made.splits.tolist() == ["train"] * 3 + ["test"]  # series 1 of both files are two series
    assert made.context.values[3].tolist() == [[1.5, 2.5, 3.5], [4, 5, 6]]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["1,2,3:4,5,6:up", "1,2,3:down"], r"a.ts:8: 1 channel, but line 7 has 2 channels"),
        (["1,2,3:4,5,6:sideways"], r"a.ts:7: the label 'sideways' is none of those"),
        (["1,2,3:4,x,6:up"], r"a.ts:7: 'x' in channel 2 is not a number"),
        ([""], "no series after @data"),
    ],
)
def test_damaged_ts_files(tmp_path, lines, words):
    with pytest.raises(DataError, match=words):
        read(ts(tmp_path / "a.ts", lines), column_spec=SPEC)


def test_ts_file_without_a_header(tmp_path):
    with pytest.raises(DataError, match=r"a.ts:1: '1,2,3' is before @data"):
        read(write(tmp_path / "a.ts", ["1,2,3", "@data"]), column_spec=SPEC)


def long_rows():
    """Three series of 4 steps, in mixed order."""
    rows = [(f"s{i}", t, 10 * i + t, -t, "ab"[i % 2]) for t in (3, 1, 0, 2) for i in range(3)]
    return pl.DataFrame(rows, schema=["id", "time", "x", "y", "label"], orient="row")


def test_long_table(tmp_path):
    long_rows().write_csv(tmp_path / "long.csv")
    made = build_cases(read(tmp_path / "long.csv", column_spec=SPEC))
    assert made.context.layout == "long" and made.context.names == ["s0", "s1", "s2"]
    assert made.context.values[2].tolist() == [[20, 21, 22, 23], [0, -1, -2, -3]]
    assert made.rows["label"].to_list() == ["a", "b", "a"] and made.rows[CASE].to_list() == [0, 1, 2]
    once = long_rows().with_columns(pl.when(pl.col("time") == 3).then("label").alias("label"))  # in one row of each
    assert build_cases(read(once, column_spec=SPEC)).rows["label"].to_list() == ["a", "b", "a"]


def test_wide_table_and_channels():
    rows = pl.DataFrame({f"t{t}": [t * 1.0, t + 5.5, 7.25 - t] for t in range(5)} | {"label": [1, 2, 1]})
    made = build_cases(read(rows, column_spec=SPEC))
    assert made.context.channels == ["value"] and made.context.values[1].tolist() == [[5.5, 6.5, 7.5, 8.5, 9.5]]
    assert made.rows["label"].to_list() == ["1", "2", "1"]
    assert group_columns(["x_0", "x_1", "y_1", "y_0"]) == {"x": ["x_0", "x_1"], "y": ["y_0", "y_1"]}
    assert group_columns(["x_0", "x_1", "y_0"]) == {"value": ["x_0", "x_1", "y_0"]}
    assert group_columns(["0", "1", "2"]) == {"value": ["0", "1", "2"]}
    short = rows.with_columns(pl.when(pl.col("label") == 2).then("t4").alias("t4"))
    assert build_cases(read(short, column_spec=SPEC)).context.lengths.tolist() == [4, 5, 4]


def test_damaged_tables(tmp_path):
    rows = long_rows()
    with refused("conflicting-labels", "s0", "different labels"):
        read(rows.with_columns(pl.when(pl.col("x") == 3).then(pl.lit("b")).otherwise("label").alias("label")), column_spec=SPEC)
    with refused("repeated-step", "s1"):
        read(pl.concat([rows, rows.filter(pl.col("id") == "s1").head(1)]), column_spec=SPEC)
    with refused("no-channels"):
        read(rows.drop("x", "y"), column_spec=SPEC)
    lacking = rows.with_columns(pl.when(pl.col("id") != "s1").then("label").alias("label"))
    with refused("missing-label"):
        read(lacking, column_spec=SPEC)
    data = read(lacking, column_spec=SPEC, allow_bad=True)
    assert len(build_cases(data)) == 2 and finding(data, "missing-label").unusable == 4
    empty = rows.with_columns(
        pl.when(pl.col("id") != "s2").then("x").alias("x"), pl.when(pl.col("id") != "s2").then("y").alias("y")
    )
    with refused("empty-series"):
        read(empty, column_spec=SPEC)
    flat = rows.with_columns(pl.lit(1.5).alias("y"), pl.when(pl.col("id") == "s0").then(4.5).otherwise("x").alias("x"))
    still = read(flat, column_spec=SPEC)
    assert finding(still, "constant-series").count == 1
    again = pl.concat([rows, rows.filter(pl.col("id") == "s1").with_columns(pl.lit("s9").alias("id"))])
    assert finding(read(again, column_spec=SPEC), "repeated-series").count == 1
