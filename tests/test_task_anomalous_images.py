"""Anomaly detection in images: distances from normal patches, MVTec's layout, tables, masks, pretrained features, predictions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

import fieldguide
from fieldguide.automl.fit import fit
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data import read, samples
from fieldguide.data.loader import Batches
from fieldguide.data.samples.fabric import make_fabric
from fieldguide.metrics.anomalies import count_by_threshold, roc_auc_of_counts
from fieldguide.models.registry import card, create
from fieldguide.tasks.anomaly.anomaly_detection import AnomalyDetection
from fieldguide.tasks.anomaly.images import ImageAnomalyDetection
from fieldguide.training.patch_memory import choose_core_set, find_components
from fieldguide.training.solvers import Problem, solve

SPEC = AnomalyDetection.column_spec
SMALL = {"task.side": 32, "model.memory": 150, "model.dims": 12, "model.patch": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small set in the layout of MVTec AD."""
    home, rng = tmp_path_factory.mktemp("sets") / "cloth", np.random.default_rng(1)
    for place, defect, count in (
        ("train/good", "", 40),
        ("test/good", "", 8),
        ("test/hole", "hole", 4),
        ("test/stain", "stain", 4),
    ):
        (home / place).mkdir(parents=True)
        for number in range(count):
            pixels, mask = make_fabric(rng, defect)
            Image.fromarray(pixels).save(home / place / f"{number:03d}.png")
            if defect:
                (home / "ground_truth" / defect).mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(home / "ground_truth" / defect / f"{number:03d}_mask.png")
    return home


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cloth"
    return fit(folder, task="anomaly-detection", out=out, settings={**SMALL, "task.false_alarms": 0.1})


# ---------------------------------------------------------------------------------------------- networks


def test_fit_equals_scikit_learn():
    """Components are those of a PCA, and scores the distance to the nearest stored patch."""
    torch.manual_seed(0)
    images = torch.rand(12, 3, 16, 16)
    config = card("patchcore").resolve_config("patchcore-test", memory=10_000, dims=5, patch=5, stride=4)
    batches = Batches(12, lambda index, generator: {"image": images[index]})
    network = solve(Problem(card("patchcore"), config, batches, batches, lambda network: 0.0)).network
    assert network.memory.shape == (12 * 16, 5)  # all patches: they are fewer than the memory holds
    features = network.describe(images).flatten(2).mT.flatten(0, 1).numpy()
    pca = PCA(5).fit(features)
    projected = network.project(torch.from_numpy(features)).detach().numpy()
    assert abs(projected) == pytest.approx(abs(pca.transform(features)), abs=1e-4)  # up to the sign
    other = torch.rand(2, 3, 16, 16)
    near = NearestNeighbors(n_neighbors=1).fit(pca.transform(features))
    wanted = near.kneighbors(pca.transform(network.describe(other).flatten(2).mT.flatten(0, 1).numpy()))[0].ravel()
    found = network.measure(network.project(network.describe(other).movedim(1, -1).flatten(0, 2))).detach().numpy()
    assert found == pytest.approx(wanted, rel=1e-3)
    assert network(images).max() < 1e-2 < network(other).min()  # stored patches have no distance


def test_patches_are_those_around_each_place():
    image = torch.arange(2 * 6 * 8, dtype=torch.float32).view(1, 2, 6, 8)
    network = create("patchcore-test", channels=2, patch=3, stride=2)
    found = network.describe(image)  # 1 18 3 4
    padded = np.pad(image[0].numpy(), ((0, 0), (1, 1), (1, 1)), mode="edge")
    for i in range(3):
        for j in range(4):
            assert found[0, :, i, j].numpy() == pytest.approx(padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].ravel())
    with pytest.raises(SettingsError, match="patch=4 must be odd"):
        create("patchcore-test", patch=4)


def test_core_set_is_greedy():
    x = torch.tensor([[0.0], [1.0], [10.0], [10.5], [4.0], [10.0]])
    chosen = choose_core_set(x, 3, 0).flatten().tolist()
    first = chosen[0]
    assert chosen[1] == max(x.flatten().tolist(), key=lambda v: abs(v - first))
    assert chosen[2] == max(x.flatten().tolist(), key=lambda v: min(abs(v - c) for c in chosen[:2]))
    assert len(choose_core_set(x, 99, 0)) == 5  # equal rows are kept once
    mean, basis, fraction = find_components(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]), 1)
    assert (
        mean.tolist() == [2, 1] and basis.flatten().tolist() == pytest.approx([1, 0], abs=1e-6) and fraction == pytest.approx(1)
    )


def test_pixel_auc_equals_scikit_learn():
    rng = np.random.default_rng(0)
    mask = rng.random((6, 20, 20)) < 0.1
    maps = rng.normal(size=mask.shape) + mask
    known = rng.random(mask.shape) < 0.9
    counts = count_by_threshold(maps, mask, known)
    assert counts.sum() == known.sum()
    assert roc_auc_of_counts(counts.sum(0)) == pytest.approx(roc_auc_score(mask[known], maps[known]), abs=1e-3)
    assert np.isnan(roc_auc_of_counts(count_by_threshold(maps, mask & False, known).sum(0)))


# -------------------------------------------------------------------------------------------------- data


def test_layout_of_mvtec(folder, tmp_path):
    data = read(folder, column_spec=SPEC)
    assert len(data) == 56 and list(np.unique(data.splits, return_counts=True)[1]) == [16, 40]
    assert data.target.name == "label" and data.columns["mask"].role == "ignored"
    masks = {Path(a).parent.name: b for a, b in data.rows.select("image", "mask").rows()}
    assert masks["good"] is None and masks["hole"].endswith("ground_truth/hole/003_mask.png")
    assert not [f for f in data.findings if f.check == "class-not-in-train"]
    other = tmp_path / "cloth"
    shutil.copytree(folder, other)
    (other / "ground_truth/hole/000_mask.png").rename(other / "ground_truth/hole/900.png")
    found = {f.check: f.places for f in read(other, column_spec=SPEC).findings}
    assert found["no-mask"] == ("test/hole/000.png",) and found["no-picture"] == ("ground_truth/hole/900.png",)
    shutil.rmtree(other / "ground_truth")
    data = read(other, column_spec=SPEC)  # without masks: folders of classes
    assert len(data) == 56 and "mask" not in data.columns and set(data.rows["label"]) == {"good", "hole", "stain"}


def test_masks_and_labels(folder):
    data = read(folder, column_spec=SPEC)
    task = AnomalyDetection.fit(data.take(np.flatnonzero(data.splits == "train")), AnomalyDetection.Options(side=64))
    assert isinstance(task, ImageAnomalyDetection) and task.normal_label == ["good"] and task.input_types == ("image",)
    test = data.take(np.flatnonzero(data.splits == "test"))
    test.rows = test.rows.with_columns(mask=pl.when(pl.int_range(16) == 15).then(None).otherwise("mask"))
    found = task.targets(test)
    assert found["label"].tolist() == [0] * 8 + [1] * 8 and not found["mask"][:8].any()
    assert (found["mask"][15] == 2).all()  # its pixels are unknown
    truth = np.asarray(Image.open(test.rows["mask"][8]))
    assert (found["mask"][8] == (truth > 127)).all()


def test_mixed_and_damaged_sets(folder, tmp_path):
    data = read(folder, column_spec=SPEC)
    with pytest.raises(DataError, match="only 8 training rows are normal"):
        AnomalyDetection.fit(data.take(np.flatnonzero(data.splits == "test")), AnomalyDetection.Options())
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "ground_truth").mkdir()
    with pytest.raises(DataError, match="no images found in folders below train and test"):
        read(tmp_path, column_spec=SPEC)


# --------------------------------------------------------------------------------------------------- fit


def test_finds_defects(run):
    assert run.scores["auc"] > 0.9 and run.scores["pixel_auc"] > 0.9
    names = {b["name"]: b["scores"]["auc"] for b in run.record["scores"]["baselines"]}
    assert set(names) == {"z-score", "nearest neighbors", "isolation forest"}
    low, high = run.record["scores"]["intervals"]["pixel_auc"]
    assert low <= run.scores["pixel_auc"] <= high
    page = (run.path / "report.html").read_text()
    assert all(words in page for words in ("anomaly map", "true mask", "By kind of anomaly", "Highest scores"))


def test_predictions(run, folder):
    again = fieldguide.open_run(run.path)
    records = again.predict([str(folder / "test/hole"), str(folder / "test/good/000.png")])
    assert len(records) == 5 and list(records[0]) == ["input", "anomaly", "score", "at", "map", "overlay"]
    assert all(r["anomaly"] == (r["score"] >= 1) for r in records)
    mask = np.asarray(Image.open(folder / "ground_truth/hole/000_mask.png")) > 127
    y, x = (int(records[0]["at"][axis] * 64) for axis in "yx")
    rows, columns = np.nonzero(mask)
    assert np.hypot(rows - y, columns - x).min() < 6
    strict = again.predict(str(folder / "test/hole"), false_alarms=0.5)
    assert all(a["score"] >= b["score"] for a, b in zip(strict, records))
    result = again.evaluate(folder)
    assert result["scores"]["auc"] > 0.9  # over all images
    assert {f.name for f in again.signature.record} >= {"anomaly", "score", "map"}


@pytest.mark.slow
def test_table_of_images(folder, tmp_path):
    rows = [(str(p), "bad" if p.parent.name != "good" else "ok", i) for i, p in enumerate(sorted(folder.glob("t*/*/*.png")))]
    pl.DataFrame(rows, schema=["photo", "label", "number"], orient="row").write_csv(tmp_path / "rows.csv")
    run = fit(tmp_path / "rows.csv", task="anomaly-detection", out=tmp_path / "run", settings=SMALL)
    assert run.scores["auc"] > 0.8 and run.scores["pixel_auc"] is None
    assert len(run.predict(str(folder / "test/good"))) == 8


@pytest.mark.slow
def test_normal_images_without_labels(folder, tmp_path):
    run = fit(folder / "train/good", task="anomaly-detection", out=tmp_path / "run", settings=SMALL)
    assert run.scores["auc"] is None and run.scores["distance"] > 0
    scores = [r["score"] for r in run.predict([str(folder / "test/good"), str(folder / "test/hole")])]
    assert max(scores[:8]) < min(scores[8:])


def test_features_of_a_checkpoint(folder, tmp_path):
    """A classifier becomes the backbone; its weights stay as they are, and resuming finds them again."""
    torch.manual_seed(0)
    network = create("resnet-test", num_classes=2)
    fieldguide.save(network, tmp_path / "network", format="huggingface")
    settings = {"task.side": 32, "model.memory": 50}
    run = fit(folder, task="anomaly-detection", weights=tmp_path / "network", out=tmp_path / "run", settings=settings)
    model = fieldguide.open_run(run.path).model
    assert model.config.backbone == "resnet" and list(model.levels) == ["c3", "c4"]
    assert torch.equal(model.backbone.stem.conv.weight, network.stem.conv.weight)
    image = torch.rand(1, 3, 64, 64)
    maps = network.eval().features(image)
    near = [torch.nn.functional.avg_pool2d(maps[n], 3, 1, 1, count_include_pad=False) for n in ("c3", "c4")]
    wide = torch.nn.functional.interpolate(near[1], near[0].shape[2:], mode="bilinear")
    torch.testing.assert_close(model.cpu().describe(image), torch.cat([near[0], wide], 1))
    assert not model.train().backbone.training


@pytest.mark.slow
def test_the_sample(tmp_path):
    run = fit("fabric", task="anomaly-detection", out=tmp_path / "run", minutes=1)
    assert run.scores["auc"] > 0.99 and run.scores["pixel_auc"] > 0.98
    assert samples.SAMPLES["fabric"].task == "anomaly-detection"
