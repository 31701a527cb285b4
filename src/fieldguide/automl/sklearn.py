"""scikit-learn estimators that choose, preprocess and train a network as `fit` does.

    FieldguideClassifier().fit(X, y).predict_proba(X_new)
    cross_val_score(FieldguideRegressor(minutes=1), frame, y)

Every column of an array is numeric. A data frame is read like any table: its column types are inferred, it may hold
categories, dates and missing values, and it is checked for problems.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, check_consistent_length, check_is_fitted, validate_data

from fieldguide.automl import fit as fitting
from fieldguide.automl.request import group_settings
from fieldguide.core.errors import DataError, FieldguideError
from fieldguide.core.settings import Settings
from fieldguide.data import Column, Data, Manifest, Splits, read, split
from fieldguide.data.dataset import Kind
from fieldguide.data.loader import Batches
from fieldguide.data.readers.memory import to_series
from fieldguide.models import registry
from fieldguide.training.inference_loop import collect
from fieldguide.training.state import Interrupted

SOURCE_NAME = "the arrays"  # in messages
PREDICTION_BATCH_ROWS = 1024


class Tabular(BaseEstimator):
    """Base class of the classifier and the regressor."""

    task: ClassVar[str]
    kind: ClassVar[Kind]  # type of the target column

    def __init__(
        self,
        model: str = "auto",
        *,
        minutes: float = 10.0,
        epochs: float | None = None,
        random_state: Any = 0,
        settings: dict[str, Any] | None = None,
        verbose: int = 0,
        out: Any = None,
    ):
        self.model = model
        self.minutes = minutes
        self.epochs = epochs
        self.random_state = random_state
        self.settings = settings
        self.verbose = verbose
        self.out = out

    def fit(self, X: Any, y: Any) -> Self:
        """Choose a network for the rows of X, an array or data frame, and train it to predict y.

        Part of the rows is held out to select the best weights. Raises `ValueError` if the data or a setting
        cannot be used; the message says what to do.
        """
        X, y = self._validate(X, y)
        y, seed = self._encode_target(y), self._get_seed()
        # The result must not depend on other load on the machine, so precision is only measured if `settings` request it.
        settings = {"precision": "float32", **(self.settings or {})}
        if self.epochs is not None:
            settings["epochs"] = self.epochs
        with as_value_errors(), torch.random.fork_rng():
            if self.out is None:
                self._train(self._build_data(X, y), settings, seed)
            else:
                self._fit_run(X, y, settings, seed)
        return self

    def _train(self, data: Data, settings: dict[str, Any], seed: int) -> None:
        """Train without a run folder, on all rows that are not held out for validation."""
        callback = self._build_callback()
        plan = fitting.build_plan(
            data,
            task=self.task,
            model=self.model,
            minutes=self.minutes,
            seed=seed,
            settings=settings,
            splits=split_rows(data, seed),
            callback=callback,
        )
        loop = fitting.build_trainer(plan, callback)
        callback.on_train_start(plan.settings, 0)
        try:
            state = fitting.train(plan, loop)
        except Interrupted:
            raise KeyboardInterrupt from None  # without a run folder nothing can be resumed
        finally:
            callback.close()
        self._store(plan.task, plan.objective, plan.card.name, plan.size, plan.settings)
        self.n_steps_, self.validation_score_ = state.step, state.best

    def _fit_run(self, X: Any, y: np.ndarray, settings: dict[str, Any], seed: int) -> None:
        """Train in a run folder, with test rows and a report, as `fieldguide.fit` does."""
        table, kinds = self._to_table(X), {}
        if isinstance(X, np.ndarray):
            kinds = {f"column.{name}": "number" for name in table.columns}
        target = self._target_name(table.columns)
        table = table.with_columns(pl.Series(target, self._format_target(y)))
        self.run_ = fitting.fit(
            table,
            target=target,
            task=self.task,
            model=self.model,
            minutes=self.minutes,
            out=self.out,
            seed=seed,
            callback=self._build_callback(),
            settings={f"column.{target}": self.kind, **kinds, **settings},
        )
        run, model = self.run_, self.run_.record["model"]
        self._store(run.task, run.objective, model["architecture"], model["size"], run.settings)
        self.n_steps_, self.validation_score_ = run.record["cost"]["steps"], None

    def _store(self, task: Any, objective: Any, architecture: str, size: str, settings: Settings) -> None:
        # Predictions are computed in float64, so that the prediction of a row does not depend on the other rows of its
        # batch: in float32 the order of summation may change the result.
        self.task_, self.objective_ = task, objective.cpu().double().eval()
        self.architecture_, self.size_, self.settings_ = architecture, size, settings.to_dict()

    @property
    def model_(self) -> torch.nn.Module:
        """Trained network, in float64."""
        check_is_fitted(self)
        return self.objective_.model

    def _compute_outputs(self, X: Any) -> dict[str, np.ndarray]:
        check_is_fitted(self)
        X = self._validate(X)
        with as_value_errors():
            batches = self.task_.batches(self._build_data(X), registry.cards()[self.architecture_])

            def make(rows: np.ndarray, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
                return {k: t.double() if t.is_floating_point() else t for k, t in batches.make(rows, None).items()}

            return self.task_.postprocess(
                collect(self.objective_, Batches(len(batches), make), batch=PREDICTION_BATCH_ROWS, device=torch.device("cpu"))
            )

    def _validate(self, X: Any, y: Any = None) -> Any:
        """Return X, and in `fit` also y, validated by scikit-learn; a data frame stays a data frame."""
        fitting_now, is_data_frame = y is not None, is_frame(X)
        if not hasattr(self, "task_") and not fitting_now:  # lets scikit-learn raise its own error for fit(X, None)
            return validate_data(self, X, None)
        if is_data_frame and (fitting_now or self.fitted_on_frame_):
            X = validate_data(self, X, reset=fitting_now, skip_check_array=True)
            if not len(X):
                raise ValueError(f"Found array with 0 sample(s) (shape={X.shape}) while a minimum of 1 is required.")
            if fitting_now:
                y = column_or_1d(y, warn=True)
                assert_all_finite(y, input_name="y")
                check_consistent_length(X, y)
        elif fitting_now:
            X, y = validate_data(self, X, y, dtype=np.float64, ensure_all_finite="allow-nan", ensure_min_samples=2)
        else:
            X = validate_data(self, X, reset=False, dtype=np.float64, ensure_all_finite="allow-nan")
        if fitting_now:
            self.fitted_on_frame_: bool = is_data_frame
        return (X, y) if fitting_now else X

    def _to_table(self, X: Any) -> pl.DataFrame:
        """Return X as a table without a target."""
        if not isinstance(X, np.ndarray):
            return X if isinstance(X, pl.DataFrame) else pl.DataFrame([to_series(str(c), X[c]) for c in X.columns])
        names = [str(n) for n in getattr(self, "feature_names_in_", [f"x{i}" for i in range(X.shape[1])])]
        return pl.DataFrame(X, schema=names, orient="row").fill_nan(None)

    def _build_data(self, X: Any, y: np.ndarray | None = None) -> Data:
        """Return X and y as `Data`. Column types of a data frame are inferred by the reader."""
        table = self._to_table(X)
        if y is None and self.fitted_on_frame_:
            return self.task_.read([table])
        if y is None:
            return Data(SOURCE_NAME, table, {c.name: c for c in self.task_.columns}, Manifest(SOURCE_NAME))
        target = self._target_name(table.columns)
        table = table.with_columns(pl.Series(target, y))
        if self.fitted_on_frame_:
            *_, kinds, _ = group_settings(self.settings or {})
            return read(table, target=target, kinds={**kinds, target: self.kind})
        columns = {n: Column(n, "number", "feature", "column of an array") for n in table.columns}
        columns[target] = Column(target, self.kind, "target", "y", distinct=table[target].n_unique())
        return Data(SOURCE_NAME, table, columns, Manifest(SOURCE_NAME))

    def _target_name(self, taken: list[str]) -> str:
        name = "target"
        while name in taken:
            name += "_"
        return name

    def _get_seed(self) -> int:
        state = self.random_state
        return int(state) if isinstance(state, int | np.integer) else int(check_random_state(state).randint(2**31 - 1))

    def _build_callback(self) -> Any:
        if not self.verbose:
            return fitting.NullCallback()
        from fieldguide.automl.progress import Progress

        return Progress()

    def _encode_target(self, y: np.ndarray) -> np.ndarray:
        """Return y in the form that the target column of `Data` holds."""
        raise NotImplementedError

    def _format_target(self, y: np.ndarray) -> list[Any]:
        """Return encoded targets as a run folder stores them."""
        raise NotImplementedError

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        return tags


class FieldguideClassifier(ClassifierMixin, Tabular):
    """Classifier: a neural network for tables, chosen and sized for the data.

    Parameters
    ----------
    model : name or size of an architecture (`fieldguide models --task tabular-classification`); "auto" lets the advisor choose.
    minutes : limit of the training time; 0 for no limit.
    epochs : passes over the training rows; None chooses by the number of rows.
    random_state : seed of the split, the initial weights and the order of the rows.
    settings : training settings by name, fields of the network as model.FIELD, types of columns as column.NAME.
    verbose : 1 shows the choices made and the progress of training.
    out : a new run folder with test rows and a report, as `fieldguide.fit` writes it; None stores nothing.

    Attributes
    ----------
    classes_, n_features_in_, feature_names_in_ : as in all estimators of scikit-learn.
    model_, size_, settings_ : the network, the name of its size, and the training settings used.
    n_steps_, validation_score_ : number of training steps, and the best score on the validation rows.
    run_ : the run, if `out` is given.
    """

    task = "tabular-classification"
    kind = "category"

    def _encode_target(self, y: np.ndarray) -> np.ndarray:
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds only one class, {self.classes_[0]!r}. Add rows of another class.")
        return codes.astype(str)

    def _format_target(self, y: np.ndarray) -> list[str]:
        names = [str(c) for c in self.classes_]
        if len(set(names)) < len(names):
            raise ValueError("two classes of y are equal as text, but a run folder needs distinct names. Rename one of them.")
        return [names[int(code)] for code in y]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities of the classes, in the order of `classes_`; each row sums to 1."""
        p = self._compute_outputs(X)["probabilities"].astype(np.float64)
        names = [str(c) for c in self.classes_] if self.out is not None else [str(i) for i in range(len(self.classes_))]
        p = p[:, [self.task_.labels.index(n) for n in names]]
        return p / p.sum(1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each row."""
        p = self.predict_proba(X)
        return self.classes_[self.task_.decide(p)]


class FieldguideRegressor(RegressorMixin, Tabular):
    """Regressor: a neural network for tables, chosen and sized for the data.

    Parameters
    ----------
    model : name or size of an architecture (`fieldguide models --task tabular-regression`); "auto" lets the advisor choose.
    minutes : limit of the training time; 0 for no limit.
    epochs : passes over the training rows; None chooses by the number of rows.
    random_state : seed of the split, the initial weights and the order of the rows.
    settings : training settings by name, fields of the network as model.FIELD, types of columns as column.NAME.
    verbose : 1 shows the choices made and the progress of training.
    out : a new run folder with test rows and a report, as `fieldguide.fit` writes it; None stores nothing.

    Attributes
    ----------
    n_features_in_, feature_names_in_ : as in all estimators of scikit-learn.
    model_, size_, settings_ : the network, the name of its size, and the training settings used.
    n_steps_, validation_score_ : number of training steps, and the best score on the validation rows.
    run_ : the run, if `out` is given.
    """

    task = "tabular-regression"
    kind = "number"

    def _encode_target(self, y: np.ndarray) -> np.ndarray:
        return np.asarray(y, dtype=np.float64)

    def _format_target(self, y: np.ndarray) -> list[float]:
        return y.tolist()

    def predict(self, X: Any) -> np.ndarray:
        """Return the prediction for each row, in the unit of y."""
        outputs = self._compute_outputs(X)
        return self.task_.to_target_unit(outputs)


def is_frame(X: Any) -> bool:
    return isinstance(X, pl.DataFrame) or (type(X).__module__.partition(".")[0] == "pandas" and hasattr(X, "columns"))


def split_rows(data: Data, seed: int) -> Splits:
    """Return training and validation rows, without test rows. If there are too few to hold any out, both are all rows."""
    everything, nothing = np.arange(len(data)), np.array([], dtype=np.int64)
    try:
        parts = split(data, seed=seed, test=0)
    except DataError:
        return Splits(
            everything, everything, nothing, "too few rows to hold any out: the training rows are used for validation"
        )
    target = data.target
    if target is not None and target.kind == "category":  # grouping equal rows may leave a class without training rows
        known = data.rows[target.name][parts.train].unique()
        unseen = ~data.rows[target.name][parts.validation].is_in(known.to_list()).to_numpy()
        if unseen.any():
            return Splits(
                np.sort(np.r_[parts.train, parts.validation[unseen]]),
                parts.validation if unseen.all() else parts.validation[~unseen],
                nothing,
                parts.description,
            )
    return parts


@contextmanager
def as_value_errors() -> Iterator[None]:
    """Raise errors that the user can fix as `ValueError`, as scikit-learn does."""
    try:
        yield
    except FieldguideError as error:
        raise ValueError(str(error)) from error
