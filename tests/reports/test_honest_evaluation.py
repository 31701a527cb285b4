"""Evaluation recognizes rows that were used in training by their content, in files and data frames, in any order."""

from __future__ import annotations

import shutil

import numpy as np
import pandas
import polars as pl
import pytest
from PIL import Image

import fieldguide
from fieldguide.core.errors import DataError
from fieldguide.data.row_digests import compute_digests

SETTINGS = {"steps": 3, "batch_size": 16, "precision": "float32"}
RNG = np.random.default_rng(0)


def table(count, seed=0):
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "x": rng.normal(size=count),
            "count": rng.integers(0, 1000, count),
            "city": rng.choice(["Rome", "Paris", "Oslo"], count),
            "label": rng.choice(["yes", "no"], count),
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest")
    table(200).write_csv(folder / "train.csv")
    run = fieldguide.fit(folder / "train.csv", target="label", model="mlp-test", out=folder / "run", settings=SETTINGS)
    return run, folder


def copies(folder):
    data = pl.read_csv(folder / "train.csv")
    shutil.copy(folder / "train.csv", folder / "copy.csv")
    data.write_parquet(folder / "copy.parquet")
    return {
        "copy of the file": folder / "copy.csv",
        "other format": folder / "copy.parquet",
        "data frame": data,
        "other order": data.sample(fraction=1.0, shuffle=True, seed=1),
        "other column order": data.select(reversed(data.columns)),
        "numbers as floats": data.with_columns(pl.col("count").cast(pl.Float64)),
        "pandas": pandas.DataFrame(data.to_dict(as_series=False)),
    }


KINDS = ("copy of the file", "other format", "data frame", "other order", "other column order", "numbers as floats", "pandas")


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_training_data_scores_the_test_rows_alone(trained, kind):
    run, folder = trained
    result = run.evaluate(copies(folder)[kind])
    assert result["rows"] == run.record["scores"]["tested"] == 40
    assert result["scores"]["accuracy"] == pytest.approx(run.scores["accuracy"])


def test_training_rows_among_new_ones_are_left_out(trained):
    run, folder = trained
    with np.load(run.path / "splits.npz") as splits:
        seen = pl.read_csv(folder / "train.csv")[splits["train"][:30]]
    result = run.evaluate(pl.concat([table(50, seed=7), seen]))
    assert result["rows"] == 50 and "30 of 80 rows were used in training" in result["note"]
    assert run.evaluate(table(50, seed=7))["note"] == ""
    with pytest.raises(DataError, match="all 30 rows were used in training"):
        run.evaluate(seen)


def test_equal_rows_of_a_coarse_table_are_not_left_out(tmp_path):
    """With few different rows, new rows equal training rows by chance."""
    rng = np.random.default_rng(0)
    coarse = lambda n: pl.DataFrame(
        {"a": rng.integers(0, 3, n), "b": rng.integers(0, 2, n), "label": rng.choice(["y", "n"], n)}
    )
    run = fieldguide.fit(coarse(200), target="label", model="mlp-test", out=tmp_path / "run", settings=SETTINGS)
    result = run.evaluate(coarse(60))
    assert result["rows"] == 60 and any("equal to training rows, possibly by chance" in note for note in result["notes"])


def test_images_are_recognized_by_content(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(30):
            picture = RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "train" / name / f"{i}.png")
    run = fieldguide.fit(tmp_path / "train", model="resnet-test", out=tmp_path / "run", settings=SETTINGS)
    for name in "ab":
        (tmp_path / "other" / name).mkdir(parents=True)
        for i, path in enumerate(sorted((tmp_path / "train" / name).iterdir())):
            shutil.copy(path, tmp_path / "other" / name / f"renamed{99 - i}.png")
    assert run.evaluate(tmp_path / "other")["rows"] == run.record["scores"]["tested"]


def test_targets_alone_do_not_make_equal_rows():
    data = fieldguide.read(table(20), target="label")
    assert compute_digests(data, list(data.columns.values())) is not None
    assert compute_digests(data, [data.columns["label"]]) is None


def test_texts_are_recognized(tmp_path):
    data = pl.DataFrame({"text": [f"sentence number {i} of this file" for i in range(120)], "label": ["a", "b"] * 60})
    run = fieldguide.fit(data, target="label", model="bert-test", out=tmp_path / "run", settings=SETTINGS)
    assert run.evaluate(data.sample(fraction=1.0, shuffle=True, seed=3))["rows"] == run.record["scores"]["tested"]


def test_a_run_without_digests_still_evaluates(trained, tmp_path):
    run = trained[0]
    shutil.copytree(run.path, tmp_path / "old")
    (tmp_path / "old" / "row_digests.npz").unlink()
    assert fieldguide.pipeline(tmp_path / "old").evaluate(table(50, seed=7))["rows"] == 50
