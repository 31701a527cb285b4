"""The specification of a task: what it reads, which models it accepts, its metrics and its options. Class-level facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fieldguide.core.numbers import format_plain
from fieldguide.core.options import PREDICT_ALIASES, parse_options
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import Data

# Aliases of task options, including their names in run folders of schema 1 -> current names.
OPTION_ALIASES = {"vocab": "vocab_size", "image_size": "side", "max_length": "length", "max_seq_length": "length"}


@dataclass(frozen=True)
class Metric:
    """A metric: its name, the direction that is better, and a short description."""

    name: str
    better: str  # max | min, or a description of the target value: near 80 %
    words: str  # short description: "of held-out rows correct"
    percent: bool = False
    label: str = ""  # the name as it is written, if it is not the name in words: mAP, AUC

    @property
    def title(self) -> str:
        """Return the name for people."""
        return self.label or self.name.replace("_", " ")

    @property
    def heading(self) -> str:
        """Return the name for people, with a capital letter unless it is an abbreviation such as mAP."""
        return self.title if any(c.isupper() for c in self.title) else self.title.capitalize()

    def text(self, value: float | None) -> str:
        if value is None or value != value:
            return "–"
        return f"{100 * value:.1f} %" if self.percent else format_plain(value)

    def interval_text(self, low: float, high: float) -> str:
        """Return an interval as text; a dash if it is undefined."""
        return self.text(low) if low != low else f"{self.text(low)} to {self.text(high)}"


class TaskSpec:
    """What a task is, known before any data is read. Everything here belongs to the class, not to a fitted task."""

    name: ClassVar[str]
    reads: ClassVar[str]  # description of the accepted data, for error messages and documentation
    input_types: tuple[str, ...]  # accepted values of card.input_type
    output_types: tuple[str, ...]  # accepted values of card.output_type
    feature: ClassVar[tuple[str, ...]] = ()  # column kinds of the single feature column, if examples have only one
    further: ClassVar[tuple[str, ...]] = ()  # further column kinds that are read with it
    metrics: ClassVar[tuple[Metric, ...]]  # the first one ranks models
    monitor: ClassVar[str] = ""  # the metric that selects the best checkpoint, if it is not the first one
    metric: str = ""  # name of the metric that the user chose, or that suits the data; empty for the task's own choice
    recipe: ClassVar[Mapping[str, Any]] = {}  # training settings that override the general defaults
    student_recipe: ClassVar[
        Mapping[str, Any]
    ] = {}  # settings of a network that starts from its teacher's weights, over the card's
    finetune_rate: ClassVar[float] = 1.0  # factor of the learning rates of fine-tuning
    finetune_mode: ClassVar[str | None] = None  # which part of a pretrained network is trained; None: by rows and memory
    compares_networks: ClassVar[bool] = True  # whether scores of different networks compare, so that the best one can be chosen
    needs_reference: bool = False  # the objective takes a frozen copy of the initial model as `reference`
    column_spec: ClassVar[ColumnSpec] = ColumnSpec()  # how the columns of a table are assigned to roles

    @dataclass(frozen=True)
    class Options:
        """The task's own settings, set with task.NAME; None means that the value is chosen from the data."""

    @dataclass(frozen=True)
    class PredictOptions:
        """Options for prediction with a trained model (`predict --set NAME=VALUE`)."""

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
        """Return the options with `changes` over the defaults. Raises `SettingsError` for unknown keys and wrong values."""
        return cls.Options(**parse_options(cls.Options, changes, owner=cls.name, prefix="task.", aliases=OPTION_ALIASES))

    def parse_predict_options(self, changes: Mapping[str, Any]) -> Any:
        """Return prediction options with `changes` over the defaults. Raises `SettingsError` for unknown keys and values."""
        kind = self.PredictOptions  # a fitted task may have other defaults than its class
        return kind(**parse_options(kind, changes, owner=self.name, aliases=PREDICT_ALIASES))

    @classmethod
    def select_columns(cls, data: Data) -> Data:
        """Return the data with only the feature columns that this task reads; other features are ignored."""
        read = (*cls.feature, *cls.further)
        other = lambda c: bool(cls.feature) and c.role == "feature" and c.kind not in read
        out = lambda c: replace(c, role="ignored", why=f"{cls.name} reads only {' and '.join(read)}")
        return replace(data, columns={n: out(c) if other(c) else c for n, c in data.columns.items()})

    def monitored_metric(self) -> Metric:
        """Return the metric that selects the best weights and the model."""
        return next((m for m in self.metrics if m.name == (self.metric or self.monitor)), self.metrics[0])

    def main_metric(self) -> Metric:
        """Return the metric that results are summarized with."""
        return next((m for m in self.metrics if m.name == self.metric), self.metrics[0])

    def ordered_metrics(self) -> list[Metric]:
        """Return all metrics, the main one first."""
        return sorted(self.metrics, key=lambda metric: metric is not self.main_metric())
