"""The Task interface: what a task reads, which models it accepts, the training objective, and how predictions are
scored.

The training loop, run folder, report and CLI use only this interface. A task's preprocessing is fitted on the
training rows alone and saved with the run, so that prediction takes raw inputs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

import numpy as np
import polars as pl

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError, nearest
from fieldguide.core.report_elements import Exhibit
from fieldguide.core.run_record import rename
from fieldguide.core.settings import Settings, canonical_predict_options, from_text
from fieldguide.data import read
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import FILE, Column, Data, Manifest, SkippedInput
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import ImageTransform
from fieldguide.objectives import Objective

# Aliases of task options, including their names in run folders of schema 1 -> current names.
OPTION_ALIASES = {"vocab": "vocab_size", "image_size": "side", "max_length": "length", "max_seq_length": "length"}
Arrays = dict[str, np.ndarray]  # name -> array whose first axis is the example


@dataclass(frozen=True)
class Metric:
    """A metric: its name, the direction that is better, and a short description."""

    name: str
    better: str  # max | min, or a description of the target value: near 80 %
    words: str  # short description: "of held-out rows correct"
    percent: bool = False

    def text(self, value: float | None) -> str:
        if value is None or value != value:
            return "–"
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


@dataclass(frozen=True)
class Media:
    """A prediction value that is written as a file: its content and its file suffix (".png", ".wav", ...)."""

    content: bytes
    suffix: str


@dataclass(frozen=True)
class Baseline:
    """A reference to compare with: its outputs on the test rows, scored exactly like the model's outputs."""

    name: str
    what: str
    outputs: Arrays
    bound: bool = False  # True for an upper bound: the best result that can be expected


@dataclass(frozen=True)
class CheckpointAssets:
    """The preprocessing and label names that are published with pretrained weights."""

    names: list[str]  # of classes, tags or answers
    folder: Path | None  # folder of the tokenizer
    length: int  # number of tokens the model reads; 0 for image-only models
    pictures: ImageTransform | None
    pooled: str  # how token vectors are pooled into a text vector
    columns: tuple[str, ...] = ()  # names of the text columns, if the user sets them

    def texts(self, most: int = 1) -> list[Column]:
        """Return the text columns of the examples.

        Raises `SettingsError` if more columns are named than the model reads.
        """
        if len(self.columns) > most:
            raise SettingsError(
                f"columns={','.join(self.columns)}: this model reads at most {most} text column{'s' if most > 1 else ''}."
            )
        return [Column(name, "text") for name in self.columns or ("text",)]


class Task:
    """A task with fitted preprocessing. Create one with `fit` from training rows, or with `load` from a run folder."""

    name: ClassVar[str]
    reads: ClassVar[str]  # description of the accepted data, for error messages and documentation
    input_types: ClassVar[tuple[str, ...]]  # accepted values of card.input_type
    output_types: ClassVar[tuple[str, ...]]  # accepted values of card.output_type
    feature: ClassVar[tuple[str, ...]] = ()  # column kinds of the single feature column, if examples have only one
    further: ClassVar[tuple[str, ...]] = ()  # further column kinds that are read with it
    metrics: ClassVar[tuple[Metric, ...]]  # the first one ranks models
    monitor: ClassVar[str] = ""  # the metric that selects the best checkpoint, if it is not the first one
    recipe: ClassVar[Mapping[str, Any]] = {}  # training settings that override the general defaults
    needs_reference: ClassVar[bool] = False  # the objective takes a frozen copy of the initial model as `reference`
    column_spec: ClassVar[ColumnSpec] = ColumnSpec()  # how the columns of a table are assigned to roles

    @dataclass(frozen=True)
    class Options:
        """The task's own settings, set with task.NAME; None means that the value is chosen from the data."""

    @dataclass(frozen=True)
    class PredictOptions:
        """Options for prediction with a trained model (`predict --set NAME=VALUE`)."""

    max_batch_size = 256  # maximum examples per step, if the user sets no batch size
    min_batch_size = 16  # minimum examples per step, if the data has that many
    max_validation_examples: int | None = None  # maximum validation rows scored during training; set if scoring is slow
    max_test_examples: int | None = None  # maximum test rows that are predicted; set if prediction is slow

    def __init__(self, columns: list[Column], options: Any):
        self.columns, self.options, self.predict_options = columns, options, self.PredictOptions()
        self.notes: list[str] = []  # messages for the user about truncated, clipped or inferred values

    @property
    def column(self) -> str:
        """Return the name of the single feature column."""
        return next(c.name for c in self.columns if c.kind in self.feature and c.role == "feature")

    @property
    def target(self) -> Column:
        return next(c for c in self.columns if c.role == "target")

    # Before training

    @classmethod
    def match(cls, data: Data) -> str | None:
        """Return the reason why this data implies this task, or None if it does not or if the task must be requested."""
        return None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        """Return what the data lacks for this task, or None if the task is possible."""
        return None

    @classmethod
    def options_from(cls, changes: Mapping[str, Any]) -> Any:
        """Return the options with `changes` over the defaults. Raises `SettingsError` for unknown keys."""
        return apply_changes(cls.Options(), rename(changes, OPTION_ALIASES), cls.name, "task.")

    @classmethod
    def parse_predict_options(cls, changes: Mapping[str, Any]) -> Any:
        """Return prediction options with `changes` over the defaults. Raises `SettingsError` for unknown keys and values."""
        return apply_changes(cls.PredictOptions(), canonical_predict_options(changes), cls.name, "")

    def for_request(self, options: Any) -> Self:
        """Return a copy of the task for one request, with its own prediction options and notes.

        What a task keeps between reading inputs and formatting predictions stays in the copy, so that one fitted task
        serves many threads.
        """
        request = copy.copy(self)
        request.predict_options, request.notes = options, []
        return request

    @classmethod
    def select_columns(cls, data: Data) -> Data:
        """Return the data with only the feature columns that this task reads; other features are ignored."""
        read = (*cls.feature, *cls.further)
        other = lambda c: bool(cls.feature) and c.role == "feature" and c.kind not in read
        out = lambda c: replace(c, role="ignored", why=f"{cls.name} reads only {' and '.join(read)}")
        return replace(data, columns={n: out(c) if other(c) else c for n, c in data.columns.items()})

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        """Return the selected data with one row per example, for example time series cut into windows.

        Sets `splits` if the rows must not be split at random.
        """
        return data

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        """Fit the preprocessing on `data`, which holds only training rows, and return the task."""
        raise NotImplementedError

    @classmethod
    def monitored_metric(cls) -> Metric:
        """Return the metric that selects the best checkpoint."""
        return next((m for m in cls.metrics if m.name == cls.monitor), cls.metrics[0])

    def model_dims(self) -> dict[str, Any]:
        """Return the dimensions that the data requires of a model, by their standard names: num_classes, channels, ..."""
        raise NotImplementedError

    def data_facts(self) -> dict[str, Any]:
        """Return facts about the data that the advisor's rules compare."""
        return {}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        """Return the training objective. `parts` are the further models named in `card.parts`, such as a GAN's
        discriminator.
        """
        raise NotImplementedError

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Return the function that predicts a batch for test and prediction, which uses `predict_options`.

        During training `objective.outputs` is used instead; it may be faster and return less.
        """
        return objective.outputs

    def log_eval_samples(self, objective: Objective) -> list[Exhibit]:
        """Return a few samples to log during training. Must not depend on torch's global generator."""
        return []

    # Data to tensors, tensors to predictions

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Return the preprocessed examples. With `settings`, they are augmented if `make` gets a generator."""
        raise NotImplementedError

    def train_batches(self, data: Data, card: Card, settings: Settings) -> Batches:
        """Return the training examples. Override this if they differ from the examples that are scored."""
        return self.batches(data, card, settings)

    def predict_batches(self, data: Data, card: Card) -> Batches:
        """Return the raw inputs for prediction. Override this if they differ from the training examples."""
        return self.batches(data, card)

    def preprocessing_state(self) -> dict[str, Any]:
        """Return the part of the state that determines how an example becomes tensors."""
        return self.state()

    def teacher_inputs(self, other: Task, card: Card) -> Callable[[dict[str, Any]], Sequence[Any]]:
        """Return a function that maps batches of this task to the inputs of a teacher model with card `card`.

        `other` is the teacher's task. Raises `SettingsError` if the two tasks preprocess examples differently.
        """
        if self.preprocessing_state() != other.preprocessing_state():
            raise SettingsError(
                f"the teacher's {self.name} task preprocesses examples differently. Train it on the same data, "
                "with the same --seed, columns and task.* settings."
            )

        def show(batch: dict[str, Any]) -> Sequence[Any]:
            if lacking := [name for name in card.inputs if name not in batch]:
                raise SettingsError(
                    f"the teacher reads {', '.join(lacking)}, but this model's examples have "
                    f"{', '.join(batch)}. Choose models with the same inputs."
                )
            return [batch[name] for name in card.inputs]

        return show

    def targets(self, data: Data) -> Arrays:
        """Return the known targets of the rows."""
        raise NotImplementedError

    def prepare_test(self, train: Data, held: Data) -> None:
        """Compute from the training rows what the test's scores and exhibits need in addition to the targets."""

    def prepare_scoring(self, rows: int) -> None:
        """Receive the number of examples that are about to be predicted and scored."""

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        """Return every metric of `metrics` that the outputs allow; during training, at least the monitored one."""
        raise NotImplementedError

    def calibrate(self, outputs: Arrays, targets: Arrays) -> None:
        """Fit the parameters of `postprocess` on the trained model's outputs for the validation rows."""

    def postprocess(self, outputs: Arrays) -> Arrays:
        """Return the outputs as they are scored and formatted, for example with calibrated probabilities."""
        return outputs

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return the 95 % confidence interval of every metric, by resampling examples."""
        return bootstrap_intervals(self, outputs, targets)

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any] | list[dict[str, Any]]]:
        """Return one record per example, or a list of them. A value that is written to a file (image, audio) is a
        `Media`.
        """
        raise NotImplementedError

    def encode_texts(self, texts: Sequence[str], longest: int) -> Batches | None:
        """Return the texts as model inputs of at most `longest` tokens each; None if the task does not read text."""
        return None

    def stream(self, objective: Objective, source: Any) -> Iterator[str] | None:
        """Yield the prediction for one input piece by piece as it is generated; None if predictions are not streamed."""
        return None

    def read(self, sources: Sequence[Any], *, answered: bool = False) -> Data:
        """Read raw inputs for prediction, or for evaluation with their targets (`answered`).

        For prediction, inputs that cannot be read are listed in `Data.skipped`, unless there is only one source.
        """
        if not sources:
            raise DataError(f"no input given. {self.name} reads {self.reads}.")
        data, unread, before = [], [], 0
        for source in sources:
            try:
                one = self.read_one(source, answered)
            except DataError as error:
                if answered or len(sources) == 1:
                    raise
                unread.append(SkippedInput(before, str(source), str(error)))
                continue
            unread += [
                replace(u, before=u.before + before, place=full_path(one, u.place) if len(sources) > 1 else u.place)
                for u in one.skipped
            ]
            before += len(one)
            data.append(one)
        if not data:
            raise DataError("none of the inputs can be read:\n" + "\n".join(f"  - {u.why}" for u in unread))
        if len(data) == 1:
            return replace(data[0], skipped=unread)
        files, rows = [], []
        for d in data:  # paths include the source's folder: two folders may hold a 1.png each
            rows.append(d.rows.with_columns(pl.col(FILE) + len(files)))
            files += [replace(f, path=full_path(d, f.path)) for f in d.manifest.files]
        return Data(
            ", ".join(d.source for d in data),
            pl.concat(rows, how="diagonal_relaxed"),
            data[0].columns,
            Manifest("", files),
            [f for d in data for f in d.findings],
            skipped=unread,
        )

    def read_one(self, source: Any, answered: bool) -> Data:
        data = read(source, schema=self.columns, labels_optional=not answered, lenient=not answered)
        return self.build_examples(self.select_columns(data), self.options) if answered else data

    # Reporting

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        raise NotImplementedError

    def exhibits(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[Exhibit]]:
        """Return the report's exhibits for the test rows, by section title.

        `objective` holds the trained model, for exhibits that need more than the outputs, such as attention.
        """
        return {}

    # Saved with the run, or created from published weights

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self | None:
        """Return the task of a pretrained model with its head; None if the weights alone do not define it."""
        return None

    def state(self) -> dict[str, Any]:
        """Return the fitted preprocessing as JSON values."""
        raise NotImplementedError

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "task": self.name,
            "columns": [asdict(c) for c in self.columns],
            "options": asdict(self.options),
            "state": self.state(),
        }
        (folder / "task.json").write_text(json.dumps(record, ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Task:
        from fieldguide.tasks import task

        record = json.loads((folder / "task.json").read_text())
        kind = task(record["task"])
        return kind.from_state(
            [Column(**c) for c in record["columns"]],
            kind.Options(**rename(record["options"], OPTION_ALIASES)),
            record["state"],
            folder,
        )


def full_path(data: Data, place: str) -> str:
    """Return the path of a place in the data, relative to where the user's source path starts."""
    base = Path(data.source)
    return str((base if base.is_dir() else base.parent) / place) if base.exists() else place


def apply_changes(defaults: Any, changes: Mapping[str, Any], task: str, prefix: str) -> Any:
    """Return the dataclass with `changes` parsed from text and applied. Raises `SettingsError` for an unknown key."""
    kinds, known = get_type_hints(type(defaults)), {f.name for f in fields(defaults)}
    for key in changes:
        if key not in known:
            raise SettingsError(
                f"{task} has no option {prefix}{key}.{nearest(key, known)} Options are: "
                f"{', '.join(f'{prefix}{k}' for k in sorted(known)) or 'none'}."
            )
    return replace(defaults, **{k: from_text(f"{prefix}{k}", v, kinds[k]) for k, v in changes.items()})


def bootstrap_intervals(
    task: Task, outputs: Arrays, targets: Arrays, *, repeats: int = 300, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return bootstrap intervals of every metric over examples (Efron 1979; percentile method)."""
    rng, count = np.random.default_rng(seed), len(next(iter(targets.values())))
    drawn: dict[str, list[float]] = {}
    for _ in range(repeats):
        rows = rng.integers(0, count, count)
        for name, value in task.score(
            {k: v[rows] for k, v in outputs.items()}, {k: v[rows] for k, v in targets.items()}
        ).items():
            drawn.setdefault(name, []).append(value)
    tails = [50 * (1 - level), 50 * (1 + level)]
    undefined = (float("nan"), float("nan"))  # for example the AUC of a single class
    return {
        name: undefined if np.isnan(values).all() else tuple(np.nanpercentile(values, tails).tolist())
        for name, values in drawn.items()
    }
