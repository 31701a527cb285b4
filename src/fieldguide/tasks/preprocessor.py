"""The preprocessor of a task: fitted on the training rows, it turns rows into batches, and is saved with the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import polars as pl

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.dataset import FILE, CellProblems, Column, Data, FileEntry, Manifest, SkippedInput
from fieldguide.data.loader import Batches
from fieldguide.data.media.images import Scale
from fieldguide.data.preprocessing import ImageTransform
from fieldguide.data.preprocessing.image_transform import find_other_ranges
from fieldguide.data.validation.findings import describe_problems
from fieldguide.objectives.embedding import Pooling
from fieldguide.tasks.evaluator import Arrays
from fieldguide.tasks.spec import TaskSpec

# Findings about inputs of predictions that say how they were read
NOTED_CHECKS = (
    *("no-header", "column-names", "encoding", "timestamp-parts", "delimiter-line", "line-ends"),
    *("trailing-delimiter", "space-before-quote", "comment-lines", "missing-cells"),
)


@dataclass(frozen=True)
class CheckpointAssets:
    """The preprocessing and label names that are published with pretrained weights."""

    names: list[str]  # of classes, tags or answers
    folder: Path | None  # folder of the tokenizer
    length: int  # number of tokens the model reads; 0 for image-only models
    pictures: ImageTransform | None
    pooled: Pooling  # how a text becomes a vector
    columns: tuple[str, ...] = ()  # names of the text columns, if the user sets them
    audio: Mapping[str, Any] | None = None  # task options for recordings
    horizon: int = 0  # steps that the model forecasts, if it forecasts series that it was not trained on
    begin: int | None = None  # ids of the tokens around generated texts, if the model's configuration names them
    end: int | None = None
    score: str = ""  # of a network with one output for a pair of texts: "logit", or "sigmoid" for its probability

    @property
    def tokenizer_folder(self) -> Path:
        """Return the folder of the tokenizer; only text models have one."""
        assert self.folder is not None
        return self.folder

    def texts(self, most: int = 1) -> list[Column]:
        """Return the text columns of the examples.

        Raises `SettingsError` if more columns are named than the model reads.
        """
        if len(self.columns) > most:
            raise SettingsError(
                f"columns={','.join(self.columns)}: this model reads at most {most} text column{'s' if most > 1 else ''}."
            )
        return [Column(name, "text") for name in self.columns or ("text",)]


class Preprocessor(TaskSpec):
    """Reads raw inputs and turns them into batches. Create one with `fit` from training rows, or with `from_state`.

    It knows nothing about scores or reports: batches and `model_dims` are all that a model and the training loop need.
    """

    has_own_rows: ClassVar[bool] = True  # whether a row holds its inputs and targets, rather than a place in other data
    checks_splits: ClassVar[bool] = False  # whether `check_split` checks anything
    min_batch_size: int = 16  # minimum examples per step, if the data has that many
    predict_options: Any  # an instance of `PredictOptions`
    STATE: ClassVar[Mapping[str, Any]] = {}  # key of `state` -> type (see `core.structure`), in addition to base classes

    def __init__(self, columns: list[Column], options: Any):
        self.columns, self.options, self.predict_options = columns, options, self.PredictOptions()
        self.notes: list[str] = []  # messages for the user about truncated, clipped or inferred values
        self.problems: list[CellProblems] = []  # cells of the inputs that do not fit the training data

    def add_note(self, note: str) -> None:
        """Add a message for the user, once."""
        if note not in self.notes:
            self.notes.append(note)

    def note_truncated(self, cut: int, texts: int, length: int, what: str = "texts") -> None:
        """Tell the user that texts were truncated; only the first part of the data that has such texts is told."""
        rest = f" % of the {what} are longer than {length} tokens and are truncated (change this with task.length=...)"
        if cut and not any(note.endswith(rest) for note in self.notes):
            self.notes.append(f"{100 * cut / texts:.1f}{rest}")

    @property
    def max_batch_size(self) -> int:
        """Return the maximum number of examples per step, if the user sets no batch size."""
        return 256

    @property
    def column(self) -> str:
        """Return the name of the single feature column."""
        return next(c.name for c in self.columns if c.kind in self.feature and c.role == "feature")

    @property
    def target(self) -> Column:
        """Return the target column."""
        return next(c for c in self.columns if c.role == "target")

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        """Return the selected data with one row per example, for example time series cut into windows.

        Sets `splits` if the rows must not be split at random.
        """
        return data

    @classmethod
    def check_split(cls, data: Data, name: str, options: Any) -> None:
        """Raise `DataError` if the rows of a split (`name`: training, validation or test) cannot be trained on or scored.

        `data` is what `build_examples` returned, restricted to the rows of the split. Called before training.
        """

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        """Fit the preprocessing on `data`, which holds only training rows, and return the task."""
        raise NotImplementedError

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self | None:
        """Return the task of a pretrained model with its head; None if the weights alone do not define it."""
        return None

    @property
    def class_names(self) -> Sequence[str]:
        """Return the names of the classes that a checkpoint may know too; empty if its head is never reused."""
        return ()

    def model_dims(self) -> dict[str, Any]:
        """Return the dimensions that the data requires of a model, by their standard names: num_classes, channels, ..."""
        raise NotImplementedError

    def part_names(self, card: Card) -> Mapping[str, str]:
        """Return the further networks that the objective takes, by name in `objective`, such as the critic of a generator."""
        return card.parts

    def data_facts(self) -> dict[str, Any]:
        """Return facts about the data that the advisor's rules compare."""
        return {}

    def smaller_inputs(self) -> list[tuple[int, float]]:
        """Return smaller input sizes that a network may get if time is short, and how much smaller they are.

        None by default, and if the user has set the size. For images, the size is the pixels per side.
        """
        return []

    def with_input_size(self, size: int) -> Self:
        """Return a copy of the task whose networks get inputs of one of the `smaller_inputs`."""
        raise NotImplementedError

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Return the preprocessed examples. With `settings`, they are augmented if `make` gets a generator."""
        raise NotImplementedError

    def train_batches(self, data: Data, card: Card, settings: Settings) -> Batches:
        """Return the training examples. Override this if they differ from the examples that are scored."""
        return self.batches(data, card, settings)

    def loss_batches(self, data: Data, card: Card, settings: Settings) -> Batches:
        """Return validation examples for which the objective has a loss."""
        return self.train_batches(data, card, settings)

    def predict_batches(self, data: Data, card: Card) -> Batches:
        """Return the raw inputs for prediction. Override this if they differ from the training examples."""
        return self.batches(data, card)

    def encode_texts(self, texts: Sequence[str], longest: int) -> Batches | None:
        """Return the texts as model inputs of at most `longest` tokens each; None if the task does not read text."""
        return None

    def preprocessing_state(self) -> dict[str, Any]:
        """Return the part of the state that determines how an example becomes tensors."""
        return self.state()

    def teacher_inputs(self, other: Any, card: Card) -> Callable[[dict[str, Any]], Sequence[Any]]:
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

    @classmethod
    def student_options(cls, teacher: Any, card: Card) -> dict[str, Any] | None:
        """Return the options of a task whose network starts from the weights of a teacher, and has its architecture.

        `teacher` is the teacher's task. None, as by default, means that teacher and student are independent networks. Raises
        `SettingsError` if the network with card `card` cannot be a teacher.
        """
        return None

    def distill(self, model: Any, teacher: Any) -> Any:
        """Return the objective of a network that starts from the weights of its teacher (see `student_options`)."""
        raise NotImplementedError

    def targets(self, data: Data) -> Arrays:
        """Return the known targets of the rows."""
        raise NotImplementedError

    def read(self, sources: Sequence[Any], *, answered: bool = False) -> Data:
        """Read raw inputs for prediction, or for evaluation with their targets (`answered`).

        For prediction, inputs that cannot be read are listed in `Data.skipped`, unless there is only one source.
        """
        if not sources:
            raise DataError(f"no input given. {self.name} reads {self.reads}.")
        data: list[Data] = []
        unread: list[SkippedInput] = []
        before = 0
        for source in sources:
            try:
                one = self.check_ranges(self.read_one(source, answered))
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
        self.note_problems(data, len(sources) > 1)
        if len(data) == 1:
            return replace(data[0], skipped=unread)
        rows: list[pl.DataFrame] = []
        files: list[FileEntry] = []
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
            inputs=join_inputs([d.inputs for d in data]),
        )

    @property
    def image_scale(self) -> Scale | None:
        """Return the scale of images with more than 8 bits that was learned in training, or None."""
        return None

    def check_ranges(self, data: Data) -> Data:
        """Return the data with the images that the learned scale does not fit in `problems`."""
        column = next((c.name for c in self.columns if c.kind == "image" and c.role == "feature"), None)
        if column is None:
            return data
        problems, notes = find_other_ranges(data, column, self.image_scale)
        for note in notes:
            self.add_note(note)
        return replace(data, problems=[*data.problems, *problems])

    def note_problems(self, data: Sequence[Data], several: bool) -> None:
        """Keep the cells that do not fit the training data, and add notes about them and about how the inputs were read."""
        before = 0
        for d in data:
            for p in d.problems:
                examples = tuple((full_path(d, place) if several else place, value) for place, value in p.examples)
                self.problems.append(replace(p, rows=tuple(i + before for i in p.rows), examples=examples))
            before += len(d)
            for finding in d.findings:
                if finding.check in NOTED_CHECKS:
                    self.add_note(str(finding))
        for line in describe_problems(self.problems):
            self.add_note(line)

    def list_requests(self, data: Data) -> pl.DataFrame | None:
        """Return the raw inputs of predictions for scored examples; None if they are the rows of the examples."""
        return None

    def read_one(self, source: Any, answered: bool) -> Data:
        data = read(source, schema=self.columns, labels_optional=not answered, lenient=not answered)
        return self.build_examples(self.select_columns(data), self.options) if answered else data

    def state(self) -> dict[str, Any]:
        """Return the fitted preprocessing as JSON values, whose types are in `STATE`."""
        raise NotImplementedError

    @classmethod
    def state_types(cls) -> dict[str, Any]:
        """Return the types of the values of `state` by key, from `STATE` of this class and those above it."""
        return {key: kind for parent in reversed(cls.__mro__) for key, kind in vars(parent).get("STATE", {}).items()}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the fitted preprocessing to a new folder, which `update_run` then moves into the run."""
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "task": self.name,
            "columns": [asdict(c) for c in self.columns],
            "options": asdict(self.options),
            "state": self.state(),
            **({"metric": self.metric} if self.metric else {}),
        }
        (folder / "task.json").write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")


def join_inputs(tables: Sequence[pl.DataFrame | None]) -> pl.DataFrame | None:
    """Return several tables as one; None if an input was no table."""
    present = [table for table in tables if table is not None]
    return pl.concat(present, how="diagonal_relaxed") if len(present) == len(tables) else None


def full_path(data: Data, place: str) -> str:
    """Return the path of a place in the data, relative to where the user's source path starts."""
    base = Path(data.source)
    return str((base if base.is_dir() else base.parent) / place) if base.exists() else place
