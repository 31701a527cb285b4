"""Panoptic segmentation: readers, damage, panoptic quality and merging against loops and transformers, and a run."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fieldguide.automl.fit import fit
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.packed_masks import encode_mask, encode_run_lengths, number_pixels, pack_masks
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.media.masks import object_mask
from fieldguide.data.media.segments import bound_runs, find_runs, merge_runs
from fieldguide.data.preprocessing.detection import Letterbox
from fieldguide.data.samples import path as sample
from fieldguide.metrics.panoptic import count_matches, match_segments, panoptic_quality
from fieldguide.models.registry import card
from fieldguide.objectives.mask_set import MaskSet, MaskSetPanoptic
from fieldguide.objectives.object_masks import find_box
from fieldguide.objectives.segment_merging import merge_masks, merge_queries
from fieldguide.tasks import infer_task
from fieldguide.tasks.vision.instance_segmentation import InstanceSegmentation
from fieldguide.tasks.vision.panoptic_segmentation import PanopticSegmentation
from test_models import batch, tiny

WIDE, HIGH = 40, 30
NAMES = ("sky", "grass", "cat", "dog")  # two of stuff, two of things
SETTINGS = {"steps": 4, "batch": 4, "evaluate": 4, "precision": "float32", "channels_last": False}


def scene(i: int) -> tuple[np.ndarray, dict[int, tuple[int, bool]]]:
    """Return the map of image i (0 is void), and the class and the crowd flag of each of its numbers."""
    ids = np.where(np.arange(HIGH)[:, None] < 12 + i % 5, 1, 2) * np.ones((1, WIDE), dtype=int)
    ids[-2:] = 0
    x, y = 4 + i % 7, 3 + i % 5
    ids[y : y + 12, x : x + 9] = 2001
    kinds = {1: (0, False), 2: (1, False), 2001: (2 + i % 2, False)}
    if i % 3 == 0:
        ids[14:26, 24:34], ids[14:20, 34:38] = 3001, 3002
        kinds |= {3001: (3, False), 3002: (3, False)}
    if i % 4 == 0:
        ids[0:4, 30:40], kinds[3] = 3, (3, True)
    return ids, kinds


def picture(file, i):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(i).integers(0, 60, (HIGH, WIDE, 3), np.uint8)
    ids, kinds = scene(i)
    for number, (kind, _) in kinds.items():
        pixels[ids == number] += np.array([(120, 0, 0), (0, 120, 0), (0, 0, 120), (150, 150, 0)][kind], np.uint8)
    Image.fromarray(pixels).save(file)


def save_codes(file, codes):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([codes & 255, codes >> 8 & 255, codes >> 16], -1).astype(np.uint8)).save(file)


def coco(root, count=12):
    notes = []
    for i in range(count):
        picture(root / "images" / f"p{i:03d}.png", i)
        ids, kinds = scene(i)
        codes = np.where(ids > 0, ids * 4001, 0)  # uses all three channels
        save_codes(root / "annotations" / "panoptic" / f"p{i:03d}.png", codes)
        segments = [
            {"id": n * 4001, "category_id": 10 + kind, "area": int((ids == n).sum()), "iscrowd": int(crowd)}
            for n, (kind, crowd) in kinds.items()
        ]
        notes.append({"image_id": i, "file_name": f"p{i:03d}.png", "segments_info": segments})
    document = {
        "images": [{"id": i, "file_name": f"p{i:03d}.png", "width": WIDE, "height": HIGH} for i in range(count)],
        "categories": [{"id": 10 + k, "name": name, "isthing": int(k > 1)} for k, name in enumerate(NAMES)],
        "annotations": notes,
    }
    (root / "annotations" / "panoptic.json").write_text(json.dumps(document))
    return root


def numbers(i: int) -> np.ndarray:
    """Return the map of image i with class x 1000 + object, classes from 1; 0 is void."""
    ids, kinds = scene(i)
    out = np.zeros_like(ids)
    for place, (number, (kind, crowd)) in enumerate(kinds.items()):
        out[ids == number] = 1 + kind if kind < 2 or crowd else 1000 * (1 + kind) + place
    return out.astype(np.uint16)


def folders(root, count=12):
    for i in range(count):
        picture(root / "images" / f"p{i:03d}.png", i)
        (root / "segments").mkdir(exist_ok=True)
        Image.fromarray(numbers(i)).save(root / "segments" / f"p{i:03d}.png")
    (root / "classes.txt").write_text("void\n" + "\n".join(NAMES) + "\n")
    return root


def cityscapes(root, count=12):
    """The same with ids of Cityscapes: sky 23, terrain 22, person 24, car 26; and files that are not read."""
    known = np.array([0, 23, 22, 24, 26])
    for i in range(count):
        split, place = ("train", "val")[i % 4 == 3], f"{'ab'[i % 2]}/a_{i:06d}"
        picture(root / "leftImg8bit" / split / f"{place}_leftImg8bit.png", i)
        file = root / "gtFine" / split / f"{place}_gtFine_instanceIds.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        own = numbers(i).astype(int)
        own = np.where(own >= 1000, known[own // 1000] * 1000 + own % 1000, known[np.minimum(own, 4)])
        Image.fromarray(own.astype(np.uint16)).save(file)
        Image.fromarray(own.astype(np.uint16)).save(file.with_name(file.name.replace("instanceIds", "labelIds")))
    return root


def prepare(source, **options):
    options = PanopticSegmentation.options_from({"side": 64, **options})
    data = PanopticSegmentation.select_columns(read(source, column_spec=PanopticSegmentation.column_spec))
    data = PanopticSegmentation.build_examples(data, options)
    return PanopticSegmentation.fit(data, options), data


# ---------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("form", [coco, folders, cityscapes])
def test_formats_give_the_same_segments(form, tmp_path):
    data = read(form(tmp_path))
    kind, why = infer_task(data)
    assert kind is PanopticSegmentation and why == "images with panoptic segments"
    theirs = dict(zip(NAMES, ("sky", "terrain", "person", "car"))) if form is cityscapes else {n: n for n in NAMES}
    assert [data.context["things"], {f.check for f in data.findings}] == [[theirs["cat"], theirs["dog"]], {"void-pixels"}]
    places = [data.locate_row(row) for row in range(len(data))]
    if form is cityscapes:
        assert sorted(np.unique(data.splits).tolist()) == ["train", "val"]
    for place, objects in zip(places, data.rows["segments"].to_list()):
        i = int("".join(c for c in place.rpartition("/")[2].partition("_left")[0] if c.isdigit()))
        ids, kinds = scene(i)
        found = {(o["label"], o["crowd"], object_mask(o, HIGH, WIDE).tobytes()) for o in objects}
        assert found == {(theirs[NAMES[k]], crowd, (ids == n).tobytes()) for n, (k, crowd) in kinds.items()}
        for one in objects:
            assert (one["left"], one["top"], one["right"], one["bottom"]) == find_box(object_mask(one, HIGH, WIDE))


def test_runs_of_numbers():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, (7, 5))
    found = find_runs(ids)
    assert set(found) == set(np.unique(ids).tolist())
    for number, runs in found.items():
        mask = ids == number
        assert runs == encode_run_lengths(mask) and bound_runs(runs, 7) == find_box(mask)
    assert bound_runs([6, 2, 27], 7) == (0, 0, 2, 7)  # the end of a column and the start of the next
    assert merge_runs([found[1], found[3]], (5, 7)) == encode_run_lengths((ids == 1) | (ids == 3))
    assert merge_runs([found[0], found[1], found[2], found[3]], (5, 7)) == [0, 35]


def test_folder_with_boxes_too_is_read_as_requested(tmp_path):
    document = json.loads((coco(tmp_path) / "annotations" / "panoptic.json").read_text())
    boxes = [{"id": i, "image_id": i, "category_id": 12, "bbox": [4, 3, 9, 12 + i / 10], "iscrowd": 0} for i in range(12)]
    (tmp_path / "annotations" / "instances.json").write_text(json.dumps({**document, "annotations": boxes}))
    assert infer_task(read(tmp_path))[0].name == "object-detection"
    assert "segments" in read(tmp_path, column_spec=PanopticSegmentation.column_spec).columns
    assert "segments" in read(tmp_path, target="segments").columns
    lacking = read(tmp_path, column_spec=InstanceSegmentation.column_spec)
    assert "segments of things and stuff" in PanopticSegmentation.missing_requirements(lacking)


def test_segments_are_objects_of_other_tasks(tmp_path):
    data = read(coco(tmp_path))
    assert InstanceSegmentation.missing_requirements(data) is None


def damages():
    note = lambda document, i=0: document["annotations"][i]["segments_info"]
    file = lambda root, i=0: root / "annotations" / "panoptic" / f"p{i:03d}.png"
    yield "segments-file", lambda root, d: file(root).unlink()
    yield "segments-file", lambda root, d: file(root).write_bytes(b"\x89PNG damaged")
    yield "segments-file", lambda root, d: Image.new("L", (WIDE, HIGH)).save(file(root))
    yield "segments-size", lambda root, d: save_codes(file(root), np.full((HIGH, WIDE + 1), 4001))
    yield "size-differs", lambda root, d: (d["images"][0].update(width=41), save_codes(file(root), np.full((HIGH, 41), 4001)))
    yield "segment-unlisted", lambda root, d: note(d).pop()
    yield "segment-without-pixels", lambda root, d: note(d).append({"id": 7, "category_id": 10, "area": 9})
    yield "segment-area", lambda root, d: note(d)[0].update(area=1)
    yield "duplicate-segment", lambda root, d: note(d).append(note(d)[0])
    yield "stuff-parts", lambda root, d: note(d)[1].update(category_id=10)
    yield "unknown-category", lambda root, d: note(d)[0].update(category_id=99)
    yield "no-segments", lambda root, d: d["annotations"].pop(0)
    yield "no-segments", lambda root, d: d["annotations"][0].pop("segments_info")
    yield "malformed-box", lambda root, d: note(d)[0].update(id="x")
    yield "duplicate-id", lambda root, d: d["annotations"].append(d["annotations"][0])
    yield "unknown-picture", lambda root, d: d["annotations"].append({**d["annotations"][0], "image_id": 99})


@pytest.mark.parametrize(("check", "edit"), [pytest.param(c, e, id=f"{c}-{n}") for n, (c, e) in enumerate(damages())])
def test_damage_is_found(check, edit, tmp_path):
    file = coco(tmp_path) / "annotations" / "panoptic.json"
    document = json.loads(file.read_text())
    edit(tmp_path, document)
    file.write_text(json.dumps(document))
    data = read(tmp_path, allow_bad=True)
    also = {"segment-without-pixels", "segment-area"} if check == "size-differs" else set()
    assert {f.check for f in data.findings} - also == {check, "void-pixels"}
    place = next(f for f in data.findings if f.check == check).places[0]
    assert "panoptic.json" in place and (check == "unknown-picture" or "p000" in place)
    assert len(data) == 12 - next(f for f in data.findings if f.check == check).unusable
    if check == "segment-unlisted":  # its pixels are void
        known = sum(object_mask(o, HIGH, WIDE) for o in data.rows["segments"].to_list()[0])
        assert (known == 0).sum() == 2 * WIDE + 40
    if check == "stuff-parts":
        assert [o["label"] for o in data.rows["segments"].to_list()[0]].count("sky") == 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["categories"][1].pop("isthing"), "'grass' lacks isthing"),
        (lambda d: d.pop("categories"), "lacks categories"),
        (lambda d: d["images"][3].pop("file_name"), "image 3 lacks id or file_name"),
    ],
)
def test_damaged_documents(edit, message, tmp_path):
    file = coco(tmp_path) / "annotations" / "panoptic.json"
    document = json.loads(file.read_text())
    edit(document)
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_damaged_folders(tmp_path):
    file = folders(tmp_path) / "segments" / "p003.png"
    picture(file, 3)  # the image in place of its segments
    (tmp_path / "images" / "p004.png").unlink()
    Image.fromarray(numbers(5)[:20]).save(tmp_path / "segments" / "p005.png")
    (tmp_path / "classes.txt").write_text("void\nsky\ngrass\ncat\n")
    data = read(tmp_path, allow_bad=True)
    found = {f.check: f for f in data.findings}
    assert set(found) == {"segments-file", "no-picture", "size-differs", "unnamed-class", "void-pixels"}
    assert len(data) == 9 and "4 (" in found["unnamed-class"].what and data.context["things"] == ["cat"]
    assert all("segments/p00" in found[check].places[0] for check in ("segments-file", "no-picture", "size-differs"))
    (tmp_path / "classes.txt").unlink()
    assert read(tmp_path, allow_bad=True).context == {"classes": ["1", "2", "3", "4"], "things": ["3", "4"]}
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nsky,0,0,0\n")
    with pytest.raises(DataError, match="given as colors"):
        read(tmp_path)


# ---------------------------------------------------------------------------------------------- panoptic quality


def slow_quality(found, found_labels, true, true_labels, crowd, classes):
    """Section 4 of the paper, pixel by pixel: sums of IoU, matches, false and missed segments of one image."""
    counts = [[0.0, 0, 0, 0] for _ in range(classes)]
    pixels = list(zip(found.ravel().tolist(), true.ravel().tolist()))
    matched_found, matched_true = set(), set()
    for p, label in enumerate(found_labels, 1):
        for t, known in enumerate(true_labels, 1):
            if label != known or crowd[t - 1]:
                continue
            both = sum(a == p and b == t for a, b in pixels)
            either = sum((a == p and b != 0) or b == t for a, b in pixels)
            if both and both / either > 0.5:
                counts[label][0] += both / either
                counts[label][1] += 1
                matched_found.add(p), matched_true.add(t)
    for p, label in enumerate(found_labels, 1):
        area = sum(a == p for a, b in pixels)
        beside = sum(a == p and (b == 0 or (crowd[b - 1] and true_labels[b - 1] == label)) for a, b in pixels)
        if p not in matched_found and area and beside / area <= 0.5:
            counts[label][2] += 1
    for t, known in enumerate(true_labels, 1):
        if t not in matched_true and not crowd[t - 1]:
            counts[known][3] += 1
    return counts


def pack(maps, labels, crowds=None):
    codes = [[encode_mask(one == n) for n in range(1, len(names) + 1)] for one, names in zip(maps, labels)]
    count = max(map(len, labels)) + 1
    pad = lambda rows, value: np.array([[*row, *[value] * (count - len(row))] for row in rows])
    found = {"labels": pad(labels, -1), **pack_masks(codes, [one.shape for one in maps], count)}
    return found | ({"crowd": pad(crowds, False)} if crowds else {"scores": (pad(labels, -1) >= 0) * 1.0})


def test_quality_equals_a_loop():
    rng = np.random.default_rng(0)
    outputs, targets, want = ([], []), ([], [], []), []
    for _ in range(40):
        blocks = rng.integers(0, 6, (4, 4))  # 0 is void
        true = np.kron(blocks, np.ones((3, 3), int))
        found = np.where(rng.random(true.shape) < rng.choice([0.05, 0.3]), rng.integers(0, 6, true.shape), true)
        found[rng.integers(0, 12) :] = rng.integers(0, 6)
        labels = rng.integers(0, 3, 5).tolist()
        said = [k if rng.random() < 0.8 else int(rng.integers(0, 3)) for k in labels]
        crowd = (rng.random(5) < 0.25).tolist()
        there = [n for n in range(1, 6) if (true == n).any()]  # segments without pixels are none
        true = np.searchsorted([0, *there], true)
        labels, crowd = [labels[n - 1] for n in there], [crowd[n - 1] for n in there]
        for list_, value in zip((*outputs, *targets), (found, said, true, labels, crowd)):
            list_.append(value)
        want.append(slow_quality(found, said, true, labels, crowd, 3))
    outputs, targets = pack(*outputs), pack(*targets)
    counts = count_matches(outputs, targets, 3)
    np.testing.assert_allclose(counts, want)
    total = counts.sum(0)
    assert (total[:, 1:] > 0).all() and any(match_segments(outputs, targets, i).ignored.any() for i in range(40))
    scores = panoptic_quality(total, {"things": [0, 1], "stuff": [2]})
    each = [(row[0] / row[1], row[1] / (row[1] + row[2] / 2 + row[3] / 2)) for row in total]
    assert scores["sq"] == pytest.approx(np.mean([a for a, _ in each]))
    assert scores["rq"] == pytest.approx(np.mean([b for _, b in each]))
    assert scores["pq"] == pytest.approx(np.mean([a * b for a, b in each]))
    assert scores["pq_things"] == pytest.approx(np.mean([a * b for a, b in each[:2]]))
    assert scores["pq_stuff"] == pytest.approx(each[2][0] * each[2][1])


def test_classes_without_segments_do_not_count():
    counts = np.array([[0.9, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]])
    scores = panoptic_quality(counts, {"things": [1], "stuff": [0, 2]})
    assert scores["pq"] == scores["pq_stuff"] == pytest.approx(0.45) and np.isnan(scores["pq_things"])


def test_mostly_void_and_crowd_segments_are_not_false():
    true = np.zeros((4, 10), int)
    true[:, 5:] = 1
    targets = lambda crowd: pack([true], [[0]], [[crowd]])
    found = np.zeros_like(true)
    found[:, :6] = 1  # 5 of 6 columns are void
    assert count_matches(pack([found], [[0]]), targets(False), 2)[0].tolist() == [[0, 0, 0, 1], [0] * 4]
    found[:, 2:8] = 1  # half is void, which is not more than half
    found[:, :2] = 0
    assert count_matches(pack([found], [[1]]), targets(False), 2)[0].tolist() == [[0, 0, 0, 1], [0, 0, 1, 0]]
    assert count_matches(pack([found], [[0]]), targets(True), 2)[0].tolist() == [[0] * 4, [0] * 4]
    assert count_matches(pack([found], [[1]]), targets(True), 2)[0].tolist() == [[0] * 4, [0, 0, 1, 0]]


# ---------------------------------------------------------------------------------------------- merging


def some_queries(seed, count=5, side=12):
    """Return logits of classes (3 and none) and smooth masks, each of some of nine places; the last class is fused."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, count, 4, generator=generator)
    owner = torch.randint(count, (1, 1, 3, 3), generator=generator) == torch.arange(count)[None, :, None, None]
    coarse = 8 * owner - 4 + torch.randn(1, count, 3, 3, generator=generator)
    return logits, torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")


def test_merging_equals_a_loop():
    kept = 0
    for seed in range(12):
        logits, masks = some_queries(seed)
        scores, labels = logits[0].softmax(-1).max(-1)
        inside = masks[0].sigmoid()
        found = merge_masks(inside, scores.tolist(), labels.tolist(), {2})
        owner = [[max(range(5), key=lambda k: float(scores[k] * inside[k, y, x])) for x in range(12)] for y in range(12)]
        want: dict[tuple[int, int], tuple[float, set[tuple[int, int]]]] = {}
        for k in range(5):
            own = {(y, x) for y in range(12) for x in range(12) if owner[y][x] == k}
            whole = {(y, x) for y in range(12) for x in range(12) if inside[k, y, x] >= 0.5}
            if own and whole and len(own) >= 0.8 * len(whole) and own & whole:
                key = (int(labels[k]), -1 if labels[k] == 2 else k)
                score, pixels = want.get(key, (0.0, set()))
                want[key] = max(score, float(scores[k])), pixels | (own & whole)
        as_sets = sorted((one.label, round(one.score, 5), sorted(map(tuple, one.mask.nonzero().tolist()))) for one in found)
        assert as_sets == sorted((label, round(score, 5), sorted(pixels)) for (label, _), (score, pixels) in want.items())
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        kept += len(found)
    assert kept > 12 and merge_masks([], [], [], {2}) == []


@torch.no_grad()
def test_merging_equals_transformers():
    """Their rule on the same logits, of 384 x 384 positions, to which it enlarges masks first."""
    from tv import transformers

    processor, seen = transformers.Mask2FormerImageProcessorPil(), 0
    for seed in range(6):
        logits, masks = some_queries(seed, side=384)
        made = type("Found", (), {"class_queries_logits": logits, "masks_queries_logits": masks})()
        theirs = processor.post_process_panoptic_segmentation(made, threshold=0.5, label_ids_to_fuse={2})[0]
        scores, labels = logits[0].softmax(-1).max(-1)
        real = (labels < 3) & (scores > 0.5)
        ours = merge_masks(masks[0, real].sigmoid(), scores[real].tolist(), labels[real].tolist(), {2}, rule="transformers")
        want: dict[int, tuple[int, float]] = {}
        for segment in theirs["segments_info"]:
            assert segment["id"] not in want or segment["was_fused"]
            want[segment["id"]] = segment["label_id"], max(segment["score"], want.get(segment["id"], (0, 0.0))[1])
        assert len(ours) == len(want)
        left = [(label, score, theirs["segmentation"] == number) for number, (label, score) in want.items()]
        for one in ours:
            same = [k for k, (label, score, mask) in enumerate(left) if label == one.label and torch.equal(mask, one.mask)]
            assert len(same) == 1 and left.pop(same[0])[1] == pytest.approx(one.score, abs=1e-6)
        seen += len(ours)
    assert seen > 12


def test_segments_are_placed_in_the_image():
    """Logits of cells of 4 pixels in a letterboxed square of 32: the image of 50 x 20 has a scale of 0.64 and 10 rows above it."""
    logits = torch.full((1, 3, 8, 8), -9.0)
    logits[0, 0, :, :4], logits[0, 1, :, 4:] = 9.0, 9.0
    found = {"scores": torch.tensor([[0.8, 0.9, 0.7]]), "labels": torch.tensor([[1, 0, -1]]), "masks": logits}
    merged = merge_queries(found, Letterbox.of([50], [20], 32), 32, (0,), threshold=0.5)
    assert merged["labels"].tolist() == [[0, 1, -1]] and merged["scores"][0].tolist() == pytest.approx([0.9, 0.8, 0])
    pixels = number_pixels({name: values.numpy() for name, values in merged.items()}, 0)
    assert pixels.shape == (20, 50) and (pixels[:, :25] == 2).all() and (pixels[:, 25:] == 1).all()
    assert merged["boxes"][0, :2].tolist() == [[25, 0, 50, 20], [0, 0, 25, 20]]
    few = merge_queries(found, Letterbox.of([50], [20], 32), 32, (0,), threshold=0.85)
    assert few["labels"].tolist() == [[0, -1, -1]]


# ---------------------------------------------------------------------------------------------- training and runs


def test_positions_without_a_segment_are_not_scored():
    model = tiny("mask2former")
    (x,) = batch("mask2former", 2)
    size = model.mask_size(*x.shape[2:])
    masks, labels = torch.rand(2, 2, *size, dtype=torch.float64), torch.tensor([[0, 2], [1, -1]])
    masks[:, :, :5] = 0
    masks[1, 1] = 0
    parts = MaskSetPanoptic(model)({"image": x, "masks": masks, "labels": labels})
    logits, found = (torch.stack(p) for p in zip(*model.predict_layers(x)))
    known = torch.ones(2, *size, dtype=torch.float64)
    known[:, :5] = 0
    torch.testing.assert_close(parts, MaskSet()(logits, found.flatten(3), labels, masks.flatten(2), known.flatten(1)))


@pytest.mark.parametrize("augmentation", ["none", "light", "standard"])
def test_masks_of_a_batch(augmentation, tmp_path):
    task, data = prepare(coco(tmp_path))
    batches = task.batches(data, card("mask2former"), Settings(augmentation=augmentation))
    made = batches.make(np.arange(4), torch.Generator().manual_seed(0))
    total = made["masks"].sum(1)
    assert made["masks"].shape[2:] == (16, 16) and total.max() < 1.05 and (made["labels"] >= 0).sum(1).min() >= 2
    if augmentation == "none":  # crowds and void pixels are in no mask
        cells = 1.6**2 / 16
        expected = [
            sum((scene(i)[0] == n).sum() for n, (_, crowd) in scene(i)[1].items() if not crowd) * cells for i in range(4)
        ]
        assert total.sum((1, 2)).tolist() == pytest.approx(expected, rel=0.02)


def test_scores_and_threshold(tmp_path):
    task, data = prepare(coco(tmp_path))
    targets = task.targets(data)
    right = {**targets, "scores": np.where(targets["labels"] >= 0, 0.9, 0.0)}
    assert set(task.score(right, targets).values()) == {1.0}
    assert all(low == high == 1 for low, high in task.intervals(right, targets).values())
    wrong = {**right, "scores": right["scores"].copy(), "labels": right["labels"].copy()}
    for i in range(12):  # the last segment of each image has another class, and a low score
        last = int((targets["labels"][i] >= 0).sum()) - 1
        wrong["labels"][i, last], wrong["scores"][i, last] = (targets["labels"][i, last] + 1) % 4, 0.3
    task.calibrate(wrong, targets)
    assert 0.3 < task.threshold <= 0.4
    for baseline in task.baselines(data, data):
        assert 0 < task.score(baseline.outputs, targets)["pq"] < 0.9
    again = PanopticSegmentation.from_state(data.columns.values(), task.options, task.state(), tmp_path)
    assert (again.things, again.threshold, again.names) == (frozenset({2, 3}), task.threshold, task.names)


def test_splits_without_segments_are_rejected(tmp_path):
    task, data = prepare(coco(tmp_path))
    with pytest.raises(DataError, match="no box"):
        PanopticSegmentation.check_split(replace(data, rows=data.rows[:0]), "test", task.options)


@pytest.mark.slow
def test_network_trains_and_predicts(tmp_path):
    source = folders(tmp_path / "data", 36)
    run = fit(str(source), model="mask2former-test", minutes=2, out=tmp_path / "run", settings={**SETTINGS, "task.side": 64})
    assert set(run.scores) == {"pq", "sq", "rq", "pq_things", "pq_stuff"}
    (answer,) = run.predict([str(source / "images" / "p003.png")], threshold=0.0)
    assert list(answer) == ["input", "found", "segments", "picture", "panoptic"] and answer["segments"]
    pixels = np.asarray(Image.open(io.BytesIO(answer["panoptic"].content))).astype(int) @ [1, 256, 65536]
    assert pixels.shape == (HIGH, WIDE)
    for one in answer["segments"]:
        assert list(one) == ["id", "label", "isthing", "score", "area", "box"]
        assert one["area"] == (pixels == one["id"]).sum() > 0 and one["isthing"] == (one["label"] in ("cat", "dog"))
        assert find_box(pixels == one["id"]) == tuple(one["box"])
    assert set(np.unique(pixels)) - {0} == {one["id"] for one in answer["segments"]}
    Image.open(io.BytesIO(answer["picture"].content)).verify()
    assert "merge" in [step.name for step in run.signature.postprocessing]
    evaluated = run.evaluate(str(source))["scores"]
    assert evaluated.keys() == run.scores.keys()
    assert "True segments on the left" in (run.path / "report.html").read_text()
    option = next(o for o in run.signature.options if o.name == "merge")
    assert option.choices == ("paper", "transformers")
    with pytest.raises(SettingsError, match="must be paper or transformers"):
        run.predict([str(source / "images" / "p003.png")], merge="x")


@pytest.mark.slow
def test_sample_reaches_its_floor(tmp_path):
    settings = {"steps": 160, "batch": 8, "precision": "float32"}
    run = fit("scenery", model="mask2former-mini", minutes=9, out=tmp_path / "run", settings=settings)
    assert run.scores["pq"] > 0.65 and run.scores["pq_things"] > 0.4 and sample("scenery").is_dir()
