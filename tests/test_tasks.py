"""Tasks: scores equal scikit-learn's, preprocessing is fitted on training rows only, raw inputs are always predicted."""

from __future__ import annotations

import json
import warnings

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from sklearn import metrics

import fieldguide
from fieldguide.automl.fit import build_plan
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import read, samples
from fieldguide.data.preprocessing import Standardizer
from fieldguide.data.preprocessing.augmentation import augment_images
from fieldguide.data.splits import Splits
from fieldguide.models import registry
from fieldguide.tasks import infer_task, task
from fieldguide.tasks.base import bootstrap_intervals
from fieldguide.tasks.supervised import mix_pairs
from fieldguide.tasks.supervised_evaluator import calibration_error, roc_auc

QUICK = {"steps": 8, "precision": "float32"}


# Scores


def answered(rows: int, classes: int, seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return targets, and probabilities that are better than random."""
    rng = np.random.default_rng(seed)
    y = np.r_[np.arange(classes), rng.integers(0, classes, rows - classes)]
    logits = rng.normal(size=(rows, classes)) + 1.5 * np.eye(classes)[y]
    if ties:
        logits = np.round(logits)
    p = np.exp(logits)
    return y, p / p.sum(1, keepdims=True)


def classifier(classes: int):
    made = task("tabular-classification")([], None)
    made.labels, made.counts = [f"c{i}" for i in range(classes)], [1] * classes
    return made


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_scores_equal_scikit_learn(classes, ties):
    for seed in range(5):
        y, p = answered(200, classes, seed, ties)
        guess = p.argmax(1)
        ours = classifier(classes).score({"probabilities": p}, {"label": y})
        # As scikit-learn's one-against-rest: each class against the others, and the plain mean of those.
        auc = np.mean([metrics.roc_auc_score(y == c, p[:, c]) for c in range(classes)])
        wanted = {
            "accuracy": metrics.accuracy_score(y, guess),
            "balanced_accuracy": metrics.balanced_accuracy_score(y, guess),
            "macro_f1": metrics.f1_score(y, guess, average="macro"),
            "log_loss": metrics.log_loss(y, p),
            "auc": auc,
        }
        if classes > 2:
            assert auc == pytest.approx(metrics.roc_auc_score(y, p, multi_class="ovr"))
        for name, value in wanted.items():
            assert ours[name] == pytest.approx(value, abs=1e-9), name
        assert ours["calibration_error"] == pytest.approx(slow_calibration_error(p.max(1), guess == y), abs=1e-9)
        assert set(ours) == {m.name for m in classifier(classes).metrics}


def test_scores_over_the_classes_that_occur():
    """Classes missing in the test rows are ignored; a single class has no ROC curve."""
    y, p = answered(60, 3, 0)
    two = y < 2
    ours = classifier(3).score({"probabilities": p[two]}, {"label": y[two]})
    guess = p[two].argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn remarks on the class that does not occur
        assert ours["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(y[two], guess))
    assert ours["macro_f1"] == pytest.approx(metrics.f1_score(y[two], guess, labels=[0, 1], average="macro"))
    assert ours["auc"] == pytest.approx(np.mean([metrics.roc_auc_score(y[two] == c, p[two, c]) for c in (0, 1)]))
    assert np.isnan(roc_auc(p[y == 0], y[y == 0], np.array([0])))


def test_confident_error_has_a_finite_loss():
    ours = classifier(2).score({"probabilities": np.array([[1.0, 0.0], [0.0, 1.0]])}, {"label": np.array([1, 1])})
    assert ours["log_loss"] == pytest.approx(-np.log(1e-12) / 2)


def slow_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Compute the error bin by bin: |B|/n times |mean confidence - accuracy|."""
    total = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if b / bins <= c < (b + 1) / bins or (c == 1 and b == bins - 1)]
        if inside:
            total += len(inside) / len(right) * abs(np.mean(confidence[inside]) - np.mean(right[inside]))
    return total


def test_calibration_error_of_known_cases():
    sure, right = np.full(100, 0.8), np.arange(100) < 80
    assert calibration_error(sure, right) == pytest.approx(0, abs=1e-12)
    assert calibration_error(sure, ~right) == pytest.approx(0.6)
    assert calibration_error(np.ones(10), np.zeros(10, bool)) == pytest.approx(1)


def test_temperature_changes_confidence_but_not_predictions():
    y, p = answered(3000, 3, 1)
    sharp = p**3 / (p**3).sum(1, keepdims=True)  # three times too sure
    made = classifier(3)
    made.calibrate({"probabilities": sharp[:1500]}, {"label": y[:1500]})
    mended = made.postprocess({"probabilities": sharp[1500:]})
    before, after = (made.score(o, {"label": y[1500:]}) for o in ({"probabilities": sharp[1500:]}, mended))
    assert after["accuracy"] == before["accuracy"]
    assert after["log_loss"] < before["log_loss"] and after["calibration_error"] < 0.5 * before["calibration_error"]
    assert np.allclose(mended["probabilities"].sum(1), 1)


def test_regression_scores_equal_scikit_learn():
    rng = np.random.default_rng(0)
    y, guess = rng.normal(50, 9, 300), rng.normal(50, 9, 300)
    made = task("tabular-regression")([], None)
    made.standard = Standardizer(50.0, 9.0)
    ours = made.score({"values": (guess[:, None] - 50) / 9}, {"value": y})
    wanted = {
        "rmse": metrics.root_mean_squared_error(y, guess),
        "mae": metrics.mean_absolute_error(y, guess),
        "r2": metrics.r2_score(y, guess),
    }
    assert ours == pytest.approx(wanted)
    assert np.isnan(made.score({"values": np.zeros((3, 1))}, {"value": np.full(3, 5.0)})["r2"])


@pytest.mark.slow
def test_intervals_contain_the_score_and_shrink():
    made = classifier(3)
    widths = []
    for rows in (50, 200, 3200):
        y, p = answered(rows, 3, 2)
        found = bootstrap_intervals(made, {"probabilities": p}, {"label": y})
        score = made.score({"probabilities": p}, {"label": y})
        for name in ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "auc"):
            assert found[name][0] <= score[name] <= found[name][1], name
        widths.append(found["accuracy"][1] - found["accuracy"][0])
        assert found == bootstrap_intervals(made, {"probabilities": p}, {"label": y})
    # The normal approximation: 2 x 1.96 x sqrt(p (1 - p) / n).
    q = score["accuracy"]
    assert widths[2] == pytest.approx(3.92 * np.sqrt(q * (1 - q) / 3200), rel=0.2)
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.slow
def test_intervals_have_nominal_coverage():
    """About 95 % of many samples of 150 rows have an interval that contains the true accuracy."""
    y, p = answered(40_000, 3, 3)
    true, made, rng = np.mean(p.argmax(1) == y), classifier(3), np.random.default_rng(0)
    held = 0
    for _ in range(60):
        rows = rng.integers(0, len(y), 150)
        low, high = bootstrap_intervals(made, {"probabilities": p[rows]}, {"label": y[rows]}, repeats=80)["accuracy"]
        held += low <= true <= high
    assert held >= 50


# Preparation sees training rows alone


def prepared(source, parts: Splits, model: str):
    plan = build_plan(source, splits=parts, model=model, settings={**QUICK, "batch": 8})
    batch = plan.train_batches.make(np.arange(len(parts.train)), None)
    return plan, batch


def poison_table(rows: pl.DataFrame, at: np.ndarray) -> pl.DataFrame:
    """Put extreme numbers, categories, dates and missing values in these rows."""
    here = pl.Series(np.isin(np.arange(rows.height), at))
    return rows.with_columns(
        pl.when(here).then(pl.lit(1e9)).otherwise(pl.col("size")).alias("size"),
        pl.when(here).then(None).otherwise(pl.col("weight")).alias("weight"),
        pl.when(here).then(pl.lit("absurd")).otherwise(pl.col("colour")).alias("colour"),
        pl.when(here).then(pl.lit("1066-10-14")).otherwise(pl.col("day")).alias("day"),
    )


@pytest.fixture(scope="module")
def mixed() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    n = 120
    colour = rng.choice(["red", "green", "blue"], n)
    size = rng.normal(10, 2, n)
    return pl.DataFrame(
        {
            "size": size,
            "weight": rng.normal(3, 1, n),
            "colour": colour,
            "day": [f"2024-{m:02d}-{d:02d}" for m, d in zip(rng.integers(1, 13, n), rng.integers(1, 29, n))],
            "kind": np.where(size + (colour == "red") > 10.3, "big", "small"),
        }
    )


@pytest.mark.parametrize("model", ["mlp-s", "fnn"])
def test_table_preprocessing_is_fitted_on_training_rows(mixed, model, tmp_path):
    parts = Splits(np.arange(0, 80), np.arange(80, 100), np.arange(100, 120), "by hand")
    saved, batches = [], []
    for name, rows in (("clean", mixed), ("poisoned", poison_table(mixed, np.arange(80, 120)))):
        rows.write_csv(tmp_path / f"{name}.csv")
        plan, batch = prepared(read(tmp_path / f"{name}.csv", target="kind"), parts, model)
        plan.task.save(tmp_path / name)
        record = json.loads((tmp_path / name / "task.json").read_text())
        saved.append({**record, "columns": None})  # the schema tells of the whole file
        batches.append(batch)
    assert saved[0] == saved[1]
    assert set(batches[0]) == set(batches[1])
    for key, tensor in batches[0].items():
        assert torch.equal(tensor, batches[1][key]), key


def test_target_scaling_is_fitted_on_training_rows(tmp_path):
    table = pl.read_csv(samples.path("diabetes"), infer_schema_length=None)
    parts = Splits(np.arange(0, 300), np.arange(300, 370), np.arange(370, 442), "by hand")
    here = pl.Series(np.arange(442) >= 300)
    table.write_csv(tmp_path / "clean.csv")
    table.with_columns(
        pl.when(here).then(1e6 + pl.col("progression")).otherwise(pl.col("progression")).alias("progression")
    ).write_csv(tmp_path / "poisoned.csv")
    plans = [prepared(read(tmp_path / f"{n}.csv", target="progression"), parts, "mlp-s")[0] for n in ("clean", "poisoned")]
    assert plans[0].task.standard == plans[1].task.standard
    assert plans[0].task.standard.mean == pytest.approx(table["progression"][:300].mean())


def test_tokenizer_is_fitted_on_training_rows(tmp_path):
    clean = pl.read_csv(samples.path("docstrings")).head(300)
    parts = Splits(np.arange(0, 200), np.arange(200, 250), np.arange(250, 300), "by hand")
    absurd = [t if i < 200 else f"Ωmega zzqx {i} " * 40 for i, t in enumerate(clean["text"])]
    files, batches = [], []
    for name, texts in (("clean", clean["text"].to_list()), ("poisoned", absurd)):
        source = read(clean.with_columns(pl.Series("text", texts)), target="library", kinds={"text": "text"})
        assert len(source) == 300
        plan, batch = prepared(source, parts, "gru-s")
        plan.task.save(tmp_path / name)
        files.append({f.name: f.read_text() for f in (tmp_path / name).iterdir() if f.name != "task.json"})
        batches.append(batch)
        files[-1]["lengths"] = plan.task.options.length, plan.task.median
    assert files[0] == files[1]
    assert all(torch.equal(t, batches[1][k]) for k, t in batches[0].items())


def test_image_statistics_are_fitted_on_training_rows(tmp_path):
    home = samples.path("digits")
    source = read(home)
    rows = np.random.default_rng(0).permutation(len(source))[:160]
    parts = Splits(np.sort(rows[:100]), np.sort(rows[100:130]), np.sort(rows[130:]), "by hand")
    clean, batch = prepared(source, parts, "simplecnn")
    # The others become huge, white and coloured.
    Image.new("RGB", (300, 300), (255, 255, 254)).save(tmp_path / "white.png")
    others = np.setdiff1d(np.arange(len(source)), parts.train)
    here = pl.Series(np.isin(np.arange(len(source)), others))
    source.rows = source.rows.with_columns(
        pl.when(here).then(pl.lit(str(tmp_path / "white.png"))).otherwise(pl.col("image")).alias("image"),
        *(
            pl.when(here).then(v).otherwise(pl.col(c)).alias(c)
            for c, v in (("#width", 300), ("#height", 300), ("#channels", 3))
            if c in source.rows.columns
        ),
    )
    poisoned, again = prepared(source, parts, "simplecnn")
    assert clean.task.state() == poisoned.task.state() and clean.task.options == poisoned.task.options
    assert all(torch.equal(t, again[k]) for k, t in batch.items())
    assert clean.task.pictures.channels == 1 and clean.task.pictures.side == 8


# Mixing and augmenting


def test_mixup_uses_one_proportion_for_inputs_and_labels():
    x = torch.randn(32, 5)
    y = torch.arange(32) % 4
    batch = mix_pairs({"vector": x, "target": y}, ("vector",), 4, 0.4, torch.Generator().manual_seed(3))
    again = mix_pairs({"vector": x, "target": y}, ("vector",), 4, 0.4, torch.Generator().manual_seed(3))
    assert torch.equal(batch["vector"], again["vector"]) and torch.equal(batch["target"], again["target"])
    one_hot = torch.nn.functional.one_hot(y, 4).float()
    found = 0
    for i in range(32):  # each row is part * x_i + (1 - part) * x_j for some j, labels alike
        for j in range(32):
            if i == j:
                continue
            part = ((batch["vector"][i] - x[j]) @ (x[i] - x[j])) / ((x[i] - x[j]) @ (x[i] - x[j]))
            if torch.allclose(batch["vector"][i], part * x[i] + (1 - part) * x[j], atol=1e-5):
                assert 0 <= part <= 1
                assert torch.allclose(batch["target"][i], part * one_hot[i] + (1 - part) * one_hot[j], atol=1e-4)
                found += 1
                break
    assert found >= 28  # those paired with themselves aside
    assert torch.allclose(batch["target"].sum(1), torch.ones(32))


@pytest.mark.parametrize("how", ["none", "light", "standard"])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_keeps_shape_and_range(how, channels):
    x = torch.randint(0, 256, (20, channels, 17, 17), dtype=torch.uint8)
    out = augment_images(x, how, True, torch.Generator().manual_seed(1))
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 255
    assert torch.equal(out, augment_images(x, how, True, torch.Generator().manual_seed(1)))
    if how == "none":
        assert torch.equal(out, x)
    else:
        assert not torch.equal(out, augment_images(x, how, True, torch.Generator().manual_seed(2)))
        assert not torch.equal(out.float(), x.float())
        flat = torch.full_like(x, 77)  # what is even stays even, up to the border
        assert torch.allclose(
            augment_images(flat, how, True, torch.Generator().manual_seed(1)).float(), flat.float(), atol=1e-3
        )


def test_images_are_mirrored_only_if_allowed():
    x = torch.zeros(200, 1, 16, 16, dtype=torch.uint8)
    x[..., :4] = 255  # a bar on the left, wider than any shift
    left = lambda out: out[..., :8].float().mean((1, 2, 3)) > out[..., 8:].float().mean((1, 2, 3))
    for how in ("light", "standard"):
        assert left(augment_images(x, how, False, torch.Generator().manual_seed(0))).all()
        share = left(augment_images(x, how, True, torch.Generator().manual_seed(0))).float().mean()
        assert 0.35 < share < 0.65
    assert x[..., :4].eq(255).all() and x[..., 4:].eq(0).all()  # the stored pictures are untouched


def test_digits_are_never_mirrored(digits_run):
    assert digits_run.task.options.flip is False


def test_symmetric_images_are_mirrored(tmp_path):
    """Classes that differ by the height of a bar and its shade do not change when mirrored."""
    rng = np.random.default_rng(0)
    for c, row in enumerate((2, 7, 12)):
        (tmp_path / f"bar{c}").mkdir()
        for i in range(25):
            pixels = rng.integers(0, 90, (16, 16)).astype(np.uint8)
            pixels[row : row + 3] = rng.integers(160, 255)
            Image.fromarray(pixels).save(tmp_path / f"bar{c}" / f"{i}.png")
    source = read(tmp_path)
    kind, _ = infer_task(source)
    assert kind.fit(source, kind.options_from({})).options.flip is True
    assert kind.fit(source, kind.options_from({"flip": "false"})).options.flip is False


# Raw inputs get a defined answer


def probabilities(answers) -> np.ndarray:
    return np.array([list(a["probabilities"].values()) for a in answers])


@pytest.fixture(scope="module")
def mixed_run(mixed, tmp_path_factory):
    home = tmp_path_factory.mktemp("mixed")
    mixed.write_csv(home / "mixed.csv")
    return fieldguide.fit(
        home / "mixed.csv", target="kind", model="mlp-s", out=home / "run", settings={"steps": 40, "precision": "float32"}
    )


def test_unseen_categories_and_missing_values_are_predicted(mixed_run, mixed):
    rows = (
        mixed.drop("kind")
        .head(6)
        .with_columns(
            pl.Series("colour", ["red", "violet", None, "", "ROT", "red"]),
            pl.Series("size", [10.0, None, 1e12, -1e12, 9, 10.0]),
            pl.Series("day", ["2024-02-03", "1900-01-01", "2999-12-31", None, "not a day", "2024-02-03"]),
        )
    )
    found = probabilities(mixed_run.predict(rows))
    assert found.shape == (6, 2) and np.isfinite(found).all() and np.allclose(found.sum(1), 1)
    # Every unseen category is the same unknown one.
    same = rows[[0, 0]].with_columns(pl.Series("colour", ["violet", "octarine"]))
    a, b = probabilities(mixed_run.predict(same))
    assert np.allclose(a, b, rtol=0, atol=1e-6)  # rows of one batch may be summed in another order


def test_missing_column_is_named(mixed_run, mixed):
    with pytest.raises(DataError, match="'colour'"):
        mixed_run.predict(mixed.drop("colour"))


def test_unseen_characters_and_empty_texts_are_predicted(text_run):
    texts = ["", "   ", "日本語 😀", "\x00\x07", "a" * 5000, "Return the array."]
    found = probabilities(text_run.predict(pl.DataFrame({"text": texts})))
    assert found.shape == (6, 5) and np.isfinite(found).all() and np.allclose(found.sum(1), 1, atol=1e-5)


def test_images_of_any_size_and_mode_are_predicted(digits_run, tmp_path):
    modes = {"L": 9, "RGB": (9, 8, 7), "RGBA": (9, 8, 7, 100), "1": 1, "P": 3, "I;16": 40_000, "CMYK": (1, 2, 3, 4)}
    for i, (mode, colour) in enumerate(modes.items()):
        suffix = "tif" if mode == "CMYK" else "png"
        Image.new(mode, (3 + 40 * i, 200 - 27 * i), colour).save(tmp_path / f"{i}.{suffix}")
    found = probabilities(digits_run.predict(tmp_path))
    assert found.shape == (len(modes), 10) and np.isfinite(found).all()


@pytest.mark.parametrize("name", ["iris_run", "digits_run", "text_run"])
def test_single_row_equals_its_row_in_a_batch(name, request):
    run = request.getfixturevalue(name)
    data = read(run.record["request"]["data"])
    rows = np.random.default_rng(0).permutation(len(data))[:70]
    together = run.outputs(data.take(rows))["probabilities"]
    for i in (0, 17, 69):
        alone = run.outputs(data.take(rows[[i]]))["probabilities"][0]
        assert alone == pytest.approx(together[i], abs=2e-5)
    turned = run.outputs(data.take(rows[::-1]))["probabilities"]
    assert np.allclose(turned[::-1], together, atol=2e-5)


# Through fit


def test_class_weights_are_inverse_to_frequency(mixed):
    made = classifier(3)
    made.counts = [10, 30, 60]
    objective = made.objective(torch.nn.Identity(), registry.card("mlp-s"), Settings(class_weights=True))
    weights = [b for n, b in objective.named_buffers() if b.numel() == 3] or [torch.tensor(objective.loss.weights)]
    assert weights[0].tolist() == pytest.approx([100 / 30, 100 / 90, 100 / 180])
    assert sum(w * c for w, c in zip(weights[0].tolist(), made.counts)) == pytest.approx(100)


def test_group_and_time_splits(mixed, tmp_path):
    table = mixed.with_columns(pl.Series("patient", [f"p{i // 4}" for i in range(120)]))
    table.write_csv(tmp_path / "table.csv")
    run = fieldguide.fit(
        tmp_path / "table.csv", target="kind", model="mlp-s", group="patient", out=tmp_path / "group", settings=QUICK
    )
    with np.load(run.path / "splits.npz") as parts:
        sides = [set(table["patient"].gather(parts[p])) for p in ("train", "validation", "test")]
        assert sum(len(parts[p]) for p in parts) == 120 and not sides[0] & sides[2] and not sides[0] & sides[1]
        assert not sides[1] & sides[2]
    assert "groups by 'patient' kept whole" in run.record["data"]["split"]["how"]
    assert "patient" not in {c.name for c in run.task.inputs()}

    run = fieldguide.fit(
        tmp_path / "table.csv",
        target="kind",
        model="mlp-s",
        time_column="day",
        out=tmp_path / "time",
        settings={**QUICK, "column.patient": "category"},
    )
    with np.load(run.path / "splits.npz") as parts:
        days = [table["day"].gather(parts[p]) for p in ("train", "validation", "test")]
    assert days[0].max() < days[1].min() and days[1].max() < days[2].min()
    assert "the latest by 'day'" in run.record["data"]["split"]["how"]


def test_column_type_can_be_overridden(mixed, tmp_path):
    mixed.write_csv(tmp_path / "m.csv")
    run = fieldguide.fit(
        tmp_path / "m.csv",
        target="kind",
        model="mlp-s",
        out=tmp_path / "run",
        settings={**QUICK, "column.day": "identifier", "column.size": "category"},
    )
    assert {c.name: c.kind for c in run.task.inputs()} == {"weight": "number", "colour": "category"}
    size = next(c for c in run.task.columns if c.name == "size")
    assert (size.kind, size.role) == ("category", "ignored")  # every value occurs once, so it tells nothing
    assert any("not used" in note and "size" in note for note in run.record["data"]["notes"])


def pictures_table(root, rows: int = 60) -> pl.DataFrame:
    """Return bright and dark images with labels and a numeric column that image networks do not read."""
    paths, bright = [root / f"{i}.png" for i in range(rows)], np.arange(rows) % 2
    for i, path in enumerate(paths):
        pixels = np.random.default_rng(i).integers(128 * bright[i], 128 * bright[i] + 120, (16, 16), np.uint8)
        Image.fromarray(pixels).save(path)
    table = pl.DataFrame(
        {
            "image": [str(p) for p in paths],
            "weight": np.random.default_rng(0).normal(size=rows),
            "label": ["bright" if b else "dark" for b in bright],
        }
    )
    table.write_csv(root / "table.csv")
    return table


def test_unused_columns_are_ignored_and_not_required(tmp_path):
    pictures_table(tmp_path)
    run = fieldguide.fit(tmp_path / "table.csv", model="simplecnn", settings={"steps": 2}, out=tmp_path / "run")
    weight = run.task.columns[1]
    assert (weight.role, weight.why) == ("ignored", "image-classification reads only image")
    assert run.predict(tmp_path / "0.png")[0]["label"] in ("bright", "dark")


def test_unconditional_generation_is_noted(tmp_path):
    pictures_table(tmp_path).rename({"label": "kind"}).write_csv(tmp_path / "table.csv")
    kind = task("image-generation")
    notes = [
        kind.fit(
            kind.select_columns(read(tmp_path / "table.csv", column_spec=kind.column_spec, target=target)), kind.Options()
        ).notes
        for target in (None, "kind")
    ]
    assert "--target kind generates by class" in notes[0][0] and not notes[1]


def test_task_options(tmp_path):
    with pytest.raises(SettingsError, match=r"task.sise.*Did you mean 'side'"):
        task("image-classification").options_from({"sise": 3})
    with pytest.raises(SettingsError, match="is not an integer"):
        task("image-classification").options_from({"side": "large"})
    with pytest.raises(SettingsError, match="Did you mean 'text-classification'"):
        task("text-clasification")


def test_targets_without_a_known_class_are_rejected(iris_run):
    table = pl.read_csv(samples.path("iris")).with_columns(pl.lit("tulip").alias("species"))
    with pytest.raises(DataError, match=r"no class in column 'species'.*'tulip'.*'setosa', 'versicolor', 'virginica'"):
        iris_run.evaluate(table)


def test_size_of_a_requested_architecture_follows_data_and_time():
    from fieldguide.automl.advisor import Variant, rank_networks
    from fieldguide.tasks import task

    kind = task("image-classification")
    machine = {"device": "cpu", "memory": 24e9, "flops": {"float32": 1.5e11, "bfloat16": 4e10}}

    def advice(model: str, rows: int, minutes: float):
        return rank_networks(
            variants=[
                Variant(
                    0,
                    {"task": kind.name, "rows": rows, "side": 32, "num_classes": 10},
                    {"num_classes": 10, "image": 32, "channels": 3},
                )
            ],
            minutes=minutes,
            machine=machine,
            input_types=kind.input_types,
            output_types=kind.output_types,
            model=model,
        )

    short, long = advice("resnet", 2_000, 1).best, advice("resnet", 50_000, 10_000).best
    assert short.architecture == long.architecture == "resnet" and short.parameters < long.parameters
    assert "requested" in short.reasons[0]
    assert advice("resnet50", 2_000, 1).best.name == "resnet50"  # the name of a size is final
    with pytest.raises(SettingsError, match="cannot use"):
        advice("llama", 2_000, 1)


def test_short_time_prefers_a_good_network_partly_trained():
    """Every network is too slow for eight passes, and the encoder is still ranked first."""
    from fieldguide.automl.advisor import Variant, rank_networks
    from fieldguide.tasks import task

    kind = task("text-classification")
    machine = {"device": "cpu", "memory": 24e9, "flops": {"float32": 1.5e11, "bfloat16": 4e10}}

    def best(minutes: float):
        return rank_networks(
            variants=[
                Variant(0, {"task": kind.name, "rows": 20_000, "tokens": 220}, {"classes": 2, "vocab": 16_000, "length": 256})
            ],
            minutes=minutes,
            machine=machine,
            input_types=kind.input_types,
            output_types=kind.output_types,
        ).best

    assert best(3).name == "transformer-encoder-s" and any("allow only" in a for a in best(3).against)
    assert best(0.001).parameters > 0  # however short the time: something is advised, with its reason
    assert "minutes are too few" in best(0.001).against[0]


def advice_on_pictures(rows: int, minutes: float = 20):
    from fieldguide.automl.advisor import Variant, rank_networks

    return rank_networks(
        variants=[
            Variant(
                0,
                {"task": "image-classification", "rows": rows, "side": 64, "classes": 10},
                {"classes": 10, "image": 64, "channels": 3},
            )
        ],
        minutes=minutes,
        input_types=("image",),
        output_types=("label",),
        machine={"device": "cpu", "memory": 24e9, "flops": {"float32": 1e13, "bfloat16": 4e10}},
    )


@pytest.mark.parametrize("rows", [pytest.param(200, marks=pytest.mark.slow), 100_000])
def test_measuring_all_networks_gives_the_same_choice(monkeypatch, rows):
    from fieldguide.automl import advisor
    from fieldguide.models import registry

    some = [n for n in registry.names(input_type="image", output_type="label") if (registry.card(n).sizes[n].params or 0) < 6e6]
    monkeypatch.setattr(registry, "names", lambda: some)
    few = advice_on_pictures(rows)
    monkeypatch.setattr(advisor, "MIN_MEASURED_OPTIONS", 10**6)
    monkeypatch.setattr(advisor, "MAX_SIZES_PER_ARCHITECTURE", 10**6)
    every = advice_on_pictures(rows)
    assert len(few.options) < len(every.options) and few.best == every.best


def test_larger_networks_for_more_data(monkeypatch):
    """Within one family, if time is not the limit."""
    from fieldguide.models import registry

    monkeypatch.setattr(registry, "names", lambda: ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
    chosen = [advice_on_pictures(rows, 1e6).best.name for rows in (3000, 130_000, 500_000)]
    assert chosen == ["resnet18", "resnet50", "resnet152"]


def test_only_promising_networks_are_measured(monkeypatch):
    """A few of a hundred sizes are measured, each architecture is considered, and slow sizes exclude larger ones."""
    from fieldguide.automl import profile
    from fieldguide.automl.advisor import Variant, rank_networks

    made, count = [], profile.count_costs
    monkeypatch.setattr(profile, "count_costs", lambda name, config, **k: made.append(name) or count(name, config, **k))
    advice = rank_networks(
        variants=[
            Variant(
                0,
                {"task": "image-classification", "rows": 2000, "side": 32, "classes": 10},
                {"classes": 10, "image": 32, "channels": 3},
            )
        ],
        minutes=5,
        input_types=("image",),
        output_types=("label",),
        machine={"device": "cpu", "memory": 24e9, "flops": {"float32": 1e11, "bfloat16": 4e10}},
    )
    assert len(made) < 20 and len({o.architecture for o in advice.options}) > 2
    assert all(o.multiply_adds for o in advice.options)
    slow = {o.architecture for o in advice.rejected if o.slow}
    assert all(made.count(name) <= 3 for name in slow - {o.architecture for o in advice.options})
