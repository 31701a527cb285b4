"""Images: damaged ones are found and named, unusual ones are converted, and nothing is dropped silently."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from damage import checks, digits, finding, refused, write
from fieldguide.core.errors import DataError
from fieldguide.data import read, samples
from fieldguide.data.media import images
from fieldguide.tasks import infer_task


def photo(path: Path, size=(40, 30), mode: str = "RGB", seed: int = 0, **options) -> Path:
    """Return an image of smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, **options)
    return path


def test_folder_of_classes(tmp_path):
    data = read(digits(tmp_path))
    assert len(data) == 120 and set(data.rows["label"]) == {"0", "1", "2"} and data.splits is None
    assert data.columns["image"].kind == "image" and data.target.name == "label"
    assert all(os.path.isabs(p) and os.path.exists(p) for p in data.rows["image"])
    assert data.rows["#width"].unique().to_list() == [8] and data.rows["#channels"].unique().to_list() == [1]
    assert data.locate_row(0).startswith("0/") and len(data.manifest.files) == 120
    summary = data.manifest.summary()
    assert [summary[k] for k in ("root", "files", "rows", "dropped")] == [str(tmp_path), 120, 120, 0]


def test_splits_nested_folders_and_ignored_files(tmp_path):
    digits(tmp_path, split="train")
    (tmp_path / "valid" / "1" / "deep").mkdir(parents=True)
    for i, file in enumerate(sorted((samples.path("digits") / "1").iterdir())[50:60]):
        shutil.copy(file, tmp_path / "valid" / "1" / "deep" / f"{i}.png")
    (tmp_path / "__MACOSX" / "train").mkdir(parents=True)
    (tmp_path / "train" / "0" / "._x.png").write_bytes(b"x")
    (tmp_path / "train" / "0" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "readme.txt").write_text("hello")
    data = read(tmp_path)
    assert len(data) == 130 and (data.splits == "val").sum() == 10 and (data.splits == "train").sum() == 120
    assert set(data.rows["label"].filter(data.splits == "val")) == {"1"}
    assert finding(data, "hidden-files").count == 3
    assert finding(data, "other-files").places == ("readme.txt",)


def test_lists_and_licenses_in_class_folders_are_no_examples(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            photo(tmp_path / name / f"{i}.png", seed=i + 10 * (name == "a"))
        (tmp_path / name / "labels.xml").write_text("<labels/>")
        (tmp_path / name / "LICENSE.txt").write_text("free")
    (tmp_path / "a" / "3.jpg").write_text("<html>not found</html>")  # says that it is an image, so it is a fault
    data = read(tmp_path, allow_bad=True)
    assert len(data) == 6 and finding(data, "other-files").count == 4
    assert data.manifest.summary()["dropped"] == 1  # only the last one


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "check", "remedy"),
    [
        (truncate, "truncated-image", "Copy them again"),
        (garble, "corrupt-image", "Copy them again"),
        (lambda p: p.write_bytes(b""), "empty-file", "Copy them again"),
        (lambda p: p.write_bytes(b"<html>not found</html>"), "corrupt-image", "Copy them again"),
        (lambda p: p.rename(p.with_suffix(".bin")).write_text("notes"), "not-an-image", "Remove"),
        (lambda p: (p.unlink(), p.symlink_to("/etc/hostname")), "link-outside", "Copy the files into"),
        (lambda p: (p.unlink(), p.symlink_to("/nowhere/at/all.png")), "link-outside", "Copy the files into"),
    ],
)
def test_damaged_images(tmp_path, damage, check, remedy):
    digits(tmp_path, each=60)
    victims = sorted((tmp_path / "1").iterdir())[5:7]
    damage(victims[0])
    data = read(tmp_path)
    found = finding(data, check)
    assert len(data) == 179 and found.count == found.unusable == 1 and remedy in found.remedy
    assert found.places[0].startswith("1/" + victims[0].stem)
    if check != "link-outside":
        assert data.manifest.summary()["dropped"] == 1 and data.manifest.summary()["files"] == 180
    damage(victims[1])
    with refused(check, "2 of 180", victims[0].stem, victims[1].stem, remedy, "allow_bad"):
        read(tmp_path)
    assert len(read(tmp_path, allow_bad=True)) == 178


def test_every_problem_in_one_error(tmp_path):
    digits(tmp_path)
    files = sorted((tmp_path / "0").iterdir())
    truncate(files[0])
    files[1].write_bytes(b"")
    (tmp_path / "3").mkdir()
    with refused("empty-class", "class folder '3' contains no images", "[truncated-image]", "[empty-file]"):
        read(tmp_path)


def test_content_overrides_a_wrong_extension(tmp_path):
    digits(tmp_path)
    first = sorted((tmp_path / "2").iterdir())[0]
    first.rename(first.with_suffix(".jpg"))
    data = read(tmp_path)
    found = finding(data, "wrong-extension")
    assert len(data) == 120 and found.severity == "warning" and found.places == (f"2/{first.stem}.jpg",)


def test_images_without_a_class(tmp_path):
    digits(tmp_path)
    stray = sorted((tmp_path / "2").iterdir())[0].rename(tmp_path / "stray.png")
    data = read(tmp_path)
    assert finding(data, "no-class").places == ("stray.png",) and len(data) == 119
    stray.unlink()
    flat = tmp_path / "0"
    bare = read(flat)
    assert len(bare) == 40 and bare.target is None  # what can be learnt from it, the task has to say
    with pytest.raises(DataError, match="the task cannot be inferred"):
        infer_task(bare)
    data = read(flat, labels_optional=True)
    assert len(data) == 40 and data.rows["label"].null_count() == 40
    schema = read(tmp_path).schema()
    assert len(read(flat, schema=schema, labels_optional=True)) == 40
    assert len(read(sorted(flat.iterdir())[0], schema=schema, labels_optional=True)) == 1


def test_decompression_bomb(tmp_path, monkeypatch):
    digits(tmp_path, each=60)
    Image.new("1", (9000, 11000)).save(tmp_path / "0" / "bomb.png")  # 12 kB that fill 99 MB
    data = read(tmp_path)
    assert finding(data, "too-many-pixels").places == ("0/bomb.png (9000 x 11000)",) and len(data) == 180
    with pytest.raises(DataError, match="9000 x 11000 pixels"):
        images.load([tmp_path / "0" / "bomb.png"], 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # Pillow's own limit, an error of its own
    assert finding(read(tmp_path), "too-many-pixels").count == 1


def test_image_modes_are_counted_and_converted(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(4):
        photo(tmp_path / "a" / f"{i}.png", seed=i)
    b = tmp_path / "b"
    b.mkdir()
    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040).astype(np.uint16)
    Image.fromarray(deep).save(b / "deep.png")
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    clear.save(b / "clear.png")
    photo(b / "cmyk.jpg", mode="CMYK")
    frames = [Image.new("L", (8, 8), v) for v in (10, 200)]
    frames[0].save(b / "moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(b / "turned.jpg", exif=exif)
    data = read(tmp_path)
    assert {"deep-image", "transparent-image", "cmyk-image", "animated-image", "rotated-image"} <= checks(data)
    assert finding(data, "deep-image").places == ("b/deep.png",)
    size = {Path(r["image"]).name: (r["#width"], r["#height"]) for r in data.rows.to_dicts()}
    assert size["turned.jpg"] == (30, 40) and size["0.png"] == (40, 30)
    load = {p.name: images.load([p], 8, 3)[0].numpy() for p in b.iterdir()}
    assert abs(load["deep.png"][0].astype(int) - deep // 257).max() <= 1
    assert load["clear.png"][:, 0, 0].tolist() == [0, 0, 255]
    assert load["clear.png"][:, 5, 5].tolist() == [255, 255, 255]
    assert (load["moving.gif"] == 10).all()
    upright = np.asarray(Image.open(b / "turned.jpg").rotate(-90, expand=True).convert("RGB"))
    assert (
        np.abs(
            images.load([b / "turned.jpg"], 30, fit="crop")[0].numpy().transpose(1, 2, 0).astype(int)
            - upright[5:35].astype(int)
        ).max()
        <= 2
    )


def test_loading_gives_the_same_pixels():
    data = read("digits")
    paths = data.rows["image"].to_list()[:50]
    x = images.load(paths, 8, 1)
    assert x.shape == (50, 1, 8, 8) and str(x.dtype) == "torch.uint8"
    for i, p in enumerate(paths):
        assert np.array_equal(x[i, 0].numpy(), np.asarray(Image.open(p)))
    assert images.load(paths, 16, 3).shape == (50, 3, 16, 16)


@pytest.mark.parametrize(("fit", "left"), [("crop", 10), ("pad", 255), ("stretch", 0)])
def test_fit_of_wide_and_tall_images(tmp_path, fit, left):
    image = np.full((10, 30), 10, dtype=np.uint8)
    image[:, 10:20] = 100
    image[:, :3] = 0
    Image.fromarray(image).save(tmp_path / "wide.png")
    Image.fromarray(image.T).save(tmp_path / "tall.png")
    wide, tall = images.load([tmp_path / "wide.png", tmp_path / "tall.png"], 10, 1, fit=fit)[:, 0].numpy()
    assert np.array_equal(wide, tall.T) and abs(int(wide[5, 5]) - 100) <= 6
    if fit == "crop":
        assert (wide[:, 1:9] == 100).all()
    else:
        assert abs(int(wide[0 if fit == "pad" else 5, 0]) - left) <= 1


def test_loading_names_damaged_images(tmp_path):
    digits(tmp_path)
    file = sorted((tmp_path / "0").iterdir())[3]
    truncate(file)
    with pytest.raises(DataError, match=file.name):
        images.load(sorted((tmp_path / "0").iterdir()), 8)


def test_table_of_paths(tmp_path):
    digits(tmp_path / "img", each=60)
    files = [f for c in "012" for f in sorted((tmp_path / "img" / c).iterdir())]
    rows = ["file,kind"] + [f"img/{f.parent.name}/{f.name},{['zero', 'one', 'two'][int(f.parent.name)]}" for f in files]
    rows[9] = "img/0/lost.png,zero"
    data = read(write(tmp_path / "t.csv", rows))
    assert data.columns["file"].kind == "image" and data.target.name == "kind" and len(data) == 179
    found = finding(data, "missing-file")
    assert found.places[0].startswith("t.csv:10") and "relative to the folder of the table" in found.remedy
    assert data.manifest.files[0].dropped == 1 and len(data.manifest.files) == 181
    assert data.rows["#hash"].null_count() == 0 and os.path.exists(data.rows["file"][0])
    rows[20] = "img/0/lost too.png,zero"
    with refused("missing-file", "2 of 180", "t.csv:21"):
        read(write(tmp_path / "t.csv", rows))


def test_pillow_warnings_are_suppressed(tmp_path):
    digits(tmp_path)
    Image.new("P", (8, 8)).save(tmp_path / "0" / "p.png", transparency=b"\0" * 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = read(tmp_path)
        images.load(data.rows["image"].to_list(), 8)
    assert images.ImageFile.LOAD_TRUNCATED_IMAGES is False
