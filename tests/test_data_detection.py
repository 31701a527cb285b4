"""Augmentation of images with boxes: boxes move exactly as the pixels do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fieldguide.data.loader import make_generator
from fieldguide.data.media import images
from fieldguide.data.preprocessing.augmentation import BoxAugmentation, jitter, mirror_boxes, mosaic, warp
from fieldguide.data.preprocessing.detection import Letterbox, clip_boxes, letterbox, pad_boxes

PLAIN = BoxAugmentation(mosaic=0, scale=0, shift=0, flip=0, hue=0, saturation=0, brightness=0)


def scenes(count: int, side: int = 48, channels: int | None = None):
    """Return white images with two separate rectangles. Each rectangle has its own class and is black in the channel of that
    number; the last position is padding.
    """
    rng = np.random.default_rng(0)
    pictures = torch.full((count, channels or 2 * count, side, side), 255.0)
    places, labels = torch.zeros(count, 3, 4), torch.full((count, 3), -1)
    for i in range(count):
        for j in range(2):  # one in the upper half, one in the lower
            left, width = int(rng.integers(0, side // 2)), int(rng.integers(8, side // 2))
            top, height = side // 2 * j + int(rng.integers(0, 6)), int(rng.integers(6, side // 2 - 6))
            pictures[i, 2 * i + j, top : top + height, left : left + width] = 0
            places[i, j], labels[i, j] = torch.tensor([left, top, left + width, top + height]), 2 * i + j
    return pictures, places, labels


def extents(picture: torch.Tensor, label: int) -> list[float]:
    """Return the left, top, right and bottom of a class in the pixels."""
    there = (picture[label] < 127.5).nonzero()
    (top, left), (bottom, right) = there.amin(0).tolist(), there.amax(0).tolist()
    return [left, top, right + 1, bottom + 1]


def agree(pictures, boxes, labels, within: float = 1.0) -> int:
    """Check each box against the pixels and return the number of boxes."""
    checked = 0
    for picture, some, names in zip(pictures, boxes, labels):
        for box, label in zip(some.tolist(), names.tolist()):
            if label >= 0:
                assert extents(picture, label) == pytest.approx(box, abs=within)
                checked += 1
    return checked


# ---------------------------------------------------------------------------------------------- letterbox


def test_letterbox_equals_pillow_padding():
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (100, 37), (37, 100), (640, 480), (5, 3), (999, 1000), (8, 200)]
    for width, height in sizes + rng.integers(20, 300, (40, 2)).tolist():
        for side in (32, 65):
            black = images.to_array(Image.new("L", (width, height)), side, 1, "pad")[0]
            rows, columns = (np.flatnonzero((black < 255).any(axis)) for axis in (1, 0))
            box = Letterbox.of([width], [height], side)
            whole = box.to_square(torch.tensor([[[0.0, 0, width, height]]]))[0, 0]
            assert whole.tolist() == pytest.approx([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], abs=1e-3)


def test_letterbox_round_trip():
    boxes = torch.tensor([[[0.0, 0, 640, 480], [100, 50, 200, 450]], [[0, 0, 33, 99], [1, 2, 3, 4]]])
    box = Letterbox.of([640, 33], [480, 99], 64)
    inside = box.to_square(boxes)
    torch.testing.assert_close(inside[0], torch.tensor([[0.0, 8, 64, 56], [10, 13, 20, 53]]))
    torch.testing.assert_close(box.to_image(inside), boxes)
    beyond = box.to_image(torch.tensor([[[-5.0, -5, 90, 90]]] * 2))
    assert beyond[:, 0].tolist() == [[0, 0, 640, 480], [0, 0, 33, 99]]


def test_letterbox_of_an_image_in_memory():
    rng = np.random.default_rng(0)
    for width, height in ((90, 40), (31, 77), (20, 20)):
        pixels = np.asarray(Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((width, height)))
        got, box = letterbox(torch.from_numpy(pixels.copy()).permute(2, 0, 1), 48)
        want = images.to_array(Image.fromarray(pixels), 48, 3, "pad")
        assert got.dtype == torch.uint8 and np.abs(got.numpy().astype(int) - want).max() <= 2
        assert torch.equal(box.corner, Letterbox.of([width], [height], 48).corner)


def test_pad():
    boxes, labels = pad_boxes([np.array([[1, 2, 3, 4]]), np.zeros((0, 4)), [[5, 6, 7, 8], [9, 9, 10, 10]]], [[2], [], [0, 1]])
    assert boxes.tolist() == [[[1, 2, 3, 4], [0] * 4], [[0] * 4] * 2, [[5, 6, 7, 8], [9, 9, 10, 10]]]
    assert labels.tolist() == [[2, -1], [-1, -1], [0, 1]] and labels.dtype == torch.int64
    assert pad_boxes([[]], [[]])[0].shape == (1, 1, 4)


# ---------------------------------------------------------------------------------------------- changes


def test_hardly_visible_boxes_are_dropped():
    boxes = torch.tensor(
        [
            [[-90.0, 0, 9, 20], [-90, 0, 11, 20], [98.5, 0, 110, 50], [120, 0, 140, 9], [50, 60, 40, 70], [5, 5, 20, 30]],
            [[0, 0, 50, 50]] + [[0, 0, 9, 9]] * 5,
        ]
    )
    labels = torch.tensor([[0, 1, 2, 3, 4, 5], [7, -1, -1, -1, -1, -1]])
    kept, names = clip_boxes(boxes, labels, 100)
    assert names.tolist() == [[1, 5], [7, -1]]
    assert kept.tolist() == [[[0, 0, 11, 20], [5, 5, 20, 30]], [[0, 0, 50, 50], [0, 0, 0, 0]]]
    assert clip_boxes(boxes, torch.full_like(labels, -1), 100)[1].tolist() == [[-1], [-1]]


def test_flip_moves_boxes_with_the_pixels():
    scene = scenes(4)
    which = torch.tensor([True, False, True, False])
    pictures, boxes, labels = mirror_boxes(*scene, which)
    assert agree(pictures, boxes, labels, 0) == 8
    assert torch.equal(pictures[1], scene[0][1]) and not torch.equal(pictures[0], scene[0][0])
    assert not boxes[:, 2].any()  # padding stays zero


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.7])
def test_warp_moves_boxes_with_the_pixels(scale):
    scene = scenes(6, 64)
    shift = torch.tensor([[0.0, 0], [9, 0], [0, -7], [-4.5, 3.25], [12, 12], [-10, 0]])
    pictures, boxes, labels = warp(*scene, torch.full((6,), scale), shift, 64)
    assert agree(pictures, boxes, labels) >= 8
    if scale == 1:
        assert torch.equal(pictures[0], scene[0][0]) and torch.equal(pictures[1][..., 9:], scene[0][1][..., :-9])
        assert (pictures[1][..., :9] == 255).all() and (pictures[2][:, -7:] == 255).all()
    narrow = torch.minimum(scene[1], torch.tensor([40.0, 64, 40, 64]))
    pictures, boxes, labels = warp(scene[0][..., :40], narrow, scene[2], torch.full((6,), scale), shift, 80)
    assert pictures.shape == (6, 12, 80, 80) and agree(pictures, boxes, labels) >= 8


def test_mosaic_combines_four_images():
    pictures, boxes, labels = scenes(8, 32)
    four, places, names = mosaic(*(x.unflatten(0, (2, 4)) for x in (pictures, boxes, labels)))
    assert four.shape == (2, 16, 64, 64) and places.shape == (2, 12, 4)
    for i in range(8):
        top, left = 32 * (i % 4 // 2), 32 * (i % 2)
        assert torch.equal(four[i // 4, :, top : top + 32, left : left + 32], pictures[i])
        inner = places[i // 4, 3 * (i % 4) : 3 * (i % 4) + 2] - torch.tensor([left, top, left, top])
        assert torch.equal(inner, boxes[i, :2])
    assert names.tolist() == labels.view(2, 12).tolist()


def test_jitter_rotates_hue_and_keeps_gray():
    torch.manual_seed(0)
    grey, colour = torch.rand(1, 1, 4, 4).expand(1, 3, 4, 4) * 255, 80 + 60 * torch.rand(1, 3, 4, 4)
    one = lambda x: torch.tensor([float(x)])
    torch.testing.assert_close(jitter(grey, one(0.2), one(1.5), one(1)), grey, rtol=0, atol=0.05)
    torch.testing.assert_close(jitter(colour, one(1), one(1), one(1)), colour, rtol=0, atol=0.01)
    flat = jitter(colour, one(0), one(0), one(1))
    torch.testing.assert_close(flat[:, 0], flat[:, 2], rtol=0, atol=0.05)
    light = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(flat[0, 0], (colour[0] * light[:, None, None]).sum(0), rtol=0, atol=0.05)
    turned = jitter(colour, one(0.1), one(1), one(1))
    assert (turned - colour).abs().max() > 2
    torch.testing.assert_close((turned[0] * light[:, None, None]).sum(0), flat[0, 0], rtol=0, atol=0.05)
    torch.testing.assert_close(
        jitter(colour, one(0.1), one(0.8), one(1.3)),
        jitter(jitter(colour, one(0.1), one(1), one(1)), one(0), one(0.8), one(1.3)),
        rtol=1e-4,
        atol=1e-2,
    )
    assert jitter(colour, one(0), one(1), one(9)).max() == 255
    torch.testing.assert_close(jitter(grey[:, :1], one(0.3), one(2), one(0.5)), grey[:, :1] / 2)
    both = jitter(colour.repeat(2, 1, 1, 1), torch.tensor([0.0, 0.5]), torch.ones(2), torch.ones(2))
    assert not torch.allclose(both[0], both[1])


# ---------------------------------------------------------------------------------------------- all together


def augmented(how: BoxAugmentation, seed: int = 0):
    """Return twelve augmented images; images fetched for mosaics have classes of their own."""
    return how(lambda rows: scenes(len(rows), 64, 96), np.arange(12), 12, make_generator(seed, 5))


def test_no_augmentation_keeps_images():
    pictures, boxes, labels = augmented(PLAIN)
    scene = scenes(12, 64, 96)
    assert torch.equal(pictures, scene[0]) and torch.equal(boxes, scene[1][:, :2]) and torch.equal(labels, scene[2][:, :2])


@pytest.mark.parametrize("mosaic", [0.0, 0.5, 1.0])
def test_boxes_follow_all_augmentations(mosaic):
    checked = 0
    for seed in range(6):
        pictures, boxes, labels = augmented(BoxAugmentation(mosaic=mosaic, brightness=0.02), seed)
        checked += agree(pictures, boxes, labels)
        sides = (boxes[..., 2:] - boxes[..., :2])[labels >= 0]
        assert (boxes >= 0).all() and (boxes <= 64).all() and (sides >= 2).all() and not boxes[labels < 0].any()
        assert (labels >= 0).any(0).all()  # no wider than needed
    assert checked > 100


def test_mosaics_and_single_images_keep_their_order():
    def fetch(rows):  # a picture's own number is its brightness
        return (
            torch.from_numpy(rows).view(-1, 1, 1, 1).float().expand(-1, 1, 8, 8),
            torch.zeros(len(rows), 1, 4),
            torch.full((len(rows), 1), -1),
        )

    rows = np.array([30, 7, 19, 2, 11, 24, 3, 5])
    pictures, _, labels = replace(PLAIN, mosaic=0.5)(fetch, rows, 40, make_generator(3))
    alone = (pictures == pictures[:, :, :1, :1]).all(-1).all(-1)[:, 0]
    assert 0 < alone.sum() < 8 and torch.equal(pictures[alone][:, 0, 0, 0], torch.from_numpy(rows).float()[alone])
    assert labels.shape == (8, 1)


def test_augmentation_depends_on_the_generator_only():
    first, again, other = augmented(BoxAugmentation()), augmented(BoxAugmentation()), augmented(BoxAugmentation(), 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])
    # One setting moves no draw of another: the same pictures are mirrored, whatever becomes of their colours.
    plain, bright = augmented(replace(PLAIN, flip=0.5)), augmented(replace(PLAIN, flip=0.5, brightness=0.3))
    assert torch.equal(plain[1], bright[1]) and not torch.equal(plain[0], bright[0])
    flipped = (plain[1] != augmented(PLAIN)[1]).any(-1).any(-1)
    assert 2 <= flipped.sum() <= 10
