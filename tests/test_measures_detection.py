"""Average precision: cases by hand, and a plain Python implementation on random boxes."""

from __future__ import annotations

import numpy as np
import pytest

import boxes as slow
from fieldguide.core.errors import DataError
from fieldguide.metrics.detection import average_precision

IOUS = np.arange(0.5, 0.96, 0.05)


def pad(rows, width):
    """Convert lists of (label, box) or (label, box, score) per image to padded arrays."""
    n = len(rows)
    out = {"boxes": np.zeros((n, width, 4)), "labels": np.full((n, width), -1), "scores": np.zeros((n, width))}
    for i, row in enumerate(rows):
        for j, (label, box, *score) in enumerate(row):
            out["boxes"][i, j], out["labels"][i, j], out["scores"][i, j] = box, label, score[0] if score else 0
    return out


def score(found, truth, classes=2, width=4):
    known = pad(truth, width)
    del known["scores"]
    return average_precision(pad(found, width), known, classes)


A, B = (0, 0, 10, 10), (20, 20, 40, 30)


def test_all_correct_and_all_wrong():
    right = score([[(0, A, 0.9), (1, B, 0.8)]], [[(0, A), (1, B)]])
    assert [right["map"], right["map50"], right["map75"], *right["class_map"]] == pytest.approx([1] * 5)
    assert right["precision"] == pytest.approx(np.ones((2, 101)))
    assert (right["confidence"][0] == 0.9).all() and right["recall"].tolist() == pytest.approx(np.arange(101) / 100)
    swapped = score([[(1, A, 0.9), (0, B, 0.8)]], [[(0, A), (1, B)]])
    assert swapped["map"] == swapped["map50"] == 0
    none = score([[], []], [[(0, A)], [(1, B)]])
    assert none["map"] == 0 and not none["precision"].any()
    elsewhere = score([[(0, A, 0.9)], []], [[], [(0, A)]])
    assert elsewhere["map50"] == 0


def test_precision_by_hand():
    """Class 0 has three boxes: correct 0.9, wrong 0.8, correct 0.7. Class 1 has one, found twice: correct 0.5, duplicate 0.4."""
    got = score(
        [[(0, A, 0.9), (0, (60, 60, 70, 70), 0.8), (1, A, 0.5)], [(0, B, 0.7), (1, A, 0.4)]],
        [[(0, A), (0, (50, 0, 60, 10)), (1, A)], [(0, B)]],
    )
    # Up to recall 1/3 precision 1: 34 of the 101 recalls; up to 2/3, 2/3: 33; beyond, none.
    assert got["class_map50"] == pytest.approx([(34 + 33 * 2 / 3) / 101, 1.0])
    assert got["map50"] == pytest.approx(got["class_map50"].mean())
    assert got["precision"][0, [0, 33, 34, 66, 67, 100]] == pytest.approx([1, 1, 2 / 3, 2 / 3, 0, 0])
    assert got["confidence"][0, [0, 33, 34, 66]] == pytest.approx([0.9, 0.9, 0.7, 0.7])
    # A double before the right one: the better score takes the true box.
    double = score([[(0, A, 0.9), (0, (0, 0, 10, 11), 0.95)]], [[(0, A)]])
    assert double["map50"] == pytest.approx(1) and double["class_map"][0] == pytest.approx((9 * 1 + 0.5) / 10)


def test_single_iou_thresholds():
    """IoU 0.72 is correct at 0.7 and wrong at 0.75; 0.77 is correct at both."""
    for width, at75 in ((7.2, 0), (7.7, 1)):
        got = score([[(0, (0, 0, width, 10), 0.9)]], [[(0, A)]], classes=1)
        assert (got["map50"], got["map75"], got["map"]) == pytest.approx((1, at75, 0.5 + 0.1 * at75))


def test_mean_over_iou_thresholds():
    """IoU 100/150: correct at 0.5 to 0.65, wrong above; a class without boxes is ignored."""
    got = score([[(0, (0, 0, 10, 15), 0.9), (1, A, 0.3)]], [[(0, A)]], classes=3)
    assert got["map50"] == pytest.approx(1) and got["map75"] == 0 and got["map"] == pytest.approx(4 / 10)
    assert np.isnan(got["class_map"][1:]).all() and got["class_map"][0] == pytest.approx(0.4)
    assert np.isnan(got["precision"][1:]).all()


def test_crowds_are_not_evaluated():
    found = pad([[(0, A, 0.9), (0, B, 0.95)]], 2)
    truth = pad([[(0, A), (0, B)]], 2)
    without = {"boxes": truth["boxes"], "labels": np.array([[0, -1]])}
    crowd = {"boxes": truth["boxes"], "labels": truth["labels"], "crowd": np.array([[False, True]])}
    assert average_precision(found, without, 1)["map50"] == pytest.approx(0.5)
    assert average_precision(found, crowd, 1)["map50"] == pytest.approx(1)
    assert average_precision(pad([[(0, A, 0.9)]], 2), crowd, 1)["map50"] == pytest.approx(1)


def sweep(found, truth, label, limit):
    """Return the average precision of a class at an IoU, box by box."""
    ranked = sorted(((s, i, box) for i, row in enumerate(found) for k, box, s in row if k == label), key=lambda x: -x[0])
    total = sum(k == label for row in truth for k, _ in row)
    taken, right, points = set(), 0, []
    for rank, (_, picture, box) in enumerate(ranked, 1):
        free = [
            (slow.overlap(box, b), j) for j, (k, b) in enumerate(truth[picture]) if k == label and (picture, j) not in taken
        ]
        best, j = max(free, default=(0, -1))
        if best >= limit:
            taken.add((picture, j))
            right += 1
        points.append((right / total, right / rank))
    return np.mean([max((p for r, p in points if r >= recall - 1e-12), default=0.0) for recall in np.arange(101) / 100])


def test_equals_a_python_implementation():
    rng = np.random.default_rng(0)
    truth, found = [], []
    for _ in range(12):
        corner, side = rng.random((5, 2)) * 60, rng.random((5, 2)) * 30 + 5
        true = [(int(rng.integers(3)), (*c, *(c + s))) for c, s in zip(corner, side)][: rng.integers(1, 6)]
        near = [
            (k if rng.random() < 0.8 else int(rng.integers(3)), tuple(np.array(b) + rng.normal(0, 2, 4)), rng.random())
            for k, b in true
            for _ in range(rng.integers(0, 3))
        ]
        truth.append(true)
        found.append(near)
    got = score(found, truth, 3, 12)
    want = np.array([[sweep(found, truth, k, limit) for limit in IOUS] for k in range(3)])
    assert got["class_map"] == pytest.approx(want.mean(1), abs=1e-9)
    assert got["class_map50"] == pytest.approx(want[:, 0], abs=1e-9)
    assert got["map"] == pytest.approx(want.mean()) and 0.1 < got["map"] < got["map50"] < 0.95


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.array([[5, -1]])}, "class 5"),
        ({"scores": np.array([[np.nan, 0]])}, "not finite"),
        ({"scores": np.zeros((1, 3))}, "shapes of the predicted boxes do not match"),
        ({"boxes": np.zeros((1, 2, 5))}, "shapes of the predicted boxes do not match"),
    ],
)
def test_invalid_arrays_are_rejected(change, words):
    found, truth = pad([[(0, A, 0.9)]], 2), pad([[(0, A)]], 2)
    del truth["scores"]
    with pytest.raises(DataError, match=words):
        average_precision(found | change, truth, 2)
    with pytest.raises(DataError, match="have no scores"):
        average_precision(truth, truth, 2)
    with pytest.raises(DataError, match="no image has a true box"):
        average_precision(found, truth | {"labels": np.array([[-1, -1]])}, 2)
    with pytest.raises(DataError, match="3 images"):
        average_precision(pad([[(0, A, 0.9)]] * 3, 2), truth, 2)


def test_prints_nothing(capsys):
    score([[(0, A, 0.9)]], [[(0, A)]])
    assert capsys.readouterr() == ("", "")
