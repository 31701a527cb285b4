"""Detection: IoU, suppression, assignment and loss against loops over single boxes, and a network that learns."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import boxes as slow
from fieldguide.automl.fit import NullCallback
from fieldguide.core.settings import Settings
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing.augmentation import BoxAugmentation
from fieldguide.metrics.detection import average_precision
from fieldguide.models.layers import boxes as fast
from fieldguide.models.registry import create, find
from fieldguide.objectives.detection import Detection, assign, decode, distribution_focal_loss, make_grid, select_detections
from fieldguide.training.inference_loop import collect
from fieldguide.training.trainer import Trainer

STRIDES = (8, 16, 32)


def some_boxes(*shape: int, side: float = 64.0, generator: torch.Generator | None = None) -> Tensor:
    """Return boxes of all sizes within a square."""
    middle = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * side
    half = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) ** 2 * side / 2 + 0.5
    return torch.cat([(middle - half).clamp(0, side), (middle + half).clamp(0, side)], -1)


# ---------------------------------------------------------------------------------------------- overlap


def test_iou_by_hand():
    a = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4], [1, 1, 1, 1], [3, 3, 1, 1]])
    b = torch.tensor([[2.0, 1, 6, 3], [0, 0, 4, 4], [4, 0, 8, 4], [1, 1, 2, 3], [1, 1, 1, 1], [0, 0, 4, 4]])
    assert fast.area(a).tolist() == [16, 16, 16, 16, 0, 0]
    torch.testing.assert_close(fast.iou(a, b), torch.tensor([4 / 20, 1, 0, 2 / 16, 0, 0]))
    # Middles (2, 2) and (4, 2); enclosed by 6 x 4; proportions 1 and 2.
    v = 4 / math.pi**2 * (math.pi / 4 - math.atan(2)) ** 2
    want = 0.2 - 4 / 52 - v * v / (0.8 + v)
    torch.testing.assert_close(fast.ciou(a, b)[0], torch.tensor(want))
    torch.testing.assert_close(fast.ciou(a, b)[1], torch.tensor(1.0))


def test_iou_equals_loops():
    torch.manual_seed(0)
    a, b = some_boxes(40), some_boxes(30)
    for ours, theirs in ((fast.iou, slow.overlap), (fast.ciou, slow.complete)):
        want = torch.tensor([[theirs(x, y) for y in b.tolist()] for x in a.tolist()], dtype=torch.float64)
        torch.testing.assert_close(ours(a[:, None], b[None]), want, rtol=1e-10, atol=1e-12)


def test_ciou_gradient_equals_its_equation():
    """Alpha is constant in the gradient; empty, equal and distant boxes have finite gradients."""
    torch.manual_seed(0)
    a, b = some_boxes(6).requires_grad_(), some_boxes(6)
    fast.ciou(a, b).sum().backward()
    for i, (x, y) in enumerate(zip(a.detach().tolist(), b.tolist())):

        def shape(box):
            return math.atan((box[2] - box[0]) / (box[3] - box[1]))

        v = 4 / math.pi**2 * (shape(x) - shape(y)) ** 2
        alpha = v / (1 - slow.overlap(x, y) + v)

        def value(box, y=y, alpha=alpha, shape=shape):
            w = 4 / math.pi**2 * (shape(box) - shape(y)) ** 2
            beta = w / (1 - slow.overlap(box, y) + w)
            return slow.complete(box, y) + beta * w - alpha * w

        for side in range(4):
            step = 1e-6
            high, low = ([c + sign * step * (k == side) for k, c in enumerate(x)] for sign in (1, -1))
            assert float(a.grad[i, side]) == pytest.approx((value(high) - value(low)) / (2 * step), abs=1e-6)
    odd = torch.tensor([[5.0, 5, 5, 5], [1, 1, 3, 4], [0, 0, 1e-3, 600], [9, 9, 2, 2]], requires_grad=True)
    fast.ciou(odd, torch.tensor([[5.0, 5, 5, 5], [1, 1, 3, 4], [600, 0, 640, 1], [0, 0, 4, 4]])).sum().backward()
    assert odd.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------- suppression


def kept(boxes: Tensor, scores: Tensor, labels: Tensor, limit: float) -> list[int]:
    return fast.nms(boxes, scores, labels, limit).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("pairs", [40, 10**6])
def test_nms_equals_the_greedy_sweep(limit, pairs, monkeypatch):
    """Boxes on a coarse grid, so that IoUs equal the limit; few distinct scores; duplicates; one or many classes."""
    monkeypatch.setattr(fast, "MAX_PAIRS_PER_CHUNK", pairs)
    random = torch.Generator().manual_seed(0)
    for turn in range(60):
        count, classes = (0, 1, 2, 7, 30, 60)[turn % 6], (1, 3, 20)[turn % 3]
        boxes = some_boxes(count, side=(6, 12, 64)[turn // 6 % 3], generator=random)
        boxes = boxes.round() if turn % 2 else boxes
        boxes[count // 2 : count // 2 * 2] = boxes[: count // 2] if turn % 4 == 3 else boxes[count // 2 : count // 2 * 2]
        scores = torch.rand(count, generator=random, dtype=torch.float64)
        scores = (scores * 4).round() / 4 if turn % 5 < 3 else scores
        labels = torch.randint(classes, (count,), generator=random)
        want = slow.greedy(boxes.tolist(), scores.tolist(), labels.tolist(), limit)
        assert kept(boxes, scores, labels, limit) == sorted(want)


def test_nms_of_long_chains():
    """Each box overlaps only its neighbors, so every other one is kept."""
    left = torch.arange(301.0) * 4
    boxes = torch.stack([left, left * 0, left + 10, left * 0 + 10], -1)  # 6 of 14 in common, then 2 of 18
    scores = torch.linspace(1, 0.1, 301)
    assert kept(boxes, scores, torch.zeros(301, dtype=torch.long), 0.3) == list(range(0, 301, 2))
    assert kept(boxes, scores.flip(0), torch.zeros(301, dtype=torch.long), 0.3) == list(range(0, 301, 2))
    assert kept(boxes, scores, torch.arange(301) % 2, 0.3) == list(range(301))  # neighbours of other classes


def test_nms_is_fast():
    """1000 candidates per image in 80 classes, 8 images; and in one class. Much faster than a loop in Python."""
    torch.manual_seed(0)
    boxes, scores = some_boxes(8000, side=640).float(), torch.rand(8000)
    pictures = torch.arange(8).repeat_interleave(1000)
    for classes, most in ((80, 0.1), (1, 0.8)):
        groups = pictures * classes + torch.randint(classes, (8000,))
        fast.nms(boxes, scores, groups, 0.7)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            fast.nms(boxes, scores, groups, 0.7)
            times.append(time.perf_counter() - started)
        assert min(times) / 8 < most  # seconds a picture; about 0.001 and 0.03 on one idle core


def test_detections_are_sorted_clipped_and_padded():
    """The best of every class in descending order of score, within the image, then padding."""
    boxes = torch.tensor([[[-4.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 40, 70]], [[0.0, 0, 9, 9]] * 3])
    scores = torch.tensor([[[0.9, 0.2], [0.8, 0.3], [0.05, 0.6]], [[0.0, 0.0]] * 3])
    found = select_detections(boxes, scores, (64, 32), confidence=0.1, overlap=0.5, candidates=100, max_detections=4)
    assert found["labels"].tolist() == [[0, 1, 1, -1], [-1] * 4]
    torch.testing.assert_close(found["scores"][0], torch.tensor([0.9, 0.6, 0.3, 0]))
    assert found["boxes"][0].tolist() == [[0, 0, 10, 10], [20, 20, 32, 64], [0, 0, 10, 10], [0, 0, 0, 0]]
    assert not found["scores"][1].any() and not found["boxes"][1].any()
    few = select_detections(boxes, scores, (64, 32), confidence=0.1, overlap=0.5, candidates=2, max_detections=1)
    assert few["labels"].tolist() == [[0], [-1]]
    same = select_detections(
        boxes[:1].expand(2, -1, -1),
        scores[:1].expand(2, -1, -1),
        (64, 32),
        confidence=0.1,
        overlap=0.5,
        candidates=100,
        max_detections=4,
    )  # pictures drop nothing of each other's
    assert same["labels"].tolist() == [[0, 1, 1, -1]] * 2
    many = select_detections(boxes, scores, (64, 32), confidence=0.1, overlap=1.0, candidates=100, max_detections=50)
    assert many["labels"].shape == (2, 50) and (many["labels"][0] >= 0).sum() == 5


# ---------------------------------------------------------------------------------------------- the loss


class Answers(nn.Module):
    """A network that returns the outputs it was given."""

    strides = STRIDES

    def __init__(self, bins: int):
        super().__init__()
        self.register_buffer("bins", torch.arange(bins, dtype=torch.float64).view(1, -1, 1, 1))
        self.given: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B A 4R+K
        return self.given


def situation(bins: int = 6, classes: int = 3, height: int = 40, width: int = 52):
    """Return three images: crowded, with objects of all sizes and padding in between, and empty."""
    torch.manual_seed(0)
    points = len(make_grid(height, width, STRIDES, torch.device("cpu"))[0])
    raw = torch.randn(3, points, 4 * bins + classes, dtype=torch.float64) * 1.5
    truth = some_boxes(3, 7, side=40)
    truth[0, 1] = truth[0, 0] + 1  # two that want the same points
    truth[1, 0] = torch.tensor([17.0, 9, 19, 12])  # smaller than a cell, and no point in it
    truth[1, 2] = torch.tensor([0.0, 0, 52, 40])  # further than the last bin
    labels = torch.randint(classes, (3, 7))
    labels[1, [1, 4]] = -1
    labels[2] = -1
    return raw, truth, labels, (height, width)


def test_grid_and_decoding_equal_loops():
    raw, _, _, size = situation()
    points, strides = make_grid(*size, STRIDES, raw.device)
    boxes, distances, logits = decode(raw, torch.arange(6), points, strides)
    for picture, row in enumerate(raw.tolist()):
        want = slow.answers(row, 6, *size)
        assert [(x, y, stride) for x, y, stride, *_ in want] == [(*p, s) for p, s in zip(points.tolist(), strides.tolist())]
        torch.testing.assert_close(boxes[picture], torch.tensor([one[3] for one in want], dtype=torch.float64))
        torch.testing.assert_close(distances[picture], torch.tensor([one[4] for one in want], dtype=torch.float64))
        assert logits[picture].tolist() == [one[5] for one in want]
    assert decode(raw.bfloat16(), torch.arange(6), points, strides)[0].dtype == torch.float32


@pytest.mark.parametrize("topk", [1, 3, 10, 10_000])
def test_assignment_equals_loops(topk):
    raw, truth, labels, size = situation()
    points, strides = make_grid(*size, STRIDES, raw.device)
    boxes, _, logits = decode(raw, torch.arange(6), points, strides)
    owner, quality = assign(logits.sigmoid(), boxes, points, truth, labels, topk=topk)
    fought = 0
    for picture, row in enumerate(raw.tolist()):
        wanted, share = slow.assigned(slow.answers(row, 6, *size), truth[picture].tolist(), labels[picture].tolist(), topk)
        assert owner[picture].tolist() == wanted
        torch.testing.assert_close(quality[picture], torch.tensor(share, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        fought += len({n for n in wanted if n >= 0})
    assert fought >= 6 and (owner[2] == -1).all()


def test_smallest_boxes_get_points():
    """Boxes of 1 to 7 pixels, most of which contain no grid point, get a nearby point of the finest grid."""
    points, strides = make_grid(64, 64, STRIDES, torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    middle = 4 + 56 * torch.rand(200, 1, 2, generator=random)
    outwards = torch.tensor([-1.0, -1, 1, 1])
    truth = middle.repeat(1, 1, 2) + outwards * (0.5 + 3 * torch.rand(200, 1, 1, generator=random))
    boxes = (points.repeat(1, 2) + strides[:, None] * outwards).expand(200, -1, -1)
    owner, quality = assign(torch.full((200, len(points), 2), 0.1), boxes, points, truth, torch.zeros(200, 1, dtype=torch.long))
    assert (owner == 0).any(1).all() and (quality > 0).any(1).all()
    near = (points[(owner == 0).nonzero()[:, 1]] - middle[(owner == 0).nonzero()[:, 0], 0]).abs().amax(-1)
    assert near.max() <= 4
    none, _ = assign(
        torch.full((200, len(points), 2), 0.1), boxes, points, truth, torch.zeros(200, 1, dtype=torch.long), smallest=0.0
    )
    assert not (none == 0).any(1).all()


def test_assignment_without_boxes():
    raw, truth, labels, size = situation()
    points, strides = make_grid(*size, STRIDES, raw.device)
    boxes, _, logits = decode(raw, torch.arange(6), points, strides)
    owner, quality = assign(logits.sigmoid(), boxes, points, truth[:, :0], labels[:, :0])
    assert owner.shape == quality.shape == boxes.shape[:2] and (owner == -1).all() and not quality.any()


def test_distribution_focal_loss_by_hand():
    logits = torch.tensor([[0.0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 5], [0, 0, 0, 5]])
    logs = logits.log_softmax(-1)
    got = distribution_focal_loss(logits, torch.tensor([1.25, -3.0, 3.0, 700.0]))
    want = [-0.75 * logs[0, 1] - 0.25 * logs[0, 2], -logs[1, 0], -0.01 * logs[2, 2] - 0.99 * logs[2, 3]]
    torch.testing.assert_close(got, torch.stack([*want, want[2]]))


def test_loss_equals_loops():
    raw, truth, labels, size = situation()
    model = Answers(6)
    batch = {"image": torch.zeros(3, 1, *size), "boxes": truth, "labels": labels}
    model.given = raw.clone().requires_grad_()
    parts = Detection(model)(batch)
    want = slow.losses([slow.answers(row, 6, *size) for row in raw.tolist()], truth.tolist(), labels.tolist(), 3)
    assert {name: parts[name].item() for name in want} == pytest.approx(want, rel=1e-9)
    assert parts["loss"].item() == pytest.approx(7.5 * want["box"] + 0.5 * want["label"] + 1.5 * want["distance"], rel=1e-9)


def test_gradient_equals_the_numerical_slope(monkeypatch):
    """Owners and qualities are constants. (Complete IoU, with its constant alpha, is tested above.)"""
    raw, truth, labels, size = situation()
    points, strides = make_grid(*size, STRIDES, raw.device)
    boxes, _, logits = decode(raw, torch.arange(6), points, strides)
    fixed = assign(logits.sigmoid(), boxes, points, truth, labels)
    batch, model = {"image": torch.zeros(3, 1, *size), "boxes": truth, "labels": labels}, Answers(6)
    objective = Detection(model, box=0.0)
    model.given = raw.clone().requires_grad_()
    objective(batch)["loss"].backward()
    slope, direction = model.given.grad, torch.randn_like(raw)
    monkeypatch.setattr("fieldguide.objectives.detection.assign", lambda *_, **__: fixed)
    values = []
    for step in (1e-6, -1e-6):
        model.given = raw + step * direction
        values.append(objective(batch)["loss"].item())
    assert (slope * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_empty_images_only_train_the_background():
    raw, truth, labels, size = situation()
    for batch in ({"boxes": truth, "labels": torch.full_like(labels, -1)}, {"boxes": truth[:, :0], "labels": labels[:, :0]}):
        model = Answers(6)
        model.given = raw.clone().requires_grad_()
        parts = Detection(model)({"image": torch.zeros(3, 1, *size), **batch})
        parts["loss"].backward()
        assert parts["box"] == parts["distance"] == 0 and parts["label"] > 0
        assert not model.given.grad[..., :24].any() and (model.given.grad[..., 24:] > 0).all()


def test_padding_changes_nothing():
    raw, truth, labels, size = situation()
    model, image = Answers(6), torch.zeros(3, 1, *size)
    model.given = raw
    want = Detection(model)({"image": image, "boxes": truth, "labels": labels})
    order = torch.tensor([3, 0, 5, 1, 6, 2, 4])
    wide = torch.cat([truth[:, order], torch.full((3, 5, 4), 30.0, dtype=torch.float64)], 1)
    got = Detection(model)({"image": image, "boxes": wide, "labels": torch.cat([labels[:, order], torch.full((3, 5), -1)], 1)})
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------------------------------- a network learns


def scattered_digits(count: int, side: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return images of one to four handwritten 0s, 1s and 2s, two or three times as large as in scikit-learn, with their
    boxes. Seeds 0 and 1 share no digit.
    """
    from sklearn.datasets import load_digits

    rng, digits = np.random.default_rng(seed), load_digits()
    ours = np.arange(len(digits.images)) % 2 == seed
    kinds = [digits.images[ours & (digits.target == kind)] for kind in range(3)]
    pictures, boxes, labels = np.zeros((count, 1, side, side), np.float32), np.zeros((count, 4, 4)), np.full((count, 4), -1)
    for i in range(count):
        placed: list[tuple[int, int, int, int]] = []
        for _ in range(rng.integers(1, 5)):
            label = int(rng.integers(3))
            ink = np.kron(kinds[label][rng.integers(len(kinds[label]))] * 15.9, np.ones([rng.integers(2, 4)] * 2))
            ink = ink[ink.any(1)][:, ink.any(0)]
            height, width = ink.shape
            x, y = int(rng.integers(side - width)), int(rng.integers(side - height))
            if all(x >= b[2] or x + width <= b[0] or y >= b[3] or y + height <= b[1] for b in placed):
                pictures[i, 0, y : y + height, x : x + width] = ink
                labels[i, len(placed)], boxes[i, len(placed)] = label, (x, y, x + width, y + height)
                placed.append((x, y, x + width, y + height))
    return torch.from_numpy(pictures), torch.from_numpy(boxes).float(), torch.from_numpy(labels)


def learnt(size: str, side: int, steps: int, lr: float, augment: BoxAugmentation | None = None, **overrides) -> dict:
    """Return the average precision on unseen digits of a network trained on the CPU."""
    torch.manual_seed(0)
    train, test = scattered_digits(512, side, 0), scattered_digits(128, side, 1)

    def batch(rows, generator):
        if augment is None or generator is None:
            pictures, boxes, labels = (x[rows] for x in train)
        else:
            pictures, boxes, labels = augment(lambda some: tuple(x[some] for x in train), rows, 512, generator)
        return {"image": pictures / 255, "boxes": boxes, "labels": labels}

    objective = Detection(create(size, num_classes=3, channels=1, image=side, **overrides))
    settings = Settings().with_(
        {
            **find(size)[0].recipe,
            "steps": steps,
            "batch": 16,
            "lr": lr,
            "precision": "float32",
            "channels_last": False,
            "minutes": 0,
            "evaluate": steps,
        }
    )
    Trainer(objective, Batches(512, batch), settings, device=torch.device("cpu"), callback=NullCallback()).train()
    answers = Batches(128, lambda rows, _: {"image": test[0][rows] / 255, "boxes": test[1][rows], "labels": test[2][rows]})
    found = collect(objective, answers, batch=48, device=torch.device("cpu"))
    assert found["boxes"].shape == (128, 300, 4) and found["labels"].shape == found["scores"].shape == (128, 300)
    return average_precision(found, {"boxes": test[1].numpy(), "labels": test[2].numpy()}, 3)


@pytest.mark.slow  # test_task_detection.py learns in `make test`
def test_small_network_detects_digits():
    scores = learnt("yolov8n", 64, 150, 8e-3, widths=(8, 12, 24, 32, 48), depths=(1, 1, 1, 1), bins=8)
    assert scores["map50"] > 0.8 and scores["map"] > 0.5


@pytest.mark.slow
def test_yolov8n_detects_digits_with_mosaics():
    scores = learnt("yolov8n", 64, 300, 2e-3, BoxAugmentation(mosaic=0.5, flip=0.0, scale=0.3))
    # 300 steps amplify rounding: CPUs end between .93 and .97.
    assert scores["map50"] > 0.9 and scores["map"] > 0.6


def test_bfloat16_changes_little():
    torch.manual_seed(0)
    objective = Detection(create("yolov8-test", image=64))
    batch = {"image": torch.randn(2, 3, 64, 64), "boxes": some_boxes(2, 4).float(), "labels": torch.randint(3, (2, 4))}
    full = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = objective(batch)
    assert all(half[name].dtype == torch.float32 for name in half)
    for name in ("box", "distance"):
        assert half[name].item() == pytest.approx(full[name].item(), rel=0.1)
    half["loss"].backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters())
