"""Preprocessing is fitted on training rows only, survives a JSON round trip, and handles unseen values."""

from __future__ import annotations

import datetime as dt
import json

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.preprocessing import QuantileTransformer

from damage import digits
from fieldguide.core.errors import DataError
from fieldguide.data import Column, read, split
from fieldguide.data.preprocessing import ImageTransform, Labels, Standardizer, TablePreparer, TextTokenizer, suggest_side
from fieldguide.data.preprocessing.tokenizer import suggest_length, suggest_size


def learn(table: dict, kinds: dict | None = None):
    data = read({**table, "y": np.arange(len(next(iter(table.values())))) // 5 % 2}, target="y", kinds=kinds)
    return TablePreparer.fit(data.rows, data.features()), data


def test_numbers_become_standard_normals():
    data = read("breast-cancer")
    train = data.rows[split(data).train]
    numbers, codes = TablePreparer.fit(train, data.features()).apply(train)
    assert numbers.shape == (len(train), 30) and numbers.dtype == np.float32
    assert codes.shape == (len(train), 0)
    assert np.abs(numbers.mean(0)).max() < 0.1 and np.abs(numbers.std(0) - 1).max() < 0.3
    assert np.abs(numbers).max() < 5.3


def test_numbers_agree_with_scikit_learn():
    x = np.random.default_rng(0).gamma(2, size=3000)
    x[:300] = 1.5  # ties in the middle
    preparer, _ = learn({"x": x})
    new = np.linspace(-1, x.max() + 1, 500)
    theirs = QuantileTransformer(n_quantiles=100, output_distribution="normal", subsample=None).fit(x[:, None])
    ours = preparer.apply(pl.DataFrame({"x": new}))[0][:, 0]
    assert np.abs(ours - theirs.transform(new[:, None])[:, 0]).max() < 1e-4
    assert len(preparer.numbers[0].quantiles) == 100


def test_value_of_half_of_the_rows_is_not_extreme():
    """scikit-learn maps a tied minimum to -5.2; here the mean of its probabilities is used."""
    x = np.maximum(np.random.default_rng(0).normal(size=2000), 0)
    numbers, _ = learn({"x": x})[0].apply(pl.DataFrame({"x": x}))
    assert -1 < numbers.min() < -0.5


def test_missing_and_unseen_values_and_json_round_trip():
    n = 200
    x = [None if i % 10 == 0 else i * 0.37 for i in range(n)]
    c = [None if i % 7 == 0 else "uvw"[i % 3] for i in range(n)]
    preparer, data = learn({"x": x, "c": c, "b": [i % 3 == 0 for i in range(n)], "d": ["k", "l"] * (n // 2)})
    assert [(f.column, f.part) for f in preparer.categories] == [
        ("x", "missing"),
        ("c", "value"),
        ("b", "value"),
        ("d", "value"),
    ]
    assert preparer.cardinalities == [3, 5, 3, 3] and preparer.width == 1 + 2 + 4 + 2 + 2
    new = pl.DataFrame({"x": [None, 30.0], "c": ["new", None], "b": [None, True], "d": [None, "l"]})
    numbers, codes = preparer.apply(new)
    assert numbers[0, 0] == 0 and codes.tolist() == [[2, 0, 0, 0], [1, 4, 2, 2]]
    assert preparer.unseen == {"c": 1}
    flat = preparer.vector(new)
    assert flat.shape == (2, 11) and flat.dtype == np.float32 and flat[:, 1:].sum(1).tolist() == [1, 4]
    again = TablePreparer.from_json(json.loads(json.dumps(preparer.to_json(), allow_nan=False)))
    assert np.array_equal(again.vector(data.rows), preparer.vector(data.rows))
    assert again.numbers == preparer.numbers and again.categories == preparer.categories


def test_only_training_rows_are_fitted():
    data = read("iris")
    made = split(data)
    before = TablePreparer.fit(data.rows[made.train], data.features()).to_json()
    rows = data.rows.with_columns(
        pl.Series("petal_width_cm", np.where(np.isin(np.arange(150), made.test), 99.0, data.rows["petal_width_cm"].to_numpy()))
    )
    assert TablePreparer.fit(rows[made.train], data.features()).to_json() == before


def test_constant_columns_and_rare_values():
    n = 300
    names = [f"town {i // 2 % 40}" if i < 280 else f"once {i}" for i in range(n)]
    preparer, data = learn({"same": [1.0] * (n - 1) + [2.0], "town": names})
    constant = TablePreparer.fit(data.rows[:100], data.features())
    assert [f.column for f in constant.numbers] == []  # constant in these rows
    town = next(f for f in preparer.categories if f.column == "town")
    assert len(town.values) == 40 and preparer.unseen == {}  # 20 names that are there once: code 0
    codes = preparer.apply(data.rows)[1][:, 0]
    assert (codes[280:] == 0).all() and (codes[:280] > 0).all() and preparer.unseen == {"town": 20}


def test_dates():
    when = [dt.datetime(2023, 1, 1) + dt.timedelta(days=i) for i in range(400)]
    times = [w + dt.timedelta(hours=i % 24) for i, w in enumerate(when)]
    preparer, data = learn({"day": when, "time": times})
    parts = [(f.column, f.part) for f in preparer.numbers]
    assert parts == [
        ("day", "time"),
        ("day", "year-sin"),
        ("day", "year-cos"),
        ("time", "time"),
        ("time", "year-sin"),
        ("time", "year-cos"),
        ("time", "hour-sin"),
        ("time", "hour-cos"),
    ]
    numbers, codes = preparer.apply(data.rows)
    assert np.isfinite(numbers).all() and preparer.cardinalities == [8, 8]
    assert codes[:3, 0].tolist() == [7, 1, 2]  # a Sunday, a Monday, a Tuesday
    assert numbers[6, 6] == pytest.approx(np.sin(2 * np.pi * 6 / 24)) and (np.diff(numbers[:, 0]) >= 0).all()
    gone = preparer.apply(pl.DataFrame({"day": [None], "time": [None]}, schema={c: pl.Datetime("us") for c in ("day", "time")}))
    assert (gone[0] == 0).all() and (gone[1] == 0).all()


def test_labels():
    labels = Labels.fit(pl.Series(["10", "9", "2", None]))
    assert labels.names == ("2", "9", "10") and len(labels) == 3
    assert labels.apply(pl.Series(["9", None, "10", "7"])).tolist() == [1, -1, 2, -1]
    assert Labels.from_json(json.loads(json.dumps(labels.to_json()))) == labels
    assert Labels.fit(["b", "a"]).inverse(np.array([1, 0])) == ["b", "a"]
    assert Labels.fit(pl.Series([True, False])).apply(pl.Series([True, False])).tolist() == [1, 0]


def test_standardizer():
    values = np.random.default_rng(0).normal(50, 7, 1000)
    standard = Standardizer.fit(values)
    scaled = standard.apply(values)
    assert scaled.dtype == np.float32 and abs(scaled.mean()) < 1e-6 and abs(scaled.std() - 1) < 1e-6
    assert np.allclose(Standardizer.from_json(standard.to_json()).inverse(scaled), values, atol=1e-5)
    assert Standardizer.fit(np.ones(5)).apply(np.ones(5)).tolist() == [0] * 5
    assert np.isnan(standard.apply(pl.Series([None, 1.0]))).tolist() == [True, False]


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return TextTokenizer.fit(read("docstrings").rows["text"].to_list())


def test_text_round_trip(text, tmp_path):
    for given in ("return the sum of all elements.", "naïve café 日本語 🙂 \\n", "a  b"):
        ids, mask, cut = text.apply([given], 100)
        assert ids.dtype == np.int64 and mask.all() and cut == 0 and text.unknown not in ids
        assert text.decode(ids[0]).strip() == given
    text.save(tmp_path)
    again = TextTokenizer.load(tmp_path)
    some = ["Fit the model.", "", "Compute the mean of x along an axis"]
    assert all(np.array_equal(a, b) for a, b in zip(again.apply(some, 9), text.apply(some, 9)))
    assert (again.size, again.pad, again.lower) == (text.size, 0, True)
    assert {p.name for p in tmp_path.iterdir()} == {"tokenizer.json", "text.json"}
    other = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert np.array_equal(other.apply(some, 9)[0], text.apply(some, 9)[0])


def test_text_batches(text):
    ids, mask, cut = text.apply(["", "one two", "one two three four five six seven eight"], 4)
    assert ids.shape == mask.shape == (3, 4) and cut == 1
    assert mask[0].tolist() == [True, False, False, False] and ids[0, 0] == text.unknown
    assert (ids[~mask] == text.pad).all() and mask[2].all()
    with_class, _, cut = text.apply(["", "one two"], 50, cls=True)
    assert (with_class[:, 0] == text.cls).all() and with_class.shape[1] == 1 + mask[1].sum()
    assert text.apply([], 4)[0].shape == (0, 1)
    assert text.apply(["Return None"], 9)[0].tolist() == text.apply(["RETURN none"], 9)[0].tolist()


def test_tokenizer_training_is_deterministic():
    texts = read("docstrings").rows["text"].to_list()[:500]
    assert TextTokenizer.fit(texts).tokenizer.to_str() == TextTokenizer.fit(texts).tokenizer.to_str()


def test_vocabulary_sizes():
    sizes = [suggest_size(n) for n in (0, 10_000, 270_000, 26_000_000, 10**10)]
    assert sizes == [512, 512, 2048, 16384, 32768]
    assert [suggest_length(s) for s in ([3, 4, 5, 90], [5000] * 9, [1])] == [80, 512, 8]


def test_invalid_tokenizer_file_is_rejected(tmp_path):
    with pytest.raises(DataError, match="no tokenizer found"):
        TextTokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizers library\) is damaged or malformed"):
        TextTokenizer.load(tmp_path / "tokenizer.json")


def test_image_transform(tmp_path):
    paths = read(digits(tmp_path)).rows["image"].to_list()
    x = ImageTransform(8, 1, (0.5,), (0.25,)).load(paths)
    pictures = ImageTransform.from_pixels(x)
    y = pictures.apply(x)
    assert y.dtype == torch.float32 and abs(y.mean()) < 1e-5 and abs(y.std(correction=0) - 1) < 1e-5
    again = ImageTransform.from_json(json.loads(json.dumps(pictures.to_json())))
    assert again == pictures and torch.equal(again.apply(x[0]), y[0])
    colour = ImageTransform.from_pixels(ImageTransform(16).load(paths))
    assert len(colour.mean) == 3 and colour.apply(x.new_zeros(2, 3, 16, 16)).shape == (2, 3, 16, 16)


def test_suggested_side():
    sides = [suggest_side([s] * 5, [s + 10] * 5) for s in (5, 8, 28, 32, 50, 100, 500)]
    assert sides == [8, 8, 28, 32, 48, 96, 224]


def test_columns_of_other_types_are_skipped():
    rows = pl.DataFrame({"t": ["a b", "c d"], "x": [1.0, 2.0]})
    preparer = TablePreparer.fit(rows, [Column("t", "text"), Column("x", "number")])
    assert [n.column for n in preparer.numbers] == ["x"] and preparer.categories == ()
