"""Images with more than 8 bits: the scale is learned from the training images, stored, and applied in `predict`."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import fieldguide
from fieldguide.core.errors import DataError
from fieldguide.data import read
from fieldguide.data.media import images
from fieldguide.data.preprocessing.image_transform import ImageTransform, learn_scale
from fieldguide.data.preprocessing.masks import Canvas
from fieldguide.inference.run import open_run
from fieldguide.tasks.vision.image_classification import ImageClassification

QUICK = {"steps": 60, "precision": "float32", "lr": 0.01}


def encode_png16(array):
    """Return a PNG with 16 bits per color (H W 3 or 4), which Pillow cannot write."""
    height, width, channels = array.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def encode_tiff16(array):
    """Return an uncompressed little-endian TIFF with 16 bits per color, H W 3."""
    height, width, _ = array.shape
    body = array.astype("<u2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 0), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 0)]
    tags += [(277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(body))]
    at = 8 + 2 + 12 * len(tags) + 4
    values = {258: at, 273: at + 6}
    entries = b"".join(struct.pack("<HHII", tag, kind, count, values.get(tag, value)) for tag, kind, count, value in tags)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return head + struct.pack("<HHH", 16, 16, 16) + body


def microscopy(folder, high=130, dtype=np.uint16, suffix=".png", count=30):
    """Write two classes, dim discs and bright ones, with values up to `high`."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    disc = (y - 8) ** 2 + (x - 8) ** 2 < 30
    for label, level in (("alive", 0.9), ("dead", 0.4)):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            values = (rng.uniform(0, 0.1, (16, 16)) + disc * level) * high
            path = folder / label / f"{i}{suffix}"
            array = values.astype(dtype)
            np.save(path, array) if suffix == ".npy" else Image.fromarray(array).save(path)
    return folder


def learn(data):
    return ImageClassification.fit(data, ImageClassification.Options())


@pytest.mark.parametrize(
    ("high", "dtype", "suffix"),
    [
        (130, np.uint16, ".png"),
        (4095, np.uint16, ".tif"),  # 12 bits in 16
        (65535, np.uint16, ".png"),
        (100_000, np.int32, ".tif"),
        (1.0, np.float32, ".tif"),
        (0.003, np.float32, ".npy"),
        (800, np.float64, ".npy"),
        (130, np.int64, ".npy"),
    ],
)
def test_scale_is_the_range_of_the_training_images(tmp_path, high, dtype, suffix):
    data = read(microscopy(tmp_path, high, dtype, suffix, count=6))
    task = learn(data)
    low, top = task.pictures.scale
    assert low < 0.05 * high and 0.9 * high <= top <= high
    pixels = task.pictures.load(data.rows["image"].to_list())
    assert len(np.unique(pixels.numpy())) > 30 and pixels.max() == 255
    assert any("range of the training images" in note for note in task.notes)
    restored = ImageTransform.from_json(json.loads(json.dumps(task.pictures.to_json())))
    assert restored == task.pictures


def test_microscopy_is_learned_and_predicted_with_the_stored_scale(tmp_path):
    run = fieldguide.fit(microscopy(tmp_path / "data"), model="simplecnn", out=tmp_path / "run", settings=QUICK)
    assert run.scores["accuracy"] == 1
    state = json.loads((tmp_path / "run/preprocess/task.json").read_text())["state"]
    assert state["pictures"]["scale"][1] < 131
    loaded = open_run(tmp_path / "run")
    # One dim disc alone: its own range would make it as bright as the others.
    answer = loaded.predict(str(tmp_path / "data/dead/0.png"))[0]
    assert answer["label"] == "dead" and loaded.predict(str(tmp_path / "data/alive/0.png"))[0]["label"] == "alive"


def test_images_that_the_scale_does_not_fit_are_reported(tmp_path):
    """16-bit images after training on 12 bits are clipped, 8-bit images are not scaled."""
    task = learn(read(microscopy(tmp_path / "data", 4095, count=4)))
    bright = tmp_path / "bright.png"
    Image.fromarray(np.linspace(0, 60000, 256).reshape(16, 16).astype(np.uint16)).save(bright)
    data = task.read([str(tmp_path / "data/alive/0.png"), str(bright)])
    assert [(p.what, p.rows) for p in data.problems or task.problems] == [("out-of-range", (1,))]
    assert any("60000" in note and "bright.png" in note for note in task.notes)
    task.notes.clear()
    Image.new("L", (16, 16), 90).save(tmp_path / "plain.png")
    task.read([str(tmp_path / "plain.png")])
    assert any("8 bits per value and are not scaled" in note for note in task.notes)
    plain = learn(read(microscopy(tmp_path / "plain", 130, np.uint8, count=4)))
    plain.read([str(bright)])
    assert any("No scale for them was learned" in note for note in plain.notes)


def test_8_bit_images_have_no_scale(tmp_path):
    data = read(microscopy(tmp_path, 130, np.uint8, count=6))
    task = learn(data)
    assert task.pictures.scale is None and learn_scale(data.rows) is None
    first = data.rows["image"][0]
    assert np.array_equal(images.load([first], 16, 1)[0, 0].numpy(), np.asarray(Image.open(first)))


def test_hot_pixels_and_single_bright_images_do_not_set_the_scale(tmp_path):
    data = microscopy(tmp_path, 130, count=30)
    Image.fromarray(np.full((16, 16), 65535, np.uint16)).save(data / "alive/overexposed.png")
    big = np.random.default_rng(1).integers(0, 130, (200, 200)).astype(np.uint16)
    big[3, 3] = 65535
    Image.fromarray(big).save(data / "dead/hot.png")
    scale = learn(read(data)).pictures.scale
    assert scale[1] <= 131


def test_offsets_and_negative_values_are_kept(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    values = np.linspace(-1000, 400, 256).reshape(16, 16)
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "a/0.tif")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "b/0.tif")
    data = read(tmp_path)
    scale = learn_scale(data.rows)
    assert scale == (-1000, 400)
    assert len(np.unique(images.load(data.rows["image"].to_list(), 16, 1, scale=scale).numpy())) == 256


def test_missing_values_of_float_images(tmp_path):
    values = np.linspace(5, 6, 64, dtype=np.float32).reshape(8, 8)
    values[0, 0], values[0, 1] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "0.tif")
    data = read(tmp_path)
    scale = learn_scale(data.rows)
    assert scale == (pytest.approx(5 + 2 / 63), 6)
    assert images.load(data.rows["image"].to_list(), 8, 1, scale=scale)[0, 0, 0, :2].tolist() == [0, 255]


@pytest.mark.parametrize("form", ["png", "rgba.png", "tif", "npy", "chw.npy"])
def test_colors_of_16_bits(tmp_path, form):
    """Pillow decodes only the higher byte, which is 0 for values up to 130."""
    array = np.random.default_rng(0).integers(0, 131, (8, 8, 3)).astype(np.uint16)
    path = tmp_path / f"0.{form}"
    if form == "npy":
        np.save(path, array)
    elif form == "chw.npy":
        np.save(path, np.moveaxis(array, 2, 0))
    elif form == "rgba.png":
        path.write_bytes(encode_png16(np.concatenate([array, np.full((8, 8, 1), 65535, np.uint16)], 2)))
    else:
        path.write_bytes(encode_png16(array) if form == "png" else encode_tiff16(array))
    data = read(tmp_path)
    assert data.rows["#channels"][0] == 3 and data.rows["#high"][0] == array.max()
    scale = learn_scale(data.rows)
    shown = images.load([path], 8, 3, scale=scale)[0].numpy().transpose(1, 2, 0)
    low, high = scale
    assert np.abs(shown - (array - low) * 255 / (high - low)).max() <= 0.51
    canvas = Canvas(8, 3, (0,), scale=scale).load_images([path], [(8, 8)], (8, 8))[0]
    assert np.array_equal(canvas, shown.transpose(2, 0, 1))


def test_arrays_that_are_no_images(tmp_path):
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a/features.npy", np.zeros(512, np.float32))
    np.save(tmp_path / "a/objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"features.npy \(an array of shape \(512,\)"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"objects.npy"):
        read(tmp_path)


def test_tiff_with_several_pages_is_rejected_by_name(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        pages = [Image.fromarray(np.full((8, 8), v, np.uint8)) for v in (0, 100, 200)]
        pages[0].save(tmp_path / label / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=r"TIFF files with several pages.*stack.tif \(3 pages\)"):
        read(tmp_path)


def test_tiff_with_a_thumbnail_is_one_image(tmp_path):
    page = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    page.save(tmp_path / "0.tif", save_all=True, append_images=[page.resize((4, 4))])
    data = read(tmp_path)
    assert len(data) == 1 and images.load(data.rows["image"].to_list(), 16, 1)[0, 0, 15, 15] == 255


@pytest.mark.parametrize(
    ("name", "content", "called"),
    [
        ("0.dcm", b"\0" * 128 + b"DICM" + b"\0" * 40, "DICOM"),
        ("IM0001", b"\0" * 128 + b"DICM" + b"\0" * 40, "DICOM"),  # as scanners name them
        ("scan.nii.gz", b"\x1f\x8b\0\0", "NIfTI"),
        ("photo.HEIC", b"\0\0\0\x18ftypheic", "HEIC"),
        ("photo.jpg", b"\0\0\0\x18ftypheic", "HEIC"),  # renamed
        ("slide.svs", b"II*\0", "Aperio SVS"),
    ],
)
def test_unsupported_formats_are_named(tmp_path, name, content, called):
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / name).write_bytes(content)
    if "." not in name:
        Image.new("L", (8, 8)).save(tmp_path / "a/other.png")
    with pytest.raises(DataError, match=rf"format that is not read.*\({called}\).*Convert them to PNG or TIFF"):
        read(tmp_path)


def test_single_unsupported_file_is_named_in_prediction(tmp_path):
    (tmp_path / "x.dcm").write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(DataError, match="DICOM"):
        read(tmp_path / "x.dcm", labels_optional=True)


def test_older_runs_scale_by_the_format():
    """A state without a scale behaves as before."""
    saved = {"side": 8, "channels": 1, "mean": [0.5], "std": [0.25], "fit": "crop"}
    transform = ImageTransform.from_json(saved)
    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "PNG")
    assert transform.scale is None
    shown = images.to_array(Image.open(file), 8, 1, "crop", scale=transform.scale)[0]
    assert np.array_equal(shown, np.rint(deep / 257).astype(np.uint8))


def test_unsupported_files_in_a_table_are_named(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.dcm").write_bytes(b"\0" * 128 + b"DICM" + bytes([i]))
    (tmp_path / "table.csv").write_text("scan,label\n" + "".join(f"{i}.dcm,{'ab'[i % 2]}\n" for i in range(6)))
    with pytest.raises(DataError, match="DICOM"):
        read(tmp_path / "table.csv")
