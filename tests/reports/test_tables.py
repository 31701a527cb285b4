"""Tables as people have them: what is read from number formats, headers, codes, malformed files and competition layouts."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from damage import checks, finding, write
from fieldguide.core.errors import DataError
from fieldguide.data import read
from fieldguide.data.number_formats import FileHints, NumberFormat, infer_format
from fieldguide.tasks import infer_task

N = 40


def table(path, values, mark=",", more=""):
    """A file with the column x, which repeats `values`, and a target of two classes."""
    rows = [f"{values[i % len(values)]}{mark}{'ab'[i % 3 == 0]}" for i in range(N)]
    return write(path, [f"x{mark}y", *rows])


def numbers(path, values, mark=","):
    data = read(table(path, [f'"{v}"' if mark in v else v for v in values], mark))
    assert data.columns["x"].kind == "number", data.columns["x"]
    return data, data.rows["x"].to_list()[: len(values)]


# 1: number formats


@pytest.mark.parametrize(
    ("mark", "values", "expected"),
    [
        (",", ["1,299", "948", "12,000"], [1299, 948, 12000]),  # the reported cases
        (";", ["2.499", "802", "1.250"], [2499, 802, 1250]),
        (";", ["5.894,58", "12,50", "948,00"], [5894.58, 12.5, 948]),
        (",", ["$27,815", "$948", "$1,000"], [27815, 948, 1000]),
        (",", ["8.18%", "10%", "0.5%"], [8.18, 10, 0.5]),
        (",", ["\u22125.5", "3", "\u22122"], [-5.5, 3, -2]),
        (",", ["1\u00a0299", "948", "12\u00a0000"], [1299, 948, 12000]),
        (";", ["1\u202f299,5", "948", "12\u2009000"], [1299.5, 948, 12000]),  # siblings
        (",", ["1'299.50", "948", "12\u2019000"], [1299.5, 948, 12000]),
        (",", ["(1,299.00)", "948.00", "(5.25)"], [-1299, 948, -5.25]),
        (",", ["12.5-", "3", "1,200"], [-12.5, 3, 1200]),
        (",", ["12,34,567", "1,000", "999"], [1234567, 1000, 999]),  # lakh
        (";", ["1.234.567", "802", "45"], [1234567, 802, 45]),
        (",", ["-$5.50", "$-3", "$1,204.25"], [-5.5, -3, 1204.25]),
        (";", ["1.299,00 €", "948,50 €", "7 €"], [1299, 948.5, 7]),
        (",", ["EUR 500", "EUR 1,250", "EUR 7.5"], [500, 1250, 7.5]),
        ("\t", ["5 kg", "7.5 kg", "12 kg"], [5, 7.5, 12]),
        (";", ["0.512", "1.250", "3.125"], [0.512, 1.25, 3.125]),  # a leading zero leaves no doubt
        (",", ["1.234", "5.678", "9.5"], [1.234, 5.678, 9.5]),
        (",", ["1.5e3", "2,000", "7"], [1500, 2000, 7]),
        (",", ["+5", "-3.25", ".5"], [5, -3.25, 0.5]),
        (",", ["\uff11\uff12", "\uff14.5", "7"], [12, 4.5, 7]),  # full-width digits
        (",", ["\u0661\u0662", "\u0664\u066b5".replace("5", "\u0665"), "\u0667"], [12, 4.5, 7]),  # Arabic digits
    ],
)
def test_number_formats(tmp_path, mark, values, expected):
    data, found = numbers(tmp_path / "t.csv", values, mark)
    assert found == expected
    assert data.columns["x"].role == "feature" and data.columns["x"].missing == 0


def test_percentages_keep_their_numbers_and_say_so(tmp_path):
    data, _ = numbers(tmp_path / "t.csv", ["8.18%", "10%"])
    assert "8.18% is 8.18" in data.columns["x"].why


@pytest.mark.parametrize(
    ("mark", "values", "read_as", "option", "other"),
    [
        (";", ["1,500", "2,250", "7,125"], 1.5, "decimal-point", 1500),
        (";", ["1.500", "2.250", "7.125"], 1500, "decimal-point", 1.5),
        (",", ["1,500", "2,250", "7,125"], 1500, "decimal-comma", 1.5),
        (",", ["2.499", "802", "1.250", "640"], 2.499, "decimal-comma", 2499),
        ("\t", ["2.499", "802", "1.250", "640"], 2499, "decimal-point", 2.499),
    ],
)
def test_ambiguous_numbers_are_reported_and_can_be_set(tmp_path, mark, values, read_as, option, other):
    data, found = numbers(tmp_path / "t.csv", values, mark)
    warning = finding(data, "ambiguous-numbers")
    assert found[0] == read_as and warning.severity == "warning" and f"read as {read_as:g}" in warning.what
    assert f"column.x=number:{option}" in warning.remedy
    chosen = read(tmp_path / "t.csv", kinds={"x": f"number:{option}"})
    assert chosen.rows["x"][0] == other and "ambiguous-numbers" not in checks(chosen)


def test_other_columns_decide(tmp_path):
    rows = ["x;z;y"] + [f"{i % 9 + 1}.{125 + i};{i % 7}.5;{'ab'[i % 3 == 0]}" for i in range(N)]
    data = read(write(tmp_path / "t.csv", rows))
    assert data.rows["x"][0] == 1.125 and "ambiguous-numbers" not in checks(data)
    rows = ["x;z;y"] + [f"{i % 9 + 1}.{125 + i};{i % 7},5;{'ab'[i % 3 == 0]}" for i in range(N)]
    data = read(write(tmp_path / "t.csv", rows))
    assert data.rows["x"][0] == 1125 and "ambiguous-numbers" not in checks(data)


def test_clear_numbers_are_not_reported(tmp_path):
    for values in (["1,299", "948", "12,000"], ["1,234,567", "1,000"], ["1,299.50", "12.5"]):
        assert "ambiguous-numbers" not in checks(numbers(tmp_path / "t.csv", values)[0])


@pytest.mark.parametrize(
    "values",
    [
        ["192.168.100.200", "10.0.0.1"],
        ["A12", "B13"],
        ["10:30", "11:20"],
        ["5-7", "3-4"],
        ["1,2", "3,4,5"],
        ["€5", "$7"],  # different currencies cannot be compared
        ["5 kg", "7 lb"],
    ],
)
def test_what_only_looks_like_numbers_is_not_read_as_numbers(values):
    assert infer_format(pl.Series("x", values * 3)).values.null_count() == 3 * len(values)


def test_several_units_are_named(tmp_path):
    data = read(table(tmp_path / "t.csv", ["€5", "$7", "€9"]))
    assert data.columns["x"].kind == "category"
    assert "several units ('$', '€')" in finding(data, "numbers-as-text").what


@pytest.mark.parametrize("values", [["27k", "1.2M", "948"], ["8.18%", "0.05", "12%"], ["$5", "7.5k", "$12"]])
def test_numbers_in_mixed_units_are_a_warning(tmp_path, values):
    data = read(table(tmp_path / "t.csv", values))
    assert data.columns["x"].kind == "category" and finding(data, "numbers-as-text").severity == "warning"


def test_codes_with_letters_are_no_numbers_in_units(tmp_path):
    for values in (["12A", "3B", "7C"], ["A12", "B13", "C1"], ["3D", "4D", "2D"]):
        assert "numbers-as-text" not in checks(read(table(tmp_path / "t.csv", values)))


def test_a_number_format_is_stored_and_applied_without_guessing():
    text = pl.Series("x", ["1.299,50", "948,00", "12,25"])
    form = infer_format(text, FileHints(";")).format
    again = NumberFormat.from_json(json.loads(json.dumps(form.to_json())))
    assert again == form and again.parse(pl.Series(["2.499", "2,499", "1,299.50"])).to_list() == [2499, 2.499, None]


def test_the_schema_stores_the_format(tmp_path):
    data, _ = numbers(tmp_path / "t.csv", ["1,299", "948", "12,000"])
    schema = json.loads(json.dumps(data.schema()))
    # Alone, 2,499 could be 2.499; an ordinary 2.5 is still one.
    found = read(write(tmp_path / "p.csv", ["x", '"2,499"', "2.5", "abc"]), schema=schema, labels_optional=True)
    assert found.rows["x"].to_list() == [2499, 2.5, None]


def test_misfits_of_a_grouped_column_are_reported(tmp_path):
    rows = ["x,z,y"] + [f'"1,{100 + i}",{i % 7},{"ab"[i % 2]}' for i in range(60)]
    rows[7] = "oops,3,a"
    data = read(write(tmp_path / "t.csv", rows))
    assert finding(data, "mixed-types").places == ("t.csv:8",) and data.rows["x"][0] == 1100


# 3: headers, codes and classes


@pytest.mark.parametrize(
    "names",
    ["400,410,420,430,variety", "2010,2011,2012,country", "0,1,2,label", "1100,1102.5,1105,1107.5,kind", "550,610,590,class"],
)
def test_numeric_headers_are_names(tmp_path, names):
    rng, width = np.random.default_rng(0), names.count(",")
    rows = [names] + [",".join([*(f"{v:.3f}" for v in rng.uniform(0.1, 0.9, width)), "pqr"[i % 3]]) for i in range(N)]
    data = read(write(tmp_path / "t.csv", rows))
    assert list(data.columns) == names.split(",") and len(data) == N and data.target.distinct == 3


def test_lines_of_data_are_no_numeric_header(tmp_path):
    rng = np.random.default_rng(0)
    rows = [",".join([*(f"{v:.3f}" for v in rng.uniform(0.1, 0.9, 4)), "pqr"[i % 3]]) for i in range(N)]
    assert len(read(write(tmp_path / "t.csv", rows))) == N
    rows = [f"{i * 7 % 41},{i * 7 % 41 + 1},{i * 7 % 41 + 2},{'pqr'[i % 3]}" for i in range(N)]  # equally spaced throughout
    assert len(read(write(tmp_path / "t.csv", rows))) == N


@pytest.mark.parametrize(
    "values",
    [
        [*(f"{i:02d}" for i in range(1, 96)), "2A", "2B"],  # departments of France
        ["01", "02", "10", "20"],
        ["007", "010", "123", "99X"],
        ["00501", "10001", "90210"],
        ["0", "00", "01", "1"],
    ],
)
def test_codes_stay_text(tmp_path, values):
    rows = ["code,z,y"] + [f"{values[i % len(values)]},{i % 9},{'ab'[i % 3 == 0]}" for i in range(300)]
    data = read(write(tmp_path / "t.csv", rows))
    assert data.columns["code"].kind == "category" and set(data.rows["code"]) == set(values)
    assert "mixed-types" not in checks(data)


def test_whole_floats_are_the_codes_of_integers():
    codes = [20.0, None, 31.0, 7.0] * 10
    data = read({"code": codes, "z": [0.5, 1.0] * 20, "y": list("abcd") * 10}, target="y", kinds={"code": "category"})
    assert set(data.rows["code"].drop_nulls()) == {"20", "31", "7"}


@pytest.mark.parametrize(
    "values", [["1", "1.0", "0"], ["2", "1.0", "2.0"], ["1.0", "0.0"], [1, 0, 1], [1.0, 0.0, 1.0], ["a", "1", "1.0"]]
)
def test_spellings_of_a_number_are_one_class(values):
    data = read({"x": np.arange(60) * 0.7, "y": (values * 60)[:60]}, target="y")
    assert data.target.kind == "category" and data.target.distinct == 2
    assert not any(str(v).endswith(".0") for v in data.rows["y"])


@pytest.mark.parametrize("word", ["None", "NA", "null", "n/a", "-"])
def test_words_for_missing_values_can_be_classes(tmp_path, word):
    rows = ["x,y"] + [f"{i * 0.7},{[word, 'mild', 'severe'][i % 3]}" for i in range(60)]
    data = read(write(tmp_path / "t.csv", rows), target="y")
    assert set(data.rows["y"]) == {word, "mild", "severe"} and data.target.literals == (word,)
    assert any(f"{word!r} is a class" in f.what for f in data.findings)
    again = read(write(tmp_path / "p.csv", ["x,y", f"1.5,{word}", "2,"]), schema=data.schema(), labels_optional=True)
    assert again.rows["y"].to_list() == [word, None]


@pytest.mark.parametrize("values", [["True", "False", "1", "0"], ["TRUE", "1.0", "0.0"], ["true", "false", "0"]])
def test_truth_values_and_digits_are_one_class(tmp_path, values):
    rows = ["x,z,y"] + [f"{i * 0.7},{i % 7},{values[i % len(values)]}" for i in range(60)]
    data = read(write(tmp_path / "t.csv", rows), target="y")
    assert data.target.distinct == 2 and data.target.why == "the target has 2 classes"
    assert {v.lower() for v in data.rows["y"]} == {"true", "false"}


def test_codes_that_are_written_as_formulas(tmp_path):
    rows = ["zip,z,y"] + [f'="0{100 + i % 9}",{i % 7},{"ab"[i % 2]}' for i in range(60)]
    data = read(write(tmp_path / "t.csv", rows))
    assert data.rows["zip"][0] == "0100" and data.columns["zip"].kind == "category" and "formula-text" in checks(data)


def test_words_for_missing_values_stay_missing_without_evidence(tmp_path):
    rows = ["x,y"] + [f"{i * 0.7},{'ab'[i % 2]}" for i in range(300)]
    rows[5] = rows[9] = "1.5,NA"
    data = read(write(tmp_path / "t.csv", rows))
    assert len(data) == 298 and "column.y=category" in finding(data, "target-missing").remedy
    assert len(read(tmp_path / "t.csv", kinds={"y": "category"})) == 300  # declared
    rows[5] = "1.5,"
    rows[11] = rows[13] = "1.5,None"
    with pytest.raises(DataError, match=r"\[target-missing\]"):  # an empty cell is missing, and so are the words
        read(write(tmp_path / "t.csv", rows))


def test_yes_and_true_are_not_two_values(tmp_path):
    assert read(table(tmp_path / "t.csv", ["yes", "true"])).columns["x"].kind == "category"
    assert read(table(tmp_path / "t.csv", ["yes", "no"])).columns["x"].kind == "boolean"


# 4: no dead ends


def test_a_feature_that_determines_the_class_is_accepted_on_request(tmp_path):
    rows = ["size,code,y"] + [f"{i * 0.7},{'uv'[i % 2]},{'ab'[i % 2]}" for i in range(80)]
    with pytest.raises(DataError, match=r"use it with --allow-bad"):
        read(write(tmp_path / "t.csv", rows))
    data = read(tmp_path / "t.csv", allow_bad=True)
    assert finding(data, "leak").severity == "warning" and data.columns["code"].role == "feature"


def competition(home, target="price", test_columns="id,size,colour", fill=None):
    names = ["id", "size", "colour", target]
    rows = [[str(i), f"{i * 0.7:.1f}", "rgb"[i % 3], f"{i * 2.5 + i % 7:.2f}"] for i in range(80)]
    write(home / "train.csv", [",".join(names), *(",".join(r) for r in rows[:60])])
    kept = [names.index(n) for n in test_columns.split(",")]
    write(
        home / "test.csv",
        [test_columns, *(",".join(r[k] if k != 3 or fill is None else fill for k in kept) for r in rows[60:])],
    )


@pytest.mark.parametrize("target", [None, "price"])
def test_a_test_file_without_the_target_is_the_set_to_predict(tmp_path, target):
    competition(tmp_path)
    write(tmp_path / "sample_submission.csv", ["id,price", "60,0"])
    data = read(tmp_path, target=target)
    assert len(data) == 60 and data.target.name == "price" and data.target.kind == "number"
    note = finding(data, "unlabeled-test")
    assert "the set to predict" in note.what and "predict RUN test.csv" in note.remedy
    assert finding(data, "submission-file").places == ("sample_submission.csv",)
    if target is None:
        assert "only test.csv lacks it" in finding(data, "target-chosen").what


def test_a_test_file_with_empty_targets_is_the_set_to_predict(tmp_path):
    competition(tmp_path, test_columns="id,size,colour,price", fill="")
    data = read(tmp_path, target="price")
    assert len(data) == 60 and "unlabeled-test" in checks(data)


def test_a_test_file_that_lacks_features_too_is_named(tmp_path):
    competition(tmp_path, test_columns="id,size")
    note = finding(read(tmp_path, target="price"), "unlabeled-test")
    assert note.severity == "warning" and "also lacks 'colour'" in note.what and "column.colour=identifier" in note.remedy
    with pytest.raises(DataError, match="name the target with --target"):
        read(tmp_path)


def test_a_test_file_that_lacks_a_feature_is_an_error(tmp_path):
    competition(tmp_path, target="label", test_columns="id,size,label")
    with pytest.raises(DataError, match="different columns"):
        read(tmp_path)


def test_an_error_says_which_target_was_chosen(tmp_path):
    rows = ["a,b,c"] + [f"{i},{i % 7},same" for i in range(40)]
    with pytest.raises(DataError, match=r"note: no target was specified: column 'c' was chosen because it is the last column"):
        read(write(tmp_path / "t.csv", rows))


@pytest.mark.parametrize(
    ("names", "target"),
    [("x,y,z", "z"), ("x,y,z,price", "price"), ("id,x,y,height", "height"), ("x,y", "y"), ("x,z,y", "y"), ("y,x1,x2", "y")],
)
def test_coordinates_are_no_targets(tmp_path, names, target):
    rng, width = np.random.default_rng(0), names.count(",") + 1
    rows = [names] + [",".join(f"{v:.3f}" for v in rng.normal(size=width)) for _ in range(60)]
    assert read(write(tmp_path / "t.csv", rows)).target.name == target


# 5: malformed files


def body(text):
    return [text.format(i=i, y="ab"[i % 2]) for i in range(N)]


def test_a_space_before_a_quotation_mark(tmp_path):
    data = read(write(tmp_path / "t.csv", ["x, city, y", *body('{i}.5, "Paris, {i}", {y}')]))
    found = finding(data, "space-before-quote")
    assert data.rows["city"][1] == "Paris, 1" and found.places[0] == "t.csv:2" and found.count == N
    data = read(write(tmp_path / "t.csv", ["x, city, y", *body('{i}.5, "Paris {i}", {y}')]))  # no delimiter inside
    assert data.rows["city"][1] == "Paris 1" and "space-before-quote" in checks(data)


@pytest.mark.parametrize("at", [0, 1, 12])
def test_comment_lines(tmp_path, at):
    rows = ["x,z,y", *body("{i}.5,{i},{y}")]
    rows[at:at] = ["# made by a logger", "# do not edit"]
    data = read(write(tmp_path / "t.csv", rows))
    assert list(data.columns) == ["x", "z", "y"] and len(data) == N
    assert finding(data, "comment-lines").places == (f"t.csv:{at + 1}", f"t.csv:{at + 2}")
    assert data.locate_row(N - 1) == f"t.csv:{N + 3}" and "empty-lines" not in checks(data)


def test_a_name_with_a_hash_is_no_comment(tmp_path):
    data = read(write(tmp_path / "t.csv", ["#x,z,y", *body("{i}.5,{i},{y}")]))
    assert list(data.columns) == ["#x", "z", "y"] and len(data) == N


@pytest.mark.parametrize("line", ["sep=;", '"sep=;"', "sep=;\r"])
def test_a_line_that_names_the_delimiter(tmp_path, line):
    data = read(write(tmp_path / "t.csv", [line, "x;z;y", *body("{i},5;{i};{y}")]))
    assert list(data.columns) == ["x", "z", "y"] and data.rows["x"][3] == 3.5
    assert finding(data, "delimiter-line").places == ("t.csv:1",) and data.locate_row(0) == "t.csv:3"


def test_delimiters_at_the_end_of_lines(tmp_path):
    data = read(write(tmp_path / "t.csv", ["x,z,y", *body("{i}.5,{i},{y},")]))
    assert list(data.columns) == ["x", "z", "y"] and finding(data, "trailing-delimiter").places == ("t.csv:2",)
    data = read(write(tmp_path / "t.csv", ["x;z;y;", *body("{i}.5;{i};{y};")]))
    assert list(data.columns) == ["x", "z", "y"] and "trailing-delimiter" in checks(data)
    data = read(write(tmp_path / "t.csv", ["x,z,y", *body("{i}.5,{i},{y}")[:-1], "7.5,3,a,,"]))
    assert len(data) == N and finding(data, "trailing-delimiter").places == (f"t.csv:{N + 1}",)


def test_carriage_returns_as_line_ends(tmp_path):
    (tmp_path / "t.csv").write_bytes("\r".join(["x,z,y", *body("{i}.5,{i},{y}")]).encode())
    data = read(tmp_path / "t.csv")
    assert len(data) == N and "CR alone" in finding(data, "line-ends").what and data.locate_row(1) == "t.csv:3"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["x,z,y", *body("{i},5,{i},{y}")[1:][::-1]], r"t\.csv:2 has 4.*Numbers with a comma"),
        (["z,y", *body("name {i},{i},{y}")], r"t\.csv:2 has 3.*the first column, perhaps of row names, has no name"),
        (["x,z,y", *body("{i}.5,{i},{y}"), "40 rows"], rf"t\.csv:{N + 2} has 1.*a title or a footer"),
        (["x,z,y", *body("{i}.5,{i},{y}")[:-1], "1,2,a,extra"], rf"t\.csv:{N + 1} has 4.*Quote cells that contain ','"),
        (["Report 2024", "x,z,y", *body("{i}.5,{i},{y}")], r"t\.csv:2 has 3.*perhaps a title"),
        (["x,z,y", *body("USD 1,{i}00,{i}.5,{y}")[1:]], r"t\.csv:2 has 4.*Numbers with a comma"),
        (["sep=;"], r"t\.csv: the file has no lines after 'sep=;'"),
        (
            ["x,text,y", *body('{i}.5,"he said" \\"{i}, {i}\\" to me,{y}')],
            r"t\.csv:2: broken quoting",
        ),
        (["| x | y |", "|---|---|", *body("| {i}.5 | {y} |")], r"t\.csv:1: the file is a table drawn with lines \(Markdown"),
        (["+---+---+", "| x | y |", *body("| {i}.5 | {y} |")], r"t\.csv:1: the file is a table drawn with lines"),
        (["@relation iris", "@attribute x numeric", *body("{i}.5,{y}")], r"t\.csv:1: the file is an ARFF file"),
        (["x,text,y", *body("{i}.5,'one, {i}',{y}")], r"t\.csv:2 has 4.*single quotation marks"),
        (
            ["x,text,y", *body("{i}.5,text {i},{y}"), "1.5,a text", "goes on,a"],
            rf"at the end of line {N + 2} seems to continue",
        ),
        (["<!DOCTYPE html>", "<html><body>", "Not found"], r"t\.csv:1: the file is a web page"),
        (['[{"x": 1, "y": "a"},', '{"x": 2, "y": "b"}]'], r"t\.csv:1: the file is JSON"),
        (['{"x": 1, "y": "a"}', '{"x": 2, "y": "b"}'], r"t\.csv:1: the file is JSON Lines"),
    ],
)
def test_other_causes_are_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "t.csv", rows))


# 6: what check shows


def test_check_shows_values_missing_ranges_and_classes(tmp_path, capsys):
    from fieldguide.automl.progress import print_data

    rows = ["amount,copy,day,kind,y"]
    for i in range(1100):
        value = "" if i < 475 else f"{i * 0.5}"
        rows.append(f"{value},{value},2024-01-{i % 28 + 1:02d},{'uvw'[i % 3]},{'yes' if i % 4 else 'no'}")
    data = read(write(tmp_path / "t.csv", rows), target="y")
    assert data.columns["amount"].why == "all 625 values are numbers"
    assert "'copy' has the same values as column 'amount'" in finding(data, "duplicate-column").what
    print_data(data, *infer_task(data))
    shown = capsys.readouterr().out
    assert "475 (43 %)" in shown and "237.5 to 549.5, e.g. 237.5, 238, 238.5" in shown
    assert "2024-01-01 to 2024-01-28" in shown and "2 classes: yes 825, no 275" in shown and "3 values: u 367" in shown
    lines = shown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("column"))
    end = next(i for i, line in enumerate(lines) if i > start and line.startswith("  "))
    assert all(len(line) <= 100 for line in lines[start:end])


def test_duplicate_columns_of_other_types(tmp_path):
    rows = ["a,b,c,d,y"] + [f"{'uvw'[i % 3]},{'uvw'[i % 3]},{'uvw'[i % 3 - 1]},{i % 9},{'pq'[i % 5 == 0]}" for i in range(60)]
    found = [f.what for f in read(write(tmp_path / "t.csv", rows)).findings if f.check == "duplicate-column"]
    assert found == ["column 'b' has the same values as column 'a'"]
