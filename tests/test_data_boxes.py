"""Images with boxes: COCO, YOLO and Pascal VOC agree, and every error is reported with location, cause, remedy and count."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from damage import finding
from fieldguide.automl.request import read_for
from fieldguide.core.errors import DataError
from fieldguide.data import read
from fieldguide.data.validation.checks import BadData
from fieldguide.tasks.vision.object_detection import ObjectDetection

NAMES = ("cat", "dog")
SIZE = (40, 30)


def scene(number):
    """Return the boxes (class, left, top, right, bottom) of image `number`; every fifth has none."""
    if number % 5 == 4:
        return []
    first = (number % 2, 4.0, 6.0, 14.0 + number % 7, 20.0)
    return [first, (1 - number % 2, 20.0, 3.0, 36.0, 27.0)] if number % 3 else [first]


def picture(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def voc(root, count=120):
    (root / "Annotations").mkdir(parents=True)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for i in range(count):
        picture(root / "JPEGImages" / f"p{i:03d}.jpg", i)
        things = "".join(
            f"<object>\n<name>{NAMES[k]}</name><difficult>{int(i == 0)}</difficult><bndbox><xmin>{a:g}</xmin>"
            f"<ymin>{b:g}</ymin><xmax>{c:g}</xmax><ymax>{d:g}</ymax></bndbox></object>\n"
            for k, a, b, c, d in scene(i)
        )
        (root / "Annotations" / f"p{i:03d}.xml").write_text(
            f"<annotation>\n<filename>p{i:03d}.jpg</filename><size><width>40</width><height>30</height></size>\n{things}</annotation>"
        )
    for name, numbers in (
        ("train", range(0, count - 40)),
        ("val", range(count - 40, count - 20)),
        ("test", range(count - 20, count)),
    ):
        (lists / f"{name}.txt").write_text("".join(f"p{i:03d}\n" for i in numbers))
    return root


def yolo(root, count=120):
    (root / "labels" / "train").mkdir(parents=True)
    for i in range(count):
        picture(root / "images" / "train" / f"p{i:03d}.jpg", i)
        (root / "labels" / "train" / f"p{i:03d}.txt").write_text(
            "".join(f"{k} {(a + c) / 80} {(b + d) / 60} {(c - a) / 40} {(d - b) / 30}\n" for k, a, b, c, d in scene(i))
        )
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nnc: 2\nnames:\n  0: cat\n  1: dog\n")
    return root


def coco(root, count=120):
    notes = [(i, *one) for i in range(count) for one in scene(i)]
    for i in range(count):
        picture(root / "images" / f"p{i:03d}.jpg", i)
    document = {
        "images": [{"id": i, "file_name": f"p{i:03d}.jpg", "width": 40, "height": 30} for i in range(count)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {
                "id": n,
                "image_id": i,
                "category_id": (7, 9)[k],
                "bbox": [a, b, c - a, d - b],
                "iscrowd": 0,
                "segmentation": [[a, b, c, b, c, d]],
            }
            for n, (i, k, a, b, c, d) in enumerate(notes)
        ],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances.json").write_text(json.dumps(document))
    return root


MAKERS = {"voc": voc, "yolo": yolo, "coco": coco}


@pytest.mark.parametrize("form", MAKERS)
def test_coco_yolo_and_voc_give_the_same_table(form, tmp_path):
    data, kind, _ = read_for(
        {
            "data": str(MAKERS[form](tmp_path)),
            "target": None,
            "kinds": {},
            "roles": {},
            "group": None,
            "time": None,
            "allow_bad": False,
            "task": None,
        }
    )
    assert kind is ObjectDetection and len(data) == 120 and data.context["classes"] == list(NAMES)
    for i, objects in enumerate(data.rows["objects"].to_list()):
        assert data.rows["image"][i].endswith(f"p{i:03d}.jpg")
        got = [(NAMES.index(o["label"]), o["left"], o["top"], o["right"], o["bottom"]) for o in objects]
        assert len(got) == len(scene(i)) and np.allclose(np.array(got), np.array(scene(i)), atol=1e-4)
        assert [o["crowd"] for o in objects] == [form == "voc" and i == 0] * len(objects)
    assert finding(data, "background").count == 24
    if form == "coco":
        assert data.rows["objects"][0][0]["outline"] == [[4.0, 6.0, 14.0, 6.0, 14.0, 20.0]]
    if form == "voc":
        assert [int((data.splits == s).sum()) for s in ("train", "val", "test")] == [80, 20, 20]
    before = data.manifest.digest
    file = next(p for p in sorted(tmp_path.rglob("*")) if p.suffix in (".xml", ".json") or p.parent.parent.name == "labels")
    file.write_text(file.read_text() + " ")
    assert read(tmp_path).manifest.digest != before  # what is annotated is part of the data


def test_coco_with_splits_and_as_a_single_file(tmp_path):
    for part in ("train", "val"):
        coco(tmp_path / part, 20)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / part / "annotations" / "instances.json").rename(tmp_path / "annotations" / f"instances_{part}2017.json")
        (tmp_path / part / "images").rename(tmp_path / f"{part}2017")
    (tmp_path / "annotations" / "captions_val2017.json").write_text('{"images": [], "annotations": [{"caption": "a cat"}]}')
    data = read(tmp_path)
    assert int((data.splits == "train").sum()) == 20 and int((data.splits == "val").sum()) == 20
    assert all("train2017" in p for p, s in zip(data.rows["image"], data.splits) if s == "train")
    alone = read(tmp_path / "annotations" / "instances_val2017.json")
    assert len(alone) == 20 and alone.splits is None and "val2017" in alone.rows["image"][0]


def test_yolo_layouts(tmp_path):
    yolo(tmp_path / "a", 10)
    (tmp_path / "a" / "labels" / "train" / "p001.txt").write_text("1 0.1 0.2 0.5 0.2 0.5 0.8 0.1 0.8\n")  # an outline
    made = read(tmp_path / "a").rows["objects"][1].to_list()
    assert len(made) == 1 and made[0]["label"] == "dog"
    assert [made[0][s] for s in ("left", "top", "right", "bottom")] == pytest.approx([4, 6, 20, 24])
    assert made[0]["outline"][0] == pytest.approx([4, 6, 20, 6, 20, 24, 4, 24])
    for part in ("train", "valid"):  # as exported by web tools
        yolo(tmp_path / "b" / part, 10)
        for what in ("images", "labels"):
            folder = tmp_path / "b" / part / what
            (folder / "train").rename(folder.with_name("moved"))
            folder.rmdir()
            folder.with_name("moved").rename(folder)
        (tmp_path / "b" / part / "data.yaml").unlink()
    (tmp_path / "b" / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n")
    data = read(tmp_path / "b")
    assert int((data.splits == "val").sum()) == 10 and len(data) == 20 and data.rows["objects"][0].len() == 1
    assert len(read(tmp_path / "b" / "data.yaml")) == 20


def change(path, *pairs):
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)


def has(source, check, count=1, unusable=0, place="", severity="warning"):
    found = finding(source, check)
    assert (found.count, found.unusable, found.severity) == (count, unusable, severity), found
    assert place in " ".join(found.places) and found.places and (found.remedy or severity == "note")
    return True


def test_damaged_voc(tmp_path):
    root = voc(tmp_path)
    xml = root / "Annotations"
    change(xml / "p001.xml", ("<xmax>15<", "<xmax>4<"))  # no width
    change(xml / "p002.xml", ("<xmin>20<", "<xmin>90<"), ("<xmax>36<", "<xmax>99<"))
    change(xml / "p005.xml", ("<ymax>20<", "<ymax>200<"))
    change(xml / "p007.xml", ("</annotation>", xml.joinpath("p007.xml").read_text().partition("</size>\n")[2]))
    data = read(root)
    assert len(data) == 120 and has(data, "degenerate-box", place="p001.xml:3") and has(data, "box-outside", place="p002.xml")
    assert has(data, "box-over-edge", place="p005.xml:3") and has(data, "duplicate-box", 2, place="p007.xml")
    assert data.rows["objects"][5][0]["bottom"] == 30 and data.rows["objects"][1].len() == 1
    assert data.rows["objects"][2].len() == 1 and data.rows["objects"][7].len() == 2
    damages = {
        "malformed-box": (lambda: change(xml / "p010.xml", ("<xmin>4<", "<xmin>four<")), "p010.xml:3"),
        "malformed-xml": (lambda: change(xml / "p010.xml", ("</annotation>", "")), "p010.xml"),
        "wrong-encoding": (lambda: (xml / "p010.xml").write_bytes(b"<annotation><name>\xe9t\xe9</name></annotation>"), "p010"),
        "xml-doctype": (lambda: (xml / "p010.xml").write_text('<!DOCTYPE a [<!ENTITY x "y">]>\n<annotation/>'), "p010"),
        "empty-annotation": (lambda: (xml / "p010.xml").write_text(""), "p010.xml"),
        "size-differs": (lambda: change(xml / "p010.xml", ("<width>40", "<width>41")), "p010.xml: 41 x 30, the image 40 x"),
        "no-picture": (lambda: (root / "JPEGImages" / "p010.jpg").rename(root / "other.jpg"), "p010.xml: p010.jpg"),
        "no-annotation": (lambda: (xml / "p010.xml").unlink(), "ImageSets/Main: p010"),
        "truncated-image": (
            lambda: (root / "JPEGImages" / "p010.jpg").write_bytes((root / "JPEGImages" / "p010.jpg").read_bytes()[:400]),
            "p010.jpg",
        ),
    }
    kept = (xml / "p010.xml").read_bytes(), (root / "JPEGImages" / "p010.jpg").read_bytes()
    for check, (damage, place) in damages.items():
        damage()
        data = read(root)
        assert len(data) == 119 and has(data, check, unusable=1, place=place), check
        (xml / "p010.xml").write_bytes(kept[0])
        (root / "JPEGImages" / "p010.jpg").write_bytes(kept[1])
    change(root / "ImageSets" / "Main" / "train.txt", ("p020\n", ""), ("p021\n", "p021\np119\n"))
    data = read(root)
    assert len(data) == 119 and has(data, "not-listed", place="p020", severity="note")
    assert has(data, "listed-twice", place="train.txt:22") and data.splits[-1] == "test"
    for i in range(10, 14):
        (root / "JPEGImages" / f"p{i:03d}.jpg").unlink()
    with pytest.raises(BadData, match="4 of 119 examples are unusable"):
        read(root)


def test_damaged_yolo(tmp_path):
    root = yolo(tmp_path)
    labels = root / "labels" / "train"
    (labels / "p003.txt").write_text("0 0.5 0.5 0 0.4\n1 2 0.5 0.2 0.2\n0 0.9 0.5 0.4 0.2\n" + 2 * "1 0.5 0.5 0.2 0.2\n")
    (labels / "p008.txt").write_text("")
    (labels / "p013.txt").unlink()
    data = read(root)
    assert len(data) == 120 and has(data, "degenerate-box", place="labels/train/p003.txt:1")
    assert has(data, "box-outside", place="p003.txt:2") and has(data, "box-over-edge", place="p003.txt:3")
    assert has(data, "duplicate-box", place="p003.txt:5") and data.rows["objects"][3].len() == 2
    assert finding(data, "empty-label-file").count == 25 and has(data, "no-label-file", place="p013.jpg", severity="note")
    damages = {
        "malformed-line": ("0 0.5 0.5 0.2\n", "p010.txt:1: '0 0.5 0.5 0.2'"),
        "class-beyond-names": ("0 0.5 0.5 0.2 0.2\n2 0.5 0.5 0.2 0.2\n", "p010.txt:2: 2"),
        "wrong-encoding": (b"0 0.5 0.5 0.2 0.2 \xff\xfe", "p010.txt"),
    }
    for check, (text, place) in damages.items():
        (labels / "p010.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        data = read(root)
        assert len(data) == 119 and has(data, check, unusable=1, place=place), check
    for text in ("cat 0.5 0.5 0.2 0.2", "0 20 15 8 9", "0 nan 0.5 0.2 0.2", "0.5 0.5 0.5 0.2 0.2", "0 .1 .1 .5 .1 .5"):
        (labels / "p010.txt").write_text(text)
        assert has(read(root), "malformed-line", unusable=1, place="p010.txt:1"), text
    (labels / "p010.txt").write_text("")
    (labels / "lone.txt").write_text("0 0.5 0.5 0.2 0.2")
    assert has(read(root), "no-picture", unusable=1, place="labels/train/lone.txt")
    (labels / "lone.txt").unlink()
    path = root / "images" / "train" / "p010.jpg"
    path.write_bytes(path.read_bytes()[:400])
    assert has(read(root), "truncated-image", unusable=1, place="p010.jpg")
    for text, words in (
        ("train: images/nowhere\nnames: [cat, dog]\n", "train refers to 'images/nowhere', which does not exist"),
        ("train: images/train\nnc: 3\nnames: [cat, dog]\n", "nc is 3 but names lists 2 classes"),
        ("train: images/train\nnames: [cat, cat]\n", "several classes have the name 'cat'"),
        ("train: [images/train\nnames: x", "data.yaml:2: invalid YAML"),
        ("train: images/train\nnames: 5\n", "`names` must be a list"),
    ):
        (root / "data.yaml").write_text(text)
        with pytest.raises(DataError, match=words):
            read(root)
    (root / "data.yaml").unlink()
    with pytest.raises(DataError, match="the classes have no names"):
        read(root)
    (root / "classes.txt").write_text("cat\ndog\n")
    assert read(root, allow_bad=True).context["classes"] == ["cat", "dog"]


def test_damaged_coco(tmp_path):
    root = coco(tmp_path, 240)
    file = root / "annotations" / "instances.json"
    whole = file.read_text()

    def damaged(change):
        document = json.loads(whole)
        change(document["images"], document["annotations"], document["categories"])
        file.write_text(json.dumps(document))
        return read(root)

    def several(images, notes, categories):
        notes[0]["bbox"][2], notes[1]["bbox"][0], notes[3]["bbox"][3] = -3, 300, 99
        notes[9]["bbox"][3] = 0
        notes.append(notes[5])
        notes.append({**notes[6], "image_id": 999})

    data = damaged(several)
    assert len(data) == 240 and has(data, "degenerate-box", 2, place="annotation 9")
    assert has(data, "box-outside", place="annotation 1")
    assert has(data, "box-over-edge", place="annotation 3") and has(data, "duplicate-box") and has(data, "unknown-picture")
    for check, change, lost, place in (
        ("unknown-category", lambda i, n, c: n[4].update(category_id=3), 1, "annotation 4 (3)"),
        ("malformed-box", lambda i, n, c: n[4].update(bbox=[1, 2, None, 4]), 1, "annotation 4"),
        ("size-differs", lambda i, n, c: i[4].update(width=80, height=60), 1, "p004.jpg: 80 x 60"),
        ("duplicate-id", lambda i, n, c: i[4].update(id=5), 2, "p004.jpg (id 5)"),
        ("duplicate-picture", lambda i, n, c: i.append({**i[4], "id": 999}), 1, "p004.jpg"),
        ("missing-file", lambda i, n, c: i[4].update(file_name="gone.jpg"), 1, "gone.jpg"),
    ):
        data = damaged(change)
        assert finding(data, check).unusable == lost and place in " ".join(finding(data, check).places), check
        assert finding(data, check).remedy
    for change, words in (
        (lambda i, n, c: c.append(c[0]), "several categories have the id 7"),
        (lambda i, n, c: i[3].pop("file_name"), "image 3 lacks id or file_name"),
        (lambda i, n, c: c[0].pop("name"), "each category needs"),
    ):
        with pytest.raises(DataError, match=words):
            damaged(change)
    for text, words in (
        (whole[: len(whole) // 2], "is not valid JSON"),
        (whole.replace('"images"', '"image"', 1), "lacks images"),
        (whole.replace("cat", "caf\xe9", 1).encode("latin-1"), "not UTF-8"),
    ):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DataError, match=words):
            read(root)
