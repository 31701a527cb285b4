"""Images and recordings with tables: ImageFolder and AudioFolder conventions, Flickr8k, Flickr30k and COCO captions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
from PIL import Image

import fieldguide
from fieldguide.automl.request import read_for
from fieldguide.core.errors import DataError
from fieldguide.data import read

WORDS = ("a red square", "a green, wide field", "two dogs run", "a boat at night")


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path


def sound(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, 4000), 8000, format="WAV")
    return path


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pl.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    elif path.suffix == ".jsonl":
        frame.write_ndjson(path)
    else:
        frame.write_csv(path)


def requested(path, **more):
    request = {
        "data": str(path),
        "target": None,
        "kinds": {},
        "roles": {},
        "group": None,
        "time": None,
        "allow_bad": False,
        "task": None,
    }
    return read_for(request | more)


def named(data):
    return Counter(Path(p).name for p in data.rows[data.features("image")[0].name].to_list())


# ImageFolder and AudioFolder


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet", "labels.csv", "Metadata.CSV"])
@pytest.mark.parametrize("base", ["", "data/"])
def test_image_folder_with_labels(tmp_path, name, base):
    for split, count in (("train", 8), ("test", 4)):
        for i in range(count):
            picture(tmp_path / base / split / f"{i:04d}.png", count * 100 + i)
        rows = {"file_name": [f"{i:04d}.png" for i in range(count)], "label": ["cat", "dog"] * (count // 2)}
        table(tmp_path / base / split / (name if "CSV" not in name else name.lower()), rows)
    data, kind, _ = requested(tmp_path)
    assert kind.name == "image-classification" and Counter(data.splits) == {"train": 8, "test": 4}
    assert data.target.name == "label" and data.rows["label"].value_counts().height == 2
    assert data.rows["#hash"].n_unique() == 12  # each row has the image of its own split


def test_image_folder_with_captions_in_folders(tmp_path):
    for split in ("train_set", "validation", "test_set"):
        for i in range(4):
            picture(tmp_path / split / "images" / f"{i}.png", len(split) * 10 + i)
        table(tmp_path / split / "metadata.jsonl", {"file_name": [f"images/{i}.png" for i in range(4)], "text": list(WORDS)})
    data = requested(tmp_path, task="image-text")[0]
    assert Counter(data.splits) == {"train": 4, "val": 4, "test": 4} and data.target.kind == "text"


@pytest.mark.parametrize("names", [["0", "1", "2", "3"], ["x/0.PNG"] * 4, [f"train\\{i}.png" for i in range(4)]])
def test_names_in_tables_are_found(tmp_path, names):
    for i in range(4):
        picture(tmp_path / "pictures" / f"{i}.png" if names[0] != "0" else tmp_path / "pictures" / f"img_{i}.png", i)
    rows = [n if names[0] != "0" else f"img_{n}" for n in names]
    table(tmp_path / "labels.csv", {"id": rows, "kind": ["a", "b", "a", "b"]})
    data = read(tmp_path, target="kind")
    assert data.columns["id"].kind == "image" and data.rows["#width"].to_list() == [12] * 4


def test_images_without_a_row_are_named(tmp_path):
    for i in range(4):
        picture(tmp_path / "train" / f"{i}.png", i), picture(tmp_path / "test" / f"{i}.png", 10 + i)
    for split in ("train", "test"):
        table(tmp_path / split / "metadata.csv", {"file_name": ["0.png", "1.png", "2.png"], "label": ["a", "b", "a"]})
    data = read(tmp_path)
    assert len(data) == 6 and next(f for f in data.findings if f.check == "file-without-row").places == ("train/3.png",)


def test_table_that_names_other_images(tmp_path):
    for split in ("train", "test"):
        picture(tmp_path / split / "a.png", 1)
        table(tmp_path / split / "metadata.csv", {"file_name": ["other.jpg"] * 3, "label": ["a", "b", "a"]})
    with pytest.raises(
        DataError, match=r"no column of test/metadata.csv \(file_name, label\) contains the names.*such as a.png"
    ):
        read(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_audio_folder(tmp_path, name):
    for split, count in (("train", 6), ("test", 2)):
        for i in range(count):
            sound(tmp_path / split / "audio" / f"{i}.wav", count * 10 + i)
        rows = {"file_name": [f"audio/{i}.wav" for i in range(count)], "transcription": [f"word {i}" for i in range(count)]}
        table(tmp_path / split / name, rows)
    data, kind, _ = requested(tmp_path)
    assert kind.name == "automatic-speech-recognition" and Counter(data.splits) == {"train": 6, "test": 2}
    assert data.target.name == "transcription" and data.rows["#hash"].n_unique() == 8


def test_recordings_in_folders_named_after_splits(tmp_path):
    for split in ("train_audio", "test_audio"):
        for i in range(2):
            sound(tmp_path / split / f"{i}.wav", len(split) + i)
            (tmp_path / split / f"{i}.txt").write_text(f"word {i}")
    assert Counter(read(tmp_path).splits) == {"train": 2, "test": 2}


# Captions


def flickr(root, form, folder="Images"):
    for i in range(6):
        picture(root / folder / f"{i}000_ab.jpg", i)
    names = [f"{i}000_ab.jpg" for i in range(6)]
    if form == "csv":
        lines = ["image,caption"] + [
            f'{n},"{w}"' if "," in w and i % 2 else f"{n},{w}" for n in names for i, w in enumerate(WORDS)
        ]
        (root / "captions.txt").write_text("\n".join(lines) + "\n")
    elif form == "token":
        (root / "Flickr8k.token.txt").write_text("\n".join(f"{n}#{i}\t{w}" for n in names for i, w in enumerate(WORDS)))
        for part, some in (("train", names[:3]), ("dev", names[3:4]), ("test", names[4:])):
            (root / f"Flickr_8k.{part}Images.txt").write_text("\n".join(some))
    else:
        lines = ["image_name| comment_number| comment"] + [f"{n}| {i}| {w}" for n in names for i, w in enumerate(WORDS)]
        (root / "results.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize(
    ("form", "folder"),
    [("csv", "Images"), ("csv", "Flicker8k_Dataset"), ("token", "Images"), ("results", "flickr30k_images/flickr30k_images")],
)
def test_flickr(tmp_path, form, folder):
    data, kind, _ = requested(flickr(tmp_path, form, folder))
    assert kind.name == "image-text" and data.target.name == "caption" and data.target.kind == "text"
    assert set(named(data).values()) == {4} and len(named(data)) == 6
    assert Counter(data.rows["caption"].to_list()) == dict.fromkeys(WORDS, 6)  # commas belong to the caption
    if form == "token":
        assert Counter(data.splits) == {"train": 12, "val": 4, "test": 8}
    assert all(Path(p).exists() for p in data.rows["image"].to_list())


def coco_captions(root, instances=False):
    for split, ids in (("train", range(6)), ("val", range(6, 9))):
        for i in ids:
            picture(root / f"{split}2017" / f"{i:012d}.jpg", i)
        shots = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 12, "height": 12} for i in ids]
        notes = [{"id": 10 * i + k, "image_id": str(i), "caption": w + "\n"} for i in ids for k, w in enumerate(WORDS)]
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/captions_{split}2017.json").write_text(
            json.dumps({"info": {}, "images": shots, "annotations": notes})
        )
        if instances:
            boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [i, 1, 3, 3]} for i in ids]
            (root / f"annotations/instances_{split}2017.json").write_text(
                json.dumps({"images": shots, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]})
            )
    return root


def test_coco_captions(tmp_path):
    data, kind, _ = requested(coco_captions(tmp_path))
    assert kind.name == "image-text" and Counter(data.splits) == {"train": 24, "val": 12}
    assert set(data.rows["caption"].unique()) == set(WORDS) and len(named(data)) == 9


def test_coco_with_captions_and_instances(tmp_path):
    coco_captions(tmp_path, instances=True)
    assert requested(tmp_path)[1].name == "object-detection"
    data, kind, _ = requested(tmp_path, task="image-text")
    assert kind.name == "image-text" and data.target.name == "caption" and len(data) == 36


def test_captions_are_trained_on(tmp_path):
    """They used to be ignored: the name of the folder was the class, and the score 100 %."""
    run = fieldguide.fit(
        flickr(tmp_path / "data", "csv"), model="clip-test", out=tmp_path / "run", settings={"steps": 2, "precision": "float32"}
    )
    assert run.record["task"] == "image-text" and run.record["data"]["rows"] == 24


def test_captions_in_folders_with_split_words(tmp_path):
    for split in ("train_data", "test_data"):
        for i in range(3):
            picture(tmp_path / split / f"{i}.png", len(split) * 7 + i)
            (tmp_path / split / f"{i}.txt").write_text(WORDS[i])
    assert Counter(read(tmp_path).splits) == {"train": 3, "test": 3}


def test_malformed_caption_file_is_named(tmp_path):
    coco_captions(tmp_path)
    path = tmp_path / "annotations/captions_train2017.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"captions_train2017.json is not valid JSON"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_one_table_for_folders_of_splits(tmp_path, suffix):
    for split in ("train", "test"):
        for i in range(4):
            picture(tmp_path / split / f"img{i}.png", i + len(split))
    names = [f"{split}/img{i}.png" for split in ("train", "test") for i in range(4)]
    table = pl.DataFrame({"file_name": names, "label": ["a", "b"] * 4})
    table.write_csv(tmp_path / "metadata.csv") if suffix == "csv" else table.write_parquet(tmp_path / "metadata.parquet")
    assert Counter(read(tmp_path).splits) == {"train": 4, "test": 4}
    table.filter(pl.col("file_name").str.starts_with("test")).write_csv(tmp_path / "metadata.csv")
    (tmp_path / "metadata.parquet").unlink(missing_ok=True)
    assert read(tmp_path).splits is None  # a test set alone is no split


def test_images_that_the_table_does_not_name_are_a_warning(tmp_path):
    """A column of numbers is no name of an image: the numbers used to be the only input, without a word."""
    for i in range(6):
        picture(tmp_path / f"images/{i:04d}.png", i)
    pl.DataFrame({"id": range(6), "label": ["a", "b"] * 3}).write_csv(tmp_path / "labels.csv")
    assert "images-not-used" in {f.check for f in read(tmp_path).findings if f.severity == "warning"}
    names = [f"{i:04d}.png" for i in range(6)]
    pl.DataFrame({"id": names, "label": ["a", "b"] * 3}).write_csv(tmp_path / "labels.csv")
    assert "images-not-used" not in {f.check for f in read(tmp_path).findings}
