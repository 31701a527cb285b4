"""Images with several captions in one row: lists, objects with a text, lists written into a CSV, numbered columns."""

from __future__ import annotations

import csv
import json

import numpy as np
import polars as pl
import pytest
from PIL import Image

import fieldguide
from fieldguide.data import read
from fieldguide.tasks.multimodal.image_text import ImageText

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "black": (10, 10, 10)}


def captions_of(color):
    return [f"a {color} square", f"this picture is {color}", f"{color}, nothing but {color}"]


def write_images(folder, count=24, seed=0):
    rows = []
    for i in range(count):
        color = list(COLORS)[i % 4]
        noise = np.random.default_rng((seed, i)).integers(-10, 11, (16, 16, 3))
        pixels = np.clip(np.array(COLORS[color]) + noise, 0, 255).astype(np.uint8)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        rows.append((f"{i:03d}.png", captions_of(color)))
    return rows


def as_lists(folder, rows):
    pl.DataFrame({"file_name": [r[0] for r in rows], "captions": [r[1] for r in rows]}).write_parquet(
        folder / "metadata.parquet"
    )


def as_json(folder, rows):
    lines = [json.dumps({"image": name, "caption": texts}) for name, texts in rows]
    (folder / "data.jsonl").write_text("\n".join(lines))


def as_objects(folder, rows):
    lines = [json.dumps({"image": n, "sentences": [{"raw": t, "tokens": t.split()} for t in texts]}) for n, texts in rows]
    (folder / "data.jsonl").write_text("\n".join(lines))


def as_object_of_lists(folder, rows):
    lines = [json.dumps({"image": n, "sentences": {"raw": texts, "id": [1, 2, 3]}}) for n, texts in rows]
    (folder / "data.jsonl").write_text("\n".join(lines))


def as_json_in_csv(folder, rows):
    with (folder / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("raw", "filename"), *((json.dumps(texts), name) for name, texts in rows)])


def as_python_in_csv(folder, rows):
    with (folder / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "captions"), *((name, str(texts)) for name, texts in rows)])


def as_columns(folder, rows):
    with (folder / "captions.csv").open("w", newline="") as file:
        head = ("image", "caption_0", "caption_1", "caption_2")
        csv.writer(file).writerows([head, *((name, *texts) for name, texts in rows)])


@pytest.mark.parametrize(
    "write", [as_lists, as_json, as_objects, as_object_of_lists, as_json_in_csv, as_python_in_csv, as_columns]
)
def test_every_caption_becomes_a_row(tmp_path, write):
    rows = write_images(tmp_path)
    write(tmp_path, rows)
    data = read(tmp_path, column_spec=ImageText.column_spec)
    image, text = data.features("image")[0].name, data.required_target.name
    pairs = {(value.rsplit("/", 1)[-1], caption) for value, caption in zip(data.rows[image], data.rows[text], strict=True)}
    assert pairs == {(name, caption) for name, texts in rows for caption in texts}
    assert len(data) == 3 * len(rows)
    assert any(f.check == "caption-lists" and "24 rows become 72" in f.what for f in data.findings)


def test_missing_and_empty_captions(tmp_path):
    rows = write_images(tmp_path)
    rows[3] = (rows[3][0], [])
    rows[4] = (rows[4][0], ["", "a black square", "  "])
    as_json(tmp_path, rows)
    data = read(tmp_path, column_spec=ImageText.column_spec, allow_bad=True)
    assert len(data) == 3 * 22 + 1
    (missing,) = [f for f in data.findings if f.unusable]
    assert missing.count == 1
    assert "4" in missing.places[0]


def test_splits_and_evaluation_follow_the_rows(tmp_path):
    for seed, (part, count) in enumerate((("train", 24), ("test", 8))):
        as_lists(tmp_path / part, write_images(tmp_path / part, count, seed))
    run = fieldguide.fit(tmp_path, out=tmp_path / "run", settings={"steps": 2, "batch_size": 8})
    assert run.record["task"] == "image-text"
    assert run.record["data"]["split"]["test"] == 24
    assert run.record["data"]["split"]["train"] + run.record["data"]["split"]["validation"] == 72
    assert fieldguide.pipeline(run.path).evaluate(tmp_path / "test")["rows"] == 24


def test_lists_of_other_things_stay(tmp_path):
    rows = [{"image": f"{i:03d}.png", "tags": ["a", "b"], "label": "x" if i % 2 else "y"} for i in range(24)]
    write_images(tmp_path)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    assert len(read(tmp_path, target="label")) == 24
    assert len(read(tmp_path)) == 24  # the target is inferred
