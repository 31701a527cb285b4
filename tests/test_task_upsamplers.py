"""Generated images that runs of image-to-image enlarge: as those runs do on their own, in turn, from a moved folder; wrong sides."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
from PIL import Image

import fieldguide
from fieldguide.core.errors import RunError, SettingsError
from fieldguide.exporting.builders import build_graph
from fieldguide.exporting.graph import ExportError
from fieldguide.metrics import generative
from fieldguide.tasks.vision.upsampler import Upsamplers

QUICK = {"steps": 2, "batch": 8, "precision": "float32", "evaluate": 2}


def read(content):
    return np.asarray(Image.open(io.BytesIO(content))).astype(float)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return images, two networks that enlarge (8 to 16 and 16 to 32 pixels), and a run that generates with both."""
    root, patch, rng = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch(), np.random.default_rng(0)
    train = generative.train_classifier
    patch.setattr(generative, "train_classifier", lambda *args, **options: train(*args, **{**options, "steps": 2}))
    (root / "images").mkdir()
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(root / "images" / f"{i}.png")
    small = {"model.dim": 8, "task.adversarial": 0, "task.degrade": "2x"}
    first, second = (
        fieldguide.fit(
            root / "images",
            task="image-to-image",
            model=name,
            out=root / f"to-{side}",
            settings={**QUICK, **(small if name == "pix2pix-test" else {"task.degrade": "2x"}), "task.side": side},
        )
        for name, side in (("pix2pix-test", 16), ("pix2pix-test", 32))
    )
    settings = {**QUICK, "task.side": 8}
    chosen = {"task.upsamplers": f"{first.path},{second.path}"}
    run = fieldguide.fit(
        root / "images", task="image-generation", model="ddpm-unet-test", out=root / "run", settings={**settings, **chosen}
    )
    patch.undo()
    return root / "images", first, second, run


@pytest.mark.slow
def test_images_are_enlarged_in_turn(runs, tmp_path):
    _, first, second, run = runs
    small = fieldguide.open_run(run.path)
    small.task.upsamplers = Upsamplers()
    plain = small.predict(count=3, steps=2)
    made = run.predict(count=3, steps=2)
    for i, (alone, large) in enumerate(zip(plain, made)):
        sides = [read(record["image"].content).shape[0] for record in (alone, large)]
        assert sides == [8, 32]
        (tmp_path / f"{i}.png").write_bytes(alone["image"].content)
        for step in (first, second):
            (tmp_path / f"{i}.png").write_bytes(step.predict([str(tmp_path / f"{i}.png")])[0]["image"].content)
        expected, found = read((tmp_path / f"{i}.png").read_bytes()), read(large["image"].content)
        assert np.abs(found - expected).mean() < 1 and found.std() > 1  # files are rounded between the two
    shutil.copytree(run.path, tmp_path / "moved")
    assert fieldguide.open_run(tmp_path / "moved").predict(count=3, steps=2) == made
    (tmp_path / "moved" / "preprocess" / "upsampler-1" / "upsampler.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"upsampler-1/upsampler\.safetensors"):
        fieldguide.open_run(tmp_path / "moved").predict(count=1)
    with pytest.raises(ExportError, match=r"task\.upsamplers"):
        build_graph(run)


@pytest.mark.slow
def test_sides_must_fit(runs):
    _, first, second, run = runs
    for sources, side, message in (
        (str(second.path), 8, "enlarges images of 16 x 16 pixels, but gets 8 x 8. Set task.side=16 here"),
        (f"{first.path},{first.path}", 8, "enlarges images of 8 x 8 pixels, but gets 16 x 16"),
        (str(run.path), 8, "is no run that enlarges images"),
    ):
        with pytest.raises(SettingsError, match=message):
            Upsamplers.load(sources, side)


def test_unknown_folders_are_rejected(tmp_path):
    with pytest.raises(SettingsError, match=r"task\.upsamplers: .* is no run that enlarges images"):
        Upsamplers.load(str(tmp_path), 8)
    assert not Upsamplers.load(None, 8).members
