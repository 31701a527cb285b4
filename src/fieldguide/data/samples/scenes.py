"""Image samples of scanned digits composed into scenes: segmentation, detection, captions, questions, and video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fieldguide.data.samples.writers import write_csv


def make_scene(rng: Any, side: int = 64, most: int = 4) -> tuple[Any, list[tuple[int, tuple[int, int, int, int], Any]]]:
    """Return a gray image (uint8, side x side) with one to `most` non-overlapping digits of scikit-learn on an uneven
    background, and for each digit its class, box (left, top, right, bottom) and ink mask (bool, side x side)."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    slope = rng.uniform(-30, 30, 2)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    ground = np.clip(rng.uniform(90, 140) + slope[0] * x + slope[1] * y + rng.normal(0, 6, (side, side)), 0, 255)
    taken, found = np.zeros((side, side), dtype=bool), []
    for _ in range(int(rng.integers(1, most + 1))):
        size, number = int(rng.integers(side // 5, side // 2 - 2)), int(rng.integers(len(data.images)))
        ink = (
            np.asarray(
                Image.fromarray((data.images[number] * 255 / 16).astype(np.uint8)).resize(
                    (size, size), Image.Resampling.BICUBIC
                )
            )
            / 255
        )
        left, top = (int(v) for v in rng.integers(0, side - size + 1, 2))
        if taken[max(0, top - 2) : top + size + 2, max(0, left - 2) : left + size + 2].any():
            continue
        taken[top : top + size, left : left + size] = True
        color = 255 if rng.random() < 0.5 else 0
        part = ground[top : top + size, left : left + size]
        ground[top : top + size, left : left + size] = part + (color - part) * ink
        where = np.zeros((side, side), dtype=bool)
        where[top : top + size, left : left + size] = ink > 0.4
        rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        found.append((int(data.target[number]), box, where))
    return ground.astype(np.uint8), found


def write_masks(folder: Path) -> None:
    """Write 500 scenes with masks: background, white ink, black ink."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    (folder / "classes.txt").write_text("ground\nwhite ink\nblack ink\n", encoding="utf-8")
    for number in range(500):
        image, found = make_scene(rng)
        mask = np.zeros(image.shape, dtype=np.uint8)
        for _, _, where in found:
            mask[where] = 1 if image[where].mean() > 128 else 2
        Image.fromarray(image).save(folder / "images" / f"{number:04d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:04d}.png")


def write_boxes(folder: Path) -> None:
    """Write 900 scenes of 96 x 96 with the boxes of their digits in YOLO format."""
    import numpy as np
    from PIL import Image

    rng, side = np.random.default_rng(0), 96
    for name in ("images", "labels"):
        (folder / name).mkdir()
    (folder / "data.yaml").write_text(
        f"train: images\nnames: [{', '.join(map(repr, map(str, range(10))))}]\n", encoding="utf-8"
    )
    for number in range(900):
        image, found = make_scene(rng, side, most=5)
        Image.fromarray(image).save(folder / "images" / f"{number:04d}.png")
        lines = [
            f"{digit} {(left + right) / 2 / side:.6f} {(top + bottom) / 2 / side:.6f} {(right - left) / side:.6f} "
            f"{(bottom - top) / side:.6f}\n"
            for digit, (left, top, right, bottom), _ in found
        ]
        (folder / "labels" / f"{number:04d}.txt").write_text("".join(lines), encoding="utf-8")


SCENE_SIDE = 32  # side in pixels of scenes with captions or questions


def describe_digits(image: Any, found: list[Any]) -> list[tuple[str, float, float, int]]:
    """Return the color, the center of the box (from the left, from the top) and its area for each digit in a scene."""
    return [
        (
            "white" if image[where].mean() > 128 else "black",
            (box[0] + box[2]) / 2,
            (box[1] + box[3]) / 2,
            (box[2] - box[0]) * (box[3] - box[1]),
        )
        for _, box, where in found
    ]


def write_captions(folder: Path) -> None:
    """Write 3,000 scenes of one or two digits with captions: "a small white digit at the top left"."""
    import numpy as np
    from PIL import Image

    rng, rows = np.random.default_rng(0), []
    (folder / "images").mkdir()
    for number in range(3000):
        image, found = make_scene(rng, SCENE_SIDE, 2)
        phrases = [
            f"a {'small' if area < SCENE_SIDE**2 / 20 else 'large'} {color} digit at the "
            f"{'top' if y < SCENE_SIDE / 2 else 'bottom'} {'left' if x < SCENE_SIDE / 2 else 'right'}"
            for color, x, y, area in sorted(describe_digits(image, found), key=lambda t: t[1])
        ]
        Image.fromarray(image).save(folder / "images" / f"{number:04d}.png")
        rows.append([f"images/{number:04d}.png", " and ".join(phrases)])
    write_csv(folder / "captions.csv", ["image", "caption"], iter(rows))


def write_questions(folder: Path) -> None:
    """Write 1,500 scenes of one to three digits with three questions about each."""
    import numpy as np
    from PIL import Image

    rng, rows = np.random.default_rng(0), []
    (folder / "images").mkdir()
    for number in range(1500):
        image, found = make_scene(rng, SCENE_SIDE, 3)
        things = describe_digits(image, found)
        white = sum(color == "white" for color, *_ in things)
        largest, leftmost = max(things, key=lambda t: t[3]), min(things, key=lambda t: t[1])
        lowest = max(things, key=lambda t: t[2])
        candidates = [
            ("how many digits are there?", len(things)),
            ("how many digits are white?", white),
            ("how many digits are black?", len(things) - white),
            ("is there a white digit?", "yes" if white else "no"),
            ("is there a black digit?", "yes" if white < len(things) else "no"),
            ("what colour is the largest digit?", largest[0]),
            ("what colour is the leftmost digit?", leftmost[0]),
            ("what colour is the lowest digit?", lowest[0]),
            ("on which side is the largest digit?", "left" if largest[1] < SCENE_SIDE / 2 else "right"),
        ]
        Image.fromarray(image).save(folder / "images" / f"{number:04d}.png")
        for i in rng.choice(len(candidates), 3, replace=False):
            rows.append([f"images/{number:04d}.png", candidates[i][0], str(candidates[i][1])])
    write_csv(folder / "questions.csv", ["image", "question", "answer"], iter(rows))


def write_videos(folder: Path) -> None:
    """Write digits that move one pixel per frame in four directions, as strips of eight frames of 16 x 16 pixels."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    rng, data = np.random.default_rng(0), load_digits().images * 255 / 16
    for name, (across, down) in {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.items():
        (folder / name).mkdir()
        for number in range(120):
            digit = data[rng.integers(len(data))]
            left, top = (int(rng.integers(0, 9)) if step == 0 else 8 if step < 0 else 0 for step in (across, down))
            strip = np.zeros((16, 8 * 16), dtype=np.uint8)
            for frame in range(8):
                x, y = 16 * frame + left + across * frame, top + down * frame
                strip[y : y + 8, x : x + 8] = digit
            Image.fromarray(strip).save(folder / name / f"{number:03d}.png")
