"""Data checks on data that can be read but would train a wrong model."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from damage import checks, digits, finding, lines, refused, write
from fieldguide.data import BadData, Finding, enforce, read


def test_good_data_has_no_findings():
    for name in ("digits", "iris", "wine", "breast-cancer", "diabetes", "docstrings"):
        data = read(name)
        assert not [f for f in data.findings if f.severity != "note"], name
        assert data.manifest.summary()["dropped"] == 0


def test_enforce():
    small = Finding("odd", "warning", "odd rows", ("t.csv:3",), 10, "Mend them.", unusable=10)
    enforce([small], 1000)
    with pytest.raises(
        BadData,
        match=r"(?s)10 of 999 examples are unusable \(1\.0 %.*1\. 10 x odd rows "
        r"\(t\.csv:3, "
        r"\.\.\.\)\. Mend them\. \[odd\]",
    ) as caught:
        enforce([small], 999)
    assert caught.value.findings == (small,)
    enforce([small], 999, allow_bad=True)
    with pytest.raises(BadData, match="very bad"):
        enforce([Finding("bad", "error", "very bad")], 10, allow_bad=True)


def test_single_class(tmp_path):
    rows = lines("iris")
    with refused("single-class", "'setosa' in every row"):
        read(write(tmp_path / "t.csv", rows[:51]), allow_bad=True)
    with refused("single-class", "'0' in every row"):
        read(digits(tmp_path / "d", classes=1))


def test_constant_numeric_target(tmp_path):
    with refused("single-class", "7.5 in every row"):
        read(write(tmp_path / "t.csv", ["x,y", *(f"{i},7.5" for i in range(60))]), kinds={"y": "number"})


def test_classes_with_one_example_or_similar_names(tmp_path):
    rows = lines("iris")
    rows[5] = rows[5].replace("setosa", "rare")
    rows[9:12] = [r.replace("setosa", " Setosa.") for r in rows[9:12]]
    data = read(write(tmp_path / "t.csv", rows))
    found = finding(data, "class-of-one")
    assert found.places == ("t.csv:6",) and "'rare'" in found.what and found.severity == "warning"
    assert "'Setosa.', 'setosa'" in finding(data, "class-names-alike").what


def test_too_many_classes(tmp_path):
    rows = ["x,name", *(f"{i % 7},person {i}" for i in range(60))]
    assert finding(read(write(tmp_path / "t.csv", rows)), "many-classes").severity == "warning"


def test_no_usable_features(tmp_path):
    rows = ["id,same,y", *(f"{i},a,{'pq'[i % 2]}" for i in range(60))]
    with refused("no-features", "no usable feature columns"):
        read(write(tmp_path / "t.csv", rows))


def test_duplicate_rows(tmp_path):
    rows = lines("iris")
    data = read(write(tmp_path / "t.csv", [*rows, rows[20], rows[30]]))
    found = finding(data, "duplicate")
    assert found.count == 3 and "t.csv:152 = t.csv:21" in found.places and "t.csv:153 = t.csv:31" in found.places


def test_duplicates_across_splits_and_conflicts(tmp_path):
    names, *rows = lines("iris")
    del rows[142]  # iris has one duplicate of its own
    write(tmp_path / "train.csv", [names, *rows[::2]])
    write(tmp_path / "test.csv", [names, *rows[1::2], rows[10], rows[20], rows[30].replace("setosa", "virginica")])
    data = read(tmp_path)
    found = finding(data, "duplicate-across-splits")
    assert found.severity == "warning" and found.count == 3 and found.remedy
    assert found.places == ("test.csv:76 = train.csv:7", "test.csv:77 = train.csv:12", "test.csv:78 = train.csv:17")
    clash = finding(data, "conflicting-duplicate")
    assert clash.count == 1 and clash.places == ("test.csv:78 is 'virginica', train.csv:17 is 'setosa'",)


def test_texts_are_compared_ignoring_case_and_whitespace(tmp_path):
    rows = lines("docstrings")[:200]
    text, library = rows[8].rsplit(",", 1)
    write(tmp_path / "train.csv", rows)
    write(tmp_path / "test.csv", [rows[0], rows[8], f"{text.upper().replace(' ', '  ')},{library}", "All new text,numpy"])
    found = finding(read(tmp_path), "duplicate-across-splits")
    assert found.count == 2 and found.places[1] == "test.csv:3 = train.csv:9"


def test_images_are_compared_by_pixels(tmp_path):
    digits(tmp_path, split="train")
    (tmp_path / "test" / "1").mkdir(parents=True)
    first, second = sorted((tmp_path / "train" / "1").iterdir())[:2]
    Image.open(first).save(tmp_path / "test" / "1" / "again.bmp")  # other bytes, same pixels
    shutil.copy(second, tmp_path / "train" / "2" / "wrong.png")
    data = read(tmp_path)
    assert finding(data, "duplicate-across-splits").places == (f"test/1/again.bmp = train/1/{first.name}",)
    assert finding(data, "conflicting-duplicate").places == (f"train/2/wrong.png is '2', train/1/{second.name} is '1'",)


def test_leaking_features(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 400)
    names = np.array(["low", "mid", "high"])
    nearly = np.where(rng.random(400) < 0.005, (y + 1) % 3, y)
    table = {
        "x": rng.normal(size=400),
        "code": names[y],
        "almost": nearly,
        "noisy": (y + (rng.random(400) < 0.2)) % 3,
        "grade": np.array(list("pqr"))[y],
    }
    with refused("leak", "column 'code' predicts the target 'grade' exactly", "--set 'column.code=identifier'") as caught:
        read(table, target="grade")
    found = {f.places[0]: f.severity for f in caught.value.findings if f.check == "leak"}
    assert found == {"column 'code'": "error", "column 'almost'": "warning"}
    data = read(table, target="grade", kinds={"code": "identifier"})
    assert [c.name for c in data.features()] == ["x", "almost", "noisy"]


def test_rare_class_is_not_a_leak():
    rng = np.random.default_rng(0)
    y = np.where(np.arange(1000) < 5, "rare", "usual")
    assert "leak" not in checks(read({"a": rng.integers(0, 5, 1000), "b": rng.normal(size=1000), "y": y}, target="y"))


def test_leaks_into_a_numeric_target():
    rng = np.random.default_rng(0)
    y = rng.normal(20, 5, 300)
    table = {"x": rng.normal(size=300), "fahrenheit": y * 1.8 + 32, "celsius": y}
    with refused("leak", "'fahrenheit' predicts the target 'celsius' exactly"):
        read(table, target="celsius")
    table["fahrenheit"] = table["fahrenheit"] + rng.normal(0, 0.05, 300)
    assert "correlation 0.9999" in finding(read(table, target="celsius"), "leak").what
    table["fahrenheit"] = table["fahrenheit"] + rng.normal(0, 3, 300)
    assert "leak" not in checks(read(table, target="celsius"))


def test_class_names_in_texts(tmp_path):
    rows = ["text,topic"] + [f"about {t} we say the sentence number {i},{t}" for i, t in enumerate(["sport", "music"] * 30)]
    found = finding(read(write(tmp_path / "t.csv", rows)), "label-in-text")
    assert found.severity == "note" and found.count == 60
