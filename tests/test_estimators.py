"""The scikit-learn estimators: scikit-learn's own checks, data frames, pipelines and searches."""

from __future__ import annotations

import io

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from fieldguide import FieldguideClassifier, FieldguideRegressor, open_run
from fieldguide.automl import fit
from fieldguide.data import read

QUICK = {"steps": 30, "evaluate": 15, "batch": 64, "lr": 0.02}
LONGER = {**QUICK, "steps": 150, "evaluate": 30}


@pytest.fixture(scope="module")
def iris():
    return load_iris(return_X_y=True)


@pytest.fixture(scope="module")
def mixed():
    """Numbers, a category and a date with missing values; the target depends on the category and a number."""
    rng = np.random.default_rng(0)
    n = 240
    colour = rng.choice(["red", "green", "blue"], n)
    weight = rng.normal(size=n)
    y = np.where((colour == "red") | (weight > 1), "yes", "no")
    weight[::9] = np.nan
    return pd.DataFrame(
        {
            "weight": weight,
            "colour": pd.Series(colour).where(rng.random(n) > 0.1),
            "day": pd.date_range("2026-01-01", periods=n),
            "height": rng.normal(size=n),
        }
    ), y


@parametrize_with_checks([FieldguideClassifier("mlp-s", settings=QUICK), FieldguideRegressor("mlp-s", settings=QUICK)])
def test_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_default_network_learns(iris):
    fitted = FieldguideClassifier("tabm", minutes=0, settings={**QUICK, "model.members": 4, "model.dim": 32}).fit(*iris)
    assert fitted.architecture_ == "tabm" and fitted.n_steps_ == 30
    assert fitted.score(*iris) > 0.9
    assert fitted.validation_score_ > 0.8


def test_data_frame_columns_are_typed(mixed):
    X, y = mixed
    fitted = FieldguideClassifier("mlp-s", settings=LONGER).fit(X, y)
    assert {c.name: c.kind for c in fitted.task_.inputs()} == {
        "weight": "number",
        "colour": "category",
        "day": "date",
        "height": "number",
    }
    assert list(fitted.feature_names_in_) == list(X.columns)
    assert fitted.score(X, y) > 0.85
    columns = {"colour": [c if isinstance(c, str) else None for c in X["colour"]], "day": list(X["day"])}
    twin = pl.DataFrame({name: columns.get(name, X[name].to_numpy()) for name in X}, nan_to_null=True)
    same = FieldguideClassifier("mlp-s", settings=LONGER).fit(twin, y)
    np.testing.assert_array_equal(fitted.predict_proba(X), same.predict_proba(twin))
    new = X.head(3).assign(colour=["violet", None, "red"])
    assert np.isfinite(fitted.predict_proba(new)).all()
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(X.rename(columns={"height": "size"}))


def test_column_types_can_be_set(mixed):
    X, y = mixed
    fitted = FieldguideClassifier("mlp-s", settings={**QUICK, "column.day": "identifier"}).fit(X, y)
    assert "day" not in {c.name for c in fitted.task_.inputs()}


def test_array_columns_are_always_numeric():
    """Row numbers, 0/1 columns and few distinct values are not identifiers, booleans or classes in an array."""
    rng = np.random.default_rng(0)
    X = np.c_[np.arange(60), rng.integers(0, 2, 60), np.ones(60), rng.normal(size=60)]
    X[5] = np.nan
    fitted = FieldguideRegressor("mlp-s", settings=QUICK).fit(X, rng.integers(0, 3, 60))
    assert [n.column for n in fitted.task_.preparer.numbers] == ["x0", "x1", "x3"]
    assert np.isfinite(fitted.predict(X)).all()


def test_class_names_that_look_missing_are_classes():
    X = np.r_[np.zeros((20, 2)), np.ones((20, 2))] + np.random.default_rng(0).normal(size=(40, 2)) / 10
    y = np.repeat(["none", "?"], 20)
    assert FieldguideClassifier("mlp-s", settings=QUICK).fit(X, y).score(X, y) == 1


@pytest.mark.parametrize("rows", [2, 3, 10, 20])
def test_few_rows(rows):
    X = np.random.default_rng(0).normal(size=(rows, 3))
    assert FieldguideClassifier("mlp-s", settings=QUICK).fit(X, np.arange(rows) % 2).predict(X).shape == (rows,)
    assert FieldguideRegressor("mlp-s", settings=QUICK).fit(X, X[:, 0]).predict(X).shape == (rows,)


def test_equal_rows_with_different_classes():
    """Equal rows stay in one split, but every class needs a training row."""
    X, y = np.repeat(np.eye(10), 2, 0), np.arange(20)
    assert FieldguideClassifier("mlp-s", settings=QUICK).fit(X, y).predict_proba(X).shape == (20, 20)


def test_sparse_input_is_rejected(iris):
    with pytest.raises(TypeError, match="toarray"):
        FieldguideClassifier("mlp-s", settings=QUICK).fit(csr_matrix(iris[0]), iris[1])


@pytest.mark.parametrize("settings", [{"lrr": 1}, {"lr": -1}, {"model.width": 3}])
def test_bad_settings_are_value_errors(iris, settings):
    with pytest.raises(ValueError, match=next(iter(settings)).removeprefix("model.")):
        FieldguideClassifier("mlp-s", settings=settings).fit(*iris)


def test_pipeline_and_cross_validation(iris):
    made = make_pipeline(StandardScaler(), FieldguideClassifier("mlp-s", settings=LONGER))
    assert cross_val_score(made, *iris, cv=2).min() > 0.85


@pytest.mark.slow
def test_grid_search():
    X, y = load_diabetes(return_X_y=True)
    search = GridSearchCV(FieldguideRegressor("mlp-s", settings=LONGER), {"model": ["mlp-s", "mlp-m"]}, cv=2).fit(X, y)
    assert search.best_score_ > 0.3


def test_saved_estimator_predicts_the_same(iris):
    fitted = FieldguideClassifier("mlp-s", settings=QUICK).fit(*iris)
    file = io.BytesIO()
    joblib.dump(fitted, file)
    file.seek(0)
    np.testing.assert_array_equal(joblib.load(file).predict_proba(iris[0]), fitted.predict_proba(iris[0]))


def test_seeds(iris):
    made = FieldguideClassifier("mlp-s", settings=QUICK)
    first = made.fit(*iris).predict_proba(iris[0])
    np.testing.assert_array_equal(first, clone(made).fit(*iris).predict_proba(iris[0]))
    assert (first != made.set_params(random_state=1).fit(*iris).predict_proba(iris[0])).any()
    assert made.set_params(random_state=np.random.RandomState(3)).fit(*iris).n_steps_ == 30


def test_equals_the_network_of_fit(iris):
    """The network is bit-identical to that of the steps of `fit` on the same rows."""
    X, y = iris
    ours = FieldguideClassifier("mlp-s", minutes=0, settings=QUICK).fit(X, y)
    data = read(
        pl.DataFrame(X, schema=[f"x{i}" for i in range(4)]).with_columns(target=pl.Series(y)),
        target="target",
        kinds={**{f"x{i}": "number" for i in range(4)}, "target": "category"},
    )
    from fieldguide.automl.sklearn import split_rows

    plan = fit.build_plan(
        data, model="mlp-s", minutes=0, settings={**QUICK, "precision": "float32"}, splits=split_rows(data, 0)
    )
    fit.build_trainer(plan, fit.NullCallback()).train()
    for mine, theirs in zip(ours.model_.parameters(), plan.objective.model.parameters()):
        np.testing.assert_array_equal(mine.detach().numpy(), theirs.detach().double().numpy())


def test_run_folder_if_requested(iris, tmp_path):
    X, y = iris
    names = load_iris().target_names[y]
    fitted = FieldguideClassifier("mlp-s", settings=QUICK, out=tmp_path / "run").fit(X, names)
    assert (tmp_path / "run" / "report.html").exists()
    assert open_run(tmp_path / "run").scores["accuracy"] == fitted.run_.scores["accuracy"]
    assert fitted.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    assert fitted.score(X, names) > 0.85


def test_progress_if_verbose(iris, capsys):
    FieldguideClassifier("mlp-s", settings=QUICK, verbose=1).fit(*iris)
    assert "training 30 steps" in capsys.readouterr().out
