"""What tasks share that learn from plain texts by leaving out some of their tokens: full rows, scores, and gaps as a person
writes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.distributed import device
from fieldguide.core.errors import DataError
from fieldguide.core.report_elements import Bars, Exhibit
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import Column, Data
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.tasks.base import Arrays, Baseline, Metric
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.base import Typed
from fieldguide.tasks.text.text_generation import MOST, PART, TOKENS, TextGeneration

BLANK = re.compile(r"<extra_id_\d+>|<mask>|\[MASK\]|_{3,}")  # how a person writes what is missing


class Packed(Typed):
    """Rows are full: texts one after another, a separator between them, as RoBERTa's (its table 2, "full sentences"). While
    training they begin anywhere, so that no two passes are alike. Options have `length`, `vocab` and `tokenizer`."""

    reads = "text files, or a table (CSV, JSON Lines) with a column of text"
    column_spec = ColumnSpec("none", columns={"text": "text"})
    metrics = (
        Metric("loss", "min", "nats a hidden token"),
        Metric("accuracy", "max", "of the hidden tokens guessed", percent=True),
        Metric("perplexity", "min", "tokens to choose among, in effect"),
    )
    recipe: ClassVar = {"grad_clip": 1.0, "patience": 8}
    fewest = 8

    text: TextTokenizer
    counts: np.ndarray  # how often each token stands in the training texts

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        return None if len(data.features("text")) == 1 else "one column of text (name its kind with --set column.NAME=text)"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        return TextGeneration.build_examples(data, options)

    @classmethod
    def prepared(cls, data: Data, options: Any, special: tuple[str, ...]) -> Self:
        """A task whose tokens are learnt from training texts or given, with tokens counted; row length by their number."""
        task = cls(list(data.columns.values()), options)
        texts = task.texts(data)
        task.text = (
            TextTokenizer.load(options.tokenizer)
            if options.tokenizer
            else TextTokenizer.fit_exact(texts, size=options.vocab_size, special=special)
        )
        tokens = np.concatenate([np.zeros(0, dtype=np.int64), *task.text.encode_exact(texts)])
        if not len(tokens):
            raise DataError(f"{data.source}: the training texts are empty.")
        task.counts = np.bincount(tokens, minlength=task.text.size)
        longest = options.length or min(MOST[device().type], max(8, len(tokens) // 32))
        task.options = fill_options(options, length=longest, vocab_size=task.text.size)
        return task

    # Rows as tokens

    @property
    def between(self) -> list[int]:
        """What stands between texts."""
        return [self.text.sep]

    def stream_of(self, data: Data) -> np.ndarray:
        """All texts as one row of tokens, int64, with a separator behind each."""
        begins = data.rows[PART].to_numpy() == 0 if PART in data.rows.columns else np.ones(len(data), dtype=bool)
        end = np.array(self.between, dtype=np.int64)
        pieces = [
            piece
            for ids, begin in zip(self.text.encode_exact(self.texts(data)), begins)
            for piece in ((end, ids) if begin else (ids,))
        ]
        return np.concatenate([*pieces[1:], end] if begins[0] else [*pieces, end])

    def rows(self, data: Data, width: int) -> tuple[Tensor, Callable[[Tensor, torch.Generator], Tensor]]:
        """All texts in full rows, N width, the last filled up with padding; and what draws rows for training: of the same
        numbers, each beginning anywhere."""
        tokens = self.stream_of(data)
        count = -(-len(tokens) // width)
        flat = torch.from_numpy(np.pad(tokens, (0, count * width - len(tokens)), constant_values=self.text.pad))
        room, offsets = len(tokens) - width, torch.arange(width)  # the last place a full row begins

        def drawn(index: Tensor, generator: torch.Generator) -> Tensor:
            first = index * width
            if room > 0:
                first = (first + torch.randint(width, first.shape, generator=generator)).clamp(max=room)
            return flat[first[:, None] + offsets]

        return flat.view(count, width), drawn

    def model_dims(self) -> dict[str, Any]:
        return {"vocab_size": self.text.size, "length": self.options.length}

    def data_facts(self) -> dict[str, Any]:
        length = self.options.length
        return {
            "rows": max(1, int(self.counts.sum()) // length),
            "tokens": length,
            "length": length,
            "vocab_size": self.text.size,
        }

    @property
    def most(self) -> int:
        return int(np.clip(2 ** int(np.log2(TOKENS / self.options.length)), 1, 256))

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Tokens that are hidden in each row, -1 elsewhere."""
        raise NotImplementedError

    def score(self, outputs: Arrays, truth: Arrays) -> dict[str, float]:
        count = max(int(outputs["count"].sum()), 1)
        loss = float(outputs["nats"].astype(np.float64).sum() / count)
        return {"loss": loss, "accuracy": float(outputs["right"].sum() / count), "perplexity": float(np.exp(min(loss, 700)))}

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        target = self.targets(test)["target"]
        asked, share = target >= 0, (self.counts + 1) / (self.counts.sum() + len(self.counts))
        nats, best = -np.log(share), int(self.counts.argmax())
        return [
            Baseline(
                "token frequency",
                f"each token as often as in training; always guesses {self.said([best])!r}",
                {
                    "nats": np.where(asked, nats[np.maximum(target, 0)], 0).sum(1),
                    "right": (target == best).sum(1),
                    "count": asked.sum(1),
                },
            )
        ]

    def said(self, ids: list[int]) -> str:
        return self.text.decode(ids)

    def pieces(self, text: str) -> list[list[int]]:
        """The tokens of what stands before, between and behind the gaps of a text. The blank before a gap is its own, as the
        blank before a word is part of the word."""
        parts = BLANK.split(text)
        return [ids.tolist() for ids in self.text.encode_exact([*(p.rstrip(" ") for p in parts[:-1]), parts[-1]])]

    def gapped(self, data: Data) -> list[str]:
        """Texts that are to be filled. Raises `DataError` for one without a gap."""
        texts = self.texts(data)
        for place, text in enumerate(texts):
            if not BLANK.search(text):
                raise DataError(f"{data.locate_row(place)}: {text[:40]!r} has no missing word; write <mask> where one is.")
        return texts

    def by_row(self, outputs: Arrays) -> dict[str, list[Exhibit]]:
        per_row = outputs["nats"] / np.maximum(outputs["count"], 1)
        return {
            "Scores by row": [
                Bars(
                    "How the test rows differ",
                    "Nats a hidden token of rows of the test part, by tenths.",
                    {f"{10 * q} %": float(v) for q, v in enumerate(np.quantile(per_row, np.linspace(0, 1, 11)))},
                    unit="nats",
                )
            ]
        }

    # Saved with the run

    def state(self) -> dict[str, Any]:
        return {"counts": self.counts.tolist()}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.text, task.counts = TextTokenizer.load(folder), np.array(state["counts"])
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.text.save(folder)
