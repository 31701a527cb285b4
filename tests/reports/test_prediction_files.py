"""Predictions as files and data frames: inputs next to predictions, one column per class, names of files kept."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from PIL import Image
from typer.testing import CliRunner

import fieldguide
from fieldguide.cli.commands import app
from fieldguide.core.errors import DataError, SettingsError

ROWS = 120


def people(count=ROWS, seed=0):
    draw = np.random.default_rng(seed)
    age = draw.integers(18, 80, count)
    city = draw.choice(["Rome", "Oslo", "Lima"], count)
    bought = np.where((age > 45) ^ (city == "Oslo"), "yes", "no")
    frame = {"customer": [f"c{seed}-{i}" for i in range(count)], "age": age, "city": city, "spare": draw.normal(size=count)}
    return pl.DataFrame({**frame, "bought": bought})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    people().write_csv(folder / "people.csv")
    return fieldguide.fit(folder / "people.csv", "bought", out=folder / "run", settings={"steps": 8, "batch_size": 32})


@pytest.fixture(scope="module")
def predictor(run):
    return fieldguide.pipeline(run.path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_inputs_predictions_and_probabilities(run, predictor, tmp_path, suffix):
    new = people(6, seed=1).drop("bought")
    new.write_csv(tmp_path / "new.csv")
    out = tmp_path / "sub" / f"answers{suffix}"
    answer = CliRunner().invoke(app, ["predict", str(run.path), str(tmp_path / "new.csv"), "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    assert "6 predictions written to" in answer.output
    read = {".csv": pl.read_csv, ".tsv": lambda p: pl.read_csv(p, separator="\t"), ".parquet": pl.read_parquet}
    frame = read.get(suffix, pl.read_ndjson)(out)
    assert frame.columns == [*new.columns, "label", "probability", "probability_no", "probability_yes"]
    assert frame["customer"].to_list() == new["customer"].to_list()
    assert frame["label"].to_list() == [r["label"] for r in predictor.predict(new)]
    assert np.allclose(frame["probability_no"] + frame["probability_yes"], 1)


def test_files_are_not_overwritten(run, tmp_path):
    people(3, seed=2).write_csv(tmp_path / "new.csv")
    (tmp_path / "out.csv").write_text("mine")
    for name, message in (("out.csv", "out.csv exists"), ("out.xlsx", "written as .csv")):
        arguments = ["predict", str(run.path), str(tmp_path / "new.csv"), "--out", str(tmp_path / name)]
        assert message in str(CliRunner().invoke(app, arguments).exception)
    assert (tmp_path / "out.csv").read_text() == "mine"


def test_a_target_in_the_input_is_kept(predictor, tmp_path):
    new = people(4, seed=3).rename({"spare": "label"}).with_columns(pl.lit(0.5).alias("spare"))
    frame = predictor.predict(new).to_frame()
    assert frame["label"].to_list() == new["label"].to_list()
    assert set(frame["predicted_label"].to_list()) <= {"no", "yes"}
    assert frame["bought"].to_list() == new["bought"].to_list()


def test_inputs_that_cannot_be_read_keep_their_row(predictor, tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("customer,age,city,spare\na,30,Rome,1\nb,,,\nc,50,Lima,2\n")
    frame = predictor.predict(path).to_frame()
    assert frame["customer"].to_list() == ["a", "b", "c"]
    if "error" in frame.columns:  # a row without any value
        assert frame["error"].is_null().to_list() == [True, False, True]
        assert frame["label"].is_null().to_list() == [False, True, False]


def test_several_tables(predictor, tmp_path):
    for i in (1, 2):
        people(3, seed=i).drop("bought").write_csv(tmp_path / f"{i}.csv")
    frame = predictor.predict([str(tmp_path / "1.csv"), str(tmp_path / "2.csv")]).to_frame()
    assert frame["customer"].to_list() == [f"c{s}-{i}" for s in (1, 2) for i in range(3)]


def test_rows_as_dictionaries_and_series(predictor):
    pandas = pytest.importorskip("pandas")
    rows = people(4, seed=5).drop("bought").to_dicts()
    expected = [r["label"] for r in predictor.predict(people(4, seed=5))]
    assert [r["label"] for r in predictor.predict(rows)] == expected
    assert predictor.predict(rows[0])[0]["label"] == expected[0]
    assert predictor.predict(pandas.Series(rows[1]))[0]["label"] == expected[1]
    frame = pandas.DataFrame(rows)
    assert [r["label"] for r in predictor.predict(frame)] == expected
    assert [predictor.predict(row)[0]["label"] for _, row in frame.iterrows()] == expected
    assert list(predictor.predict(frame).to_pandas()["label"]) == expected


def test_predict_proba(predictor, run):
    new = people(9, seed=6)
    found = predictor.predict_proba(new)
    assert predictor.classes == ["no", "yes"] and found.shape == (9, 2)
    records = predictor.predict(new)
    assert np.allclose(found, [[r["probabilities"][c] for c in predictor.classes] for r in records], atol=1e-6)
    assert np.allclose(found.sum(1), 1)


def test_predict_proba_keeps_the_place_of_inputs_that_cannot_be_read(predictor, tmp_path):
    people(2, seed=8).write_csv(tmp_path / "a.csv")
    people(3, seed=9).write_csv(tmp_path / "c.csv")
    found = predictor.predict_proba([tmp_path / "a.csv", tmp_path / "no such file.csv", tmp_path / "c.csv"])
    assert np.isnan(found).all(1).tolist() == [False, False, True, False, False, False]
    assert np.array_equal(found[3:], predictor.predict_proba(tmp_path / "c.csv"))


def test_predict_proba_needs_classes(tmp_path):
    frame = pl.DataFrame({"x": np.arange(60.0) % 7, "z": np.arange(60.0) % 5}).with_columns(
        (pl.col("x") * 2 + pl.col("z")).alias("y")
    )
    run = fieldguide.fit(frame, "y", out=tmp_path / "run", settings={"steps": 2}, task="tabular-regression")
    with pytest.raises(SettingsError, match="no class probabilities"):
        run.predict_proba(frame)
    assert run.predict(frame).to_frame().columns == ["x", "z", "y", "predicted_y"]


def test_columns_that_the_model_does_not_use_are_not_required(predictor):
    new = people(3, seed=7).drop("customer", "bought")
    assert len(predictor.predict(new)) == 3


def squares(folder, count=20, side=40):
    rows = []
    for i in range(count):
        draw = np.random.default_rng(i)
        pixels = draw.integers(0, 60, (side, side + 160, 3), dtype=np.uint8)
        x, y = draw.integers(0, side - 16, 2)
        pixels[y : y + 14, x : x + 14] = (230, 30, 30) if i % 2 else (30, 230, 30)
        mask = np.zeros((side, side + 160), dtype=np.uint8)
        mask[y : y + 14, x : x + 14] = 1 + i % 2
        rows.append((f"shot {i:02d}.png", pixels, mask))
    return rows


@pytest.mark.slow
def test_segmentation_writes_masks_and_readable_overlays(tmp_path):
    for name, pixels, mask in squares(tmp_path):
        for part, values in (("images", pixels), ("masks", mask)):
            (tmp_path / "data" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(tmp_path / "data" / part / name)
    run = fieldguide.fit(tmp_path / "data", out=tmp_path / "run", settings={"steps": 2, "batch_size": 4})
    paths = [str(tmp_path / "data" / "images" / f"shot {i:02d}.png") for i in range(2)]
    for expected in ("", "-1"):  # the second time, the files exist already
        found = run.predict(paths).save_media(tmp_path / "out")
        assert [r["mask"] for r in found] == [str(tmp_path / "out" / f"shot {i:02d}-mask{expected}.png") for i in range(2)]
        assert [r["overlay"] for r in found] == [
            str(tmp_path / "out" / f"shot {i:02d}-overlay{expected}.jpg") for i in range(2)
        ]
    with Image.open(found[0]["overlay"]) as overlay, Image.open(found[0]["mask"]) as mask:
        assert mask.size == (200, 40)
        assert overlay.width == 200 and overlay.height > 40  # with a legend


def test_detection_writes_one_table_and_drawings_next_to_it(tmp_path):
    (tmp_path / "data").mkdir()
    images, boxes = [], []
    for i, (name, pixels, mask) in enumerate(squares(tmp_path)):
        Image.fromarray(pixels).save(tmp_path / "data" / name)
        ys, xs = np.nonzero(mask)
        images.append({"id": i, "file_name": name, "width": pixels.shape[1], "height": pixels.shape[0]})
        box = [int(xs.min()), int(ys.min()), 14, 14]
        boxes.append({"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": box, "area": 196, "iscrowd": 0})
    categories = [{"id": 1, "name": "green"}, {"id": 2, "name": "red"}]
    (tmp_path / "data" / "boxes.json").write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": categories})
    )
    run = fieldguide.fit(tmp_path / "data", out=tmp_path / "run", settings={"steps": 2, "batch_size": 4})
    found = run.predict([str(tmp_path / "data" / "shot 00.png"), str(tmp_path / "data" / "shot 01.png")], threshold=0.0)
    out = found.save(tmp_path / "found.csv")
    frame = pl.read_csv(out)
    assert frame["picture"].to_list() == [str(tmp_path / "found" / f"shot {i:02d}.jpg") for i in range(2)]
    assert all(isinstance(json.loads(cell), list) for cell in frame["objects"])
    with pytest.raises(DataError, match="exists"):
        found.save(out)
