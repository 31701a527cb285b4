"""Segmentation: losses and counts against slow references, tiles, mask formats, damaged folders, and a complete run."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fieldguide.automl.fit import fit
from fieldguide.automl.request import read_for
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data import read
from fieldguide.data.preprocessing.augmentation import augment_with_masks
from fieldguide.data.preprocessing.masks import Canvas, read_codes
from fieldguide.data.validation.checks import BadData
from fieldguide.objectives.segmentation import (
    Segmentation,
    dice_loss,
    find_padding,
    get_tile_starts,
    predict_tiled,
    reflect_pad,
)
from fieldguide.tasks.base import Media
from fieldguide.tasks.vision.image_segmentation import ImageSegmentation
from test_models import tiny


class Pixelwise(nn.Module):
    """Predicts each pixel from itself only."""

    def __init__(self, classes=3):
        super().__init__()
        self.layer = nn.Conv2d(2, classes, 1)

    def forward(self, x):
        return self.layer(x)


def test_dice_equals_its_definition():
    logits, target = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randint(-1, 3, (3, 5, 6))  # class 3 never occurs
    p, scores = logits.softmax(1), []
    for k in range(4):
        both = said = is_ = 0.0
        for b in range(3):
            for y in range(5):
                for x in range(6):
                    if target[b, y, x] >= 0:
                        t = float(target[b, y, x] == k)
                        both, said, is_ = both + float(p[b, k, y, x]) * t, said + float(p[b, k, y, x]), is_ + t
        if is_:
            scores.append((2 * both + 1) / (said + is_ + 1))
    assert float(dice_loss(logits, target)) == pytest.approx(1 - sum(scores) / len(scores), rel=1e-12)


def test_loss_ignores_pixels_without_a_class():
    objective = Segmentation(Pixelwise(), 3)
    image, target = torch.randn(2, 2, 8, 8), torch.randint(0, 3, (2, 8, 8))
    target[:, :4] = -1
    part = objective({"image": image[:, :, 4:], "target": target[:, 4:]})
    whole = objective({"image": image, "target": target})
    torch.testing.assert_close(whole["loss"], part["loss"])
    torch.testing.assert_close(whole["entropy"], F.cross_entropy(objective.model(image), target, ignore_index=-1))
    nothing = objective({"image": image, "target": torch.full_like(target, -1)})
    assert nothing["dice"] == 0


@pytest.mark.parametrize("size", [(40, 70), (16, 16), (33, 90), (100, 20)], ids=str)
def test_tiles_equal_the_whole_image(size):
    """A pixelwise network predicts the same for any tiling, since weights are normalized."""
    model, image = Pixelwise().double(), torch.randn(2, 2, *size, dtype=torch.float64)
    torch.testing.assert_close(predict_tiled(model, image, 16).double(), model(image), rtol=1e-5, atol=1e-5)
    for n in size:
        begins = get_tile_starts(n, 16)
        covered = {i for b in begins for i in range(b, min(b + 16, n))}
        assert covered == set(range(n)) and all(b2 - b1 <= 12 for b1, b2 in pairwise(begins))


def test_network_without_padding_covers_the_whole_image():
    image = torch.randn(1, 2, 50, 43)
    five = nn.Conv2d(2, 3, 5)  # loses two pixels at each side
    assert find_padding(five, 2, 50, 43) == (4, 4)
    logits = Segmentation(five, 3).predict_untiled(image)
    assert logits.shape == (1, 3, 50, 43)
    torch.testing.assert_close(logits[..., 2:-2, 2:-2], five(image))
    torch.testing.assert_close(logits, five(F.pad(image, (2, 2, 2, 2), "reflect")))
    model, image = tiny("unet"), image.double()  # the 2015 form: less comes out than goes in
    assert model(image).shape[2:] != (50, 43) and Segmentation(model, 3).predict_untiled(image).shape == (1, 3, 50, 43)
    small = Segmentation(model, 3).predict_untiled(image[..., :3, :5])  # too small for it to have an answer by itself
    assert small.shape == (1, 3, 3, 5)
    assert find_padding(tiny("unet-resnet"), 3, 50, 43) == (0, 0)
    row = torch.arange(5.0).view(1, 1, 1, 5)
    assert reflect_pad(row, 0, 12)[0, 0, 0].tolist() == [2, 3, 4, 3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2]


def test_counts_are_at_the_original_size():
    objective = Segmentation(Pixelwise(), 3)
    image = torch.randn(2, 2, 32, 32)
    sizes, inner = torch.tensor([[20, 30], [60, 50]]), torch.tensor([[20, 30], [32, 27]])
    truth = torch.full((2, 60, 50), -1)
    truth[0, :20, :30], truth[1] = torch.randint(0, 3, (20, 30)), torch.randint(-1, 3, (60, 50))
    counts = objective.outputs({"image": image, "size": sizes, "inner": inner, "truth": truth})["counts"]
    maps = objective.outputs({"image": image, "size": sizes, "inner": inner})["map"]
    together = {"image": image, "size": sizes, "inner": inner, "truth": truth}
    alone = objective.outputs({name: x[:1] for name, x in together.items()} | {"truth": truth[:1, :20, :30]})
    assert torch.equal(alone["thumb"][0], objective.outputs(together)["thumb"][0])  # whatever else is in the batch
    assert (alone["thumb"] >= 0).all()
    for row in range(2):
        h, w = sizes[row].tolist()
        own = objective.model(image)[row : row + 1, :, : inner[row, 0], : inner[row, 1]]
        said = F.interpolate(own, (h, w), mode="bilinear").argmax(1)[0]
        assert torch.equal(maps[row, :h, :w].long(), said) and (maps[row, h:] == -1).all() and (maps[row, :, w:] == -1).all()
        for t in range(3):
            for s in range(3):
                assert counts[row, t, s] == ((truth[row, :h, :w] == t) & (said == s)).sum()


@pytest.mark.parametrize("form", ["L", "P", "RGB", "I;16", "RGBA"])
def test_mask_formats(tmp_path, form):
    classes = np.random.default_rng(0).integers(0, 3, (20, 30)).astype(np.uint8)
    if form == "P":
        image = Image.fromarray(classes, "P")
        image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    elif form in ("RGB", "RGBA"):
        image = Image.fromarray(np.array([[0, 0, 0], [200, 0, 7], [0, 90, 3]], np.uint8)[classes]).convert(form)
    else:
        image = Image.fromarray(classes.astype(np.uint16) * 300 if form == "I;16" else classes)
    image.save(tmp_path / "mask.png")
    values = {"L": (0, 1, 2), "P": (0, 1, 2), "I;16": (0, 300, 600)}.get(form, (0, (200 << 16) + 7, (90 << 8) + 3))
    assert sorted(np.unique(read_codes(tmp_path / "mask.png"))) == sorted(values)
    canvas = Canvas(64, 3, values)
    assert (canvas.load_masks([tmp_path / "mask.png"], [(30, 20)], (32, 32))[0, :20, :30] == classes).all()
    fewer = Canvas(64, 3, values[:2])
    got = fewer.load_masks([tmp_path / "mask.png"], [(30, 20)], (20, 30), full=True)[0]
    assert (got[classes == 2] == -1).all() and (got[classes < 2] == classes[classes < 2]).all()


@pytest.mark.parametrize("augment", ["none", "light", "standard"])
def test_augmented_masks_match_their_images(augment):
    """The mask is drawn into the image: both must agree after augmentation, and pixels outside have no class."""
    target = torch.arange(40 * 48).view(1, 40, 48).div(160, rounding_mode="floor").repeat(6, 1, 1) % 5
    pixels = (target[:, None] * 50).expand(-1, 3, -1, -1).to(torch.uint8)
    inner = torch.tensor([[40, 48]] * 3 + [[20, 30]] * 3)
    image, classes = augment_with_masks(pixels, target, inner, 32, augment, torch.Generator().manual_seed(1))
    assert image.shape == (6, 3, 32, 32) and classes.shape == (6, 32, 32) and classes.max() < 5
    real = classes >= 0
    assert real.float().mean() > 0.3 and real[:3].float().mean() > 0.6
    if augment != "standard":
        near = (image[:, 0] / 50 - classes).abs() < 0.5  # edges are blurred by scaling
        assert near[real].float().mean() > 0.9
    again = augment_with_masks(pixels, target, inner, 32, augment, torch.Generator().manual_seed(1))
    assert torch.equal(image, again[0]) and torch.equal(classes, again[1])


# Folders


def folder(root, count=40, side=(24, 32)):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        mask = np.zeros(side, np.uint8)
        y, x = rng.integers(0, side[0] - 8), rng.integers(0, side[1] - 8)
        mask[y : y + 8, x : x + 8] = 1
        Image.fromarray((rng.integers(0, 60, side) + 150 * mask).astype(np.uint8)).save(root / "images" / f"p{i}.png")
        Image.fromarray(mask).save(root / "masks" / f"p{i}.png")
    return root


def asked(path, **more):
    return read_for(
        {
            "data": str(path),
            "target": None,
            "kinds": {},
            "roles": {},
            "group": None,
            "time": None,
            "allow_bad": False,
            "task": None,
            **more,
        }
    )


def test_images_with_masks(tmp_path):
    data, kind, _ = asked(folder(tmp_path))
    assert kind is ImageSegmentation and len(data) == 40 and data.target.kind == "mask"
    made = kind.build_examples(data, kind.Options())
    assert made.context == {"values": [0, 1], "names": ["background", "foreground"]}
    for part in ("train", "val", "test"):
        folder(tmp_path / "parts" / part, 10)
    assert [int((read(tmp_path / "parts").splits == s).sum()) for s in ("train", "val", "test")] == [10, 10, 10]
    for i, path in enumerate(sorted((tmp_path / "masks").iterdir())):
        array = np.asarray(Image.open(path)).copy()
        array[0, :3] = 255
        Image.fromarray(array * (1 if i else 2)).save(path)
    made = kind.build_examples(read(tmp_path, column_spec=kind.column_spec), kind.Options())
    assert any(f.check == "void-pixels" for f in made.findings) and 255 not in made.context["values"]
    (tmp_path / "classes.txt").write_text("ground\nsquare\n")
    with pytest.raises(DataError, match=r"1 masks hold values .*masks/p0|images/p0"):
        kind.build_examples(read(tmp_path, column_spec=kind.column_spec), kind.Options())


def test_classes_can_be_ignored_by_name(tmp_path):
    """For color masks with names in class_dict.csv."""
    for path in (folder(tmp_path) / "masks").iterdir():
        Image.fromarray(np.array([(0, 0, 0), (9, 8, 7)], np.uint8)[np.asarray(Image.open(path))]).save(path)
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nfield,0,0,0\nsquare,9,8,7\nVoid,1,1,1\n")
    data, kind, _ = asked(tmp_path)
    assert kind.build_examples(data, kind.Options()).context["names"] == ["field", "Void", "square"]
    assert kind.build_examples(data, kind.Options(ignore="Void")).context["names"] == ["field", "square"]
    with pytest.raises(SettingsError, match=r"values or classes \(field, square, Void\)"):
        kind.build_examples(data, kind.Options(ignore="void"))


def test_damaged_images_with_masks(tmp_path):
    folder(tmp_path, 120)
    (tmp_path / "masks" / "p3.png").unlink()
    (tmp_path / "images" / "p4.png").unlink()
    with pytest.raises(BadData) as raised:
        read(tmp_path)
    found = {f.check: f for f in raised.value.findings}
    assert found["no-mask"].places == ("images/p3.png",) and found["no-picture"].places == ("masks/p4.png",)
    folder(tmp_path, 120)
    good = (tmp_path / "masks" / "p5.png").read_bytes()
    (tmp_path / "masks" / "p5.png").write_bytes(good[: len(good) // 2])
    data = read(tmp_path)
    assert len(data) == 119 and any("p5" in p for f in data.findings if f.unusable for p in f.places)
    (tmp_path / "masks" / "p5.png").write_bytes(b"")
    assert any(f.check == "empty-file" and f.count == 1 for f in read(tmp_path).findings)
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "masks" / "p5.png")
    found = {f.check: f for f in read(tmp_path).findings}
    assert found["mask-size"].unusable == 1 and "5 x 5 for 32 x 24" in found["mask-size"].what
    (tmp_path / "masks" / "p5.png").write_text("no picture")
    assert any(f.check == "corrupt-image" and "masks" in f.what for f in read(tmp_path).findings)
    folder(tmp_path, 120)
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3)).astype(np.uint8)).save(path)
    with pytest.raises(DataError, match="different values, too many for classes"):
        ImageSegmentation.build_examples(read(tmp_path), ImageSegmentation.Options())
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(np.zeros((24, 32), np.uint8)).save(path)
    with pytest.raises(DataError, match="only one class"):
        ImageSegmentation.build_examples(read(tmp_path), ImageSegmentation.Options())
    for path in (tmp_path / "masks").iterdir():
        path.unlink()
    with pytest.raises(DataError):
        read(tmp_path, column_spec=ImageSegmentation.column_spec, target="mask")
    (tmp_path / "masks" / "other.png").write_bytes(good)
    with pytest.raises(DataError, match="no image has a mask with its name"):
        read(tmp_path)
    (tmp_path / "class_dict.csv").write_text("name,r,g\na,1,2\n")
    folder(tmp_path, 3)
    with pytest.raises(DataError, match="requires the columns name, r, g, b"):
        read(tmp_path)


@pytest.mark.slow
def test_network_learns_to_segment(tmp_path):
    run = fit(
        "inked",
        model="unet-mini",
        minutes=2,
        out=tmp_path / "run",
        settings={"steps": 70, "precision": "float32", "evaluate": 35, "lr": 2e-3, "task.crop": 64, "batch": 8},
    )
    assert run.scores["miou"] > 0.7 and run.scores["pixel_accuracy"] > 0.96
    assert run.record["scores"]["baselines"][0]["scores"]["miou"] < 0.35
    tall = Image.fromarray(np.random.default_rng(0).integers(90, 140, (150, 40)).astype(np.uint8))
    tall.save(tmp_path / "tall.png")
    first, second = run.predict([str(tmp_path / "tall.png"), str(sample() / "images" / "0001.png")], tile=64)
    assert isinstance(first["mask"], Media) and abs(sum(first["shares"].values()) - 1) < 1e-9
    assert Image.open(io.BytesIO(first["mask"].content)).size == (40, 150) and first["shares"]["ground"] > 0.9
    mask = np.asarray(Image.open(io.BytesIO(second["mask"].content)))
    truth = np.asarray(Image.open(sample() / "masks" / "0001.png"))
    assert (mask == truth).mean() > 0.9
    assert run.evaluate("inked")["scores"] == pytest.approx(run.scores)
    assert "Confusion of pixels" in (run.path / "report.html").read_text()


def sample():
    from fieldguide.data import samples

    return samples.path("inked")


class GlobalContext(nn.Module):
    """A network in which every pixel sees the whole canvas."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * torch.cat([x, x.mean((2, 3), keepdim=True) - x], 1)


def test_an_image_has_the_same_mask_alone_and_in_company():
    objective, generator = Segmentation(GlobalContext(), 2), torch.Generator().manual_seed(0)
    sizes, images = [(20, 33), (70, 40), (25, 60), (20, 33)], torch.zeros(4, 1, 96, 64)
    for image, (height, width) in zip(images, sizes):
        image[:, :height, :width] = torch.randn(height, width, generator=generator) * 0.01 - 0.001
    found = objective.outputs({"image": images, "inner": torch.tensor(sizes), "size": torch.tensor(sizes)})["map"]
    for row, (height, width) in enumerate(sizes):
        alone = images[row : row + 1, :, : -(-height // 32) * 32, : -(-width // 32) * 32]
        size = torch.tensor([sizes[row]])
        want = objective.outputs({"image": alone, "inner": size, "size": size})["map"][0]
        assert want.unique().tolist() == [0, 1]
        assert torch.equal(found[row, :height, :width], want)
