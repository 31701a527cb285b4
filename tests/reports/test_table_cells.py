"""Cells of tables that were once misread without a word: more number formats, fillers, long integers, escapes, delimiters."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from damage import checks, finding, write
from fieldguide.data import read
from fieldguide.tasks import task

N = 60
VALUES = np.random.default_rng(0).uniform(1, 2000, N).round(2)


def column(path, make, **options):
    """The column x of a file whose cells `make` writes from their number and value, next to a feature and two classes."""
    cells = [make(i, v) for i, v in enumerate(VALUES)]
    rows = ["x,z,y", *(f'"{c}",{i / 7:.3f},{"ab"[i % 3 == 0]}' for i, c in enumerate(cells))]
    return read(write(path / "t.csv", rows), target="y", **options)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda i, v: f"$({v:,.2f})" if i % 3 == 0 else f"${v:,.2f}", lambda i, v: -v if i % 3 == 0 else v),
        (lambda i, v: f"(${v:,.2f})" if i % 3 == 0 else f"${v:,.2f}", lambda i, v: -v if i % 3 == 0 else v),
        (lambda i, v: f"{v:.0f},-", lambda i, v: round(v)),
        (lambda i, v: f"€ {v:.0f},-", lambda i, v: round(v)),
        (lambda i, v: f"{v:.0f},\u2013 €", lambda i, v: round(v)),
        (lambda i, v: f"{v:.0f}.--" if i % 2 else f"{v:.2f}", lambda i, v: round(v) if i % 2 else v),
    ],
)
def test_prices(tmp_path, make, expected):
    data = column(tmp_path, make)
    assert data.columns["x"].kind == "number"
    assert data.rows["x"].to_list() == pytest.approx([expected(i, v) for i, v in enumerate(VALUES)])
    again = data.columns["x"].number_format
    assert read({"x": [make(0, VALUES[0])], "z": [1.0]}, schema=data.schema(), labels_optional=True).rows["x"][
        0
    ] == pytest.approx(expected(0, VALUES[0])), again


@pytest.mark.parametrize("filler", ["\u2014", "..", "\\N", "#DIV/0!", "#VALUE!", "<NA>", "(null)", "#N/A"])
def test_marks_and_errors_are_missing_values(tmp_path, filler):
    data = column(tmp_path, lambda i, v: filler if i % 3 == 0 else f"{v}")
    assert data.columns["x"].kind == "number" and data.columns["x"].missing == N // 3
    assert data.rows["x"].drop_nulls().to_list() == [v for i, v in enumerate(VALUES) if i % 3]


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda i, v: "unknown" if i % 3 == 0 else f"{v}", "20 of 60 values are none, such as 'unknown'"),
        (lambda i, v: "TBD" if i % 3 == 0 else f"{v * 10:,.0f}", "20 of 60 values are none, such as 'TBD'"),
        (lambda i, v: "<0.5" if i % 3 == 0 else f"{v}", "such as '<0.5'"),
        (lambda i, v: f"<{v}" if i % 4 == 0 else f"{v}", "15 of 60 values are none"),
        (lambda i, v: f"{v}*" if i % 5 == 0 else f"{v}", "12 of 60 values are none"),
        (lambda i, v: f"{v:,.0f}[1]" if i % 5 == 0 else f"{v:,.0f}", "12 of 60 values are none"),
        (lambda i, v: f"{int(v / 60):02d}:{int(v % 60):02d}", "times of day or durations"),
        (lambda i, v: f"{v} ppm", "units that are not known"),
        (lambda i, v: f"{v:.1f} mg/dL", "units that are not known"),
        (lambda i, v: f"{v}x", "units that are not known"),
        (lambda i, v: f"~{v}", "units that are not known"),
        (lambda i, v: f"{v:.2f}".replace(".", ".," [i % 2]), "the decimal mark is not clear"),
    ],
)  # fmt: skip
def test_columns_that_are_mostly_numbers_are_a_warning(tmp_path, make, what):
    found = finding(column(tmp_path, make), "numbers-as-text")
    assert found.severity == "warning" and what in found.what and "column 'x'" in found.what


def test_the_remedy_reads_the_numbers_among_words(tmp_path):
    def make(i, v):
        return "TBD" if i % 3 == 0 else f"{v * 10:,.0f}"

    assert "column.x=number" in finding(column(tmp_path, make), "numbers-as-text").remedy
    data = read(tmp_path / "t.csv", target="y", kinds={"x": "number"}, allow_bad=True)
    assert data.rows["x"].to_list()[:3] == [None, round(VALUES[1] * 10), round(VALUES[2] * 10)]


@pytest.mark.parametrize(
    "make",
    [
        lambda i, v: f"10.0.{i}.{int(v) % 255}",
        lambda i, v: f"1.{i % 10}.{i % 7}",
        lambda i, v: f"DE{int(v * 1e6)}",
        lambda i, v: f"{int(v * 1000):06x}",
        lambda i, v: f"{'abc'[i % 3]}{i % 5}",
    ],
)
def test_codes_and_addresses_are_no_numbers(tmp_path, make):
    assert "numbers-as-text" not in checks(column(tmp_path, make))


def test_integers_that_numbers_cannot_hold_stay_apart(tmp_path):
    codes = [str(9007199254740993 + i) for i in range(N)]
    data = column(tmp_path, lambda i, v: codes[i])
    assert data.columns["x"].kind == "identifier" and data.rows["x"].to_list() == codes
    repeated = [codes[i % 3] for i in range(N)]
    for source in (pl.Series("x", repeated).cast(pl.Int64), pl.Series("x", repeated)):
        data = read({"x": source, "z": list(VALUES), "y": ["a", "b"] * (N // 2)}, target="y")
        assert data.columns["x"].kind == "category" and data.rows["x"].n_unique() == 3


def test_quotation_marks_with_backslashes(tmp_path):
    data = column(tmp_path, lambda i, v: f'he said \\"{i}, {v}\\" twice', kinds={"x": "text"})
    assert data.rows["x"][0] == f'he said "0, {VALUES[0]}" twice'
    assert finding(data, "escaped-quotes").places == ("t.csv:2",)
    for cell, expected in (("C:\\dir\\{i}\\", "C:\\dir\\0\\"), ('say \\""{i}\\""', 'say \\"0\\"')):  # no escapes
        data = column(tmp_path, lambda i, v, cell=cell: cell.replace("{i}", str(i)), kinds={"x": "text"})
        assert data.rows["x"][0] == expected and "escaped-quotes" not in checks(data)


@pytest.mark.parametrize("name", ["t.csv", "t.data", "t.dat"])
@pytest.mark.parametrize("header", [True, False])
def test_columns_separated_by_spaces(tmp_path, name, header):
    rows = ["x    z  y"] * header + [f"  {v:8.2f}  {i / 7:.3f}   {'ab'[i % 2]} " for i, v in enumerate(VALUES)]
    data = read(write(tmp_path / name, rows))
    assert len(data) == N and "space-delimited" in checks(data)
    assert list(data.columns) == (["x", "z", "y"] if header else ["c0", "c1", "c2"])
    assert data.rows[data.rows.columns[0]].to_list() == VALUES.tolist()


def test_lines_of_words_are_no_table(tmp_path):
    data = read(write(tmp_path / "t.csv", ["text", *(f"good thing {w}" for w in "abcdefghij")]))
    assert "space-delimited" not in checks(data) and len(data) == 10


@pytest.mark.parametrize("names", ["1,7,40,variety", "3,5,variety", "7,variety"])
def test_whole_numbers_above_fractions_are_names(tmp_path, names):
    width = names.count(",")
    rows = [",".join([*(f"{v + k:.2f}" for k in range(width)), "ab"[i % 2]]) for i, v in enumerate(VALUES % 9)]
    data = read(write(tmp_path / "t.csv", [names, *rows]), allow_bad=True)
    assert list(data.columns) == names.split(",") and len(data) == N
    assert set(data.rows["variety"]) == {"a", "b"}


def test_the_word_na_is_a_class_next_to_empty_cells_on_request(tmp_path):
    rows = [f"{v},{['NA', 'EU', '', 'AS'][i % 4]}" for i, v in enumerate(VALUES)]
    data = read(
        write(tmp_path / "t.csv", ["x,continent", *rows]), target="continent", kinds={"continent": "category"}, allow_bad=True
    )
    assert set(data.rows["continent"]) == {"NA", "EU", "AS"} and len(data) == 45


def test_percent_signs_mark_comments(tmp_path):
    data = read(
        write(tmp_path / "t.csv", ["% made by hand", "x,z,y", *(f"{v},{i},{'ab'[i % 2]}" for i, v in enumerate(VALUES))])
    )
    assert len(data) == N and finding(data, "comment-lines").places == ("t.csv:1",)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda i, v: f"{1600 + i}-{1650 + 2 * i}", "ranges or pairs of numbers, such as '1600-1650'"),  # as reported
        (lambda i, v: f"#{1600 + 3 * i}", "numbers after a sign"),
        (lambda i, v: ["1 1/2", "2 3/4", "1/2", "3"][i % 4], "fractions"),
        (lambda i, v: f"{5 + i % 9}±0.{i % 5}", "numbers with a margin of error"),
        (lambda i, v: f"{i} to {i + 10}", "ranges or pairs of numbers"),  # siblings
        (lambda i, v: f"{10 + i}x{20 + i}", "ranges or pairs of numbers"),
        (lambda i, v: f"{5 + i % 2}'{i % 12}\"\"", "feet and inches"),
        (lambda i, v: f"{10 * (i % 12)}+", "numbers with a plus sign"),
        (lambda i, v: f"1.{i % 9}x10^{i % 4}", "powers of ten"),
        (lambda i, v: f"{i % 10}/10", "fractions"),
        (lambda i, v: f"~{30 + i}", "limits or approximate numbers"),
        (lambda i, v: f"{i % 5} ½", "fractions"),
        (lambda i, v: f"No. {i}", "numbers after a sign"),
        (lambda i, v: f"{v:.1f} +/- 0.2", "numbers with a margin of error"),
    ],
)  # fmt: skip
def test_numbers_in_words_and_symbols_are_a_warning(tmp_path, make, what):
    found = finding(column(tmp_path, make), "numbers-as-text")
    assert found.severity == "warning" and what in found.what
    assert ("column.x=number" in found.remedy) == ("1 1/2" in found.what)  # where some cells are numbers


@pytest.mark.parametrize(
    "make",
    [
        lambda i, v: ["18-25", "26-35", "36-50", "51-99"][i % 4],  # groups
        lambda i, v: f"0{i:03d}-{9000 + i}",  # codes
        lambda i, v: f"555-{1000 + 83 * i % 977}"[:8] if i % 2 else f"555-{100 + i}",
        lambda i, v: f"{i % 3 + 1}st",
        lambda i, v: f"{i:02d}/20",
        lambda i, v: f"A-{i}",
    ],
)
def test_groups_and_codes_are_no_numbers(tmp_path, make):
    assert "numbers-as-text" not in checks(column(tmp_path, make))


@pytest.mark.parametrize("sentinel", [-999, 9999, 99999.0, -1e30, -9999, 99, 1e5])
@pytest.mark.parametrize("target", [False, True])
def test_numbers_that_stand_for_missing_values_are_a_warning(sentinel, target):
    values = [sentinel if i % 9 == 4 else float(v) for i, v in enumerate(np.linspace(10, 35, N))]
    other = [i % 7 / 2 for i in range(N)]
    data = read({"x": other if target else values, "y": values if target else other}, target="y")
    found = finding(data, "sentinel")
    assert found.severity == "warning" and f"holds {sentinel:.15g} in 7 rows, and otherwise 10 to 35" in found.what
    assert found.places[0] == data.locate_row(4) and "empty" in found.remedy


def test_a_negative_number_among_positive_ones_and_in_series(tmp_path):
    values = [-999.0 if i % 9 == 4 else 90.0 * i for i in range(N)]
    assert "holds -999" in finding(read({"x": values, "y": ["a", "b"] * 30}, target="y", allow_bad=True), "sentinel").what
    rows = [f"2024-{1 + i // 28:02d}-{1 + i % 28:02d},{-999 if i == 5 or i > 40 else 10 + i % 7}" for i in range(56)]
    data = read(write(tmp_path / "t.csv", ["date,value", *rows]), column_spec=task("time-series-forecasting").column_spec)
    assert finding(data, "sentinel").places[0] == "t.csv:7"


@pytest.mark.parametrize(
    "values",
    [
        [0.0 if i % 4 == 0 else 20_000 + 500.0 * i for i in range(N)],  # no income
        [1000.0 if i == 7 else i / 3 for i in range(N)],  # one large value
        [float(2 ** (i % 12)) for i in range(N)],
        [np.exp(5 * np.sin(i)) for i in range(N)],
        [99.0 if i % 9 == 0 else 40 + 0.9 * i for i in range(N)],  # within reach
        [1e6 if i % 2 else 1.0 for i in range(N)],  # two values
        [5.0] * 57 + [1.0, 2.0, 100.0],
    ],
)
def test_usual_values_stand_for_nothing_else(values):
    data = read({"x": values, "z": [i % 7 / 2 for i in range(N)], "y": ["a", "b"] * (N // 2)}, target="y", allow_bad=True)
    assert "sentinel" not in checks(data)


@pytest.mark.parametrize("name", ["id", "row_id", "customerID", "index", "Key"])
def test_an_identifier_at_the_end_is_no_target(tmp_path, name):
    rows = [f"{v},{'ab'[i % 2]},{i + 100}" for i, v in enumerate(VALUES)]
    data = read(write(tmp_path / "t.csv", [f"x,kind,{name}", *rows]))
    assert data.target.name == "kind" and data.columns[name].role == "ignored"
    assert "neither files nor identifiers" in finding(data, "target-chosen").what
