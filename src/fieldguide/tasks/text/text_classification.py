"""Text classification: a text, or a pair of texts, and one label."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import DataError
from fieldguide.core.report_elements import Quote, Quotes, ReportElement
from fieldguide.core.settings import Settings
from fieldguide.data.dataset import Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.tokenizer import suggest_length
from fieldguide.objectives import Objective
from fieldguide.tasks.base import CheckpointAssets
from fieldguide.tasks.supervised import ClassificationTask, fill_options, is_discrete
from fieldguide.tasks.text.base import TextTask, path_like
from fieldguide.tasks.text.signature import PairSignature
from fieldguide.tasks.text.windows import PairTemplate, join_pairs, pair_template

SAMPLED_TEXTS = 5000  # texts sampled to choose the maximum number of tokens
MAX_COUNTED_TOKENS = 100_000  # maximum tokens of a sampled text that are counted
MAX_TOKENS_BY_DEVICE = {"cpu": 256, "mps": 512, "cuda": 512}  # maximum tokens by device, if the user sets no length
TOKENS_PER_STEP = 8192  # approximate tokens per step, if the user sets no batch size


class TextClassification(PairSignature, TextTask, ClassificationTask):
    name = "text-classification"
    reads = (
        "a table (CSV, JSON Lines) with one text column or two (text pairs) and a label column; or a "
        "folder of .txt files per class"
    )
    input_types = ("tokens",)
    baseline_models: ClassVar = ("bag-of-ngrams",)
    recipe: ClassVar = {"label_smoothing": 0.1, "weight_decay": 0.05, "grad_clip": 1.0}

    @dataclass(frozen=True)
    class Options:
        length: int | None = None  # maximum tokens of a text; longer texts are truncated and counted
        vocab_size: int | None = None  # vocabulary size if a tokenizer is fitted on the training texts
        tokenizer: str | None = None  # path of a tokenizer.json to use instead

    text: TextTokenizer
    median: int  # tokens of a training text

    @classmethod
    def match(cls, data: Data) -> str | None:
        usable = data.features("number", "category", "boolean", "date", "image")
        texts = len(data.features("text"))
        if texts in (1, 2) and not usable and data.target and is_discrete(data.target):
            return f"{'texts' if texts == 1 else 'pairs of texts'} and {data.required_target.distinct} classes"
        return None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        texts = len(data.features("text"))
        return super().missing_requirements(data) if texts in (1, 2) else f"one text column or two (the data has {texts})"

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        texts, seconds = task.texts(data), task.second_texts(data)
        task.text = (
            TextTokenizer.load(options.tokenizer)
            if options.tokenizer
            else TextTokenizer.fit([*texts, *seconds], size=options.vocab_size)
        )
        if seconds:  # with the tokens that frame them
            around, (first, second) = (
                pair_template(task.text).size,
                (task.text.encode_exact(t[:SAMPLED_TEXTS]) for t in (texts, seconds)),
            )
            sizes = [around + len(a) + len(b) for a, b in zip(first, second)]
        else:
            sizes = [len(t) for t in task.text.encode(texts[:SAMPLED_TEXTS], MAX_COUNTED_TOKENS)[0]]
        task.median = int(np.median(sizes))
        task.fit_labels(data)
        task.options = fill_options(
            options, length=suggest_length(sizes, MAX_TOKENS_BY_DEVICE[device().type]), vocab_size=task.text.size
        )
        task.note_truncated(sum(s > task.options.length for s in sizes), len(sizes), task.options.length)
        return task

    @property
    def second(self) -> str | None:
        """Return the name of the second text column if rows are pairs."""
        names = [c.name for c in self.columns if c.kind in self.feature and c.role == "feature"]
        return names[1] if len(names) == 2 else None

    def second_texts(self, data: Data) -> list[str]:
        """Return the second text of each pair; an empty list if rows are single texts."""
        return data.rows[self.second].fill_null("").to_list() if self.second else []

    def read_one(self, source: Any, answered: bool) -> Data:
        if self.second and not answered and isinstance(source, str) and not path_like(source):
            raise DataError(
                f"{source[:40]!r} is one text, but this run reads pairs of texts. Give a table with the columns "
                f"{self.column!r} and {self.second!r}."
            )
        return super().read_one(source, answered)

    def encode_rows(self, data: Data, around: bool) -> tuple[list[np.ndarray], list[np.ndarray], int]:
        """Return the token ids of each row, the segment of each token (0 or 1), and the number of truncated rows.

        With `around`, rows get special tokens: [CLS] A [SEP] as in BERT, or pairs in the tokenizer's format: [CLS]
        A [SEP] B [SEP] of BERT, <s> A </s></s> B </s> of RoBERTa. Otherwise rows are A, or A [SEP] B. If a pair is
        too long, the end of the longer text is truncated (appendix A.2 of BERT).
        """
        length, seconds = self.options.length, self.second_texts(data)
        if not around and not seconds:
            tokens, cut = self.text.encode(self.texts(data), length)
            return tokens, [], cut
        frame = PairTemplate((), (self.text.sep,), ())
        if around:
            frame = pair_template(self.text) if seconds else PairTemplate((self.text.cls,), (), (self.text.sep,))
        first = self.text.encode_exact(self.texts(data))
        second = self.text.encode_exact(seconds) if seconds else [np.zeros(0, dtype=np.int64)] * len(first)
        tokens, segments, cut = join_pairs(first, second, frame, length)
        if not around:  # an empty row becomes the unknown token
            tokens = [t if len(t) else np.array([self.text.unknown]) for t in tokens]
        return tokens, segments if seconds else [], cut

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        objective: Any = super().objective(model, card, settings, **parts)
        if self.second and "segments" in card.optional_inputs:
            objective.inputs += ("segments",)
        return objective

    @property
    def max_batch_size(self) -> int:
        """Return the maximum examples per step: fewer if texts are long."""
        return int(np.clip(2 ** int(np.log2(TOKENS_PER_STEP / max(self.median, 1))), 16, 256))

    def model_dims(self) -> dict[str, Any]:
        return {"num_classes": len(self.labels), "vocab_size": self.text.size, "length": self.options.length}

    def data_facts(self) -> dict[str, Any]:
        return {
            "vocab_size": self.text.size,
            "length": self.options.length,
            "tokens": self.median,
            "num_classes": len(self.labels),
        }

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        tokens, segments, cut = self.encode_rows(data, bool(card) and card.has_class_token)
        if not settings:  # for training texts `fit` has added the note
            self.note_truncated(cut, len(tokens), self.options.length)
        lengths = np.array([len(t) for t in tokens])
        target = torch.from_numpy(self.targets(data)["label"]) if settings else None

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
            padded, mask = self.text.batch([tokens[i] for i in index])
            batch = {"tokens": torch.from_numpy(padded), "mask": torch.from_numpy(mask)}
            if segments:
                second = np.zeros_like(padded)
                second[mask] = np.concatenate([segments[i] for i in index])
                batch["segments"] = torch.from_numpy(second)
            if target is not None:
                batch["target"] = target[torch.from_numpy(index)]
            return batch

        return Batches(len(tokens), make, lengths)

    def shown(self, data: Data) -> list[str]:
        """Return each row as one text; pairs are joined with a bar."""
        return [f"{a} ┃ {b}" for a, b in zip(self.texts(data), self.second_texts(data))] if self.second else self.texts(data)

    def show_predictions(self, test: Data, probabilities: np.ndarray, targets: np.ndarray) -> list[ReportElement]:
        texts = self.shown(test)
        right = [(row, self.describe(probabilities, targets, row)) for row in self.correct(probabilities, targets, 10)]
        quote = lambda some, bad: [Quote(texts[i], f"{words}: {test.locate_row(i)}", bad) for i, words in some]
        found = [
            Quotes(
                "Worst mistakes",
                "Test texts that are wrong with the highest confidence.",
                quote(self.mistakes(probabilities, targets, 20), True),
            ),
            Quotes("Correct predictions", "Random test texts.", quote(right, False)),
        ]
        return [quotes for quotes in found if quotes.quotes]

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self | None:
        if assets.score:  # one output and no classes
            return None
        return cls.from_state(
            [*assets.texts(2), Column("label", "category", "target")],
            cls.Options(length=assets.length),
            {"median": 0, **cls.label_state(assets.names)},
            assets.tokenizer_folder,
        )

    STATE: ClassVar = {"median": float}

    def state(self) -> dict[str, Any]:
        return {"median": self.median, **self.target_state()}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.text, task.median = TextTokenizer.load(folder), state["median"]
        task.load_target_state(state)
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.text.save(folder)


TASKS = (TextClassification,)
