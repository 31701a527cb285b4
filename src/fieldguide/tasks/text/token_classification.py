"""Token classification: one tag per word, for example named entities or parts of speech."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import DataError
from fieldguide.core.report_elements import Matrix, Quote, Quotes, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.core.words import find_tokens
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.tokenizer import suggest_length
from fieldguide.metrics.entities import count_entities, extract_entities
from fieldguide.objectives import Objective, TokenClassificationObjective
from fieldguide.tasks.base import Arrays, Baseline, CheckpointAssets, Metric, Task
from fieldguide.tasks.report_builder import ExampleInput
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.base import path_like
from fieldguide.tasks.text.signature import TokenClassificationSignature

MAX_TOKENS_BY_DEVICE = {"cpu": 256, "mps": 512, "cuda": 512}  # maximum tokens by device, if the user sets no length
TOKENS_PER_STEP = 8192  # approximate tokens per step, if the user sets no batch size
TAG_COLUMN_NAMES = ("tags", "ner_tags", "pos_tags", "ner", "pos", "labels")
WORD_COLUMN_NAMES = ("tokens", "words")
SHOWN, SHOWN_CORRECT = 20, 8  # sentences in the report: the worst ones, and correct ones
EXAMPLE_WORDS = 20  # of a sentence that is shown as an example of an input


class TokenClassification(TokenClassificationSignature, Task):
    name = "token-classification"
    reads = "CoNLL columns (a word and its tag per line), or JSON Lines with lists `tokens` and `tags`"
    input_types = ("tokens",)
    output_types = ("labels",)
    feature = ("list",)
    column_spec = ColumnSpec(
        "named", names=TAG_COLUMN_NAMES, kinds={"target": "list"}, columns=dict.fromkeys(WORD_COLUMN_NAMES, "list")
    )
    metrics = (
        Metric("f1", "max", "F1 of whole entities", label="F1"),
        Metric("precision", "max", "of predicted entities correct"),
        Metric("recall", "max", "of entities found"),
        Metric("accuracy", "max", "of words correct", percent=True),
    )
    recipe: ClassVar = {"grad_clip": 1.0, "patience": 8}

    @dataclass(frozen=True)
    class Options:
        length: int | None = None  # maximum tokens of a sentence; words beyond get no tag and are counted
        vocab_size: int | None = None  # vocabulary size if a tokenizer is fitted on the training texts
        tokenizer: str | None = None  # path of a tokenizer.json to use instead

    text: TextTokenizer
    tags: list[str]
    often: dict[str, int]  # most frequent tag of each training word
    median: int  # tokens of a training sentence

    def __init__(self, columns: list[Column], options: Any):
        super().__init__(columns, options)
        self.unseen_tags: list[str] = []  # met in targets, but not in the training data

    @classmethod
    def match(cls, data: Data) -> str | None:
        if data.target and data.required_target.kind == "list" and len(data.features("list")) == 1:
            return "words with one tag each"
        return None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if not data.features("list"):
            return "a column `tokens` with a list of words per row"
        tagged = data.target and data.required_target.kind == "list"
        return None if tagged else "a column `tags` with one tag per word (name it with --target)"

    # Preparation

    def words(self, data: Data) -> list[list[str]]:
        return [[str(word) for word in row or ()] for row in data.rows[self.column].to_list()]

    def read_tags(self, data: Data) -> list[list[str]]:
        """Return the tags of each row. Raises `DataError` if their number differs from that of the words."""
        outside = {"0": "O"} if self.has_numeric_tags(data) else {}
        rows = [[outside.get(str(tag), str(tag)) for tag in row or ()] for row in data.rows[self.target.name].to_list()]
        for number, (words, tags) in enumerate(zip(self.words(data), rows)):
            if len(words) != len(tags):
                raise DataError(
                    f"{data.locate_row(number)}: {len(words)} words in {self.column!r}, but {len(tags)} "
                    f"tags in {self.target.name!r}. Each word needs one tag."
                )
        return rows

    def has_numeric_tags(self, data: Data) -> bool:
        """Return whether tags are numbers of which 0 is outside of entities, as in data sets of the Hugging Face Hub.

        Parts of speech have no such tag: their columns are named after them.
        """
        if tags := getattr(self, "tags", None):
            return "O" in tags and all(tag == "O" or tag.isdigit() for tag in tags)
        kind = data.rows.schema[self.target.name]
        return isinstance(kind, pl.List) and kind.inner.is_integer() and "pos" not in self.target.name.lower()

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        words, tags = task.words(data), task.read_tags(data)
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for row, own in zip(words, tags):
            for word, tag in zip(row, own):
                counts[word][tag] += 1
        task.tags = sorted({tag for own in counts.values() for tag in own}, key=lambda tag: (tag != "O", tag))
        if len(task.tags) < 2:
            raise DataError(f"{data.source}: the training rows have {len(task.tags)} different tags. At least 2 are needed.")
        task.often = {word: task.tags.index(own.most_common(1)[0][0]) for word, own in counts.items()}
        task.text = (
            TextTokenizer.load(options.tokenizer)
            if options.tokenizer
            else TextTokenizer.fit([" ".join(row) for row in words], size=options.vocab_size, lower=False)
        )
        sizes = [len(ids) for ids, _ in task.encode_sentences(words, 1 << 30)[0]]
        task.median = int(np.median(sizes))
        task.options = fill_options(
            options, length=suggest_length(sizes, MAX_TOKENS_BY_DEVICE[device().type]), vocab_size=task.text.size
        )
        return task

    def encode_sentences(self, words: list[list[str]], length: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
        """Return the token ids of each sentence with [CLS] and [SEP], the token at which each word begins, and the
        number of words that were cut off.
        """
        every = sorted({word for row in words for word in row})
        ids = dict(zip(every, self.text.encode_exact([f" {word}" for word in every])))
        rows, lost = [], 0
        for row in words:
            pieces = [ids[word] if len(ids[word]) else np.array([self.text.unknown]) for word in row]
            begins = 1 + np.cumsum([0, *map(len, pieces)])
            inside = int((begins[1:] < length).sum())  # whole words before the separator
            lost += len(row) - inside
            tokens = np.concatenate([[self.text.cls], *pieces[:inside], [self.text.sep]]).astype(np.int64)
            rows.append((tokens, begins[:inside]))
        return rows, lost

    def model_dims(self) -> dict[str, Any]:
        return {"num_classes": len(self.tags), "vocab_size": self.text.size, "length": self.options.length}

    def data_facts(self) -> dict[str, Any]:
        return {
            "vocab_size": self.text.size,
            "length": self.options.length,
            "tokens": self.median,
            "num_classes": len(self.tags),
        }

    @property
    def max_batch_size(self) -> int:
        return int(np.clip(2 ** int(np.log2(TOKENS_PER_STEP / max(self.median, 1))), 16, 256))

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        rows, lost = self.encode_sentences(self.words(data), self.options.length)
        if lost:
            self.notes.append(
                f"{lost} words are beyond the first {self.options.length} tokens of their sentence. They are not "
                "read and count as untagged (change this with task.length=...)"
            )
        targets = self.targets(data)["label"] if settings else None

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            tokens, mask = self.text.batch([rows[i][0] for i in index])
            places = [rows[i][1] for i in index]
            words = np.full((len(index), max(1, *map(len, places))), -1)
            for row, own in enumerate(places):
                words[row, : len(own)] = own
            batch = {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask), "words": torch.from_numpy(words)}
            if targets is not None:
                target = np.full(tokens.shape, -1)
                sentences, numbers = np.nonzero(words >= 0)
                target[sentences, words[sentences, numbers]] = targets[index][sentences, numbers]
                batch["target"] = torch.from_numpy(target)
            return batch

        return Batches(len(rows), make, np.array([len(tokens) for tokens, _ in rows]))

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return TokenClassificationObjective(model, card.inputs, settings.label_smoothing)

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return the index of each word's tag in `all_tags`: (N, W), -1 beyond the end of a sentence.

        Tags that are not in the training data come after those that are. Raises `DataError` if no tag is known.
        """
        rows = self.read_tags(data)
        given = {tag for row in rows for tag in row}
        if given and not given & set(self.tags):
            raise DataError(
                f"{data.source}: no tag in column {self.target.name!r} is in the training data. It has "
                f"{', '.join(sorted(given)[:5])}; the model knows {', '.join(self.tags[:20])}."
            )
        if unseen := sorted(given - set(self.tags)):
            self.unseen_tags = [*self.unseen_tags, *(tag for tag in unseen if tag not in self.unseen_tags)]
            self.add_note(f"tags that are not in the training data count as wrong: {', '.join(unseen[:5])}")
        known = {tag: number for number, tag in enumerate(self.all_tags)}
        label = np.full((len(rows), max(1, *map(len, rows)) if rows else 1), -1, dtype=np.int64)
        for number, row in enumerate(rows):
            label[number, : len(row)] = [known[tag] for tag in row]
        return {"label": label}

    @property
    def all_tags(self) -> list[str]:
        """Return the tags of the training data, then those met since in targets."""
        return [*self.tags, *self.unseen_tags]

    def align(self, outputs: Arrays, targets: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Return targets and predictions in one shape. Words without a prediction get -1."""
        real = targets["label"]
        said = np.full(real.shape, -1, dtype=np.int64)
        width = min(real.shape[1], outputs["label"].shape[1])
        said[:, :width] = outputs["label"][:, :width]
        return real, np.where(real < 0, -1, said)

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        real, said = self.align(outputs, targets)
        right, claimed, there = (int(x.sum()) for x in count_entities(real, said, self.all_tags))
        outside = self.tags.index("O") if "O" in self.tags else -2
        hits = np.where(said < 0, outside, said)[real >= 0] == real[real >= 0]
        return {
            "f1": 2 * right / max(claimed + there, 1),
            "precision": right / max(claimed, 1),
            "recall": right / max(there, 1),
            "accuracy": float(hits.mean()) if len(hits) else float("nan"),
        }

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        rows, real = self.words(test), self.targets(test)["label"]
        common = Counter(self.often.values()).most_common(1)[0][0]
        common = self.tags.index("O") if "O" in self.tags else common
        said = np.full(real.shape, -1, dtype=np.int64)
        for number, row in enumerate(rows):
            said[number, : len(row)] = [self.often.get(word, common) for word in row]
        return [
            Baseline(
                "tag by word",
                f"each word's most frequent training tag; {self.tags[common]!r} for unknown words",
                {"label": said, "probability": np.where(said < 0, np.nan, 1.0)},
            )
        ]

    # Predictions

    def read_one(self, source: Any, answered: bool) -> Data:
        if answered or not isinstance(source, str) or path_like(source):
            return super().read_one(source, answered)
        words = find_tokens(source)
        return super().read_one(pl.DataFrame({self.column: [words]}, schema={self.column: pl.List(pl.String)}), answered)

    def predict_batches(self, data: Data, card: Card) -> Batches:
        self.request = self.words(data)
        return self.batches(data, card)

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        records = []
        for words, row, sure in zip(self.request, outputs["label"].astype(int), outputs["probability"]):
            width = min(len(words), len(row))
            tags, outside = row[:width], "O" if "O" in self.tags else ""
            found = [
                {
                    "text": " ".join(words[first : last + 1]),
                    "type": kind,
                    "first": first,
                    "last": last,
                    "probability": float(np.min(sure[first : last + 1])),
                }
                for first, last, kind in extract_entities(tags, self.tags)
            ]
            said = [self.tags[tag] if tag >= 0 else outside for tag in tags] + [outside] * (len(words) - width)
            records.append({"tokens": words, "tags": said, "entities": found})
        return records

    # Report

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        from fieldguide.metrics.entities import parse_tags

        real, said = self.align(outputs, targets)
        rows = [
            (
                kind,
                int(there),
                r / c if c else float("nan"),
                r / there if there else float("nan"),
                2 * r / (c + there) if c + there else float("nan"),
            )
            for kind, r, c, there in zip(parse_tags(self.all_tags)[2], *count_entities(real, said, self.all_tags))
        ]
        shown: list[ReportElement] = [
            Table(
                "By type",
                "Precision: fraction of predicted entities that are correct. Recall: fraction of entities that "
                "are found. An entity is correct if its first word, last word and type are correct.",
                ("type", "entities", "precision", "recall", "F1"),
                rows,
                heat=("precision", "recall", "F1"),
            )
        ]
        size = len(self.tags)
        both = (real >= 0) & (real < size) & (said >= 0)
        if size <= 30:
            counts = np.bincount(real[both] * size + said[both], minlength=size * size).reshape(size, size)
            shown.append(
                Matrix("Tags of words", "Rows are the true tags, columns the predicted tags.", self.tags, counts.tolist())
            )
        return {"Errors": [*shown, *self.show_sentences(test, outputs, real, said)]}

    def example_input(self, test: Data) -> ExampleInput | None:
        return ExampleInput(" ".join(self.words(test.take([0]))[0][:EXAMPLE_WORDS])) if len(test) else None

    def show_sentences(self, test: Data, outputs: Arrays, real: np.ndarray, said: np.ndarray) -> list[ReportElement]:
        """Return the sentences with the most wrong tags, next to correct ones that have entities."""
        wrong, words = ((real != said) & (real >= 0)).sum(1), self.words(test)
        worst = []
        for row in np.argsort(-wrong, kind="stable")[:SHOWN]:
            if not wrong[row]:
                break
            there, claimed = (set(extract_entities(x[row], self.all_tags)) for x in (real, said))
            missed, wrongly = describe_entities(words[row], there - claimed), describe_entities(words[row], claimed - there)
            caption = f"missed: {missed} · wrongly predicted: {wrongly} · {test.locate_row(int(row))}"
            worst.append(Quote(" ".join(words[row]), caption, bad=True))
        right = []
        for row in np.random.default_rng(0).permutation(np.flatnonzero(wrong == 0)):
            if found := set(extract_entities(real[row], self.all_tags)):
                caption = f"{describe_entities(words[row], found)} · {test.locate_row(int(row))}"
                right.append(Quote(" ".join(words[row]), caption))
            if len(right) == SHOWN_CORRECT:
                break
        shown = [
            Quotes("Worst sentences", "Test sentences with the most wrong tags.", worst),
            Quotes("Correct sentences", "Random test sentences in which every entity is found.", right),
        ]
        return [quotes for quotes in shown if quotes.quotes]

    # Saved with the run

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self:
        return cls.from_state(
            [Column("tokens", "list"), Column("tags", "list", "target")],
            cls.Options(length=assets.length),
            {"tags": assets.names, "often": {}, "median": 0},
            assets.tokenizer_folder,
        )

    STATE: ClassVar = {"tags": list[str], "often": dict[str, int], "median": float}

    def state(self) -> dict[str, Any]:
        return {"tags": self.tags, "often": self.often, "median": self.median}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.text, task.tags, task.often, task.median = (
            TextTokenizer.load(folder),
            state["tags"],
            state["often"],
            state["median"],
        )
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.text.save(folder)


def describe_entities(words: list[str], found: set[tuple[int, int, str]]) -> str:
    return "; ".join(f"{' '.join(words[first : last + 1])} ({kind})" for first, last, kind in sorted(found)) or "–"


TASKS = (TokenClassification,)
