"""Image samples of scanned digits composed into scenes: segmentation, detection, captions, questions, and video."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from fieldguide.data.samples.writers import write_csv


@functools.cache
def load_scanned_digits() -> Any:
    """Return scikit-learn's digits, which it parses from text on every call."""
    from sklearn.datasets import load_digits

    return load_digits()


def make_scene(rng: Any, side: int = 64, most: int = 4) -> tuple[Any, list[tuple[int, tuple[int, int, int, int], Any]]]:
    """Return a gray image (uint8, side x side) with one to `most` non-overlapping digits of scikit-learn on an uneven
    background, and for each digit its class, box (left, top, right, bottom) and ink mask (bool, side x side)."""
    import numpy as np
    from PIL import Image

    data = load_scanned_digits()
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


PUPPET = ("head", "neck", "left_hand", "right_hand", "hip", "left_foot", "right_foot")
PUPPET_LINES = ((1, 2), (2, 3), (2, 4), (2, 5), (5, 6), (5, 7))  # numbers of keypoints from 1, as in COCO


def pose_puppet(rng: Any, size: float) -> Any:
    """Return the keypoints of a stick figure of some height that faces the viewer, around 0, 0: (7, 2)."""
    import numpy as np

    lean = rng.uniform(-0.5, 0.5)
    arms, legs = rng.uniform(0.1, 0.9, 2) * np.pi, rng.uniform(0.05, 0.3, 2) * np.pi  # away from straight down
    neck, hip = np.array([0.0, -0.22]), np.array([0.0, 0.12])
    points = [(0.0, -0.38), neck]
    points += [neck + 0.3 * np.array([side * np.sin(a), np.cos(a)]) for side, a in zip((1, -1), arms)]
    points += [hip, *(hip + 0.38 * np.array([side * np.sin(a), np.cos(a)]) for side, a in zip((1, -1), legs))]
    turn = np.array([[np.cos(lean), -np.sin(lean)], [np.sin(lean), np.cos(lean)]])
    return size * np.array([np.asarray(p) for p in points]) @ turn.T


def write_keypoints(folder: Path) -> None:
    """Write 600 scenes of stick figures with their boxes and keypoints as COCO JSON."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng, side, fine = np.random.default_rng(0), 96, 4
    listed: dict[str, list[Any]] = {"images": [], "annotations": []}
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    for number in range(600):
        ground = np.clip(rng.normal(rng.uniform(60, 180), 8, (side, side, 1)) + rng.uniform(-20, 20, 3), 0, 255)
        image = Image.fromarray(ground.astype(np.uint8)).resize((side * fine, side * fine))
        pen, taken = ImageDraw.Draw(image), np.zeros((side, side), dtype=bool)
        name = f"{number:04d}.png"
        listed["images"].append({"id": number, "file_name": name, "width": side, "height": side})
        for _ in range(int(rng.integers(1, 4))):
            size = rng.uniform(30, 62)
            points = pose_puppet(rng, size)
            points += rng.uniform(-points.min(0) + 0.12 * size, side - points.max(0) - 0.12 * size)
            color = tuple(int(v) for v in (rng.choice([0, 255], 3) * 0.8 + ground.mean((0, 1)) * 0.2))
            reach = 0.1 * size
            left, top = np.maximum(points.min(0) - reach, 0)
            right, bottom = np.minimum(points.max(0) + reach, side)
            if (
                taken[int(top) : int(bottom), int(left) : int(right)].any()
                or np.abs(np.array(color) - ground.mean((0, 1))).max() < 60
            ):
                continue
            taken[int(top) : int(bottom), int(left) : int(right)] = True
            for a, b in PUPPET_LINES:
                pen.line(
                    [tuple(fine * points[a - 1]), tuple(fine * points[b - 1])], fill=color, width=round(0.06 * size * fine)
                )
            x, y = fine * points[0]
            pen.ellipse((x - fine * reach, y - fine * reach, x + fine * reach, y + fine * reach), fill=color)
            listed["annotations"].append(
                {
                    "id": len(listed["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [round(float(v), 2) for v in (left, top, right - left, bottom - top)],
                    "area": round(float((right - left) * (bottom - top)) / 2, 2),
                    "iscrowd": 0,
                    "keypoints": [v for x, y in points.tolist() for v in (round(x, 2), round(y, 2), 2)],
                    "num_keypoints": len(PUPPET),
                }
            )
        image.resize((side, side), Image.Resampling.BOX).save(folder / "images" / name)
    category = {"id": 1, "name": "puppet", "keypoints": list(PUPPET), "skeleton": [list(pair) for pair in PUPPET_LINES]}
    document = json.dumps({**listed, "categories": [category]})
    (folder / "annotations" / "puppets.json").write_text(document, encoding="utf-8")


SHAPES = ("disc", "square", "star")


def draw_shape(rng: Any, kind: str, side: int, fine: int) -> Any:
    """Return the mask (bool, fine*side x fine*side) of a shape of random size, angle and place."""
    import numpy as np
    from PIL import Image, ImageDraw

    size = rng.uniform(0.13, 0.24) * side
    x, y = rng.uniform(0.1 * side, 0.9 * side, 2)
    corners, inner = {"disc": (48, 1.0), "square": (4, 1.0), "star": (10, 0.45)}[kind]
    turn = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
    away = size * np.where(np.arange(corners) % 2, inner, 1.0)
    points = fine * (np.stack([x + away * np.cos(turn), y + away * np.sin(turn)], 1))
    image = Image.new("1", (side * fine, side * fine))
    ImageDraw.Draw(image).polygon([tuple(p) for p in points.tolist()], fill=1)
    return np.asarray(image)


def make_overlapping(rng: Any, side: int, most: int, ground: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """Return an image (uint8, side x side x 3) with shapes that cover each other over a ground, and (kind, mask) of what is visible.

    Shapes of an image have similar colors, so that neighbors differ by their edges alone.
    """
    import numpy as np
    from PIL import Image

    fine, color = 3, rng.uniform(40, 215, 3)
    pixels = np.asarray(Image.fromarray(ground).resize((side * fine, side * fine))).astype(np.float32)
    shapes: list[tuple[str, Any]] = []
    for _ in range(int(rng.integers(1, most + 1))):
        kind = SHAPES[int(rng.integers(len(SHAPES)))]
        mask = draw_shape(rng, kind, side, fine)
        light = np.linspace(-25, 25, side * fine)[:, None, None] * rng.choice([-1, 1])
        pixels[mask] = np.broadcast_to(color + rng.normal(0, 18, 3) + light, pixels.shape)[mask]
        core = mask.copy()
        core[1:-1, 1:-1] = mask[2:, 1:-1] & mask[:-2, 1:-1] & mask[1:-1, 2:] & mask[1:-1, :-2]
        pixels[mask & ~core] *= 0.4
        shapes = [(name, other & ~mask) for name, other in shapes] + [(kind, mask)]
    small = pixels.reshape(side, fine, side, fine, 3).mean((1, 3))
    small = np.clip(small + rng.normal(0, 4, small.shape), 0, 255).astype(np.uint8)
    visible = [(kind, mask.reshape(side, fine, side, fine).mean((1, 3)) >= 0.5) for kind, mask in shapes]
    return small, [(kind, mask) for kind, mask in visible if mask.sum() >= 12]


def make_ground(rng: Any, side: int) -> Any:
    """Return an uneven ground (uint8, side x side x 3)."""
    import numpy as np

    slope, (y, x) = rng.uniform(-40, 40, 2), np.mgrid[0:side, 0:side] / side - 0.5
    plane = rng.uniform(60, 195, 3) + (slope[0] * x + slope[1] * y)[..., None]
    return np.clip(plane + rng.normal(0, 10, (side, side, 1)), 0, 255).astype(np.uint8)


def write_instances(folder: Path) -> None:
    """Write 700 images of shapes that cover each other as COCO JSON with the run lengths of their visible parts."""
    import numpy as np
    from PIL import Image

    from fieldguide.data.media.masks import encode_run_lengths

    rng, side = np.random.default_rng(0), 96
    listed: dict[str, list[Any]] = {"images": [], "annotations": []}
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    for number in range(700):
        image, shapes = make_overlapping(rng, side, 5, make_ground(rng, side))
        name = f"{number:04d}.png"
        Image.fromarray(image).save(folder / "images" / name)
        listed["images"].append({"id": number, "file_name": name, "width": side, "height": side})
        for kind, mask in shapes:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            left, top, right, bottom = (int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
            listed["annotations"].append(
                {
                    "id": len(listed["annotations"]) + 1,
                    "image_id": number,
                    "category_id": SHAPES.index(kind) + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [side, side], "counts": encode_run_lengths(mask)},
                }
            )
    categories = [{"id": i, "name": kind} for i, kind in enumerate(SHAPES, 1)]
    document = json.dumps({**listed, "categories": categories})
    (folder / "annotations" / "instances.json").write_text(document, encoding="utf-8")


STUFF = {"sky": (120, 165, 215), "meadow": (95, 140, 70), "water": (60, 95, 135)}  # and their mean colors
THINGS = {"balloon": "sky", "tree": "meadow", "boat": "water"}  # and where they are


def make_landscape(rng: Any, side: int) -> tuple[Any, Any]:
    """Return a ground (uint8, side x side x 3) of sky above meadow or water or both, and the number of each pixel's class, from 0."""
    import numpy as np

    x, y = np.arange(side), np.arange(side)[:, None]
    wave = lambda low, high: rng.uniform(low, high) * side + 3 * np.sin(x / rng.uniform(6, 14) + rng.uniform(0, 6))
    kinds = rng.permutation([1, 2])[: int(rng.integers(1, 3))]
    number = np.where(y >= wave(0.3, 0.5), kinds[0], 0)
    if len(kinds) > 1:
        number = np.where(y >= wave(0.6, 0.8), kinds[1], number)
    tones = np.array(list(STUFF.values())) + rng.normal(0, 14, (3, 3))
    texture = np.stack([np.zeros((side, side)), rng.normal(0, 14, (side, side)), 9 * np.sin(y / 1.5 + 0 * x)])
    light = np.linspace(12, -12, side)[:, None]
    return np.clip(tones[number] + (np.choose(number, texture) + light)[..., None], 0, 255).astype(np.uint8), number


def draw_thing(rng: Any, pen: Any, kind: str, x: float, y: float, size: float) -> None:
    """Draw a balloon, a tree or a boat around x, y."""
    place = lambda *points: [(x + size * a, y + size * b) for a, b in points]
    shade = int(rng.integers(-25, 25))
    if kind == "balloon":
        color = [(225, 70, 60), (240, 200, 60), (170, 80, 190)][int(rng.integers(3))]
        pen.ellipse(place((-0.42, -0.5), (0.42, 0.35)), fill=tuple(c + shade for c in color))
        pen.rectangle(place((-0.1, 0.38), (0.1, 0.5)), fill=(110, 75, 45))
    elif kind == "tree":
        pen.rectangle(place((-0.07, 0.2), (0.07, 0.5)), fill=(100, 70, 45))
        pen.polygon(place((-0.35, 0.25), (0.0, -0.5), (0.35, 0.25)), fill=(30, 85 + shade, 50))
    else:
        pen.polygon(place((0.0, -0.5), (0.4, 0.15), (0.0, 0.15)), fill=(235, 235, 225 + shade // 2))
        pen.polygon(place((-0.5, 0.2), (0.5, 0.2), (0.3, 0.45), (-0.3, 0.45)), fill=(140 + shade, 80, 50))


def write_panoptic(folder: Path) -> None:
    """Write 600 landscapes with balloons, trees and boats in COCO's panoptic format; a strip of some images belongs to no segment."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng, side, fine = np.random.default_rng(0), 96, 3
    names = [*STUFF, *THINGS]
    categories = [{"id": k + 1, "name": name, "isthing": int(name in THINGS)} for k, name in enumerate(names)]
    listed: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": categories}
    (folder / "annotations" / "panoptic").mkdir(parents=True)
    (folder / "images").mkdir()
    for number in range(600):
        ground, classes = make_landscape(rng, side)
        drawn, ids = Image.fromarray(ground).resize((side * fine, side * fine)), classes + 1
        kinds = {k + 1: k for k in range(len(STUFF))}
        for kind, where in THINGS.items():
            rows, columns = np.nonzero(classes == names.index(where))
            for _ in range(int(rng.choice([0, 1, 2], p=[0.3, 0.45, 0.25])) if len(rows) else 0):
                place, size = int(rng.integers(len(rows))), rng.uniform(18, 34)
                mask = Image.new("RGB", drawn.size)
                seed, spot = int(rng.integers(1 << 31)), (fine * columns[place], fine * rows[place], fine * size)
                for target in (drawn, mask):
                    draw_thing(np.random.default_rng(seed), ImageDraw.Draw(target), kind, *spot)
                inside = np.asarray(mask).any(-1).reshape(side, fine, side, fine).mean((1, 3)) >= 0.5
                key = int(rng.integers(1000, 1 << 24))
                ids[inside], kinds[key] = key, names.index(kind)
        if number % 6 == 0:
            ids[-int(rng.integers(4, 9)) :] = 0
        small = np.asarray(drawn).astype(np.float32).reshape(side, fine, side, fine, 3).mean((1, 3))
        pixels = np.clip(small + rng.normal(0, 4, small.shape), 0, 255).astype(np.uint8)
        name, areas = f"{number:04d}.png", {key: int((ids == key).sum()) for key in kinds}
        Image.fromarray(pixels).save(folder / "images" / name)
        codes = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
        Image.fromarray(codes).save(folder / "annotations" / "panoptic" / name)
        segments = [
            {"id": key, "category_id": kind + 1, "area": areas[key], "iscrowd": 0} for key, kind in kinds.items() if areas[key]
        ]
        listed["images"].append({"id": number, "file_name": name, "width": side, "height": side})
        listed["annotations"].append({"image_id": number, "file_name": name, "segments_info": segments})
    (folder / "annotations" / "panoptic.json").write_text(json.dumps(listed), encoding="utf-8")


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

    rng, data = np.random.default_rng(0), load_scanned_digits().images * 255 / 16
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
