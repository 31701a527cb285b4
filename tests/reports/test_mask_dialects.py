"""Segmentation masks as tools and people save them: codes, void pixels, interpolation, palettes, layouts and class names."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

import fieldguide
from fieldguide.automl.build_plan import build_plan
from fieldguide.automl.callbacks import NullCallback
from fieldguide.core.errors import DataError
from fieldguide.data import read
from fieldguide.data.preprocessing.masks import Canvas
from fieldguide.inference.run import open_run
from fieldguide.tasks.vision.image_segmentation import ImageSegmentation

SIDE = 40


def squares(i, classes=2):
    """Return a mask with a large square of class 1 (and a smaller one of each further class)."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4 + i : 26 + i, 3:24] = 1
    for k in range(2, classes):
        mask[28:36, 4 + 9 * (k - 2) : 11 + 9 * (k - 2)] = k
    return mask


def pairs(root, encode, count=8, classes=2, images="images", masks="masks", ending="", suffix=".png", **save):
    """Write images with their masks; `encode` turns classes (uint8) and the number of the mask into what is saved."""
    for folder in (images, masks):
        (root / folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        mask = squares(i, classes)
        pixels = (rng.integers(0, 40, (SIDE, SIDE)) + 60 * mask).astype(np.uint8)
        Image.fromarray(pixels).save(root / images / f"p{i}.png")
        encoded = encode(mask, i)
        image = encoded if isinstance(encoded, Image.Image) else Image.fromarray(encoded)
        image.save(root / masks / f"p{i}{ending}{suffix}", **save)
    return root


def build(root, **options):
    data = read(root, column_spec=ImageSegmentation.column_spec)
    return ImageSegmentation.build_examples(ImageSegmentation.select_columns(data), ImageSegmentation.options_from(options))


def learned(root, **options):
    """Return the names, and the classes that the fitted task reads from each mask."""
    data = build(root, **options)
    task = ImageSegmentation.fit(data, ImageSegmentation.options_from(options))
    canvas = Canvas.from_json(json.loads(json.dumps(task.canvas.to_json())))
    assert canvas == task.canvas
    sizes = [(SIDE, SIDE)] * len(data)
    return task.names, canvas.load_masks(task.masks(data), sizes, (SIDE, SIDE), full=True), data


def finding(data, check):
    return next(f for f in data.findings if f.check == check)


def smooth(mask, i):
    return Image.fromarray(mask * 255).filter(ImageFilter.GaussianBlur(1))


def as_rgb(mask, i):
    return np.stack([mask * 255] * 3, -1)


def palette(colors):
    def encode(mask, i):
        image = Image.fromarray(mask)
        image.putpalette([v for color in colors for v in color])
        return image

    return encode


def colored(*colors):
    return lambda mask, i: Image.fromarray(np.array(colors, np.uint8)[mask])


# Interpolated and mixed binary masks


@pytest.mark.parametrize(
    ("encode", "suffix"),
    [
        (smooth, ".png"),  # anti-aliased
        (lambda mask, i: mask * 255, ".jpg"),
        (as_rgb, ".jpg"),
        (lambda mask, i: np.asarray(smooth(mask, i))[..., None].repeat(3, -1), ".png"),
        (
            lambda mask, i: (
                Image.fromarray(mask * 255)
                .resize((61, 61), Image.Resampling.BICUBIC)
                .resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            ),
            ".png",
        ),
        (lambda mask, i: np.where(mask, 200, 20).astype(np.uint8), ".jpg"),
    ],
)
def test_interpolated_binary_masks_are_divided_by_a_threshold(tmp_path, encode, suffix):
    names, classes, data = learned(pairs(tmp_path, encode, suffix=suffix))
    assert names == ["background", "foreground"] and "void-pixels" not in {f.check for f in data.findings}
    wrong = np.mean([(classes[i] != squares(i)).mean() for i in range(8)])
    assert wrong < 0.02
    assert finding(data, "interpolated-masks").severity == "warning"


@pytest.mark.parametrize("quality", [60, 80])
def test_webp_with_loss_is_not_read_as_many_classes(tmp_path, quality):
    """Its gray pixels are not exactly gray, so every shade became a class."""
    pairs(tmp_path, lambda m, i: Image.fromarray(as_rgb(m, i)), suffix=".webp", quality=quality)
    try:
        names, classes, data = learned(tmp_path)
    except DataError as error:
        assert "JPEG or WebP with loss" in str(error)
    else:
        assert names == ["background", "foreground"] and finding(data, "interpolated-masks")
        assert (classes == np.stack([squares(i) for i in range(8)])).mean() > 0.99


def test_webp_without_loss_is_read_as_it_is(tmp_path):
    names, classes, _ = learned(
        pairs(tmp_path, colored((0, 0, 0), (255, 0, 0), (0, 255, 0)), classes=3, suffix=".webp", lossless=True)
    )
    assert len(names) == 3 and len(np.unique(classes)) == 3
    pairs(tmp_path / "lossy", colored((0, 0, 0), (255, 0, 0), (0, 255, 0)), classes=3, suffix=".webp", quality=60)
    with pytest.raises(DataError, match=r"JPEG"):
        learned(tmp_path / "lossy")


@pytest.mark.parametrize("colors", [((0, 0, 0), (255, 0, 0)), ((20, 200, 30), (90, 10, 220))])
def test_smoothed_colors_are_rejected(tmp_path, colors):
    encode = lambda mask, i: colored(*colors)(mask, i).filter(ImageFilter.GaussianBlur(0.6))
    pairs(tmp_path, encode, classes=len(colors))
    with pytest.raises(DataError, match=r"colors, most of which occur only in thin lines.*nearest"):
        learned(tmp_path)
    names, _, _ = learned(pairs(tmp_path / "clean", colored(*colors), classes=len(colors)))
    assert len(names) == len(colors)


def test_many_colors_with_areas_are_classes(tmp_path):
    """Rare small objects are no blends."""
    colors = [(0, 0, 0), (250, 0, 0), *((25 * k, 255 - 20 * k, 130) for k in range(10))]

    def encode(mask, i):
        for k in range(2, 12):
            mask[30:37, 3 * k - 3 : 3 * k] = k
        return colored(*colors)(mask, i)

    assert len(learned(pairs(tmp_path, encode))[0]) == 12


def test_transparency_is_named_if_it_holds_the_objects(tmp_path):
    pairs(tmp_path, lambda m, i: Image.fromarray(np.dstack([m * 0] * 3 + [m * 255])))
    with pytest.raises(DataError, match=r"only one class.*transparency"):
        learned(tmp_path)


def test_names_of_interpolated_masks_are_kept(tmp_path):
    pairs(tmp_path, smooth)
    (tmp_path / "classes.txt").write_text("ground\ncell\n")
    assert learned(tmp_path)[0] == ["ground", "cell"]


def test_interpolated_masks_of_several_classes_are_rejected(tmp_path):
    encode = lambda mask, i: Image.fromarray(mask * 60).filter(ImageFilter.GaussianBlur(0.8))
    with pytest.raises(DataError, match=r"thin lines between others.*nearest neighbor"):
        build(pairs(tmp_path, encode, classes=4))


def test_jpeg_masks_of_several_classes_are_rejected(tmp_path):
    with pytest.raises(DataError, match=r"8 masks were saved as JPEG.*PNG"):
        build(pairs(tmp_path, lambda mask, i: mask, classes=5, suffix=".jpg"))
    colors = np.array([(0, 0, 0), (200, 0, 0), (0, 200, 0)], np.uint8)
    with pytest.raises(DataError, match="JPEG"):
        build(pairs(tmp_path / "color", lambda mask, i: colors[mask], classes=3, suffix=".jpg"))


@pytest.mark.parametrize("first", [0, 1])
def test_files_with_0_1_and_with_0_255_hold_the_same_classes(tmp_path, first):
    names, classes, data = learned(pairs(tmp_path, lambda mask, i: mask * (255 if i % 2 == first else 1)))
    assert names == ["background", "foreground"] and all((classes[i] == squares(i)).all() for i in range(8))
    assert finding(data, "mixed-mask-values").severity == "warning"


@pytest.mark.parametrize("factor", [127, 100, 85, 40])
@pytest.mark.parametrize("first", [0, 1])
def test_files_with_numbers_and_with_gray_levels_hold_the_same_classes(tmp_path, factor, first):
    names, classes, data = learned(
        pairs(tmp_path, lambda mask, i: (mask * (factor if i % 2 == first else 1)).astype(np.uint8), classes=3)
    )
    assert names == ["0", "1", "2"] and all((classes[i] == squares(i, classes=3)).all() for i in range(8))
    assert "are read as the same classes" in finding(data, "mixed-mask-values").what


def test_gray_levels_in_different_files_are_reported(tmp_path):
    names, _, data = learned(pairs(tmp_path, lambda mask, i: (mask * (128 if i % 2 else 255)).astype(np.uint8)))
    assert names == ["0", "128", "255"]
    found = finding(data, "mixed-mask-values")
    assert found.severity == "warning" and "none holds both" in found.what and "same value" in found.remedy


@pytest.mark.parametrize("values", [[0, 1, 2, 100], [0, 1, 2, 30, 77], [0, 128, 255]])
def test_other_values_are_not_the_same_classes(tmp_path, values):
    def encode(mask, i):
        if len(values) == 3:
            return np.array(values, np.uint8)[mask]
        return np.array([0, *([1, 2] if i % 2 else values[-2:])], np.uint8)[mask]

    assert not any(f.check == "mixed-mask-values" for f in build(pairs(tmp_path, encode, classes=3)).findings)


@pytest.mark.parametrize(
    "encode",
    [
        lambda mask, i: mask,
        lambda mask, i: mask * 255,
        as_rgb,
        lambda mask, i: Image.fromarray(mask * 255).convert("1"),
        lambda mask, i: Image.fromarray(mask * 255).convert("LA"),
        lambda mask, i: mask.astype(np.uint16) * 255,
    ],
    ids=["0/1", "0/255", "rgb", "1 bit", "alpha", "16 bits"],
)
def test_clean_binary_masks(tmp_path, encode):
    names, classes, data = learned(pairs(tmp_path, encode))
    assert names == ["background", "foreground"] and all((classes[i] == squares(i)).all() for i in range(8))
    assert not {f.check for f in data.findings} & {"interpolated-masks", "mixed-mask-values", "void-pixels"}


# Void


def border(mask, i):
    """Return a mask with a border of 255 around each object."""
    out, wide = mask.copy(), np.asarray(Image.fromarray(mask * 255).filter(ImageFilter.MaxFilter(5)))
    out[(wide > 0) & (mask == 0)] = 255
    return out


def test_a_border_of_255_is_void(tmp_path):
    names, classes, data = learned(pairs(tmp_path, border))
    assert names == ["0", "1"] or names == ["background", "foreground"]
    assert (classes == -1).any() and "% of all" in finding(data, "void-pixels").what


def test_rare_255_is_void(tmp_path):
    def encode(mask, i):
        mask[:6, 30:36] = 255  # a block, 2 % of the pixels
        return mask

    assert "(2.25 % of all)" in finding(learned(pairs(tmp_path, encode))[2], "void-pixels").what


def test_255_after_consecutive_classes_is_void(tmp_path):
    """As in Cityscapes, where it covers 10 % of the pixels."""

    def encode(mask, i):
        mask[:6] = 255
        return mask

    names, classes, _ = learned(pairs(tmp_path, encode, classes=4))
    assert names == ["0", "1", "2", "3"] and (classes[0, :4] == -1).all()


def test_large_255_next_to_other_classes_is_a_question(tmp_path):
    encode = lambda mask, i: np.array([0, 255, 1], np.uint8)[mask]
    with pytest.raises(DataError, match=r"is 255 in the masks a class.*covers 2. %.*task.ignore=255.*task.ignore=none"):
        build(pairs(tmp_path, encode, classes=3))
    assert learned(tmp_path, ignore="none")[0] == ["0", "1", "255"]
    names, classes, _ = learned(tmp_path, ignore="255")
    assert names == ["0", "1"] or names == ["background", "foreground"]
    assert ((classes[0] == -1) == (squares(0, 3) == 1)).all()


@pytest.mark.parametrize("levels", [(0, 128, 255), (0, 85, 170, 255)])
def test_gray_levels_up_to_255_are_classes(tmp_path, levels):
    names, classes, _ = learned(pairs(tmp_path, lambda mask, i: np.array(levels, np.uint8)[mask], classes=len(levels)))
    assert names == [str(v) for v in levels] and (classes >= 0).all()


def test_void_share_and_classes_with_counts_are_reported(tmp_path, capsys):
    from fieldguide.automl.progress import console
    from fieldguide.cli.train_commands import check

    pairs(tmp_path, border)
    (tmp_path / "classes.txt").write_text("Cell\ncell\n")
    with console.capture() as shown:
        check(str(tmp_path))
    text = shown.get()
    assert "2 classes of masks: Cell" in text and "% of the pixels in 8 masks" in text
    assert "differ only by case" in text and "255" in text and "% of all) belong to no class" in text


# Palettes and colors

RED, GREEN, BLUE, BLACK = (200, 0, 0), (0, 200, 0), (0, 0, 200), (0, 0, 0)


def test_differing_palettes_are_matched_by_color(tmp_path):
    """Optimized PNGs number the colors by their order in the file."""

    def encode(mask, i):
        if i % 2:
            return palette([BLACK, RED, GREEN])(mask, i)
        return palette([RED, BLACK, GREEN])(np.array([1, 0, 2], np.uint8)[mask], i)

    names, classes, data = learned(pairs(tmp_path, encode, classes=3))
    assert finding(data, "palettes") and len(names) == 3
    kinds = {(int(c), int(t)) for i in range(8) for c, t in zip(classes[i].ravel(), squares(i, 3).ravel())}
    assert len(kinds) == 3  # each class is one color


def test_palettes_next_to_colors(tmp_path):
    colors = np.array([BLACK, RED, GREEN], np.uint8)
    encode = lambda mask, i: palette([BLACK, RED, GREEN])(mask, i) if i % 2 else colors[mask]
    names, classes, _ = learned(pairs(tmp_path, encode, classes=3))
    assert (
        len(names) == 3
        and len({(int(c), int(t)) for i in range(8) for c, t in zip(classes[i].ravel(), squares(i, 3).ravel())}) == 3
    )


@pytest.mark.parametrize("form", ["palette", "color"])
def test_cvat_label_map(tmp_path, form):
    colors = [BLACK, RED, GREEN]
    encode = palette(colors) if form == "palette" else (lambda mask, i: np.array(colors, np.uint8)[mask])
    pairs(tmp_path, encode, classes=3, images="JPEGImages", masks="SegmentationClass")
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "default.txt").write_text("\n".join(f"p{i}" for i in range(8)))
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:0,200,0::\nred: car:200,0,0::\n"
    )
    names, classes, data = learned(tmp_path)
    assert data.splits is None
    found = np.array(names)[classes[0]]
    assert (found == np.array(["background", "red: car", "cat"])[squares(0, 3)]).all()


def test_roboflow_masks(tmp_path):
    for split in ("train", "valid", "test"):
        pairs(
            tmp_path, lambda mask, i: np.array([0, 2, 1], np.uint8)[mask], classes=3, images=split, masks=split, ending="_mask"
        )
        (tmp_path / split / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cat\n2, dog\n")
    names, classes, data = learned(tmp_path)
    assert names == ["background", "cat", "dog"] and sorted(set(data.splits)) == ["test", "train", "val"]
    assert (np.array([0, 2, 1])[squares(0, 3)] == classes[0]).all() and len(data) == 24
    (tmp_path / "test/_classes.csv").write_text("Pixel Value, Class\n0, background\n1, dog\n2, cat\n")
    with pytest.raises(DataError, match="names other classes"):
        build(tmp_path)


# Layouts


def test_pascal_voc_has_boxes_and_masks(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    pairs(root, palette([BLACK, RED]), images="JPEGImages", masks="SegmentationClass")
    for i in range(10):
        (root / "Annotations").mkdir(exist_ok=True)
        if i > 7:
            Image.new("L", (SIDE, SIDE), i).save(root / f"JPEGImages/p{i}.png")
        (root / f"Annotations/p{i}.xml").write_text(
            f"<annotation><object><name>cat</name><bndbox><xmin>3</xmin><ymin>{4 + i % 8}</ymin><xmax>24</xmax><ymax>26</ymax></bndbox>"
            "</object></annotation>"
        )
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("p0\np1\np2\np3\n")
    (lists / "val.txt").write_text("p4\np5\n")
    boxes = read(tmp_path)
    assert boxes.target.kind == "boxes" and len(boxes) == 10
    data = build(tmp_path)  # as with --task image-segmentation
    assert data.target.kind == "mask" and len(data) == 6 and list(data.splits) == ["train"] * 4 + ["val"] * 2
    assert finding(data, "not-listed").count == 4  # two without masks, two in no list


@pytest.mark.parametrize(
    ("images", "masks", "ending", "suffix"),
    [
        ("train", "train_masks", "_mask", ".gif"),
        ("Images", "MASKS", "", ".PNG"),
        ("images/training", "annotations/training", "", ".png"),
        ("imgs", "labels", "_L", ".png"),
        ("all", "all", "_mask", ".png"),
        ("trainset/images", "trainset/masks", "", ".bmp"),
    ],
)
def test_layouts(tmp_path, images, masks, ending, suffix):
    pairs(tmp_path, lambda mask, i: mask, images=images, masks=masks, ending=ending, suffix=suffix)
    root = tmp_path / "all" if images == "all" else tmp_path
    assert len(build(root)) == 8


def test_arrays_as_masks(tmp_path):
    pairs(tmp_path, lambda mask, i: mask, classes=3)
    for i in range(8):
        (tmp_path / f"masks/p{i}.png").unlink()
        np.save(tmp_path / f"masks/p{i}.npy", squares(i, 3).astype(np.int64))
    names, classes, _ = learned(tmp_path)
    assert names == ["0", "1", "2"] and (classes[3] == squares(3, 3)).all()


# Scoring


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test", "8 test masks hold only pixels of 'background'.*scored"),
        ("val", "8 validation masks"),
        ("train", "8 training masks.*trained on"),
    ],
)
def test_empty_masks_are_rejected_before_training(tmp_path, split, message):
    for part in ("train", "val", "test"):
        pairs(tmp_path / part, lambda mask, i, part=part: mask * (part != split))
    with pytest.raises(DataError, match=message):
        build_plan(
            read(tmp_path, column_spec=ImageSegmentation.column_spec),
            task="image-segmentation",
            model="unet-test",
            settings={"steps": 2},
            callback=NullCallback(),
        )


def test_evaluation_and_prediction_use_the_stored_coding(tmp_path):
    for part in ("train", "val", "test"):
        pairs(tmp_path / "data" / part, smooth)
    settings = {"steps": 20, "precision": "float32", "task.crop": 32, "lr": 0.01}
    run = fieldguide.fit(tmp_path / "data", model="unet-mini", out=tmp_path / "run", settings=settings)
    assert run.task.names == ["background", "foreground"] and run.task.canvas.threshold == 128
    again = open_run(tmp_path / "run")
    clean = pairs(tmp_path / "clean", lambda mask, i: mask * 255)
    assert again.evaluate(str(clean))["scores"]["pixel_accuracy"] > 0.5
    assert set(again.predict(str(clean / "images/p0.png"))[0]["shares"]) <= {"background", "foreground"}


def test_evaluation_rejects_masks_that_are_coded_differently(tmp_path):
    data = build(pairs(tmp_path / "a", lambda mask, i: mask * 255))
    task = ImageSegmentation.fit(data, ImageSegmentation.Options())
    other = pairs(tmp_path / "b", lambda mask, i: mask)
    with pytest.raises(
        DataError, match=r"8 masks hold values that are no class of this model \(1\).*0 \(background\), 255 \(foreground\)"
    ):
        task.read([str(other)], answered=True)
