"""scikit-learn estimators: the same choosing, preparing and training as `fit`, behind fit(X, y) and predict(X).

    FieldguideClassifier().fit(X, y).predict_proba(X_new)
    cross_val_score(FieldguideRegressor(minutes=1), frame, y)

An array is taken as it is: every column a number. A data frame is read like any table: its columns are typed, may
hold categories, dates and missing values, and the doctor looks at them.
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
from fieldguide.automl.request import grouped
from fieldguide.core.errors import DataError, FieldguideError
from fieldguide.core.settings import Settings
from fieldguide.data import Column, Data, Manifest, Splits, read, split
from fieldguide.data.loader import Batches
from fieldguide.models import registry
from fieldguide.training.inference_loop import collect
from fieldguide.training.trainer import Interrupted

ARRAYS = "the arrays"
BATCH = 1024  # rows that are predicted at once


class Tabular(BaseEstimator):
    """The common part of classifier and regressor."""

    task: ClassVar[str]
    kind: ClassVar[str]  # of the target column

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
        X, y = self.checked(X, y)
        y, seed = self.encoded(y), self.seed()
        # A result must not depend on how busy the machine is, so precision is not measured unless asked for.
        settings = {"precision": "float32", **(self.settings or {})}
        if self.epochs is not None:
            settings["epochs"] = self.epochs
        with user_errors(), torch.random.fork_rng():
            if self.out is None:
                self.train(self.table(X, y), settings, seed)
            else:
                self.record(X, y, settings, seed)
        return self

    def train(self, data: Data, settings: dict[str, Any], seed: int) -> None:
        """Plan and train without a run folder; all rows that are not held out for validation are used for
        training.
        """
        callback = self.callback()
        plan = fitting.build_plan(
            data,
            task=self.task,
            model=self.model,
            minutes=self.minutes,
            seed=seed,
            settings=settings,
            splits=parts_of(data, seed),
            callback=callback,
        )
        loop = fitting.build_trainer(plan, callback)
        callback.on_train_start(plan.settings, 0)
        try:
            state = fitting.train(plan, loop)
        except Interrupted:
            raise KeyboardInterrupt from None  # nothing is stored that one could go on from
        finally:
            if bar := getattr(callback, "bar", None):
                bar.stop()
        self.keep(plan.task, plan.objective, plan.card.name, plan.size, plan.settings)
        self.n_steps_, self.validation_score_ = state.step, state.best

    def record(self, X: Any, y: np.ndarray, settings: dict[str, Any], seed: int) -> None:
        """Train into a run folder, with a test part and a report, as `fieldguide.fit` does."""
        table, kinds = self.columns(X), {}
        if isinstance(X, np.ndarray):
            kinds = {f"column.{name}": "number" for name in table.columns}
        target = self.target(table.columns)
        table = table.with_columns(pl.Series(target, self.named(y)))
        self.run_ = fitting.fit(
            table,
            target=target,
            task=self.task,
            model=self.model,
            minutes=self.minutes,
            out=self.out,
            seed=seed,
            callback=self.callback(),
            settings={f"column.{target}": self.kind, **kinds, **settings},
        )
        run, model = self.run_, self.run_.record["model"]
        self.keep(run.task, run.objective, model["architecture"], model["size"], run.settings)
        self.n_steps_, self.validation_score_ = run.record["cost"]["steps"], None

    def keep(self, task: Any, objective: Any, architecture: str, size: str, settings: Settings) -> None:
        # Answers are worked out in float64, where the order in which a kernel adds does not show: a row gets the same
        # answer alone and in company.
        self.task_, self.objective_ = task, objective.cpu().double().eval()
        self.architecture_, self.size_, self.settings_ = architecture, size, settings.to_dict()

    @property
    def model_(self) -> torch.nn.Module:
        """The trained network, in float64."""
        check_is_fitted(self)
        return self.objective_.model

    def outputs(self, X: Any) -> dict[str, np.ndarray]:
        check_is_fitted(self)
        X = self.checked(X)
        with user_errors():
            batches = self.task_.batches(self.table(X), registry.cards()[self.architecture_])

            def make(rows: np.ndarray, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
                return {k: t.double() if t.is_floating_point() else t for k, t in batches.make(rows, None).items()}

            return self.task_.postprocess(
                collect(self.objective_, Batches(len(batches), make), batch=BATCH, device=torch.device("cpu"))
            )

    # From what the user hands over to a table

    def checked(self, X: Any, y: Any = None) -> Any:
        """X, and y where it is fitted, as scikit-learn checks them; a data frame stays one."""
        fitting_now, typed = y is not None, is_frame(X)
        if not hasattr(self, "task_") and not fitting_now:  # fit(X, None): scikit-learn words the complaint
            return validate_data(self, X, None)
        if typed and (fitting_now or self.framed_):
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
            self.framed_ = typed
        return (X, y) if fitting_now else X

    def columns(self, X: Any) -> pl.DataFrame:
        """X as a table without a target."""
        if not isinstance(X, np.ndarray):
            return X if isinstance(X, pl.DataFrame) else pl.DataFrame([memory_column(str(c), X[c]) for c in X.columns])
        names = [str(n) for n in getattr(self, "feature_names_in_", [f"x{i}" for i in range(X.shape[1])])]
        return pl.DataFrame(X, schema=names, orient="row").fill_nan(None)

    def table(self, X: Any, y: np.ndarray | None = None) -> Data:
        """Typed data; a frame goes through the reader, an array has nothing to be guessed."""
        table = self.columns(X)
        if y is None and self.framed_:
            return self.task_.read([table])
        if y is None:
            return Data(ARRAYS, table, {c.name: c for c in self.task_.columns}, Manifest(ARRAYS))
        target = self.target(table.columns)
        table = table.with_columns(pl.Series(target, y))
        if self.framed_:
            *_, kinds, _ = grouped(self.settings or {})
            return read(table, target=target, kinds={**kinds, target: self.kind})
        columns = {n: Column(n, "number", "feature", "an array's column") for n in table.columns}
        columns[target] = Column(target, self.kind, "target", "y", distinct=table[target].n_unique())
        return Data(ARRAYS, table, columns, Manifest(ARRAYS))

    def target(self, taken: list[str]) -> str:
        name = "target"
        while name in taken:
            name += "_"
        return name

    def seed(self) -> int:
        state = self.random_state
        return int(state) if isinstance(state, int | np.integer) else int(check_random_state(state).randint(2**31 - 1))

    def callback(self) -> Any:
        if not self.verbose:
            return fitting.NullCallback()
        from fieldguide.automl.progress import Progress

        return Progress()

    def encoded(self, y: np.ndarray) -> np.ndarray:
        """y as the target column holds it."""
        raise NotImplementedError

    def named(self, y: np.ndarray) -> list[Any]:
        """The same as a run folder shows it."""
        raise NotImplementedError

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        return tags


class FieldguideClassifier(ClassifierMixin, Tabular):
    """A neural network for the classes of a table's rows, chosen and sized for the data.

    Parameters
    ----------
    model : name or size of an architecture (`fieldguide models --task tabular-classification`); "auto" chooses.
    minutes : training ends after so long; 0 for no limit.
    epochs : passes over the rows; None chooses by their number.
    random_state : seed of split, initialisation and order.
    settings : training settings by name, fields of the network as model.FIELD, kinds of columns as column.NAME.
    verbose : 1 shows what is chosen and how training goes.
    out : a new folder for a run with test part and report, as `fieldguide.fit` makes it; None stores nothing.

    Attributes
    ----------
    classes_, n_features_in_, feature_names_in_ : as everywhere in scikit-learn.
    model_, size_, settings_ : the network, its size's name, and the settings that training followed.
    n_steps_, validation_score_ : steps taken, and the accuracy on held-out rows by which weights were chosen.
    run_ : the run folder, with `out`.
    """

    task = "tabular-classification"
    kind = "category"

    def encoded(self, y: np.ndarray) -> np.ndarray:
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds one class only, {self.classes_[0]!r}; a classifier needs rows of another class.")
        return codes.astype(str)

    def named(self, y: np.ndarray) -> list[str]:
        names = [str(c) for c in self.classes_]
        if len(set(names)) < len(names):
            raise ValueError("two classes of y look alike as text; a run folder needs distinct names.")
        return [names[int(code)] for code in y]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, in the order of `classes_`; each row sums to 1."""
        p = self.outputs(X)["probabilities"].astype(np.float64)
        names = [str(c) for c in self.classes_] if self.out is not None else [str(i) for i in range(len(self.classes_))]
        p = p[:, [self.task_.labels.index(n) for n in names]]
        return p / p.sum(1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row."""
        p = self.predict_proba(X)
        return self.classes_[p.argmax(1)]


class FieldguideRegressor(RegressorMixin, Tabular):
    """A neural network for an amount that a table's rows tell, chosen and sized for the data.

    Parameters
    ----------
    model : name or size of an architecture (`fieldguide models --task tabular-regression`); "auto" chooses.
    minutes : training ends after so long; 0 for no limit.
    epochs : passes over the rows; None chooses by their number.
    random_state : seed of split, initialisation and order.
    settings : training settings by name, fields of the network as model.FIELD, kinds of columns as column.NAME.
    verbose : 1 shows what is chosen and how training goes.
    out : a new folder for a run with test part and report, as `fieldguide.fit` makes it; None stores nothing.

    Attributes
    ----------
    n_features_in_, feature_names_in_ : as everywhere in scikit-learn.
    model_, size_, settings_ : the network, its size's name, and the settings that training followed.
    n_steps_, validation_score_ : steps taken, and the error on held-out rows by which weights were chosen.
    run_ : the run folder, with `out`.
    """

    task = "tabular-regression"
    kind = "number"

    def encoded(self, y: np.ndarray) -> np.ndarray:
        return np.asarray(y, dtype=np.float64)

    def named(self, y: np.ndarray) -> list[float]:
        return y.tolist()

    def predict(self, X: Any) -> np.ndarray:
        """The expected amount for each row, in the unit of y."""
        outputs = self.outputs(X)
        return self.task_.to_target_unit(outputs)


def is_frame(X: Any) -> bool:
    return isinstance(X, pl.DataFrame) or (type(X).__module__.partition(".")[0] == "pandas" and hasattr(X, "columns"))


def memory_column(name: str, values: Any) -> pl.Series:
    from fieldguide.data.readers.memory import to_series

    return to_series(name, values)


def parts_of(data: Data, seed: int) -> Splits:
    """Rows to train on and rows to choose weights by. Where there are too few to hold any out, both are all rows."""
    everything, nothing = np.arange(len(data)), np.array([], dtype=np.int64)
    try:
        parts = split(data, seed=seed, test=0)
    except DataError:
        return Splits(everything, everything, nothing, "too few rows to hold any out: scored on what is trained on")
    target = data.target
    if target is not None and target.kind == "category":  # equal rows of two classes move together
        known = data.rows[target.name][parts.train].unique()
        strange = ~data.rows[target.name][parts.validation].is_in(known.to_list()).to_numpy()
        if strange.any():
            return Splits(
                np.sort(np.r_[parts.train, parts.validation[strange]]),
                parts.validation if strange.all() else parts.validation[~strange],
                nothing,
                parts.description,
            )
    return parts


@contextmanager
def user_errors() -> Iterator[None]:
    """What the user can mend is a `ValueError` in scikit-learn's world."""
    try:
        yield
    except FieldguideError as error:
        raise ValueError(str(error)) from error
