"""Image generation: evaluation metrics against their definitions, reproducible samples, and complete runs."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from fieldguide.automl.fit import fit
from fieldguide.automl.request import read_for
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.metrics import generative
from fieldguide.models.registry import find
from fieldguide.objectives import DiscreteProcess, EDMProcess, FlowProcess
from fieldguide.objectives.diffusion.loss_weighting import WEIGHTINGS
from fieldguide.tasks import infer_task
from fieldguide.tasks.base import Media
from fieldguide.tasks.vision.image_encoding import encode_png, encode_sheet
from fieldguide.tasks.vision.image_generation import ImageGeneration
from fieldguide.tasks.vision.image_generation_evaluator import compute_thumbnails
from fieldguide.tasks.vision.image_generation_report import sheets_by_class


def test_frechet_distance_equals_its_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)), rng.normal(1, 2, size=(150, 6))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert generative.frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    assert abs(generative.frechet_distance(a, a)) < 1e-9


def test_frechet_distance_of_fewer_examples_than_features():
    """The same value as by square roots of the covariances, which are singular."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(12, 30)), rng.normal(0.3, 1.5, size=(9, 30))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    half = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T  # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2)
    root = np.sqrt(np.linalg.eigvalsh(half @ second @ half).clip(0)).sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root
    assert generative.frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)


def test_precision_and_recall_equal_their_definition():
    rng = np.random.default_rng(1)
    real, made = rng.normal(size=(40, 3)), rng.normal(0.7, 1, size=(30, 3))

    def share(points, cloud):
        hits = 0
        for p in points:
            for i, c in enumerate(cloud):
                near = sorted(float(np.linalg.norm(c - o)) for j, o in enumerate(cloud) if j != i)
                if np.linalg.norm(p - c) <= near[generative.NEAREST_NEIGHBORS - 1] + 1e-12:
                    hits += 1
                    break
        return hits / len(points)

    assert generative.precision_recall(real, made) == pytest.approx((share(made, real), share(real, made)))
    assert generative.precision_recall(real, real + 100) == (0, 0)


def test_kernel_distance_equals_its_definition():
    rng = np.random.default_rng(1)
    real, made = rng.normal(size=(12, 3)), rng.normal(0.5, 1, size=(9, 3))
    kernel = lambda a, b: (float(np.dot(a, b)) / 3 + 1) ** 3
    mean = lambda pairs: float(np.mean([kernel(a, b) for a, b in pairs]))
    others = lambda x: [(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    wanted = mean(others(real)) + mean(others(made)) - 2 * mean([(a, b) for a in real for b in made])
    assert generative.kernel_distance(real, made) == pytest.approx(wanted, rel=1e-9)
    same = [generative.kernel_distance(rng.normal(size=(60, 3)), rng.normal(size=(60, 3))) for _ in range(40)]
    assert abs(np.mean(same)) < 2 * np.std(same) / 40**0.5 + 0.02  # without bias


def test_density_and_coverage_equal_their_definitions():
    rng = np.random.default_rng(1)
    real, made = rng.normal(size=(40, 3)), rng.normal(0.7, 1, size=(30, 3))
    k = generative.DENSITY_NEIGHBORS
    near = [sorted(float(np.linalg.norm(c - o)) for j, o in enumerate(real) if j != i)[k - 1] for i, c in enumerate(real)]
    hits = [[np.linalg.norm(m - c) <= r for c, r in zip(real, near)] for m in made]
    density, coverage = np.sum(hits) / (k * len(made)), np.any(hits, 0).mean()
    assert generative.density_coverage(real, made) == pytest.approx((density, coverage))
    assert generative.density_coverage(real, real + 100) == (0, 0)
    outlier = np.concatenate([real, [[50.0, 50.0, 50.0]]])  # one real outlier, whose neighborhood holds everything
    far = made + 20
    assert generative.precision_recall(outlier, far)[0] == 1.0 and generative.density_coverage(outlier, far)[0] < 0.25


def test_intervals_match_the_spread_of_scores():
    """About 95 of 100 scores of data from one distribution are within an interval of their mean."""
    rng = np.random.default_rng(0)
    worlds = [(rng.normal(size=(150, 4)), rng.normal(0.5, 1.2, (150, 4))) for _ in range(80)]
    for score, around in (
        (generative.frechet_distance, generative.bootstrap_distance_interval),
        *(
            (
                lambda a, b, name=name: generative.compute_cloud_scores(a, b)[name],
                lambda a, b, name=name: generative.jackknife_cloud_intervals(a, b)[name],
            )
            for name in ("kernel_distance", "precision", "density", "coverage")
        ),
        (lambda a, b: b[:, 0].mean(), lambda a, b: generative.bootstrap_mean_interval(b[:, 0])),
    ):
        true = 1.96 * np.std([score(*w) for w in worlds])
        said = np.mean([np.diff(around(*w)) / 2 for w in worlds[:5]])
        low, high = around(*worlds[0])
        assert 0.75 < said / true < 1.4 and low < score(*worlds[0]) < high
    films = np.repeat(worlds[0][0][:, None], 5, 1)  # frames of a film that say the same: no more is known for them
    wide, single = (
        np.diff(generative.bootstrap_distance_interval(x, x[:, ::-1] + 0.5)) for x in (films, worlds[0][0][:, None])
    )
    assert wide == pytest.approx(single, rel=0.05)


def test_feature_classifier_learns_without_side_effects():
    rng = torch.Generator().manual_seed(0)
    label = torch.randint(2, (300,), generator=rng)
    x = 0.3 * torch.randn(300, 1, 16, 16, generator=rng)
    x[label == 1, :, 4:8] += 1
    before = torch.random.get_rng_state()
    judge = generative.train_classifier(x, label, 2, steps=60)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (
        generative.extract_features(judge, x, return_classes=True) == label.numpy()
    ).mean() > 0.95 and generative.extract_features(judge, x).shape == (
        300,
        64,
    )
    with torch.inference_mode():  # as it is called when a run is tested
        generative.train_classifier(x, None, 0, steps=5)


def test_images_are_encoded_losslessly():
    x = np.linspace(-1, 1, 3 * 5 * 5, dtype=np.float32).reshape(3, 5, 5)
    back = np.asarray(Image.open(io.BytesIO(encode_png(x)))).transpose(2, 0, 1)
    assert np.abs(back - (x + 1) * 127.5).max() <= 0.51
    whole = np.asarray(Image.open(io.BytesIO(encode_sheet(np.stack([x] * 5)))))
    assert whole.shape == (11, 17, 3) and (whole[:5, 6:11] == back.transpose(1, 2, 0)).all()
    assert compute_thumbnails(np.ones((2, 3, 16, 16), np.float32)).shape == (2, 192)


def test_classes_without_a_test_image_are_not_shown():
    shown = sheets_by_class(np.ones((3, 1, 8, 8), np.float32), np.array([3, 1, 3]), ["a", "b", "c"])
    assert [picture.caption for picture in shown] == ["a", "c"]


def folder(root, classes=("a", "b")):
    rng = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(60):
            array = rng.integers(0, 80, (9, 9))
            array[2:5, 3 * k : 3 * k + 3] = 250
            Image.fromarray(array.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def test_accepted_data(tmp_path):
    request = {
        "data": str(folder(tmp_path / "two")),
        "target": None,
        "kinds": {},
        "roles": {},
        "group": None,
        "time": None,
        "allow_bad": False,
        "task": "image-generation",
    }
    data, kind, _ = read_for(request)
    task = kind.fit(data, kind.Options())
    assert kind is ImageGeneration and task.labels == ["a", "b"] and task.pictures.side == 8
    bare, *_ = read_for({**request, "data": str(tmp_path / "two" / "a")})
    assert bare.target is None and kind.fit(bare, kind.Options()).labels == []
    with pytest.raises(DataError, match=r"--task image-generation reads"):
        infer_task(bare)
    with pytest.raises(DataError, match="lacks what image-generation needs: an image column"):
        read_for({**request, "data": "iris"})
    good = (tmp_path / "two" / "a" / "1.png").read_bytes()
    (tmp_path / "two" / "a" / "1.png").write_bytes(good[:40])
    found = [f for f in read(tmp_path / "two").findings if f.unusable]
    assert [f.places[0].split(" ")[0] for f in found] == ["a/1.png"]


@pytest.mark.parametrize(
    ("options", "kind", "predicts"),
    [
        ({}, DiscreteProcess, "v"),
        ({"schedule": "scaled-linear", "predicts": "x"}, DiscreteProcess, "x"),
        ({"schedule": "edm", "weighting": "min-snr"}, EDMProcess, "v"),
        ({"schedule": "flow"}, FlowProcess, "velocity"),
    ],
)
def test_options_choose_the_noise_process(tmp_path, options, kind, predicts):
    data = read(folder(tmp_path / "two"))
    task, (card, size) = ImageGeneration.fit(data, ImageGeneration.Options(**options)), find("ddpm-8")
    assert task.options.predicts == predicts
    config = card.resolve_config(size, **task.model_dims(), dim=8, groups=4)
    objective = task.objective(card.model(config), card, Settings())
    assert type(objective.process) is kind and objective.process.predicts == predicts
    assert isinstance(objective.weighting, WEIGHTINGS[options.get("weighting", "uniform")])
    batch = task.batches(data, card).make(np.arange(4), None)
    assert objective(batch)["loss"].isfinite() and objective.outputs(batch)["loss"].shape == (4,)
    times = []
    objective.model.register_forward_pre_hook(lambda module, inputs: times.append(float(inputs[1].min())))
    task.predict_options = ImageGeneration.PredictOptions(steps=6)
    assert task.generate(objective, torch.tensor([1, 2]), range(2), task.predict_options).shape == (2, 1, 8, 8)
    described = {t.name: t for t in task.build_signature(card, config, objective.model).tensors}["time"]
    assert described.low <= min(times) < max(times) <= described.high
    for wrong, words in (({"schedule": "square"}, "square"), ({"schedule": "flow", "predicts": "eps"}, "eps")):
        with pytest.raises(SettingsError, match=words):
            ImageGeneration.fit(data, ImageGeneration.Options(**wrong))
    task.options = replace(task.options, weighting="heavy")
    with pytest.raises(SettingsError, match="weighting='heavy' is unknown"):
        task.objective(objective.model, card, Settings())


@pytest.mark.slow
def test_diffusion_network_learns_to_generate(tmp_path):
    run = fit(
        folder(tmp_path / "two"),
        task="image-generation",
        out=tmp_path / "run",
        settings={"steps": 150, "batch": 32, "lr": 3e-3, "precision": "float32", "evaluate": 75, "ema": 0.95, "model.dim": 16},
    )
    scores = run.scores
    noise, best = (b["scores"] for b in run.record["scores"]["baselines"])
    assert scores["feature_distance"] < 0.5 * noise["feature_distance"] and best["classifier_accuracy"] > 0.9
    assert scores["classifier_accuracy"] > 0.9  # what was asked for is what was drawn
    first = run.predict(["b"], count=3, steps=5)
    assert [a["class"] for a in first] == ["b"] * 3 and all(isinstance(a["image"], Media) for a in first)
    again = run.predict(["b"], count=2, steps=5)  # a picture depends on the seed and its number alone
    assert [a["image"] for a in again] == [a["image"] for a in first[:2]]
    assert run.predict(["b"], count=1, steps=5, seed=1)[0]["image"] != first[0]["image"]
    assert [a["class"] for a in run.predict(count=4, steps=2)] == ["a", "b", "a", "b"]
    with pytest.raises(DataError, match="unknown class 'c'"):
        run.predict(["c"])
    with pytest.raises(SettingsError, match="sampler='magic'"):
        run.predict(["a"], sampler="magic")
    page = (run.path / "report.html").read_text()
    assert "Memorization" in page and "By sampler steps" in page and "Samples during training" in page
    assert run.evaluate(tmp_path / "two")["scores"] == pytest.approx(scores, rel=1e-4)


def test_gan_trains_with_its_critic(tmp_path):
    folder(tmp_path / "two", classes=("a",))  # a folder in a folder, as torchvision likes it: no classes
    run = fit(
        tmp_path / "two",
        task="image-generation",
        model="dcgan-32",
        out=tmp_path / "run",
        settings={"steps": 40, "batch": 16, "precision": "float32", "evaluate": 20, "model.dim": 8},
    )
    assert run.record["model"]["parts"]["critic"]["architecture"] == "dcgan-discriminator"
    assert (run.path / "critic.safetensors").exists()
    assert {"critic.loss", "generator.loss"} <= {k for line in run.losses() for k in line}
    noise = run.record["scores"]["baselines"][0]["scores"]
    assert run.scores["held_out_loss"] < noise["held_out_loss"] and "classifier_accuracy" not in run.scores
    first, second = run.predict(count=2)
    assert first["image"] != second["image"] and run.predict(count=1)[0] == first and "class" not in first
    with pytest.raises(SettingsError, match="steps, sampler: not supported"):
        run.predict(count=1, steps=5, sampler="ddpm")


@pytest.mark.parametrize(("has_classes", "trained"), [(True, 2), (False, 1)])  # the judge, and with classes a CNN of samples
def test_the_time_of_scoring_is_that_of_the_networks_that_it_trains(tmp_path, monkeypatch, has_classes, trained):
    data = read(folder(tmp_path / "data"))
    task = ImageGeneration.fit(data, ImageGeneration.options_from({"side": 8}))
    if not has_classes:
        task.labels = []
    calls = []
    monkeypatch.setattr(generative, "measure_step_seconds", lambda *size: 0.01)
    assert task.estimate_scoring_seconds() == pytest.approx(trained * generative.TRAINING_STEPS * 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(task, "text", object())  # captions: the judge, and the matcher of captions
        assert task.estimate_scoring_seconds() == pytest.approx(2 * generative.TRAINING_STEPS * 0.01)
    plain = generative.train_classifier
    monkeypatch.setattr(generative, "train_classifier", lambda *a, **o: calls.append(1) or plain(*a, **{**o, "steps": 2}))
    task.prepare_test(data, data)
    targets = task.targets(data)
    label = targets["label"]
    outputs = {"samples": targets["real"].copy(), "label": label}
    for arrays in (outputs, *(baseline.outputs for baseline in task.baselines(data, data))):
        task.score(arrays, targets)
    assert len(calls) == trained
