"""Prediction and evaluation of tables apply what training decided, and report the cells that do not fit, row by row."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

import fieldguide
from damage import write
from fieldguide.core.errors import DataError
from fieldguide.data import Column, read
from fieldguide.data.preprocessing import Labels
from fieldguide.data.readers.delimited import has_header
from fieldguide.data.validation.findings import MAX_PROBLEM_LINES, describe_problems

SETTINGS = {"steps": 5, "precision": "float32"}
N = 240


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def run(home):
    """A classifier of grouped numbers, dates with the month first, codes with leading zeros, colours and a flag."""
    rng = np.random.default_rng(0)
    rows = ["x1,day,code,colour,flag,width,grade"]
    for i in range(N):
        x = rng.uniform(200, 9000)
        day = f"{i % 12 + 1:02d}/{i % 27 + 1:02d}/2023"
        width = "" if i % 10 == 0 else f"{rng.uniform(1, 5):.2f}"
        rows.append(f'"{x:,.0f}",{day},{i % 8 + 1:02d},{"rgb"[i % 3]},{["yes", "no"][i % 2]},{width},{1 if x > 4000 else 0}')
    path = write(home / "train.csv", rows)
    return fieldguide.fit(path, target="grade", model="mlp-s", out=home / "run", settings=SETTINGS)


NAMES = "x1,day,code,colour,flag,width"


def predict(run, home, *rows, names=NAMES):
    return run.predict(str(write(home / "p.csv", [names, *rows])))


def problems(found):
    return {(p.column, p.what): p for p in found.problems}


def probabilities(found):
    return np.array([r["probability"] * (1 if r["label"] == "1" else -1) for r in found])


def test_the_schema_stores_formats_and_ranges(run):
    columns = {c["name"]: c for c in json.loads((run.path / "preprocess" / "task.json").read_text())["columns"]}
    assert columns["x1"]["number_format"] == {"decimal": ".", "grouping": ","}
    assert columns["day"]["date_format"] == {"order": "mdy"} and columns["day"]["range"][1].startswith("2023-12")
    assert columns["x1"]["range"][0] > 200 and columns["code"]["kind"] == "category"


def test_inputs_that_fit_have_no_notes(run, home):
    found = predict(run, home, '"1,299",05/06/2023,03,r,yes,2.5', "950,12/25/2023,08,g,no,")
    assert found.problems == [] and found.notes == [] and len(found) == 2


def test_dates_are_read_as_in_training_whatever_is_next_to_them(run, home):
    """12/05/2023 is December 5th alone, next to 12/25/2023, next to an ISO date, and spelled out."""
    alone = predict(run, home, "900,12/05/2023,03,r,yes,2.5")
    for other in ("12/25/2023", "2023-05-12", "05/05/2023"):
        both = predict(run, home, "900,12/05/2023,03,r,yes,2.5", f"900,{other},03,r,yes,2.5")
        assert both[0]["probability"] == pytest.approx(alone[0]["probability"], abs=1e-6) and both.problems == []
    for spelled in ("2023-12-05", "5 Dec 2023", "12/5/23"):
        same = predict(run, home, f"900,{spelled},03,r,yes,2.5")
        assert same[0]["probability"] == pytest.approx(alone[0]["probability"], abs=1e-6) and same.problems == []


def test_numbers_are_read_as_in_training(run, home):
    grouped = predict(run, home, '"2,499",12/05/2023,03,r,yes,2.5')
    plain = predict(run, home, "2499,12/05/2023,03,r,yes,2.5")
    assert grouped[0]["probability"] == pytest.approx(plain[0]["probability"], abs=1e-6)
    assert ("x1", "malformed") in problems(predict(run, home, '"2.499,5",12/05/2023,03,r,yes,2.5'))
    special = predict(run, home, "\uff12\uff14\uff19\uff19\u200b,12/05/2023,03,r,yes,2.5")
    assert special[0]["probability"] == pytest.approx(plain[0]["probability"], abs=1e-6) and special.problems == []


@pytest.mark.parametrize(
    ("row", "column", "value"),
    [
        ("abc,12/05/2023,03,r,yes,2.5", "x1", "abc"),
        ("900,25/12/2023,03,r,yes,2.5", "day", "25/12/2023"),
        ("900,soon,03,r,yes,2.5", "day", "soon"),
        ("900,12/05/2023,03,r,perhaps,2.5", "flag", "perhaps"),
        ("900,12/05/2023,03,r,yes,n.a.", "width", "n.a."),
        ("900,12/05/2023,03,r,yes,2;5", "width", "2;5"),
        ("1e999,12/05/2023,03,r,yes,2", "x1", "inf"),
    ],
)
def test_malformed_cells_are_reported(run, home, row, column, value):
    found = predict(run, home, "900,12/05/2023,03,r,yes,2.5", row)
    problem = problems(found)[column, "malformed"]
    assert problem.rows == (1,) and problem.examples == (("p.csv:3", value),)
    assert any(f"column {column!r}" in n and value in n and "p.csv:3" in n for n in found.notes)
    assert len(found) == 2 and "label" in found[1]  # predicted as if the cell were empty


def test_the_note_says_whether_training_had_missing_values(run, home):
    found = predict(run, home, "abc,12/05/2023,03,r,yes,oops")
    assert "although training had no missing values" in problems(found)["x1", "malformed"].detail
    assert "although" not in problems(found)["width", "malformed"].detail


def test_a_row_of_malformed_cells_only_is_unusable(run, home):
    found = predict(run, home, "abc,never,,,perhaps,x", "900,12/05/2023,03,r,yes,2.5")
    assert "error" in found[0] and "malformed" in found[0]["error"] and "label" in found[1]


@pytest.mark.parametrize(
    ("column", "row"), [("code", "900,12/05/2023,77,r,yes,2.5"), ("colour", "900,12/05/2023,03,pink,yes,2.5")]
)
def test_unseen_categories_are_reported(run, home, column, row):
    found = predict(run, home, "900,12/05/2023,03,r,yes,2.5", row, row)
    problem = problems(found)[column, "unseen"]
    assert problem.rows == (1, 2) and problem.examples[0][0] == "p.csv:3" and len(found.problems) == 1


@pytest.mark.parametrize(
    ("column", "row"),
    [
        ("x1", "99000,12/05/2023,03,r,yes,2.5"),
        ("x1", "1.299,12/05/2023,03,r,yes,2.5"),
        ("x1", "-50,12/05/2023,03,r,yes,2.5"),
        ("day", "900,12/05/0023,03,r,yes,2.5"),
        ("day", "900,12/05/2123,03,r,yes,2.5"),
    ],
)
def test_values_far_outside_the_training_range_are_reported(run, home, column, row):
    found = predict(run, home, row, "9100,01/05/2024,03,r,yes,2.5")  # slightly outside is ordinary
    if column == "day" and "0023" in row:
        assert problems(found)[column, "malformed" if (column, "malformed") in problems(found) else "out-of-range"].rows == (0,)
        return
    assert problems(found)[column, "out-of-range"].rows == (0,) and len(found.problems) == 1


def test_empty_cells_that_training_did_not_have_are_noted(run, home):
    found = predict(run, home, ",12/05/2023,03,r,yes,")
    assert found.problems == [] and any("empty cells in column 'x1'" in n and "p.csv:2" in n for n in found.notes)
    assert not any("'width'" in n for n in found.notes)


@pytest.mark.parametrize("code", [["03"], [3], [3.0], [3.0, None], ["3"], ["3.0"], ["3", "12"]])
def test_spellings_of_a_code_are_one_category(run, code):
    n = len(code)
    table = {
        "x1": [900] * n,
        "day": ["12/05/2023"] * n,
        "code": code,
        "colour": ["r"] * n,
        "flag": [True] * n,
        "width": [2.5] * n,
    }
    wanted = run.predict({**{k: v[:1] for k, v in table.items()}, "code": ["03"]})
    found = run.predict(table)
    assert found[0]["probability"] == pytest.approx(wanted[0]["probability"], abs=1e-6)
    assert [p.rows for p in found.problems] == ([(1,)] if code[-1] == "12" else [])


@pytest.mark.parametrize(
    "names", ["X1,Day,CODE,Colour,FLAG,width", "x_1, day ,code,colour,flag,Width", "X-1,day,code,colour,flag,width"]
)
def test_names_that_differ_in_spelling_are_matched_by_name(run, home, names):
    row = "900,12/05/2023,03,r,yes,2.5"
    wanted = predict(run, home, row)
    found = predict(run, home, row, names=names)
    assert len(found) == 1 and found[0]["probability"] == pytest.approx(wanted[0]["probability"], abs=1e-6)
    assert any("matched by name" in n and "as 'x1'" in n for n in found.notes)


def test_a_first_line_of_names_in_another_spelling_is_no_data():
    rows = pl.DataFrame({"c0": ["red", "blue", "red"], "c1": ["big", "big", "red"]})
    assert has_header(rows, ["COLOUR", "big"], ("colour", "size"))  # a known name decides, although "big" occurs below
    assert not has_header(rows, ["red", "big"], ("colour", "size"))


def test_other_orders_are_matched_by_name(run, home):
    wanted = predict(run, home, "900,12/05/2023,03,r,yes,2.5")
    found = predict(run, home, "1,2.5,yes,r,03,12/05/2023,900", names="Grade,Width,Flag,Colour,Code,Day,X1")
    assert found[0]["probability"] == pytest.approx(wanted[0]["probability"], abs=1e-6) and len(found) == 1


@pytest.mark.parametrize("names", ["amount,date,dept,tint,option,breadth", "amount,day,code,colour,flag,width"])
def test_missing_names_are_listed_and_never_taken_by_position(run, home, names):
    with pytest.raises(DataError, match=r"(?s)columns that the model needs are missing:.*'x1'"):
        predict(run, home, "900,12/05/2023,03,r,yes,2.5", names=names)


def test_a_file_without_names_is_read_in_order(run, home):
    row = "900,12/05/2023,03,r,yes,2.5"
    wanted = predict(run, home, row)
    found = run.predict(str(write(home / "p.csv", [row, row])))
    assert len(found) == 2 and found[0]["probability"] == pytest.approx(wanted[0]["probability"], abs=1e-6)
    assert any("looks like data" in n and "in order" in n for n in found.notes)
    assert len(run.predict(str(write(home / "p.csv", [row])))) == 1


def test_notes_are_grouped(run, home):
    found = predict(run, home, *["abc,12/05/2023,03,r,yes,2.5"] * 500)
    (note,) = found.notes
    assert note.count("p.csv:") == 3 and "500 cells" in note
    many = [p for p in found.problems for _ in range(30)]
    assert len(describe_problems(many)) == MAX_PROBLEM_LINES


def test_several_inputs_keep_their_rows(run, home):
    a = write(home / "a.csv", [NAMES, "900,12/05/2023,03,r,yes,2.5", "900,12/05/2023,03,r,yes,2.5"])
    b = write(home / "b.csv", [NAMES, "abc,12/05/2023,03,r,yes,2.5"])
    found = run.predict([str(a), str(b)])
    assert problems(found)["x1", "malformed"].rows == (2,) and problems(found)["x1", "malformed"].examples[0][0].endswith(
        "b.csv:2"
    )


def test_evaluate_gives_the_notes_of_predict(run, home):
    rows = ["900,12/05/2023,03,r,yes,2.5,1.0"] * 20 + ["abc,12/05/2023,77,r,yes,2.5,0", '"8,000",12/05/2023,03,r,yes,2.5,1']
    path = write(home / "e.csv", [f"{NAMES},grade", *rows])
    predicted, scored = run.predict(str(path)), run.evaluate(str(path))
    assert scored["rows"] == 22 and predicted.notes and set(predicted.notes) <= set(scored["notes"])


@pytest.mark.parametrize(
    "grades", [["1", "0"], ["1.0", "0.0"], [1, 0], [1.0, 0.0], [True, False], ["01", "00"], ["True", "False"]]
)
def test_spellings_of_a_class_score_alike(run, home, grades):
    table = {"x1": [900, 8000], "day": ["12/05/2023"] * 2, "code": ["03"] * 2, "colour": ["r", "g"], "flag": ["yes"] * 2}
    wanted = run.evaluate({**table, "width": [2.5, 3.5], "grade": ["1", "0"]})["scores"]
    scored = run.evaluate({**table, "width": [2.5, 3.5], "grade": grades})
    assert scored["scores"] == pytest.approx(wanted, nan_ok=True) and scored["rows"] == 2


def test_labels_keep_names_that_differ():
    assert Labels(("1", "1.0")).apply(["1", "1.0", "2"]).tolist() == [0, 1, -1]
    assert Labels(("1", "01")).apply(["1", "01", "001"]).tolist() == [0, 1, -1]
    assert Labels(("a", "1")).apply(["true", "1.0"]).tolist() == [1, 1]


@pytest.mark.slow
def test_the_command_line_exits_with_3(run, home):
    def call(*rows):
        path = write(home / "c.csv", [NAMES, *rows])
        return subprocess.run(
            [sys.executable, "-m", "fieldguide", "predict", str(run.path), str(path), "--json"],
            capture_output=True,
            text=True,
            check=False,
        )

    ended = call("900,12/05/2023,03,r,yes,2.5", "abc,12/05/2023,77,r,yes,2.5")
    assert ended.returncode == 3 and len(ended.stdout.splitlines()) == 2
    assert "'abc' (c.csv:3)" in ended.stderr and "'77' (c.csv:3)" in ended.stderr and "2 cells do not fit" in ended.stderr
    assert call("900,12/05/2023,03,r,yes,2.5").returncode == 0


def test_folders_without_formats_are_read_as_before():
    """A schema of an earlier version: decimal commas are recognized, and the best matching format of dates is used."""
    schema = [Column("x", "number"), Column("day", "date"), Column("y", "category", "target")]
    data = read({"x": ["1,5", "2,25"], "day": ["13/12/2023", "12/05/2023"]}, schema=schema, labels_optional=True)
    assert data.rows["x"].to_list() == [1.5, 2.25] and data.rows["day"][1].month == 5
    assert data.problems == []


def test_a_class_named_none_is_trained_and_predicted(tmp_path):
    rows = ["x,z,level"] + [f"{i * 0.37 % 5:.2f},{i % 7},{['None', 'mild', 'severe'][i % 3]}" for i in range(90)]
    made = fieldguide.fit(
        write(tmp_path / "t.csv", rows), target="level", model="mlp-s", out=tmp_path / "run", settings=SETTINGS
    )
    assert made.task.labels == ["None", "mild", "severe"]
    new = [f"{i * 0.37 % 5 + 0.005:.3f},{i % 7},{['None', 'mild', 'severe'][i % 3]}" for i in range(30)]
    assert made.evaluate(str(write(tmp_path / "e.csv", [rows[0], *new])))["rows"] == 30
    again = fieldguide.pipeline(tmp_path / "run").predict(pl.DataFrame({"x": [1.5], "z": [3]}))
    assert again[0]["label"] in made.task.labels


def test_percentages_are_predicted_in_their_format(tmp_path):
    rows = ["share;z;price"] + [f"{i % 9 + 1},{i % 10}%;{i % 7};{1000 + 13 * i}" for i in range(60)]
    made = fieldguide.fit(
        write(tmp_path / "t.csv", rows), target="price", model="mlp-s", out=tmp_path / "run", settings=SETTINGS
    )
    found = made.predict(str(write(tmp_path / "p.csv", ["share;z", "8,5%;3", "0,085;3", "8.5%;3"])))
    assert problems(found)["share", "malformed"].rows == (1, 2)
