"""Exports of video generation, compared with the run in a process without torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fieldguide
from fieldguide.core.media import Media
from fieldguide.exporting.builders import build_graph
from fieldguide.exporting.comparison import Comparison, decode_image, stack_frames
from fieldguide.exporting.requests import add_images, choose_samples
from fieldguide.exporting.verify import verify

GOLDEN = Path(__file__).parent / "golden" / "v2-video-generation"


@pytest.fixture(scope="module")
def video_run():
    """A network of captions that was also trained to continue first frames."""
    return fieldguide.open_run(GOLDEN)


def test_frames_have_times_of_their_own(video_run):
    graph = build_graph(video_run)
    assert [str(axis) for axis in graph.inputs[1].axes] == ["batch", "frames=8"] and "encoder" in graph.further
    assert graph.values["first"]["time"] == 0 and len(graph.loop["steps"]) == 12


def test_requests_have_images_in_every_second_row(video_run, tmp_path):
    table = add_images(video_run, choose_samples(video_run), tmp_path)
    assert table.columns == ["caption", "image"] and table["image"].null_count() == len(table) // 2
    sizes = set()
    for path in table["image"].drop_nulls():
        with Image.open(path) as image:
            sizes.add(image.size)
    assert len(sizes) == 4


def test_all_frames_are_compared(tmp_path):
    frames = [Image.fromarray(np.full((4, 4, 3), level, dtype=np.uint8)) for level in (0, 100)]
    for name, others in (("two", frames[1:]), ("one", [])):
        frames[0].save(tmp_path / f"{name}.webp", save_all=True, append_images=others, lossless=True)
    content = {name: (tmp_path / f"{name}.webp").read_bytes() for name in ("one", "two")}
    assert stack_frames(Image.open(io.BytesIO(content["two"]))).shape == (2, 4, 4, 3)
    spell = lambda name: "data:image/webp;base64," + b64encode(content[name]).decode()
    compare = lambda name: Comparison(1e-4).compare({"video": Media(content["two"], ".webp")}, {"video": spell(name)})[1]
    assert compare("two") == "" and "another size" in compare("one")
    assert decode_image("data:video/mp4;base64,AA") is None


@pytest.mark.slow
def test_videos_equal_the_run(video_run, tmp_path):
    """From captions, and from captions and first frames of other sizes. Other times and scales of first frames are found."""
    done = video_run.export(out=tmp_path / "export")
    assert done.passed and done.verification.rows == 64, done.verification.problems
    assert len((done.path / "run.py").read_text().splitlines()) < 150
    assert json.loads((done.path / "loop.json").read_text())["steps"]
    table = tmp_path / "requests.csv"
    Image.new("L", (30, 20), 200).save(tmp_path / "frame.png")
    table.write_text("caption,image\na seven moving left,frame.png\na two moving up,\n")
    command = [sys.executable, "-E", str(done.path / "run.py"), str(table)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    first, second = (decode_image(json.loads(line)["video"])[..., :3] for line in lines)
    assert first.shape == second.shape == (8, 96, 96, 3) and (first[0] == 200).all() and not (second[0] == 200).all()
    path = done.path / "export.json"
    before = json.loads(path.read_text())
    for change in ({"time": 500.0}, {"scale": 0.5}):
        path.write_text(json.dumps({**before, "first": {**before["first"], **change}}))
        assert not verify(video_run, done.path, "narrated", options={"count": 1}).passed
