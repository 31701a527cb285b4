"""Task: what a kind of problem reads, which networks it can use, what they minimise, and how answers are judged.

The loop, run folder, report and CLI call only what stands here. A task's preparation is learnt from training rows
alone and saved with the run, so that prediction takes raw inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

import numpy as np

from fieldguide.card import Card
from fieldguide.data.batches import Batches
from fieldguide.data.dataset import Column, Data
from fieldguide.errors import SettingsError, nearest
from fieldguide.exhibits import Exhibit
from fieldguide.objectives import Objective
from fieldguide.train.settings import Settings, from_text

Arrays = dict[str, np.ndarray]      # name -> array whose first axis is the example


@dataclass(frozen=True)
class Metric:
    """A score: its name, which direction is better, and how a person reads it."""

    name: str
    better: str                     # max | min
    words: str                      # "of held-out rows right"
    percent: bool = False

    def text(self, value: float | None) -> str:
        if value is None or value != value:
            return "–"
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


@dataclass(frozen=True)
class Baseline:
    """An honest thing to beat: its outputs on the test rows, scored exactly as the network's are."""

    name: str
    what: str
    outputs: Arrays


class Task:
    """One kind of problem with one preparation. Made by `learn` from training rows, or by `load` from a run folder."""

    name: ClassVar[str]
    reads: ClassVar[str]                            # in words, for error messages and docs
    takes: ClassVar[tuple[str, ...]]                # card.takes that it can feed
    gives: ClassVar[tuple[str, ...]]                # card.gives that it can use
    metrics: ClassVar[tuple[Metric, ...]]           # the first decides which weights are best
    recipe: ClassVar[Mapping[str, Any]] = {}        # training settings laid over the general ones

    @dataclass(frozen=True)
    class Options:
        """The task's own settings, written task.NAME; None means: chosen from the data."""

    most = 256                                      # examples a step, where the user names no batch

    def __init__(self, columns: list[Column], options: Any):
        self.columns, self.options = columns, options
        self.notes: list[str] = []                  # what was cut, clipped or guessed, for a person to read

    # Before training

    @classmethod
    def suits(cls, data: Data) -> str | None:
        """Why this data makes this task, in words; None where it does not."""
        raise NotImplementedError

    @classmethod
    def options_from(cls, changes: Mapping[str, Any]) -> Any:
        """Options with changes laid over the defaults. Raises `SettingsError` for an unknown key."""
        kinds, known = get_type_hints(cls.Options), {f.name for f in fields(cls.Options)}
        for key in changes:
            if key not in known:
                raise SettingsError(f"{cls.name} has no option task.{key}.{nearest(key, known)} It has: "
                                    f"{', '.join(f'task.{k}' for k in sorted(known)) or 'none'}.")
        return replace(cls.Options(), **{k: from_text(f"task.{k}", v, kinds[k]) for k, v in changes.items()})

    @classmethod
    def learn(cls, data: Data, options: Any) -> Self:
        """Prepares from training rows (`data` holds these alone)."""
        raise NotImplementedError

    def needs(self) -> dict[str, Any]:
        """Sizes that a network must have for this data, in the project's vocabulary: classes, channels, ..."""
        raise NotImplementedError

    def profile(self) -> dict[str, Any]:
        """Plain facts about the data that the advisor's rules compare."""
        return {}

    def objective(self, model: Any, card: Card, settings: Settings) -> Objective:
        raise NotImplementedError

    # Data to tensors, tensors to answers

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Prepared examples; with `settings`, augmented as they say when a generator is handed to `make`."""
        raise NotImplementedError

    def truth(self, data: Data) -> Arrays:
        """The known answers of rows."""
        raise NotImplementedError

    def score(self, outputs: Arrays, truth: Arrays) -> dict[str, float]:
        """Every metric of `metrics`."""
        raise NotImplementedError

    def calibrate(self, outputs: Arrays, truth: Arrays) -> None:
        """Learns, from the trained network's outputs on validation rows, what `adjust` shall do."""

    def adjust(self, outputs: Arrays) -> Arrays:
        """Outputs as they are scored and answered: what a network says, corrected for how it is wont to say it."""
        return outputs

    def intervals(self, outputs: Arrays, truth: Arrays) -> dict[str, tuple[float, float]]:
        """95 % intervals of every score over examples like these."""
        return intervals(self, outputs, truth)

    def answers(self, outputs: Arrays) -> list[dict[str, Any]]:
        """One record an example: what a person or a program wants to know."""
        raise NotImplementedError

    def read(self, sources: Sequence[Any], *, answered: bool = False) -> Data:
        """Raw inputs for prediction or evaluation; `answered` where the target must be there."""
        raise NotImplementedError

    # Reporting

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        raise NotImplementedError

    def exhibits(self, test: Data, outputs: Arrays, truth: Arrays) -> dict[str, list[Exhibit]]:
        """Section title -> what to show of the results on test rows."""
        return {}

    # Saved with the run

    def state(self) -> dict[str, Any]:
        """The preparation as JSON values."""
        raise NotImplementedError

    @classmethod
    def restore(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        record = {"task": self.name, "columns": [asdict(c) for c in self.columns], "options": asdict(self.options),
                  "state": self.state()}
        (folder / "task.json").write_text(json.dumps(record, ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Task:
        from fieldguide.tasks import task
        record = json.loads((folder / "task.json").read_text())
        kind = task(record["task"])
        return kind.restore([Column(**c) for c in record["columns"]], kind.Options(**record["options"]),
                            record["state"], folder)


def intervals(task: Task, outputs: Arrays, truth: Arrays, *, repeats: int = 300, level: float = 0.95,
              seed: int = 0) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of every score over examples (Efron 1979; percentile method)."""
    rng, count = np.random.default_rng(seed), len(next(iter(truth.values())))
    drawn: dict[str, list[float]] = {}
    for _ in range(repeats):
        rows = rng.integers(0, count, count)
        for name, value in task.score({k: v[rows] for k, v in outputs.items()},
                                      {k: v[rows] for k, v in truth.items()}).items():
            drawn.setdefault(name, []).append(value)
    tails = [50 * (1 - level), 50 * (1 + level)]
    undefined = (float("nan"), float("nan"))         # such as an area under the curve of one class alone
    return {name: undefined if np.isnan(values).all() else tuple(np.nanpercentile(values, tails).tolist())
            for name, values in drawn.items()}
