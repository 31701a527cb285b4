"""Splits: every row in exactly one split, reproducible, and related rows together."""

from __future__ import annotations

import numpy as np
import pytest

from damage import digits, lines, write
from fieldguide.core.errors import DataError
from fieldguide.data import read, split


def sides(splits, n):
    """Return 0, 1 or 2 for each row; fails unless every row is in exactly one split."""
    side = np.full(n, -1)
    for code, rows in enumerate((splits.train, splits.validation, splits.test)):
        assert (side[rows] == -1).all() and (np.diff(rows) > 0).all()
        side[rows] = code
    assert (side >= 0).all()
    return side


@pytest.mark.parametrize("name", ["digits", "iris", "wine", "breast-cancer", "diabetes", "docstrings"])
def test_fractions_and_classes(name):
    data = read(name)
    made = split(data, seed=3)
    side = sides(made, len(data))
    assert abs((side == 2).mean() - 0.2) < 0.02 and (side == 0).mean() > 0.55 and "seed 3" in made.description
    if data.target.kind == "category":
        classes = data.rows[data.target.name].to_numpy()
        for c in np.unique(classes):
            assert abs((side[classes == c] == 2).mean() - 0.2) < 0.05


def test_same_seed_same_split():
    data = read("iris")
    first, again, other = split(data, seed=1), split(data, seed=1), split(data, seed=2)
    assert all(np.array_equal(getattr(first, n), getattr(again, n)) for n in ("train", "validation", "test"))
    assert not np.array_equal(first.test, other.test)


def test_given_splits_are_kept(tmp_path):
    data = read(digits(digits(tmp_path, split="train"), each=10, split="test"))
    made = split(data)
    assert (data.splits[made.test] == "test").all() and made.test.size == 30
    assert (data.splits[made.validation] == "train").all() and 20 <= made.validation.size <= 28
    assert "test as given by the source" in made.description and "validation: " in made.description


def test_rare_classes_are_in_train(tmp_path):
    rows = lines("iris")
    rows[3] = rows[3].replace("setosa", "single")
    rows[8:10] = [r.replace("setosa", "pair") for r in rows[8:10]]
    data = read(write(tmp_path / "t.csv", rows))
    for seed in range(10):
        train = set(data.rows["species"].to_numpy()[split(data, seed=seed).train])
        assert {"single", "pair", "setosa"} <= train


def test_many_small_classes_still_fill_the_test_set():
    data = read({"x": np.arange(300) % 101 * 0.5, "z": np.arange(300.0), "y": [f"c{i // 3}" for i in range(300)]}, target="y")
    side = sides(split(data), 300)
    assert abs((side == 2).mean() - 0.2) < 0.03


def test_groups_stay_whole():
    rng = np.random.default_rng(0)
    who = rng.integers(0, 60, 600)
    data = read(
        {"x": rng.normal(size=600), "who": [f"p{w}" for w in who], "y": rng.integers(0, 2, 600)}, target="y", group="who"
    )
    made = split(data)
    side = sides(made, 600)
    for person in range(60):
        assert np.unique(side[who == person]).size == 1
    assert abs((side == 2).mean() - 0.2) < 0.06 and "groups by 'who' kept whole" in made.description
    assert "who" not in [c.name for c in data.features()]


def test_duplicates_stay_together_also_across_groups():
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=100), 4)  # every input four times
    group = np.roll(np.repeat(np.arange(100), 4), 2)  # groups that overlap two inputs each chain all up
    data = read({"x": x, "y": rng.integers(0, 2, 400)}, target="y")
    side = sides(split(data), 400)
    assert all(np.unique(side[x == v]).size == 1 for v in np.unique(x))
    assert "300 duplicates kept" in split(data).description
    chained = read({"x": x, "g": [f"g{v}" for v in group], "y": rng.integers(0, 2, 400)}, target="y", group="g")
    with pytest.raises(DataError, match="cannot split"):
        split(chained)


def test_equal_images_stay_together(tmp_path):
    digits(tmp_path)
    for i, file in enumerate(sorted((tmp_path / "1").iterdir())[:20]):
        (tmp_path / "1" / f"again{i}.png").write_bytes(file.read_bytes())
    data = read(tmp_path)
    side, same = sides(split(data), len(data)), data.rows["#hash"].to_numpy()
    assert all(np.unique(side[same == h]).size == 1 for h in np.unique(same))


def test_latest_rows_are_the_test_set():
    rng = np.random.default_rng(0)
    when = rng.permutation(np.arange(np.datetime64("2020-01-01"), np.datetime64("2020-01-01") + 500))
    data = read(
        {"x": rng.normal(size=500), "when": when.astype("datetime64[us]"), "y": rng.normal(size=500)}, target="y", time="when"
    )
    made = split(data)
    assert when[made.train].max() < when[made.validation].min() <= when[made.validation].max() < when[made.test].min()
    assert made.test.size == 100 and "the latest by 'when'" in made.description


def test_impossible_splits():
    with pytest.raises(DataError, match="too few"):
        split(read({"x": [1.5, 2.5, 3.0], "y": ["a", "b", "a"]}, target="y"))
    with pytest.raises(DataError, match="leave no rows for training"):
        split(read("iris"), test=0.7, validation=0.4)
    same = read({"x": np.arange(90) * 0.5, "t": [1] * 90, "y": np.arange(90) % 2}, target="y", time="t")
    with pytest.raises(DataError, match="cannot be split by time"):
        split(same)


def test_large_data_is_fast():
    import time

    rng = np.random.default_rng(0)
    data = read({"x": rng.normal(size=200_000), "y": rng.integers(0, 1000, 200_000).astype(str)}, target="y")
    start = time.perf_counter()
    sides(split(data), 200_000)
    assert time.perf_counter() - start < 10
