"""Split folders, wrapping folders and class folders: splits are never classes, and ambiguous names are a question."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fieldguide.automl.progress import console
from fieldguide.cli.train_commands import check
from fieldguide.core.errors import DataError
from fieldguide.data import read

rng = np.random.default_rng(0)


def tree(root, *folders, count=2):
    """Write `count` different images into each folder."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / folder / f"{i}.png")
    return root


def counts(data):
    """Return (split, class) -> number of examples."""
    splits = data.splits if data.splits is not None else ["-"] * len(data)
    return dict(Counter(zip(splits, data.rows["label"].to_list())))


CLASSES = ("cats", "dogs")
BOTH = {("train", "cats"): 2, ("train", "dogs"): 2, ("test", "cats"): 2, ("test", "dogs"): 2}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training_set", "test_set"),
        ("train_images", "test_images"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("01_train", "02_test"),
        ("Training", "Testing"),
        ("TRAIN", "TEST"),
        ("TrainData", "TestData"),
        ("dataset/training-data", "dataset/holdout"),
        ("train2017", "test1"),
        ("trainset", "testset"),
        ("animals.train", "animals.test"),
        ("train/images", "test/images"),
        ("train_val", "test"),
        ("data/archive/Train", "data/archive/Test"),
    ],
)
def test_folders_with_a_split_in_their_name_are_splits(tmp_path, train, test):
    data = read(tree(tmp_path, *(f"{part}/{label}" for part in (train, test) for label in CLASSES)))
    assert counts(data) == BOTH and data.target.distinct == 2


def test_three_splits(tmp_path):
    data = read(tree(tmp_path, *tree_parts(("x_train", "x_valid", "x_test"))))
    assert Counter(data.splits) == {"train": 4, "val": 4, "test": 4}


def tree_parts(parts):
    return [f"{part}/{label}" for part in parts for label in CLASSES]


@pytest.mark.parametrize("pred", ["seg_pred/seg_pred", "predictions", "to_predict", "unlabeled"])
def test_images_to_predict_are_ignored_with_a_note(tmp_path, pred):
    data = read(tree(tmp_path, *tree_parts(("seg_train/seg_train", "seg_test/seg_test")), pred))
    assert counts(data) == BOTH
    assert next(f for f in data.findings if f.check == "no-labels").places


def test_test_folder_without_classes_is_the_set_to_predict(tmp_path):
    """The layout of competitions: training_set/cats, and test_set with images alone."""
    data = read(tree(tmp_path, *tree_parts(("training_set",)), "test_set"))
    assert set(data.rows["label"]) == {"cats", "dogs"} and len(data) == 4
    assert "fieldguide predict" in str(next(f for f in data.findings if f.check == "no-labels"))


def test_splits_below_classes(tmp_path):
    data = read(tree(tmp_path, "cats/train", "cats/test", "dogs/train", "dogs/test"))
    assert counts(data) == BOTH
    assert counts(read(tree(tmp_path / "more", "cats/train_1", "cats/val", "dogs/train_1"))) == {
        ("train", "cats"): 2,
        ("val", "cats"): 2,
        ("train", "dogs"): 2,
    }


def test_common_subfolders_are_the_classes(tmp_path):
    data = read(tree(tmp_path, *tree_parts(("camera_1", "camera_2"))))
    assert counts(data) == {("-", "cats"): 4, ("-", "dogs"): 4}
    assert next(f for f in data.findings if f.check == "common-subfolders").severity == "warning"


def test_partly_common_subfolders_are_a_warning(tmp_path):
    data = read(tree(tmp_path, "site_a/cats", "site_a/dogs", "site_b/cats", "site_b/dogs", "site_c/cats"))
    assert set(data.rows["label"]) == {"site_a", "site_b", "site_c"}
    found = next(f for f in data.findings if f.check == "partly-common-subfolders")
    assert found.severity == "warning" and found.what.endswith("the same folders: cats, dogs")


def test_folds_are_not_classes(tmp_path):
    tree(tmp_path, *(f"fold{i}/{part}/{label}" for i in (1, 2) for part in ("train", "test") for label in CLASSES))
    with pytest.raises(
        DataError, match=r"fold1, fold2 each contain splits with the same folders \(cats, dogs\).*such as fold1"
    ):
        read(tmp_path)
    assert counts(read(tmp_path / "fold1")) == BOTH


@pytest.mark.parametrize("nested", ["train/val", "train/Validation Set"])
def test_split_within_a_split_is_a_question(tmp_path, nested):
    tree(tmp_path, *tree_parts(("train", "test", nested)))
    with pytest.raises(DataError, match=rf"{nested} contains the same folders as the one it is in \(cats, dogs\)"):
        read(tmp_path)
    (tmp_path / nested).rename(tmp_path / "val")
    assert counts(read(tmp_path)) == {**BOTH, ("val", "cats"): 2, ("val", "dogs"): 2}


def test_different_subfolders_are_parts_of_a_class(tmp_path):
    data = read(tree(tmp_path, "cats/indoor", "cats/outdoor", "dogs/park", "dogs/street"))
    assert counts(data) == {("-", "cats"): 4, ("-", "dogs"): 4}


@pytest.mark.parametrize(
    "folders",
    [
        ("test", "cats", "dogs"),
        ("train", "bus", "car"),  # the vehicle?
        ("train_station", "airport"),
        ("valid", "invalid"),
        ("drug test", "no drugs"),
        ("training/cats", "training/dogs", "birds"),
        ("Validation", "horses", "zebras"),
    ],
)
def test_split_words_next_to_other_folders_are_a_question(tmp_path, folders):
    with pytest.raises(DataError, match=r"a split or a class?.*move them into a folder named train"):
        read(tree(tmp_path, *folders))
    assert len(read(tmp_path, labels_optional=True)) == 2 * len(folders)  # in prediction nothing depends on it
    (tmp_path / "fixed/train").mkdir(parents=True)
    for folder in {f.split("/")[0] for f in folders}:
        (tmp_path / folder).rename(tmp_path / "fixed/train" / folder)
    fixed = read(tmp_path / "fixed")
    assert set(fixed.rows["label"]) == {f.split("/")[0] for f in folders}  # as the remedy says


@pytest.mark.parametrize(
    "folders", [("cats_train", "dogs_train", "cats_test", "dogs_test"), ("train/cats", "training/cats", "test/cats")]
)
def test_several_folders_for_one_split_are_an_error(tmp_path, folders):
    with pytest.raises(DataError, match=r"several folders for one split.*/CLASS"):
        read(tree(tmp_path, *folders))


def test_flat_split_folders_have_no_classes(tmp_path):
    data = read(tree(tmp_path, "train_images", "test_images"))
    assert data.target is None and Counter(data.splits) == {"train": 2, "test": 2}


def test_folders_without_images_do_not_make_splits_ambiguous(tmp_path):
    tree(tmp_path, *tree_parts(("train", "test")))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/readme.txt").write_text("about")
    assert counts(read(tmp_path)) == BOTH


def test_wrapping_folder_is_no_class(tmp_path):
    assert set(read(tree(tmp_path / "a", "PetImages/cats", "PetImages/dogs")).rows["label"]) == {"cats", "dogs"}
    assert read(tree(tmp_path / "b", "images")).target is None


def test_texts_and_unmatched_names(tmp_path):
    """The same rules hold for texts; words that merely contain a split word are plain names."""
    for part in ("aclImdb_train", "aclImdb_test"):
        for label in ("pos", "neg"):
            (tmp_path / part / label).mkdir(parents=True)
            (tmp_path / part / label / "0.txt").write_text(f"{part} {label} text")
    data = read(tmp_path)
    assert set(data.rows["label"]) == {"pos", "neg"} and Counter(data.splits) == {"train": 2, "test": 2}
    assert counts(read(tree(tmp_path / "x", "trainers", "contests", "devices"))) == {
        ("-", "trainers"): 2,
        ("-", "contests"): 2,
        ("-", "devices"): 2,
    }


def test_classes_are_printed_with_counts_and_similar_names(tmp_path):
    tree(tmp_path, "Cat", "cat", "dog", count=3)
    with console.capture() as shown:
        check(str(tmp_path))
    text = " ".join(shown.get().split())
    assert "3 classes: Cat 3, cat 3, dog 3" in text and "differ only by case" in text and "'Cat', 'cat'" in text
