"""Base class of tasks that train on plain texts with some tokens removed: packed rows, scores, and parsing of gaps."""

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
from fieldguide.core.report_elements import Bars, ReportElement
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import Column, Data
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.tasks.base import Arrays, Baseline, Metric
from fieldguide.tasks.report_builder import ExampleInput
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.base import TextTask
from fieldguide.tasks.text.text_generation import MAX_TOKENS_BY_DEVICE, PART_COLUMN, TOKENS_PER_STEP, TextGeneration

EXAMPLE_WORDS = 12  # of a text that is shown as an example of an input
BLANK = re.compile(r"<extra_id_\d+>|<mask>|\[MASK\]|_{3,}")  # the ways to write a gap in an input


class PackedTextTask(TextTask):
    """A task with packed rows: texts are concatenated with separators and cut into full rows, as in RoBERTa (table 2,
    "full sentences").

    During training rows begin at random offsets, so that every epoch differs. Options must have `length`,
    `vocab_size` and `tokenizer`.
    """

    reads = "text files, or a table (CSV, JSON Lines) with a text column"
    column_spec = ColumnSpec("none", columns={"text": "text"})
    metrics = (
        Metric("loss", "min", "nats per hidden token"),
        Metric("accuracy", "max", "of the hidden tokens predicted correctly", percent=True),
        Metric("perplexity", "min", "effective number of tokens to choose from"),
    )
    recipe: ClassVar = {"grad_clip": 1.0, "patience": 8}
    min_batch_size = 8

    text: TextTokenizer
    counts: np.ndarray  # frequency of each token in the training texts

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        return None if len(data.features("text")) == 1 else "one text column (set its type with --set column.NAME=text)"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        return TextGeneration.build_examples(data, options)

    @classmethod
    def create(cls, data: Data, options: Any, special: tuple[str, ...]) -> Self:
        """Create a task whose tokenizer is loaded or fitted on the training texts.

        Counts the tokens and derives the row length from their number.
        """
        task = cls(list(data.columns.values()), options)
        texts = task.texts(data)
        task.text = (
            TextTokenizer.load(options.tokenizer)
            if options.tokenizer
            else TextTokenizer.fit_exact(texts, size=options.vocab_size, special=special)
        )
        tokens = np.concatenate([np.zeros(0, dtype=np.int64), *task.text.encode_exact(texts)])
        if not len(tokens):
            raise DataError(f"{data.source}: the training texts are empty. Add text.")
        task.counts = np.bincount(tokens, minlength=task.text.size)
        longest = options.length or min(MAX_TOKENS_BY_DEVICE[device().type], max(8, len(tokens) // 32))
        task.options = fill_options(options, length=longest, vocab_size=task.text.size)
        return task

    # Token rows

    @property
    def separator(self) -> list[int]:
        """Return the token ids between texts."""
        return [self.text.sep]

    def concatenate_texts(self, data: Data) -> np.ndarray:
        """Return all texts as one int64 array of token ids, with a separator after each."""
        begins = data.rows[PART_COLUMN].to_numpy() == 0 if PART_COLUMN in data.rows.columns else np.ones(len(data), dtype=bool)
        end = np.array(self.separator, dtype=np.int64)
        pieces = [
            piece
            for ids, begin in zip(self.text.encode_exact(self.texts(data)), begins)
            for piece in ((end, ids) if begin else (ids,))
        ]
        return np.concatenate([*pieces[1:], end] if begins[0] else [*pieces, end])

    def rows(self, data: Data, width: int) -> tuple[Tensor, Callable[[Tensor, torch.Generator], Tensor]]:
        """Return all texts as packed rows (N, width), the last one padded, and a function that samples training rows.

        The function takes row numbers and shifts each row by a random offset.
        """
        tokens = self.concatenate_texts(data)
        count = -(-len(tokens) // width)
        flat = torch.from_numpy(np.pad(tokens, (0, count * width - len(tokens)), constant_values=self.text.pad))
        room, offsets = len(tokens) - width, torch.arange(width)  # the last position at which a full row can begin

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
    def max_batch_size(self) -> int:
        return int(np.clip(2 ** int(np.log2(TOKENS_PER_STEP / self.options.length)), 1, 256))

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return the hidden tokens of each row, -1 elsewhere."""
        raise NotImplementedError

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        count = max(int(outputs["count"].sum()), 1)
        loss = float(outputs["nats"].astype(np.float64).sum() / count)
        return {"loss": loss, "accuracy": float(outputs["right"].sum() / count), "perplexity": float(np.exp(min(loss, 700)))}

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        target = self.targets(test)["target"]
        scored, share = target >= 0, (self.counts + 1) / (self.counts.sum() + len(self.counts))
        nats, best = -np.log(share), int(self.counts.argmax())
        return [
            Baseline(
                "token frequency",
                f"each token with its training frequency; always predicts {self.decode([best])!r}",
                {
                    "nats": np.where(scored, nats[np.maximum(target, 0)], 0).sum(1),
                    "right": (target == best).sum(1),
                    "count": scored.sum(1),
                },
            )
        ]

    def decode(self, ids: list[int]) -> str:
        return self.text.decode(ids)

    def split_at_gaps(self, text: str) -> list[list[int]]:
        """Return the token ids before, between and after the gaps of a text.

        A space before a gap belongs to the gap, as a space before a word is part of the word's token.
        """
        parts = BLANK.split(text)
        return [ids.tolist() for ids in self.text.encode_exact([*(p.rstrip(" ") for p in parts[:-1]), parts[-1]])]

    def texts_with_gaps(self, data: Data) -> list[str]:
        """Return the texts to fill. Raises `DataError` for a text without a gap."""
        texts = self.texts(data)
        for place, text in enumerate(texts):
            if not BLANK.search(text):
                raise DataError(f"{data.locate_row(place)}: {text[:40]!r} has no gap. Write <mask> for the missing word.")
        return texts

    def example_input(self, test: Data) -> ExampleInput | None:
        words = " ".join(self.texts(test)[:1]).split()[:EXAMPLE_WORDS]
        if len(words) < 2:
            return None
        words[len(words) // 2] = "<mask>"
        return ExampleInput(" ".join(words))

    def loss_elements(self, outputs: Arrays) -> dict[str, list[ReportElement]]:
        per_row = outputs["nats"] / np.maximum(outputs["count"], 1)
        return {
            "Scores by row": [
                Bars(
                    "Loss by test row",
                    "Nats per hidden token of the test rows, by decile.",
                    {f"{10 * q} %": float(v) for q, v in enumerate(np.quantile(per_row, np.linspace(0, 1, 11)))},
                    unit="nats",
                )
            ]
        }

    # Saved with the run

    STATE: ClassVar = {"counts": list[float]}

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
