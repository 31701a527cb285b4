"""Captioning: several captions of an image, five forms of data, damaged data, baselines, a complete run."""

from __future__ import annotations

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

import damage
from fieldguide.automl.fit import fit
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.inference.run import open_run
from fieldguide.metrics.captions import score_captions
from fieldguide.models.registry import card
from fieldguide.tasks import infer_task, task
from fieldguide.tasks.multimodal.captioning import REFERENCES, find_nearest_images
from test_task_image_text import album

KIND = task("image-to-text")


def load(source):
    return read(source, column_spec=KIND.column_spec)


def build(source, **options):
    chosen = KIND.options_from(options)
    return KIND.build_examples(KIND.select_columns(load(source)), chosen), chosen


def write_images(folder, count=40):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")


def write_coco(folder, count=40, **changes):
    """Write images with two captions each as COCO captions."""
    write_images(folder / "images", count)
    images = [{"id": 7 * i, "file_name": f"{i:02}.png"} for i in range(count)]
    captions = [{"id": i, "image_id": 7 * (i // 2), "caption": f"caption {i % 2} of image {i // 2}"} for i in range(2 * count)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions, **changes}))
    return folder


# Forms of data


def write_table(folder):
    lines = [f"images/{i // 2:02}.png,caption {i % 2} of image {i // 2}" for i in range(80)]
    return damage.write(folder / "table.csv", ["image,caption", *lines])


def write_lists(folder):
    rows = [{"image": f"images/{i:02}.png", "captions": [f"caption {k} of image {i}" for k in (0, 1)]} for i in range(40)]
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "table.jsonl"


def write_texts(folder):
    for i in range(40):
        (folder / "images" / f"{i:02}.txt").write_text(f"caption 0 of image {i}\n")
    return folder / "images"


@pytest.mark.parametrize(
    "form", [lambda folder: folder, write_table, write_lists, write_texts], ids=["COCO", "csv", "lists", "txt"]
)
def test_forms_of_data(form, tmp_path):
    data, _ = build(form(write_coco(tmp_path / "data")))
    assert len(data) == 40 and KIND.missing_requirements(data) is None
    found = {int(path[-6:-4]): texts for path, texts in zip(data.rows["image"], data.rows[REFERENCES].to_list())}
    captions = 1 if form is write_texts else 2
    assert found == {i: [f"caption {k} of image {i}" for k in range(captions)] for i in range(40)}


def test_equal_images_are_one_example(tmp_path):
    """Copies of a file share their captions; equal captions of an image count once."""
    table = album(tmp_path / "data", 20)
    shutil.copy(tmp_path / "data/photos/000.png", tmp_path / "data/photos/copy.png")
    damage.write(table, [*table.read_text().splitlines(), "photos/copy.png,a copy", "photos/copy.png,a copy"])
    data, options = build(table)
    references = data.rows[REFERENCES].to_list()
    assert len(data) == 20 and len(references[0]) == 3 and references[0][-1] == "a copy"
    assert KIND.build_examples(data, options) is data, "built once"


def test_it_is_asked_for(tmp_path):
    data = load(album(tmp_path / "data", 60))
    assert infer_task(data)[0].name == "image-text" and KIND.match(data) is None
    assert KIND.missing_requirements(read(pl.DataFrame({"a": [1, 2], "b": [3, 4]}))) == "one image column"


# Batches


def learnt(tmp_path, **options):
    data, chosen = build(album(tmp_path / "data", 30), **options)
    return KIND.fit(data, chosen), data


def test_training_takes_a_random_caption(tmp_path):
    it, data = learnt(tmp_path)
    batches, index = it.batches(data, card("blip"), Settings()), np.arange(30)
    said = lambda batch: [it.text.decode(row[row >= 0]).strip() for row in batch["target"].numpy()]
    first = said(batches.make(index, None))
    references = it.read_references(data)
    assert first == [texts[0] for texts in references], "without a generator, the first"
    drawn = [said(batches.make(index, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and first not in drawn
    assert all(text in texts for text, texts in zip(drawn[0], references))
    batch = batches.make(index, None)
    length = batch["mask"].sum(1)
    assert (batch["tokens"][:, 0] == it.begin).all() and (batch["target"][torch.arange(30), length - 1] == it.end).all()
    assert torch.equal(batch["target"] >= 0, batch["mask"])
    assert torch.equal(batch["tokens"][0, 1 : length[0]], batch["target"][0, : length[0] - 1])


def test_long_captions_are_truncated_and_counted(tmp_path):
    it, data = learnt(tmp_path, length="4")
    batch = it.batches(data, card("blip"), None).make(np.arange(5), None)
    assert batch["tokens"].shape[1] == 3 and (batch["target"][:, -1] == it.end).all()
    assert any("100.0 % of the texts are longer than 4 tokens" in note for note in it.notes)


# Scores


def test_scores_use_all_references(tmp_path):
    it, data = learnt(tmp_path)
    targets, references = it.targets(data), it.read_references(data)
    second = {"text": np.array([texts[1] for texts in references], dtype=object)}
    scores = it.score(second, targets)
    assert scores["bleu"] == pytest.approx(100) and 5 < scores["cider"] < 10
    assert it.score({"text": np.array(["nothing"] * 30, dtype=object)}, targets) == {"cider": 0, "bleu": 0}
    between = it.intervals(second | {"nats": np.full(30, 6.0), "count": np.full(30, 3)}, targets)
    assert between["cider"][0] < scores["cider"] < between["cider"][1] and between["loss"] == (2, 2)
    assert score_captions(second["text"].tolist(), references)[1].mean() == pytest.approx(scores["cider"])


def test_baselines(tmp_path):
    it, data = learnt(tmp_path)
    often, near = it.baselines(data.take(np.arange(20)), data.take(np.arange(25)))
    captions = [text for texts in it.read_references(data)[:20] for text in texts]
    assert set(often.outputs["text"]) == {max(set(captions), key=lambda text: (captions.count(text), -captions.index(text)))}
    assert near.outputs["text"][:20].tolist() == [texts[0] for texts in it.read_references(data)[:20]]
    assert find_nearest_images(torch.tensor([[1.0, 0.2], [0.0, 1.0]]), torch.eye(2)) == [0, 1]


def test_the_prompt_must_leave_room(tmp_path):
    it, _ = learnt(tmp_path)
    asked = it.for_request(it.parse_predict_options({"prompt": "a red square " * 10}))
    with pytest.raises(SettingsError, match="shorten the prompt"):
        asked.start_tokens()


# Damaged data: one clear finding or error each


def test_missing_image(tmp_path):
    folder = write_coco(tmp_path / "data")
    (folder / "images/03.png").unlink()
    with damage.refused("missing-file", "captions.json: 03.png"):
        load(folder)


def test_truncated_image(tmp_path):
    folder = write_coco(tmp_path / "data", 300)
    file = folder / "images/100.png"
    file.write_bytes(file.read_bytes()[:60])
    assert "captions.json: 100.png" in str(damage.finding(load(folder), "truncated-image"))


def test_images_without_captions(tmp_path):
    folder = write_texts(write_coco(tmp_path / "data"))
    (folder / "07.txt").unlink()
    with damage.refused("no-caption", "07.png"):
        load(folder)


def test_empty_captions(tmp_path):
    table = album(tmp_path / "data", 200)
    lines = table.read_text().splitlines()
    damage.write(table, [*lines[:3], lines[3].partition(",")[0] + ",", *lines[4:]])
    data = load(table)
    assert len(data) == 399 and "table.csv:4" in str(data.findings)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda text: text[:-20], r"captions\.json"),
        (lambda text: text.replace("image_id", "picture"), r"image_id"),
        (lambda text: text.replace('"annotations": [', '"annotations": [3, '), r"not a file of COCO captions"),
    ],
    ids=["truncated", "other keys", "no objects"],
)
def test_damaged_json(content, said, tmp_path):
    file = write_coco(tmp_path / "data") / "captions.json"
    file.write_text(content(file.read_text()))
    with pytest.raises(DataError, match=said):
        load(tmp_path / "data")


def test_captions_of_no_image(tmp_path):
    with pytest.raises(DataError, match="contains no captions of the images"):
        load(write_coco(tmp_path / "data", images=[{"id": -1, "file_name": "00.png"}]))


def test_captions_that_are_file_names_and_repeated_pairs(tmp_path):
    table = album(tmp_path / "data", 200)
    lines = table.read_text().splitlines()
    damage.write(table, [*lines[:5], "photos/001.png,001.png", *lines[6:], lines[1]])
    data = load(table)
    assert "table.csv:6" in str(damage.finding(data, "caption-is-file"))
    assert "table.csv:402" in str(damage.finding(data, "duplicate-pair"))


# A complete run

SMALL = {
    **{f"model.{side}{name}": value for side in ("", "seen_") for name, value in (("dim", 64), ("heads", 2), ("hidden", 128))},
    **{"model.depth": 2, "model.seen_depth": 2, "model.patch": 4, "precision": "float32", "minutes": 0},
}


@pytest.mark.slow
def test_captions_end_to_end(tmp_path):
    table = album(tmp_path / "data", 300)
    run = fit(
        table,
        task="image-to-text",
        model="blip-mini",
        out=tmp_path / "run",
        settings={**SMALL, "steps": 110, "evaluate": 55, "batch": 32, "model.dropout": 0},
    )
    often = {b["name"]: b["scores"]["cider"] for b in run.record["scores"]["baselines"]}["most frequent caption"]
    assert run.scores["cider"] > 2 * often and run.scores["bleu"] > 60, "one of two references exactly is about 6"
    photos, again = sorted((tmp_path / "data/photos").iterdir()), open_run(run.path)
    told = again.predict([str(p) for p in photos[:40]])
    assert len({r["text"] for r in told}) >= 6 and told[0]["input"].endswith("000.png")
    asked = again.predict(str(photos[0]), prompt="on the", num_beams=1)[0]["text"]
    assert asked.startswith("on the ") and "there is something" in asked
    assert again.evaluate(table)["scores"] == pytest.approx(run.scores, abs=1e-6)
    page = (run.path / "report.html").read_text()
    assert "Worst captions" in page and "BLEU by length of the n-grams" in page
    loop = again.signature.loop
    assert loop.kind == "encoder-decoder" and loop.start_tokens == (2,) and loop.eos_tokens == (3,)
