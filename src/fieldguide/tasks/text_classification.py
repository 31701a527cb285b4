"""Texts: one text, one label."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from fieldguide.card import Card
from fieldguide.data.batches import Batches
from fieldguide.data.dataset import Column, Data
from fieldguide.data.prepare import Text
from fieldguide.data.prepare.text import suggest_length
from fieldguide.exhibits import Exhibit, Quote, Quotes
from fieldguide.tasks.supervised import Labelled, discrete, settled
from fieldguide.tasks.typed import Typed
from fieldguide.train.distributed import device
from fieldguide.train.settings import Settings

SAMPLE = 5000         # texts whose lengths decide how many tokens are read
LONGEST = 100_000     # tokens of them that are counted
MOST = {"cpu": 256, "mps": 512, "cuda": 512}     # tokens at most, where the user names no length
TOKENS = 8192         # a step, about, where the user names no batch


class TextClassification(Typed, Labelled):
    name = "text-classification"
    reads = "a table (CSV, JSON Lines) with a column of text and one of labels, or a folder of .txt files per class"
    takes = ("tokens",)
    recipe: ClassVar = {"smoothing": 0.1, "weight_decay": 0.05, "clip": 1.0}

    @dataclass(frozen=True)
    class Options:
        length: int | None = None        # tokens of a text that are read; the rest is cut off, and counted
        vocab: int | None = None         # tokens in the vocabulary learnt from the training texts
        tokenizer: str | None = None     # a tokenizer.json to use instead

    text: Text
    median: int              # tokens of a training text

    @classmethod
    def suits(cls, data: Data) -> str | None:
        usable = data.features("number", "category", "boolean", "date", "image")
        if len(data.features("text")) == 1 and not usable and data.target and discrete(data.target):
            return f"texts and {data.target.distinct} classes"
        return None

    @classmethod
    def lacks(cls, data: Data) -> str | None:
        return super().lacks(data) if data.features("text") else "a column of text"

    @classmethod
    def learn(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        texts = task.texts(data)
        task.text = Text.load(options.tokenizer) if options.tokenizer else Text.learn(texts, size=options.vocab)
        sizes = [len(t) for t in task.text.encode(texts[:SAMPLE], LONGEST)[0]]
        task.median = int(np.median(sizes))
        task.learn_labels(data)
        task.options = settled(options, length=suggest_length(sizes, MOST[device().type]), vocab=task.text.size)
        task.note_cut(sum(s > task.options.length for s in sizes), len(sizes))
        return task

    @property
    def most(self) -> int:
        """Examples a step: fewer where texts are long."""
        return int(np.clip(2 ** int(np.log2(TOKENS / max(self.median, 1))), 16, 256))

    def note_cut(self, cut: int, texts: int) -> None:
        if cut:
            self.notes.append(f"{100 * cut / texts:.1f} % of the texts are longer than {self.options.length} tokens and are "
                              "cut there (task.length=... changes that)")

    def needs(self) -> dict[str, Any]:
        return {"classes": len(self.labels), "vocab": self.text.size, "length": self.options.length}

    def profile(self) -> dict[str, Any]:
        return {"vocab": self.text.size, "length": self.options.length, "tokens": self.median,
                "classes": len(self.labels)}

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        tokens, cut = self.text.encode(self.texts(data), self.options.length)
        if not settings:                       # of training texts it was said when the length was chosen
            self.note_cut(cut, len(tokens))
        lengths = np.array([len(t) for t in tokens])
        target = torch.from_numpy(self.truth(data)["label"]) if settings else None

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
            padded, mask = self.text.batch([tokens[i] for i in index])
            batch = {"tokens": torch.from_numpy(padded), "mask": torch.from_numpy(mask)}
            if target is not None:
                batch["target"] = target[torch.from_numpy(index)]
            return batch

        return Batches(len(tokens), make, lengths)

    def linear_features(self, train: Data, test: Data) -> tuple[Any, Any]:
        from sklearn.feature_extraction.text import TfidfVectorizer
        # Any run of word characters is a word, so that texts of single letters have some too.
        words = TfidfVectorizer(sublinear_tf=True, max_features=50_000, token_pattern=r"\w+|[^\w\s]",
                                ngram_range=(1, 2), dtype=np.float32)
        return words.fit_transform(self.texts(train)), words.transform(self.texts(test))

    def worst(self, test: Data, probabilities: np.ndarray, truth: np.ndarray) -> list[Exhibit]:
        texts = self.texts(test)
        quotes = [Quote(texts[i], f"{words}: {test.place(i)}", bad=True)
                  for i, words in self.mistakes(probabilities, truth, 20)]
        return [Quotes("Worst mistakes", "Test texts that were got wrong with most confidence.", quotes)] if quotes else []

    def state(self) -> dict[str, Any]:
        return {"median": self.median, **self.target_state()}

    @classmethod
    def restore(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.text, task.median = Text.load(folder), state["median"]
        task.restore_target(state)
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.text.save(folder)


TASKS = (TextClassification,)
