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
    """Return a PNG with 16 bits per value (H W 3 or 4, or gray and alpha: H W 2), which Pillow cannot write."""
    height, width, channels = array.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def encode_tiff(array, photometric=2, form=1, extra=(), order="<", planes=1):
    """Return an uncompressed TIFF with the values of an array, H W or H W C. `form` is 1 unsigned, 2 signed, 3 float."""
    array = np.atleast_3d(array)
    height, width, samples = array.shape
    body = (array if planes == 1 else np.moveaxis(array, 2, 0)).astype(array.dtype.newbyteorder(order)).tobytes()
    strips = samples if planes == 2 else 1
    tags = {256: [width], 257: [height], 258: [array.itemsize * 8] * samples, 259: [1], 262: [photometric], 273: [0] * strips}
    tags |= {277: [samples], 278: [height], 279: [len(body) // strips] * strips, 284: [planes], 339: [form] * samples}
    tags |= {338: list(extra)} if extra else {}
    start = 8 + 2 + 12 * len(tags) + 4
    behind = sum(4 * len(v) for v in tags.values() if len(v) > 1)
    tags[273] = [start + behind + i * (len(body) // strips) for i in range(strips)]
    entries, more = b"", b""
    for tag, values in sorted(tags.items()):
        numbers = struct.pack(f"{order}{len(values)}I", *values)
        entries += struct.pack(order + "HHI", tag, 4, len(values))
        entries += numbers if len(values) == 1 else struct.pack(order + "I", start + len(more))
        more += numbers if len(values) > 1 else b""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags))
    return head + entries + bytes(4) + more + body


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


@pytest.mark.parametrize("form", ["png", "rgba.png", "tif", "big.tif", "npy", "chw.npy", "ppm", "ascii.ppm"])
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
    elif form == "ppm":
        path.write_bytes(b"P6\n8 8\n65535\n" + array.astype(">u2").tobytes())
    elif form == "ascii.ppm":
        path.write_text("P3\n8 8\n65535\n" + " ".join(map(str, array.ravel())))
    else:
        path.write_bytes(encode_png16(array) if form == "png" else encode_tiff(array, order=">" if "big" in form else "<"))
    data = read(tmp_path)
    assert data.rows["#channels"][0] == 3 and data.rows["#high"][0] == array.max()
    scale = learn_scale(data.rows)
    shown = images.load([path], 8, 3, scale=scale)[0].numpy().transpose(1, 2, 0)
    low, high = scale
    assert np.abs(shown - (array - low) * 255 / (high - low)).max() <= 0.51
    canvas = Canvas(8, 3, (0,), scale=scale).load_images([path], [(8, 8)], (8, 8))[0]
    assert np.array_equal(canvas, shown.transpose(2, 0, 1))


def test_gray_with_alpha_of_16_bits(tmp_path):
    """Pillow decodes only the higher byte, and has no mode for it."""
    gray = np.random.default_rng(0).integers(1000, 1131, (8, 8)).astype(np.uint16)
    alpha = np.full((8, 8), 65535, np.uint16)
    alpha[0] = 0
    (tmp_path / "0.png").write_bytes(encode_png16(np.stack([gray, alpha], 2)))
    data = read(tmp_path)
    assert data.rows["#channels"][0] == 1 and data.rows["#high"][0] == gray.max() and data.rows["#low"][0] == gray.min()
    low, high = learn_scale(data.rows)
    shown = images.load([tmp_path / "0.png"], 8, 1, scale=(low, high))[0, 0].numpy()
    assert np.abs(shown[1:] - (gray[1:] - low) * 255 / (high - low)).max() <= 0.51
    assert (shown[0] == 255).all()  # transparent: white


def test_colors_multiplied_by_opacity(tmp_path):
    array = np.random.default_rng(0).integers(0, 20_000, (8, 8, 3)).astype(np.uint16)
    opacity = np.full((8, 8, 1), 40_000, np.uint16)
    (tmp_path / "0.tif").write_bytes(encode_tiff(np.concatenate([array, opacity], 2), extra=[1]))
    assert read(tmp_path).rows["#high"][0] == round(float(array.max()) * 65535 / 40_000)


@pytest.mark.parametrize(
    ("array", "form", "low", "high"),
    [
        (np.linspace(0, 4e9, 64).astype(np.uint32), 1, 0, 4e9),  # Pillow reads negative numbers
        (np.arange(-30, 34).astype(np.int8), 2, -30, 33),  # Pillow reads 226 to 255
        (np.linspace(-30_000, 30_000, 64).astype(np.int16), 2, -30_000, 30_000),
    ],
)
def test_signs_of_tiff_values(tmp_path, array, form, low, high):
    (tmp_path / "0.tif").write_bytes(encode_tiff(array.reshape(8, 8), 1, form))
    data = read(tmp_path)
    scale = learn_scale(data.rows)
    assert scale == (low, high)
    shown = images.load(data.rows["image"].to_list(), 8, 1, scale=scale)[0, 0].numpy().ravel().astype(int)
    assert (np.diff(shown) >= 0).all() and shown[0] == 0 and shown[-1] == 255


@pytest.mark.parametrize(("dtype", "order"), [(np.uint8, "<"), (np.uint8, ">"), (np.uint16, "<")])
def test_white_may_be_stored_as_zero(tmp_path, dtype, order):
    top = np.iinfo(dtype).max
    values = (np.arange(64) * (1 if dtype == np.uint8 else 1000)).astype(dtype).reshape(8, 8)
    (tmp_path / "0.tif").write_bytes(encode_tiff(values, 1, order=order))
    (tmp_path / "1.tif").write_bytes(encode_tiff((top - values).astype(dtype), 0, order=order))
    data = read(tmp_path)
    scale = learn_scale(data.rows)
    assert dtype == np.uint8 or scale == (0, 63_000)
    black, white = images.load(data.rows["image"].to_list(), 8, 1, scale=scale).numpy()
    assert (black == white).all() and (np.diff(black.ravel().astype(int)) >= 0).all()


DEEP = np.arange(192, dtype=np.uint16).reshape(8, 8, 3)


@pytest.mark.parametrize(
    ("content", "called"),
    [
        (encode_tiff(DEEP[..., :2], 1, extra=[2]), "TIFF with 2 channels of 16 bits"),
        (encode_tiff(DEEP[..., :2], 1, extra=[2], order=">"), "TIFF with 2 channels of 16 bits"),
        (encode_tiff(np.concatenate([DEEP, DEEP[..., :2]], 2), 1, extra=[0] * 4), "TIFF with 5 channels of 16 bits"),
        (encode_tiff(DEEP.astype(np.float32), 2, 3), "TIFF with 3 channels of 32 float bits"),
        (encode_tiff(DEEP[..., 0].astype(np.float64), 1, 3), "TIFF with one channel of 64 float bits"),
        (encode_tiff(DEEP[..., 0].astype(np.float16), 1, 3, order=">"), "TIFF with one channel of 16 float bits"),
        (encode_tiff(DEEP, planes=2), "TIFF with 16 bits and separate color planes"),  # Pillow reads noise
        (encode_tiff(np.concatenate([DEEP, DEEP[..., :1]], 2), 5), "CMYK with 16 bits"),
        (b"P7\nWIDTH 8\nHEIGHT 8\nDEPTH 1\nMAXVAL 65535\nTUPLTYPE GRAYSCALE\nENDHDR\n" + bytes(128), "PAM"),
    ],
)
def test_layouts_that_are_not_read_are_named(tmp_path, content, called):
    (tmp_path / "0.tif").write_bytes(content)
    with pytest.raises(DataError, match=rf"format that is not read.*\({called}\)"):
        read(tmp_path)


def test_jpeg_2000_with_deep_colors_is_named(tmp_path):
    file = io.BytesIO()
    Image.fromarray(DEEP.astype(np.uint8)).save(file, "JPEG2000")
    content = bytearray(file.getvalue())
    (tmp_path / "0.jp2").write_bytes(content)
    assert len(read(tmp_path)) == 1
    start = content.index(b"\xff\x4f\xff\x51") + 42
    content[start : start + 9 : 3] = bytes([15] * 3)  # 16 bits per color
    (tmp_path / "0.jp2").write_bytes(content)
    with pytest.raises(DataError, match=r"JPEG 2000 with colors of 16 bits"):
        read(tmp_path)


def test_channels_that_are_not_used_are_a_warning(tmp_path):
    five = np.concatenate([DEEP, DEEP[..., :2]], 2).astype(np.uint8)
    (tmp_path / "0.tif").write_bytes(encode_tiff(five, extra=[0, 0]))
    assert "other-channels" in {f.check for f in read(tmp_path).findings}


def test_damaged_tiff_is_corrupt(tmp_path):
    (tmp_path / "0.tif").write_bytes(encode_tiff(DEEP)[:40])
    with pytest.raises(DataError, match=r"corrupt|truncated"):
        read(tmp_path)


def test_float_masks_keep_large_values(tmp_path):
    from fieldguide.data.preprocessing.masks import read_codes

    values = np.array([[0, 1], [300, 70_000]])
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "m.tif")
    (tmp_path / "u.tif").write_bytes(encode_tiff(values.astype(np.uint32), 1))
    assert read_codes(tmp_path / "m.tif").tolist() == read_codes(tmp_path / "u.tif").tolist() == values.tolist()


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
