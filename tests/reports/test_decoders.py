"""Media and tables that must not be decoded: programs, bombs, devices, and files outside of the data."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import zlib

import numpy as np
import polars as pl
import pytest
import soundfile
from PIL import Image

from fieldguide.core.errors import DataError
from fieldguide.data import read
from fieldguide.data.media import audio, images, video

EPS = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 16 16
%%EndComments
({marker}) (w) file (executed) writestring
showpage
"""


def picture(path, seed=0, side=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path, "PNG")
    return path


def findings_of(source, **options):
    try:
        data = read(source, allow_bad=True, **options)
    except DataError as error:
        return str(error)
    return "\n".join(f"{f} [{f.check}]" for f in data.findings)


# Images


@pytest.mark.parametrize("name", ["a.png", "a.eps", "a.jpg"])
def test_postscript_is_never_run(tmp_path, name):
    marker = tmp_path / "executed"
    path = tmp_path / name
    path.write_text(EPS.format(marker=marker))
    assert images.check([path])[0].problem in ("unsupported-image", "corrupt-image", "not-an-image")
    assert "PostScript" in images.check([path])[0].detail
    with pytest.raises(DataError):
        images.load([path], 16)
    assert video.check([path])[0].problem
    assert not marker.exists()


def test_only_allowed_formats_are_tried(tmp_path):
    for kind in ("PCX", "TGA", "SGI"):
        path = tmp_path / f"{kind}.png"
        Image.new("RGB", (8, 8)).save(path, kind)
        assert images.check([path])[0].problem, kind
        with pytest.raises(DataError):
            images.load([path], 8)
    for kind, mode in (
        ("PNG", "RGB"),
        ("JPEG", "RGB"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("TIFF", "RGB"),
        ("WEBP", "RGB"),
        ("PPM", "RGB"),
    ):
        path = tmp_path / f"{kind}.img"
        Image.new(mode, (8, 8)).save(path, kind)
        assert not images.check([path])[0].problem, kind


def test_animation_bombs_are_rejected_quickly(tmp_path, monkeypatch):
    frames = [Image.fromarray(np.full((64, 64), i, dtype=np.uint8)) for i in range(30)]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert not video.check([path])[0].problem
    monkeypatch.setattr(video, "MAX_FRAMES", 20)
    assert video.check([path])[0].problem == "too-long"
    monkeypatch.setattr(video, "MAX_FRAMES", 1000)
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 64 * 10)
    found = video.check([path])[0]
    assert found.problem == "too-long" and "10 frames of 64 x 64" in found.detail


def test_an_image_of_a_billion_pixels_is_not_decoded(tmp_path):
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    raw = bytearray(content.getvalue())
    raw[16:29] = header
    raw[29:33] = struct.pack(">I", zlib.crc32(bytes(raw[12:29])))
    path = tmp_path / "big.png"
    path.write_bytes(bytes(raw))
    started = time.perf_counter()
    assert images.check([path])[0].problem == "too-many-pixels"
    assert time.perf_counter() - started < 5


# Sounds


def test_long_recordings_are_not_decoded(tmp_path, monkeypatch):
    path = tmp_path / "long.flac"
    soundfile.write(path, np.zeros(200_000), 8000)
    assert not audio.check([path])[0].problem
    monkeypatch.setattr(audio, "MAX_SAMPLES", 100_000)
    found = audio.check([path])[0]
    assert found.problem == "implausible-sound" and "200,000 samples" in found.detail
    with pytest.raises(DataError, match="200,000 samples"):
        audio.load([path], 8000)


def test_a_header_that_asks_for_gibibytes(tmp_path):
    path = tmp_path / "huge.wav"
    data = b"RIFF" + struct.pack("<I", 0xFFFFFFF0) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 60_000, 8000, 0, 60_000, 16)
    path.write_bytes(data + b"data" + struct.pack("<I", 0xFFFFFFB0) + bytes(1000))
    started = time.perf_counter()
    assert audio.check([path])[0].problem
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("rate", [1, 900_000])
def test_implausible_rates(tmp_path, rate):
    path = tmp_path / "odd.wav"
    soundfile.write(path, np.zeros(100), rate)
    assert audio.check([path])[0].problem == "implausible-sound"
    with pytest.raises(DataError):
        audio.load([path], 16_000)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers(tmp_path, bad):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 4000).astype(np.float32)
    samples[7:10] = bad
    path = tmp_path / "a.wav"
    soundfile.write(path, samples, 8000, subtype="FLOAT")
    found = audio.check([path])[0]
    assert found.problem == "not-finite" and "3 of 4,000 samples" in found.detail


# Tables


def test_many_columns(tmp_path):
    path = tmp_path / "wide.csv"
    count = 100_000
    path.write_text(",".join(f"c{i}" for i in range(count)) + "\n" + (",".join("1" * count) + "\n") * 3)
    started = time.perf_counter()
    with pytest.raises(DataError, match="100,000 columns"):
        read(path)
    assert time.perf_counter() - started < 30  # over 120 s with a quadratic check of names


@pytest.mark.slow
def test_duplicate_names_are_found_in_wide_tables(tmp_path):
    path = tmp_path / "wide.csv"
    names = [f"c{i}" for i in range(3000)] + ["c7"]
    path.write_text(",".join(names) + "\n" + (",".join("1" * len(names)) + "\n") * 3)
    with pytest.raises(DataError, match=r"'c7' is the name of several columns \(8, 3001\)"):
        read(path)


def test_a_small_parquet_file_with_billions_of_rows(tmp_path, monkeypatch):
    from fieldguide.data.readers import table

    path = tmp_path / "rows.parquet"
    pl.DataFrame({"a": pl.repeat(1, 3_000_000, eager=True), "b": pl.repeat(2, 3_000_000, eager=True)}).write_parquet(path)
    assert path.stat().st_size < 1 << 20
    monkeypatch.setattr(table, "ram", lambda: 64 << 20)
    with pytest.raises(DataError, match="3,000,000 rows of 2 columns do not fit"):
        read(path)


# Places


def coco(folder, names):
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0} for i in range(len(names))
    ]
    pictures = [{"id": i, "file_name": n, "width": 16, "height": 16} for i, n in enumerate(names)]
    (folder / "instances.json").write_text(
        json.dumps({"images": pictures, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]})
    )


@pytest.mark.parametrize("where", ["../../secret.png", "{outside}/secret.png", "images/../../../secret.png"])
def test_names_in_annotations_stay_inside_the_data(tmp_path, where):
    outside = tmp_path / "outside"
    picture(outside / "secret.png")
    picture(tmp_path / "secret.png")
    folder = tmp_path / "a" / "data"
    for i in range(12):
        picture(folder / "images" / f"{i}.png", i)
    coco(folder, [f"{i}.png" for i in range(12)] + [where.format(outside=outside)])
    found = findings_of(folder)
    assert "outside-data" in found or "missing-file" in found, found
    assert "secret" in found


def test_a_configuration_cannot_name_the_whole_disk(tmp_path):
    for i in range(4):
        picture(tmp_path / "images" / f"{i}.png", i)
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{i}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("train: /\nval: /\nnames: [a]\n")
    started = time.perf_counter()
    with pytest.raises(DataError, match="train refers to '/'"):
        read(tmp_path)
    assert time.perf_counter() - started < 10


def test_paths_of_another_machine_are_still_found(tmp_path):
    for i in range(6):
        picture(tmp_path / "train" / "images" / f"{i}.png", i)
        (tmp_path / "train" / "labels").mkdir(exist_ok=True)
        (tmp_path / "train" / "labels" / f"{i}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    for name in ("../train/images", "/home/someone/set/train/images", "train/images"):
        (tmp_path / "data.yaml").write_text(f"train: {name}\nnames: [a]\n")
        assert len(read(tmp_path)) == 6, name


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_regular_files_are_opened(tmp_path, kind):
    rows = [(str(picture(tmp_path / f"{i}.png", i)), "ab"[i % 2]) for i in range(40)]
    if kind == "fifo":
        os.mkfifo(tmp_path / "x.png")
    elif kind == "device":
        (tmp_path / "x.png").symlink_to("/dev/zero")
    else:
        (tmp_path / "x.png").mkdir()
    rows[3] = (str(tmp_path / "x.png"), "b")
    table = tmp_path.parent / f"{tmp_path.name}.csv"
    pl.DataFrame(rows, schema=["image", "label"], orient="row").write_csv(table)
    started = time.perf_counter()
    found = findings_of(table)
    assert "not-a-file" in found, found
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    "header", [b"{'descr': '<f4', 'fortran_order': False, 'shape': (8, 8", b"{'descr': '<f4', 'fortran_order': ("]
)
def test_arrays_with_damaged_headers_are_found(header, tmp_path):
    from fieldguide.data.media import images

    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(256)
    (tmp_path / "a.npy").write_bytes(content)
    (tmp_path / "b.npy").write_bytes(
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (80000, 80000), }".ljust(117) + b"\n"
    )
    for name in ("a.npy", "b.npy"):
        with (
            pytest.raises(ValueError, match=r"header is damaged|takes 25,600,000,000 bytes|header"),
            images.open_image(tmp_path / name),
        ):
            pass
