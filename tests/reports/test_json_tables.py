"""JSON as people have it: lists of objects, values of several types in one place, files of captions, lists of exchanges."""

from __future__ import annotations

import json
import wave

import numpy as np
import pytest
from PIL import Image

from fieldguide.core.errors import DataError
from fieldguide.data import read

N = 12


def write_images(folder, count=N):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def write_recordings(folder, names):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(np.random.default_rng(i).integers(-3000, 3000, 4000).astype("<i2").tobytes())


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_list_of_objects_is_a_table(tmp_path):
    rows = [{"x": i / 2, "y": "ab"[i % 2]} for i in range(N)]
    data = read(write_json(tmp_path / "t.json", rows), target="y")
    assert data.rows["x"].to_list() == [i / 2 for i in range(N)] and data.rows["y"].to_list() == ["a", "b"] * 6
    assert data.locate_row(2) == "t.json:3" and len(read(tmp_path, target="y")) == N
    lines = read(write_lines(tmp_path / "t.jsonl", rows), target="y")
    assert lines.rows["x"].equals(data.rows["x"]) and lines.columns["x"] == data.columns["x"]


def test_other_json_is_named(tmp_path):
    with pytest.raises(DataError, match=r"t.json: entry 2 of the list is not a JSON object"):
        read(write_json(tmp_path / "t.json", [{"a": 1}, 3]))
    (tmp_path / "t.json").write_text('[{"a": 1}, {"a"')
    with pytest.raises(DataError, match=r"t.json is not valid JSON"):
        read(tmp_path / "t.json")


def test_tables_of_splits(tmp_path):
    for name, count in (("train", 9), ("test", 3)):
        write_json(tmp_path / f"{name}.json", [{"x": i / 2, "y": "ab"[i % 2]} for i in range(count)])
    data = read(tmp_path, target="y")
    assert [(data.splits == s).sum() for s in ("train", "test")] == [9, 3]


@pytest.mark.parametrize("names", [("trainset", "testset"), ("train_data", "holdout"), ("Training", "evaluation")])
def test_other_names_of_splits(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.csv").write_text("x,y\n" + "".join(f"{i}.5,{'ab'[i % 2]}\n" for i in range(N)))
    data = read(tmp_path, target="y")
    assert (data.splits == "train").sum() == N == (data.splits != "train").sum()


@pytest.mark.parametrize(
    "content",
    [
        lambda i: [{"type": "text", "text": f"q{i}"}],
        lambda i: f"q{i}" if i % 2 else [{"type": "text", "text": f"q{i}"}],
        lambda i: [{"type": "text", "text": "q"}, {"type": "text", "text": str(i)}],
    ],
)
@pytest.mark.parametrize("write", [write_lines, write_json])
def test_contents_of_several_types(tmp_path, content, write):
    rows = [
        {"messages": [{"role": "user", "content": content(i)}, {"role": "assistant", "content": f"a{i}"}]} for i in range(N)
    ]
    path = write(tmp_path / ("t.json" if write is write_json else "t.jsonl"), rows)
    assert [[m["content"] for m in row] for row in read(path).rows["messages"]] == [[f"q{i}", f"a{i}"] for i in range(N)]


def test_values_of_several_types_become_text(tmp_path):
    rows = [{"a": [1, 2] if i % 3 else "both", "b": {"c": i if i % 2 else [i]}, "y": "ab"[i % 2]} for i in range(N)]
    data = read(write_lines(tmp_path / "t.jsonl", rows), target="y", allow_bad=True)
    assert data.rows["a"].to_list()[:3] == ["both", "[1, 2]", "[1, 2]"]
    assert data.rows["b.c"].to_list()[:3] == ["[0]", "1", "[2]"]


@pytest.mark.parametrize(
    "fields",
    [("human", "assistant"), ("human", "gpt"), ("user", "assistant"), ("prompt", "response"), ("question", "answer")],
)
@pytest.mark.parametrize("column", ["conversation", "conversations", "dialog"])
def test_lists_of_exchanges(tmp_path, fields, column):
    asked, answered = fields
    rows = [
        {"id": f"c{i}", column: [{asked: f"q{i}", answered: f"a{i}"}, {asked: "more", answered: "ok"}], "category": "chat"}
        for i in range(N)
    ]
    data = read(write_lines(tmp_path / "t.jsonl", rows))
    assert list(data.columns) == ["messages"] and [f.check for f in data.findings].count("unused-columns") == 1
    turns = [(m["role"], m["content"]) for m in data.rows["messages"][3]]
    assert turns == [("user", "q3"), ("assistant", "a3"), ("user", "more"), ("assistant", "ok")]


def test_identifiers_next_to_messages_are_no_target(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"conversation_id": i, "messages": messages, "source": "web"} for i in range(N)]
    data = read(write_lines(tmp_path / "t.jsonl", rows))
    assert list(data.columns) == ["messages"] and data.target is None


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("prefix", ["", "images/"])
def test_a_list_of_images_and_captions(tmp_path, several, prefix):
    write_images(tmp_path / "images")
    texts = [[f"picture number {i}", "another text"] if several else f"picture number {i}" for i in range(N)]
    write_json(tmp_path / "captions.json", [{"image": f"{prefix}{i}.png", "caption": texts[i]} for i in range(N)])
    data = read(tmp_path, target="caption", kinds={"caption": "text"})
    assert len(data) == N * (1 + several) and data.columns["image"].kind == "image"
    first = data.rows.filter(data.rows["image"].str.ends_with("/7.png"))
    assert first["caption"].to_list() == ["picture number 7", "another text"][: 1 + several]


@pytest.mark.parametrize("folders", [False, True])
def test_karpathy_splits(tmp_path, folders):
    splits, images = ["train", "restval", "val", "test"], []
    for i in range(N):
        folder = ("train2014" if i % 2 else "val2014") if folders else ""
        entry = {"filename": f"{i}.png", "imgid": i, "split": splits[i % 4], **({"filepath": folder} if folders else {})}
        images.append({**entry, "sentences": [{"raw": f"number  {i}", "tokens": ["x"]}, {"raw": "a dot.", "tokens": []}]})
    for folder in ("train2014", "val2014") if folders else ("Images",):
        write_images(tmp_path / folder)
    path = write_json(tmp_path / "dataset.json", {"dataset": "x", "images": images})
    for source in (tmp_path, path):
        data = read(source)
        assert len(data) == 2 * N and data.target.name == "caption"
        assert data.rows["caption"].to_list()[6:8] == ["number 3", "a dot."] and data.rows["image"][6].endswith("/3.png")
        assert not folders or "/train2014/" in data.rows["image"][6]
        assert data.splits.tolist()[:8] == [s for s in ("train", "train", "val", "test") for _ in range(2)]


@pytest.mark.parametrize(("inside", "where"), [(False, ""), (True, ""), (True, "data")])
def test_one_table_above_the_splits(tmp_path, inside, where):
    names = [f"{split}/{split}{i}.wav" for split in ("train", "test") for i in range(N // 2)]
    write_recordings(tmp_path / "data", names)
    prefix = "" if inside else "data/"
    place = tmp_path / "data" if inside else tmp_path
    rows = [f"{prefix}{name},word number {i}" for i, name in enumerate(names)]
    (place / "metadata.csv").write_text("\n".join(["file_name,transcription", *rows]))
    (tmp_path / "README.md").write_text("Recordings.")
    data = read(tmp_path / where)
    assert data.target.name == "transcription" and data.rows["transcription"][7] == "word number 7"
    assert [(data.splits == s).sum() for s in ("train", "test")] == [6, 6]
