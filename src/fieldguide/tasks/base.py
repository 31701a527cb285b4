"""Task: what a kind of problem reads, which networks it can use, what they minimise, and how answers are judged.

The loop, run folder, report and CLI call only what stands here. A task's preparation is learnt from training rows
alone and saved with the run, so that prediction takes raw inputs.
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

# Other names of task options, and those of run folders of schema 1 -> their names.
OPTION_ALIASES = {"vocab": "vocab_size", "image_size": "side", "max_length": "length", "max_seq_length": "length"}
Arrays = dict[str, np.ndarray]  # name -> array whose first axis is the example


@dataclass(frozen=True)
class Metric:
    """A score: its name, which direction is better, and how a person reads it."""

    name: str
    better: str  # max | min, or in words what it should be: near 80 %
    words: str  # "of held-out rows right"
    percent: bool = False

    def text(self, value: float | None) -> str:
        if value is None or value != value:
            return "–"
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


@dataclass(frozen=True)
class Media:
    """Part of an answer that is a file: its content, and the suffix that says what it is (".png", ".wav", ...)."""

    content: bytes
    suffix: str


@dataclass(frozen=True)
class Baseline:
    """An honest thing to beat: its outputs on the test rows, scored exactly as the network's are."""

    name: str
    what: str
    outputs: Arrays
    bound: bool = False  # not to be beaten: the best that could be hoped for


@dataclass(frozen=True)
class CheckpointAssets:
    """What lies beside the weights of a published network: how examples are prepared, and what answers are called."""

    names: list[str]  # of classes, tags or answers
    folder: Path | None  # of the tokenizer
    length: int  # tokens that the network reads; 0 for networks of pictures alone
    pictures: ImageTransform | None
    pooled: str  # how a text's vector is made of those of its tokens
    columns: tuple[str, ...] = ()  # of tables that are asked about, where the user names them

    def texts(self, most: int = 1) -> list[Column]:
        """The columns of text that examples have. Raises `SettingsError` for more than there can be."""
        if len(self.columns) > most:
            raise SettingsError(
                f"columns={','.join(self.columns)}: this network reads {most} column{'s' if most > 1 else ''} of text."
            )
        return [Column(name, "text") for name in self.columns or ("text",)]


class Task:
    """One kind of problem with one preparation. Made by `learn` from training rows, or by `load` from a run folder."""

    name: ClassVar[str]
    reads: ClassVar[str]  # in words, for error messages and docs
    input_types: ClassVar[tuple[str, ...]]  # card.takes that it can feed
    output_types: ClassVar[tuple[str, ...]]  # card.gives that it can use
    feature: ClassVar[tuple[str, ...]] = ()  # kinds of the one column that an example is, where it is one
    further: ClassVar[tuple[str, ...]] = ()  # kinds of columns that are read with it
    metrics: ClassVar[tuple[Metric, ...]]  # the first is the one to judge a network by
    monitor: ClassVar[str] = ""  # the metric by which training keeps its best weights, where another
    recipe: ClassVar[Mapping[str, Any]] = {}  # training settings laid over the general ones
    needs_reference: ClassVar[bool] = False  # its objective takes a frozen copy of the initial network as `reference`
    column_spec: ClassVar[ColumnSpec] = ColumnSpec()  # what it asks of a table's columns

    @dataclass(frozen=True)
    class Options:
        """The task's own settings, written task.NAME; None means: chosen from the data."""

    @dataclass(frozen=True)
    class PredictOptions:
        """What a user may say when asking a trained network (`predict --set NAME=VALUE`)."""

    most = 256  # examples a step, where the user names no batch
    fewest = 16  # and at least, where there are so many
    validated: int | None = None  # validation rows that are scored while training, where that takes long
    tested: int | None = None  # test rows that are asked at most, where answers take long

    def __init__(self, columns: list[Column], options: Any):
        self.columns, self.options, self.predict_options = columns, options, self.PredictOptions()
        self.notes: list[str] = []  # what was cut, clipped or guessed, for a person to read

    @property
    def column(self) -> str:
        """Name of the one column that an example is."""
        return next(c.name for c in self.columns if c.kind in self.feature and c.role == "feature")

    @property
    def target(self) -> Column:
        return next(c for c in self.columns if c.role == "target")

    # Before training

    @classmethod
    def match(cls, data: Data) -> str | None:
        """Why this data makes this task before any other, in words; None where it does not, or only if asked for."""
        return None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        """What the data has not that this task cannot do without, in words; None where it can be done."""
        return None

    @classmethod
    def options_from(cls, changes: Mapping[str, Any]) -> Any:
        """Options with changes laid over the defaults. Raises `SettingsError` for an unknown key."""
        return laid_over(cls.Options(), rename(changes, OPTION_ALIASES), cls.name, "task.")

    @classmethod
    def parse_predict_options(cls, changes: Mapping[str, Any]) -> Any:
        """Return prediction options with `changes` over the defaults. Raises `SettingsError` for unknown keys and values."""
        return laid_over(cls.PredictOptions(), canonical_predict_options(changes), cls.name, "")

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
        """The table as read whose features are the columns that this task reads; others are ignored."""
        read = (*cls.feature, *cls.further)
        other = lambda c: bool(cls.feature) and c.role == "feature" and c.kind not in read
        out = lambda c: replace(c, role="ignored", why=f"{cls.name} reads {' and '.join(read)} alone")
        return replace(data, columns={n: out(c) if other(c) else c for n, c in data.columns.items()})

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        """The table, narrowed, made into one with a row an example: series into windows, interactions into users. Sets
        `splits` where chance must not make them."""
        return data

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        """Prepares from training rows (`data` holds these alone)."""
        raise NotImplementedError

    @classmethod
    def monitored_metric(cls) -> Metric:
        """The metric by which training keeps its best weights."""
        return next((m for m in cls.metrics if m.name == cls.monitor), cls.metrics[0])

    def model_dims(self) -> dict[str, Any]:
        """Sizes that a network must have for this data, in the project's vocabulary: classes, channels, ..."""
        raise NotImplementedError

    def data_facts(self) -> dict[str, Any]:
        """Plain facts about the data that the advisor's rules compare."""
        return {}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        """`parts` are the further networks that `card.parts` names, such as a generator's critic."""
        raise NotImplementedError

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """How the trained network answers a batch when it is tested and used, following `asking`. While it trains,
        `objective.outputs` does, which may be quicker and say less."""
        return objective.outputs

    def log_eval_samples(self, objective: Objective) -> list[Exhibit]:
        """What to look at now and then while training: a few samples. Must not depend on torch's global generator."""
        return []

    # Data to tensors, tensors to answers

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Prepared examples; with `settings`, augmented as they say when a generator is handed to `make`."""
        raise NotImplementedError

    def train_batches(self, data: Data, card: Card, settings: Settings) -> Batches:
        """The training rows as they are learnt from; where that is another thing than what is asked of them, or not all."""
        return self.batches(data, card, settings)

    def predict_batches(self, data: Data, card: Card) -> Batches:
        """Raw inputs as they are put to the network; where that is another thing than what it learnt from."""
        return self.batches(data, card)

    def preprocessing_state(self) -> dict[str, Any]:
        """Of the state, what decides which tensors an example becomes."""
        return self.state()

    def teacher_inputs(self, other: Task, card: Card) -> Callable[[dict[str, Any]], Sequence[Any]]:
        """How batches that this task prepared become the inputs of a network (`card`) that learnt with another of its kind,
        as a teacher did. Raises `SettingsError` where they cannot."""
        if self.preprocessing_state() != other.preprocessing_state():
            raise SettingsError(
                f"the teacher's {self.name} prepares examples in another way. Train it on the same data, with "
                "the same --seed, columns and task.* settings."
            )

        def show(batch: dict[str, Any]) -> Sequence[Any]:
            if lacking := [name for name in card.inputs if name not in batch]:
                raise SettingsError(
                    f"the teacher reads {', '.join(lacking)}, and this network's examples have "
                    f"{', '.join(batch)}: choose networks that read the same"
                )
            return [batch[name] for name in card.inputs]

        return show

    def targets(self, data: Data) -> Arrays:
        """The known answers of rows."""
        raise NotImplementedError

    def prepare_test(self, train: Data, held: Data) -> None:
        """Learns from the training rows what scores and exhibits of the test need beside the truth."""

    def prepare_scoring(self, rows: int) -> None:
        """Told how many examples are about to be answered and scored."""

    def score(self, outputs: Arrays, truth: Arrays) -> dict[str, float]:
        """Every metric of `metrics` that these outputs allow; while training, at least the one that decides."""
        raise NotImplementedError

    def calibrate(self, outputs: Arrays, truth: Arrays) -> None:
        """Learns, from the trained network's outputs on validation rows, what `adjust` shall do."""

    def postprocess(self, outputs: Arrays) -> Arrays:
        """Outputs as they are scored and answered: what a network says, corrected for how it is wont to say it."""
        return outputs

    def intervals(self, outputs: Arrays, truth: Arrays) -> dict[str, tuple[float, float]]:
        """95 % intervals of every score over examples like these."""
        return intervals(self, outputs, truth)

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any] | list[dict[str, Any]]]:
        """One record an example, or a list of them: what a person or a program wants to know. What is to become a file (a
        picture, a sound) is a `Media`."""
        raise NotImplementedError

    def encode_texts(self, texts: Sequence[str], longest: int) -> Batches | None:
        """Texts as the network reads them, at most so many tokens each; None for a task that is not about texts."""
        return None

    def stream(self, objective: Objective, source: Any) -> Iterator[str] | None:
        """The answer to one input piece by piece, as it comes into being; None where answers come whole."""
        return None

    def read(self, sources: Sequence[Any], *, answered: bool = False) -> Data:
        """Raw inputs for prediction, or for evaluation where the answers must be there too (`answered`). To predict, one
        of several sources that cannot be read is named in `Data.unread`."""
        if not sources:
            raise DataError(f"say what to answer: {self.name} reads {self.reads}.")
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
                replace(u, before=u.before + before, place=named(one, u.place) if len(sources) > 1 else u.place)
                for u in one.skipped
            ]
            before += len(one)
            data.append(one)
        if not data:
            raise DataError("none of these can be read:\n" + "\n".join(f"  - {u.why}" for u in unread))
        if len(data) == 1:
            return replace(data[0], skipped=unread)
        files, rows = [], []
        for d in data:  # each file is called as it was asked for: two folders may hold a 1.png each
            rows.append(d.rows.with_columns(pl.col(FILE) + len(files)))
            files += [replace(f, path=named(d, f.path)) for f in d.manifest.files]
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
        self, test: Data, outputs: Arrays, truth: Arrays, objective: Objective | None = None
    ) -> dict[str, list[Exhibit]]:
        """Section title -> what to show of the results on test rows. `objective` holds the trained network, for what
        outputs do not tell: attention, samples with fewer steps."""
        return {}

    # Saved with the run, or told by a publisher

    @classmethod
    def published(cls, beside: CheckpointAssets) -> Self | None:
        """The task of a pretrained network with its head. None where weights alone cannot do it, or it has another way."""
        return None

    def state(self) -> dict[str, Any]:
        """The preparation as JSON values."""
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


def named(data: Data, place: str) -> str:
    """A place in data as it is called from where the data was asked for."""
    base = Path(data.source)
    return str((base if base.is_dir() else base.parent) / place) if base.exists() else place


def laid_over(defaults: Any, changes: Mapping[str, Any], task: str, prefix: str) -> Any:
    """A dataclass with changes laid over it, read from text. Raises `SettingsError` for an unknown key."""
    kinds, known = get_type_hints(type(defaults)), {f.name for f in fields(defaults)}
    for key in changes:
        if key not in known:
            raise SettingsError(
                f"{task} has no option {prefix}{key}.{nearest(key, known)} It has: "
                f"{', '.join(f'{prefix}{k}' for k in sorted(known)) or 'none'}."
            )
    return replace(defaults, **{k: from_text(f"{prefix}{k}", v, kinds[k]) for k, v in changes.items()})


def intervals(
    task: Task, outputs: Arrays, truth: Arrays, *, repeats: int = 300, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of every score over examples (Efron 1979; percentile method)."""
    rng, count = np.random.default_rng(seed), len(next(iter(truth.values())))
    drawn: dict[str, list[float]] = {}
    for _ in range(repeats):
        rows = rng.integers(0, count, count)
        for name, value in task.score({k: v[rows] for k, v in outputs.items()}, {k: v[rows] for k, v in truth.items()}).items():
            drawn.setdefault(name, []).append(value)
    tails = [50 * (1 - level), 50 * (1 + level)]
    undefined = (float("nan"), float("nan"))  # such as an area under the curve of one class alone
    return {
        name: undefined if np.isnan(values).all() else tuple(np.nanpercentile(values, tails).tolist())
        for name, values in drawn.items()
    }
