"""Tables: column types, errors in files with their locations, and dropped rows with their counts."""

from __future__ import annotations

import datetime as dt
import json

import numpy as np
import polars as pl
import pytest

from damage import checks, finding, lines, refused, write
from fieldguide.core.errors import DataError
from fieldguide.data import Column, read
from fieldguide.tasks import task


def test_kinds_of_columns(tmp_path):
    n = 60
    rows = ["id,code,height,colour,smoker,flag,day,when,zip,note,only,nothing,y"]
    for i in range(n):
        colour = ["red", "green", " blue "][i % 3]
        rows.append(
            f"{i + 1},u{i:03d}x,{150 + i * 0.5},{colour},{['yes', 'no'][i % 2]},{i % 2},"
            f"2024-01-{i % 28 + 1:02d},{i % 28 + 1:02d}.03.2024 12:{i:02d},{i % 9:05d},"
            f"a sentence with many words number {i} in it,same,,{['a', 'b'][i % 2 ^ (i % 7 == 0)]}"
        )
    data = read(write(tmp_path / "t.csv", rows))
    kinds = {c.name: c.kind for c in data.columns.values()}
    assert kinds == {
        "id": "identifier",
        "code": "identifier",
        "height": "number",
        "colour": "category",
        "smoker": "boolean",
        "flag": "boolean",
        "day": "date",
        "when": "date",
        "zip": "category",
        "note": "text",
        "only": "constant",
        "nothing": "constant",
        "y": "category",
    }
    assert data.target.name == "y" and data.target.distinct == 2
    assert {c.name for c in data.columns_with_role("ignored")} == {"id", "code", "only", "nothing"}
    assert all(c.why for c in data.columns.values())
    assert sorted(data.rows["colour"].unique()) == ["blue", "green", "red"]
    assert data.rows["when"][1] == dt.datetime(2024, 3, 2, 12, 1)
    assert data.rows["height"].dtype == pl.Float64 and data.rows["smoker"].dtype == pl.Boolean
    assert finding(data, "all-missing").places == ("column 'nothing'",)
    assert finding(data, "target-chosen").severity == "note"
    assert data.locate_row(0) == "t.csv:2" and data.locate_row(59) == "t.csv:61"
    assert data.manifest.summary()["rows"] == n and len(data.manifest.files[0].sha256) == 64


@pytest.mark.parametrize("marker", ["", "NA", "N/A", "NaN", "nan", "null", "None", "?", "-"])
def test_missing_values(tmp_path, marker):
    rows = ["a,b,y"] + [f"{i * 1.5},{'uvw'[i % 3]},{'pq'[i // 2 % 2]}" for i in range(30)]
    rows[3], rows[7] = f"{marker},u,p", f"4.5, {marker} ,q"
    data = read(write(tmp_path / "t.csv", rows))
    assert data.columns["a"].missing == 1 and data.rows["a"][2] is None
    assert data.columns["b"].missing == 1 and data.rows["b"][6] is None
    assert data.columns["a"].kind == "number" and data.columns["b"].kind == "category"


def test_override_kinds(tmp_path):
    data = read("diabetes", target="progression", kinds={"age": "category", "sex": "identifier"})
    assert data.columns["age"].kind == "category" and data.columns["sex"].role == "ignored"
    with pytest.raises(DataError, match=r"'agee'.*Did you mean 'age'"):
        read("diabetes", kinds={"agee": "category"})


def test_targets(tmp_path):
    assert read("iris").target.name == "species"  # by its name
    assert read("diabetes").target.kind == "number"  # an amount
    rows = ["x,rating"] + [f"{i / 7},{i % 5 + 1}" for i in range(50)]
    assert read(write(tmp_path / "t.csv", rows)).target.kind == "category"  # 5 whole numbers
    with pytest.raises(DataError, match=r"'specis'.*Did you mean 'species'.*sepal_length_cm, sepal_width_cm"):
        read("iris", target="specis")


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_delimiters_and_byte_order_marks(tmp_path, mark):
    text = "\n".join(lines("iris")).replace(",", mark) + "\n"
    plain = read("iris")
    for name, encoding in (("a.csv", "utf-8"), ("b.csv", "utf-8-sig"), ("c.csv", "utf-16")):
        (tmp_path / name).write_text(text, encoding=encoding)
        data = read(tmp_path / name)
        assert data.rows.equals(plain.rows) and "encoding" not in checks(data)


def test_decimal_comma(tmp_path):
    rows = ["x;y"] + [f"{i},{i % 10};{'ab'[i % 2]}" for i in range(40)]
    data = read(write(tmp_path / "t.csv", rows))
    assert data.columns["x"].kind == "number" and data.rows["x"][13] == pytest.approx(13.3)


def test_wrong_encoding_is_read_and_reported(tmp_path):
    rows = lines("iris")
    rows[41] = rows[41].replace("setosa", "setôsa")
    (tmp_path / "t.csv").write_bytes("\n".join(rows).encode("cp1252"))
    data = read(tmp_path / "t.csv")
    found = finding(data, "encoding")
    assert found.severity == "warning" and found.places == ("t.csv:42, the first occurrence",)
    assert "Windows-1252" in found.what
    assert "setôsa" in data.rows["species"].to_list()


def test_nul_bytes_are_refused(tmp_path):
    content = "\n".join(lines("iris")).replace("virginica", "virg\0nica", 1)
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DataError, match=r"t\.csv:102: NUL byte"):
        read(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (30, "5.1,3.5,1.4,0.2,setosa,extra", r"1 of 151 lines do not have 5 cells.*t\.csv:30 has 6"),
        (30, "5.1,3.5,1.4", r"1 of 151 lines do not have 5 cells.*t\.csv:30 has 3"),
        (30, '"5.1,3.5,1.4,0.2,setosa', r"t\.csv:30: broken quoting: a quotation mark is not closed"),
        (30, '"5.1"0,3.5,1.4,0.2,setosa', r"t\.csv:30: broken quoting: text follows a closing"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, text, message):
    rows = lines("iris")
    rows[line - 1] = text
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "t.csv", rows))


def test_quotation_marks_inside_cells_are_allowed(tmp_path):
    rows = ["size,text,y"] + [f'{i},pipe of {i % 5}" width and {i} more,{"ab"[i % 2]}' for i in range(40)]
    data = read(write(tmp_path / "t.csv", rows))
    assert len(data) == 40 and data.rows["text"][3] == 'pipe of 3" width and 3 more'


def test_line_numbers_with_line_breaks_in_cells(tmp_path):
    rows = ["text,label"] + [f'"a first line, number {i}\nand ""a second"" of it",{"ab"[i % 2]}' for i in range(40)]
    data = read(write(tmp_path / "t.csv", rows))
    assert data.rows["text"][1] == 'a first line, number 1\nand "a second" of it'
    assert data.columns["text"].kind == "text" and data.locate_row(10) == "t.csv:22"


def test_empty_lines_are_counted(tmp_path):
    rows = lines("iris")
    data = read(write(tmp_path / "t.csv", [*rows[:50], "", *rows[50:], "", ""]))
    assert len(data) == 150 and finding(data, "empty-lines").count == 3
    assert data.locate_row(49) == "t.csv:52"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a,b,a,d,species", r"t\.csv:1: 'a' is the name of several columns \(1, 3\)"),
        ("a,,c,d,species", r"t\.csv:1: column 2 has no name"),
        (",b,c,index,species", r"t\.csv:1: column 1 has no name"),
    ],
)
def test_bad_column_names(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "t.csv", [names, *lines("iris")[1:]]))


def test_unnamed_first_column_is_an_index(tmp_path):
    """As pandas and R write the names of rows."""
    names, *rows = lines("iris")
    data = read(write(tmp_path / "t.csv", ["," + names, *(f"{i},{row}" for i, row in enumerate(rows))]))
    assert data.columns["index"].kind == "identifier" and data.columns["index"].role == "ignored"
    assert "read as 'index'" in finding(data, "unnamed-index").what and data.columns.keys() >= set(names.split(","))


def test_ignored_columns_are_one_finding(tmp_path):
    path = write(tmp_path / "t.csv", ["a,b,c,x,y", *(f"0,7,0,{i % 13},{i % 3}" for i in range(40))])
    note = finding(read(path), "constant-column")
    assert note.count == 3 and note.places == ("column 'a'", "column 'b'", "column 'c'") and note.what.startswith("3 columns")


def test_literal_quotation_marks_in_tsv(tmp_path):
    """Quotation marks that are not valid quoting are literal; completely quoted cells are still unquoted."""
    rows = "".join(f"number {i} of many\tZahl {i} von vielen\n" for i in range(40))
    (tmp_path / "spoken.tsv").write_text('en\tde\n"Well,"\u2028he said.\t"Nun", sagte er.\n' + rows, newline="\r\n")
    (tmp_path / "quoted.tsv").write_text('en\tde\n"a ""b"" c"\tx\n' + rows)
    column_spec = task("translation").column_spec
    assert read(tmp_path / "spoken.tsv", column_spec=column_spec).rows.row(0)[:2] == (
        '"Well,"\u2028he said.',
        '"Nun", sagte er.',
    )
    assert read(tmp_path / "quoted.tsv", column_spec=column_spec).rows.row(0)[:2] == ('a "b" c', "x")
    (tmp_path / "wide.tsv").write_text('en\tde\n"Well," he said.\n' + rows)
    with pytest.raises(DataError, match=r"wide\.tsv:2"):
        read(tmp_path / "wide.tsv", column_spec=column_spec)


def test_sentences_in_the_first_line_are_not_names(tmp_path):
    rows = "".join(f"the cat of number {i} sat\tdie Katze Nummer {i} sitzt\n" for i in range(40))
    (tmp_path / "pairs.tsv").write_text(rows)
    (tmp_path / "named.tsv").write_text("in English\tin German\n" + rows)
    column_spec = task("translation").column_spec
    data = read(tmp_path / "pairs.tsv", column_spec=column_spec)
    assert len(data) == 40 and finding(data, "no-header").places == ("pairs.tsv:1",)
    assert len(read(tmp_path / "named.tsv", column_spec=column_spec)) == 40


def test_no_header(tmp_path):
    path = write(tmp_path / "t.csv", lines("iris")[1:])
    data = read(path)
    assert list(data.columns) == ["c0", "c1", "c2", "c3", "c4"] and len(data) == 150
    assert finding(data, "no-header").places == ("t.csv:1",)
    assert len(read(path, header=True)) == 149
    taken = read("iris", header=False)  # the names are a row then, of which no number is left
    assert len(taken) == 150 and finding(taken, "empty-input").places == ("data.csv:1",)


def test_mixed_types(tmp_path):
    rows = ["x,z,y"] + [f"{i * 0.7},{i % 9},{'ab'[i % 2]}" for i in range(100)]
    for i in range(5):
        rows[20 + i] = f"oops,4,{'ab'[i % 2]}"
    data = read(write(tmp_path / "t.csv", rows))
    found = finding(data, "mixed-types")
    assert data.columns["x"].kind == "number" and data.columns["x"].missing == 5 and len(data) == 100
    assert found.count == 5 and found.places[0] == "t.csv:21" and "'oops'" in found.what and found.remedy
    for i in range(10):
        rows[40 + i] = f"word{i % 3},3,{'ab'[i % 2]}"
    assert read(write(tmp_path / "t.csv", rows)).columns["x"].kind == "category"


def test_infinite_numbers(tmp_path):
    rows = ["x,z,y"] + [f"{i * 0.7},{i % 9},{'ab'[i % 2]}" for i in range(50)]
    rows[7], rows[9], rows[11] = "inf,1,a", "-Infinity,2,b", "NaN,3,a"
    data = read(write(tmp_path / "t.csv", rows))
    found = finding(data, "infinite")
    assert found.count == 2 and found.places == ("t.csv:8", "t.csv:10")
    assert data.columns["x"].missing == 3 and np.isfinite(data.rows["x"].drop_nulls().to_numpy()).all()


def test_rows_without_target_are_dropped_and_counted(tmp_path):
    rows = ["x,y"] + [f"{i * 0.7},{'ab'[i % 2]}" for i in range(300)]
    rows[5] = rows[9] = "1.5,"
    data = read(write(tmp_path / "t.csv", rows))
    assert len(data) == 298 and data.manifest.files[0].dropped == 2 and data.manifest.files[0].rows == 298
    found = finding(data, "target-missing")
    assert found.unusable == 2 and found.places == ("t.csv:6", "t.csv:10")
    rows[20] = rows[30] = "1.5,NA"
    with refused("target-missing", "4 of 300", "t.csv:6", "t.csv:31", "allow_bad"):
        read(write(tmp_path / "t.csv", rows))
    data = read(tmp_path / "t.csv", allow_bad=True)
    assert len(data) == 296 and data.manifest.summary()["dropped"] == 4
    assert len(read(tmp_path / "t.csv", target="y", labels_optional=True)) == 300


def test_numbers_as_text_in_a_target(tmp_path):
    rows = [{"x": i * 0.5, "price": f"{i * 3.25}"} for i in range(200)]
    rows[8]["price"] = "ask"
    path = write(tmp_path / "t.jsonl", [json.dumps(r) for r in rows])
    data = read(path, target="price")
    assert data.target.kind == "number" and len(data) == 199
    assert finding(data, "mixed-types").places == ("t.jsonl:9",)
    assert finding(data, "target-missing").unusable == 1


def test_rows_without_any_value(tmp_path):
    rows = ["x,z,y"] + [f"{i * 0.7},{'uv'[i % 2]},{'ab'[i % 3 // 2]}" for i in range(150)]
    rows[10] = ",,a"
    data = read(write(tmp_path / "t.csv", rows))
    assert len(data) == 149 and finding(data, "empty-input").places == ("t.csv:11",)


def test_parquet_and_json_lines(tmp_path):
    plain = read("iris")
    table = plain.rows.drop("#file", "#line")
    table.write_parquet(tmp_path / "t.parquet")
    table.write_ndjson(tmp_path / "t.jsonl")
    for name in ("t.parquet", "t.jsonl"):
        data = read(tmp_path / name)
        assert data.rows.drop("#file", "#line").equals(table) and data.target.name == "species"
    rows = (tmp_path / "t.jsonl").read_text().splitlines()
    rows[11] = rows[11][:-1]
    with pytest.raises(DataError, match=r"t\.jsonl:12: not a JSON object"):
        read(write(tmp_path / "t.jsonl", rows))
    (tmp_path / "t.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:200])
    with pytest.raises(DataError, match=r"t\.parquet: not a readable Parquet"):
        read(tmp_path / "t.parquet")


def test_one_file_for_each_split(tmp_path):
    names, *rows = lines("iris")
    for name, part in (("my-train.csv", rows[::2]), ("my_valid.csv", rows[1::4]), ("my.test.csv", rows[3::4])):
        write(tmp_path / name, [names, *part])
    data = read(tmp_path)
    assert [int((data.splits == s).sum()) for s in ("train", "val", "test")] == [75, 38, 37]
    assert data.locate_row(80) == "my_valid.csv:7" and len(data.manifest.files) == 3
    write(tmp_path / "my.test.csv", [names.replace("petal_width_cm", "width"), *rows[3::4]])
    with pytest.raises(DataError, match=r"different columns.*petal_width_cm.*width"):
        read(tmp_path)
    write(tmp_path / "more.csv", [names, *rows])
    with pytest.raises(DataError, match=r"several tables.*more\.csv"):
        read(tmp_path)


def test_split_column(tmp_path):
    names, *rows = lines("iris")
    rows = [f"{r},{'train' if i % 5 else 'test'}" for i, r in enumerate(rows)]
    data = read(write(tmp_path / "t.csv", [f"{names},split", *rows]))
    assert data.target.name == "species" and (data.splits == "test").sum() == 30
    assert data.columns["split"].role == "split" and len(data.features()) == 4


def test_spelling_variants_of_classes_in_a_split(tmp_path):
    names, *rows = lines("iris")
    write(tmp_path / "train.csv", [names, *rows[::2]])
    write(tmp_path / "test.csv", [names, *(f"{r.replace('setosa', 'Setosa')}." for r in rows[1::2])])
    data = read(tmp_path)
    found = finding(data, "class-spelling")
    assert found.count == 75 and "'Setosa.' as 'setosa'" in found.what and found.places[0] == "test.csv:2"
    assert data.target.distinct == 3
    write(tmp_path / "test.csv", [names, *(r.replace("setosa", "rose") for r in rows[1::2])])
    data = read(tmp_path)
    found = finding(data, "class-not-in-train")
    assert len(data) == 150 and found.count == 25 and "'rose'" in found.what and found.places[0] == "test.csv:2"


def test_known_schema(tmp_path):
    schema = json.loads(json.dumps(read("iris").schema()))
    names, *rows = lines("iris")
    # The target is absent, the columns stand in another order, and there is one more.
    turned = [",".join([first, *r.split(",")[3::-1]]) for first, r in zip(["extra", *"7" * 150], [names, *rows])]
    data = read(write(tmp_path / "t.csv", turned), schema=schema, labels_optional=True)
    assert data.target is None and finding(data, "extra-columns").places == ("column 'extra'",)
    assert data.rows["sepal_length_cm"].to_list() == read("iris").rows["sepal_length_cm"].to_list()
    turned[0] = turned[0].replace("petal_width_cm", "petal_widht_cm").replace("sepal_length_cm", "foo")
    with pytest.raises(
        DataError,
        match=r"(?s)2 of the 4 columns.*'sepal_length_cm'.*'petal_width_cm'.*Did "
        r"you mean 'petal_widht_cm'",
    ):
        read(write(tmp_path / "t.csv", turned), schema=schema)
    assert isinstance(data.columns["petal_width_cm"], Column)


def test_known_schema_keeps_kinds(tmp_path):
    rows = ["x,c,y"] + [f"{i * 0.5},{i % 3},{'ab'[i % 2]}" for i in range(60)]
    schema = read(write(tmp_path / "t.csv", rows), kinds={"c": "category"}).schema()
    data = read(write(tmp_path / "p.csv", ["x,c", "oops,2"]), schema=schema)
    assert data.rows["c"].to_list() == ["2"] and data.rows["x"].to_list() == [None]
    assert finding(data, "mixed-types").places == ("p.csv:2",) and len(data) == 1


def test_known_schema_without_header(tmp_path):
    rows = lines("iris")[1:]
    schema = read(write(tmp_path / "t.csv", rows)).schema()
    data = read(write(tmp_path / "p.csv", [r.rsplit(",", 1)[0] for r in rows[:3]]), schema=schema)
    assert len(data) == 3 and data.rows["c0"][0] == 5.1


def test_objects_in_memory():
    pandas = pytest.importorskip("pandas")
    plain = read("iris").rows.drop("#file", "#line")
    columns = {n: plain[n].to_numpy() for n in plain.columns}
    for source in (plain, columns, pandas.DataFrame(columns), {k: list(v) for k, v in columns.items()}):
        data = read(source, target="species")
        assert data.rows.drop("#file", "#line").equals(plain) and len(data.manifest.digest) == 64
    mixed = pandas.DataFrame(
        {"a": [1.5, None, 3.0] * 20, "b": ["u", None, "v"] * 20, "c": [*range(6)] * 10, "y": [0, 1, 1, 1] * 15}
    )
    data = read(mixed, target="y")
    assert data.columns["a"].missing == 20 and data.columns["b"].missing == 20 and data.target.kind == "category"
    with pytest.raises(DataError, match="differ in length"):
        read({"a": [1, 2], "b": [1]})


def test_labelled_lines(tmp_path):
    rows = [f"{['DESC', 'NUM', 'LOC'][i % 3]} what is thing number {i} ?" for i in range(60)]
    path = write(tmp_path / "questions.txt", rows)
    data = read(path)
    assert data.target.name == "label" and data.target.distinct == 3 and data.columns["text"].kind == "text"
    assert data.rows["text"][4] == "what is thing number 4 ?" and data.locate_row(4) == "questions.txt:5"
    write(tmp_path / "q.train", rows[:40])
    write(tmp_path / "q.test", rows[40:])
    path.unlink()
    assert (read(tmp_path).splits == "test").sum() == 20


def test_folders_of_texts(tmp_path):
    for label in ("good", "bad"):
        (tmp_path / label).mkdir()
        for i in range(30):
            (tmp_path / label / f"{i}.txt").write_text(f"this is {label} text number {i}", encoding="utf-8")
    data = read(tmp_path)
    assert data.target.distinct == 2 and len(data) == 60 and data.locate_row(0) == "bad/0.txt"
    (tmp_path / "bad" / "3.txt").write_text("")
    with refused("empty-input", "bad/3.txt", "1 of 60"):
        read(tmp_path)


def test_unknown_sources(tmp_path):
    with pytest.raises(
        DataError,
        match=r"no such file, folder or sample. Did you mean 'iris'\?.*digits, "
        r"iris",
    ):
        read("irs")
    write(tmp_path / "data.csv", lines("iris"))
    with pytest.raises(DataError, match=r"Did you mean 'data\.csv'"):
        read(tmp_path / "dta.csv")
    (tmp_path / "a.xyz").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match=r"(?s)this kind of data is not supported.*images.*tables \(\.csv"):
        read(tmp_path / "a.xyz")
    with pytest.raises(DataError, match="an object of type int"):
        read(3)
    (tmp_path / "e.csv").write_text("")
    with pytest.raises(DataError, match=r"e\.csv: the file is empty"):
        read(tmp_path / "e.csv")
    with pytest.raises(DataError, match="column names but no rows"):
        read(write(tmp_path / "h.csv", ["a,b"]))


def test_memory_is_close_to_the_file_size(tmp_path):
    """The text of a column is released once it is typed; 8 bytes per number remain."""
    values = np.random.default_rng(0).normal(size=(20_000, 10))
    pl.DataFrame(values, schema=[f"x{i}" for i in range(10)]).write_csv(tmp_path / "t.csv")
    data = read(tmp_path / "t.csv")
    assert data.rows.estimated_size() < (tmp_path / "t.csv").stat().st_size


@pytest.mark.parametrize(
    "steps, digits, first, last",
    [(12, 9, 1949, (1959, 1)), (12, 2, 1949, (1959, 1)), (4, 6, 1960, (1990, 1)), (1, 0, 1871, (1991, 1))],
)
def test_decimal_years_at_equal_steps_are_dates(tmp_path, steps, digits, first, last):
    rows = ["time,value", *(f"{first + i / steps:.{digits}f},{i % steps + i}" for i in range(121))]
    data = read(write(tmp_path / "t.csv", rows), target="value")
    assert data.columns["time"].kind == "date" and data.rows["time"][-1] == dt.datetime(*last, 1)
    again = read(pl.DataFrame({"time": [first + 10 / steps, 1900.3]}), schema=list(data.columns.values()), labels_optional=True)
    assert again.rows["time"].to_list()[0] == data.rows["time"][10] and again.rows["time"].to_list()[1] is None


@pytest.mark.parametrize(
    "name, values",
    [("dose", range(1950, 2000)), ("time", [1950 + i / 12 for i in (*range(40), 50)]), ("time", range(2150, 2270))],
)
def test_other_numbers_are_no_years(tmp_path, name, values):
    rows = [f"{name},size,value", *(f"{x:.4f},{i % 7},{i % 5}" for i, x in enumerate(values))]
    assert read(write(tmp_path / "t.csv", rows), target="value").columns[name].kind != "date"


def test_a_column_may_be_called_count(tmp_path):
    rows = ["size,count", *(f"{i * 1.5},{['few', 'many', 'None'][i % 3]}" for i in range(60))]
    data = read(write(tmp_path / "t.csv", rows), target="count")
    assert data.columns["count"].kind == "category" and len(data) == 60
    numbers = ["size,count", *(f"{i * 1.5},{i * i}" for i in range(60))]
    assert task("tabular-regression").fit(read(write(tmp_path / "n.csv", numbers), target="count"), None)
