"""Exports of networks of images and texts, compared with the run in a process without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import fieldguide
from fieldguide.exporting.comparison import Comparison
from fieldguide.exporting.export import export
from fieldguide.exporting.verify import verify
from test_task_image_text import album

GOLDEN = Path(__file__).parent / "golden"
CALL = """
import json, sys
sys.path.insert(0, sys.argv[1])
import run
rows = list(run.read(sys.argv[2]))
json.dump(run.Model().predict(rows, **json.loads(sys.argv[3])), sys.stdout)
"""


def write_photos(folder: Path) -> Path:
    """Write images of several sizes, one transparent, one turned by its EXIF data, one of 16 bits."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i, (width, height) in enumerate([(31, 47), (64, 64), (120, 30), (9, 90)]):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).resize((2 * width, 2 * height))
        if i == 1:
            image.putalpha(128)
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(folder / f"{i}.png", exif=exif if i == 2 else None)
    Image.fromarray((rng.random((20, 30)) * 40_000).astype(np.uint16)).save(folder / "deep.png")
    return folder


def call(folder, source, **options):
    command = [sys.executable, "-E", "-c", CALL, str(folder), str(source), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_texts(run, folder, photos):
    """Compare images of several formats for other classes and templates than those of training."""
    for options in (
        {},
        {"classes": "a red square, nothing"},
        {"classes": "red,blue", "templates": "a {} square|{} on the left"},
    ):
        want, found = run.predict(str(photos), **options), call(folder, photos, **options)
        assert len(found) == 5 and Comparison(1e-4).compare(list(want), found)[1] == ""
        assert list(found[0]["similarity"]) == list(want[0]["similarity"])


@pytest.mark.slow
def test_texts_for_raw_images_are_equal(tmp_path):
    run, source = fieldguide.open_run(GOLDEN / "v1-image-text"), str(album(tmp_path / "album", 12))
    done = export(run, data=source, out=tmp_path / "export")
    assert done.passed and done.verification.rows == 24, done.verification.problems
    for name in ("run.py", "images.py"):
        assert len((done.path / name).read_text().splitlines()) < 150
    check_texts(run, done.path, write_photos(tmp_path / "photos"))
    encoder = onnxruntime.InferenceSession(str(done.path / "encoder.onnx"))
    tokens = np.array([[5, 6, run.task.end, 0], [7, run.task.end, 0, 0]])
    vectors = encoder.run(None, {"tokens": tokens, "mask": np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)})[0]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    values = json.loads((done.path / "export.json").read_text())
    changes = {"templates": ["no {}"], "end": values["end"] + 1, "channels": 3, "length": 4}
    assert not any(find_passed(run, done.path, source, values, changes, tmp_path).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "siglip", "clip-resnet"])
def test_texts_of_architectures(name, tmp_path):
    source = album(tmp_path / "album", 60)
    settings = {"steps": 10, "precision": "float32", "batch": 16}
    run = fieldguide.fit(source, task="image-text", model=f"{name}-test", out=tmp_path / "run", settings=settings)
    done = run.export(out=tmp_path / "export")
    assert done.passed, done.verification.problems
    check_texts(run, done.path, write_photos(tmp_path / "photos"))


@pytest.mark.slow
def test_captions_of_raw_images_are_equal(tmp_path):
    """Noise on the weights makes captions that do not repeat one word, so that each token depends on those before it."""
    run, source = fieldguide.open_run(GOLDEN / "v2-image-to-text"), str(album(tmp_path / "album", 12))
    generator = torch.Generator().manual_seed(0)
    for parameter in run.model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    done = export(run, data=source, out=tmp_path / "export")
    assert done.passed and done.verification.rows == 12, done.verification.problems
    for name in ("run.py", "images.py"):
        assert len((done.path / name).read_text().splitlines()) < 150
    loop = json.loads((done.path / "loop.json").read_text())
    assert loop["kind"] == "encoder-decoder" and loop["inputs"] == ["tokens", "keys", "values", "cross_keys", "cross_values"]
    photos = write_photos(tmp_path / "photos")
    for beams in (1, 2):
        want = [record["text"] for record in run.predict(str(photos), num_beams=beams)]
        assert [record["text"] for record in call(done.path, photos, beams=beams)] == want and len(set(want)) > 1
    values = json.loads((done.path / "export.json").read_text())
    changes = {"beams": 1, "end": values["end"] + 1, "limit": 3, "start": [values["end"]]}
    assert values["beams"] > 1 and not any(find_passed(run, done.path, source, values, changes, tmp_path).values())


def find_passed(run, folder, source, values, changes, tmp_path):
    """Return which changes of a setting of an export pass the verification."""
    found = {}
    for key, value in changes.items():
        shutil.copytree(folder, tmp_path / key)
        (tmp_path / key / "export.json").write_text(json.dumps(values | {key: value}))
        try:
            found[key] = verify(run, tmp_path / key, source).passed
        except fieldguide.FieldguideError:  # the program fails, such as for an image of three channels
            found[key] = False
    return found


def test_the_least_of_the_best_may_change():
    best = {"a": 0.5, "b": 0.2, "c": 0.10001}
    find = lambda got: Comparison(1e-4).compare(best, got)[1]
    assert find({"a": 0.5, "b": 0.2, "d": 0.1}) == "" == find(best)
    assert "'b' is missing" in find({"a": 0.5, "c": 0.1, "d": 0.1})
    assert find({"a": 0.5, "b": 0.2}) and find({"a": 0.5, "b": 0.2, "d": 0.05})
