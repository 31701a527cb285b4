"""Base class of tasks whose input is a text: passages, prompts, questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch

from fieldguide.data.dataset import LINE, Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing.tokenizer import TextTokenizer
from fieldguide.data.samples import SAMPLES
from fieldguide.tasks.base import Task
from fieldguide.tasks.text.signature import TextSignature


class TextTask(TextSignature, Task):
    """A task whose input is one text column; the input may also be given as the text itself."""

    feature: ClassVar[tuple[str, ...]] = ("text",)
    text: TextTokenizer  # fitted or read by `fit`

    def texts(self, data: Data) -> list[str]:
        return data.rows[self.column].fill_null("").to_list()

    def encode_texts(self, texts: Sequence[str], longest: int) -> Batches:
        """Encode texts as encoder inputs [CLS] ... [SEP] of at most `longest` tokens."""
        text = self.text
        rows = [np.concatenate([[text.cls], ids[: longest - 2], [text.sep]]) for ids in text.encode_exact(list(texts))]

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
            tokens, mask = text.batch([rows[i] for i in index])
            return {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}

        return Batches(len(rows), make, np.array([len(row) for row in rows]))

    def make_row(self, text: str) -> pl.DataFrame:
        """Return a row of the table for a text given as input."""
        return pl.DataFrame({self.column: [text]})

    def read_one(self, source: Any, answered: bool) -> Data:
        if answered or not isinstance(source, str) or path_like(source):
            return super().read_one(source, answered)
        return name_by_text(super().read_one(self.make_row(source), answered), source)


def name_by_text(data: Data, text: str) -> Data:
    """Return the data of a text given as input, whose prediction is listed under the text itself."""
    data.manifest.files[0] = replace(data.manifest.files[0], path=text)
    data.rows = data.rows.with_columns(pl.lit(None, pl.Int64).alias(LINE))
    return data


def path_like(text: str) -> bool:
    """Return whether the input is a file, a folder or a sample name rather than a text."""
    if len(text.split()) == 1 and ("/" in text or Path(text).suffix):
        return True
    return text in SAMPLES or (0 < len(text) < 256 and Path(text).exists())
