"""What tasks share whose input a person may type: texts, prompts, questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from fieldguide.data.dataset import LINE, Data
from fieldguide.data.loader import Batches
from fieldguide.data.samples import SAMPLES
from fieldguide.tasks.base import Task


class Typed(Task):
    """A task with one column of text as its input, which may also be given as the text itself."""

    feature = ("text",)

    def texts(self, data: Data) -> list[str]:
        return data.rows[self.column].fill_null("").to_list()

    def encode_texts(self, texts: Sequence[str], longest: int) -> Batches:
        """Texts as encoders read them: a class token, at most so many tokens in all, a separator."""
        text = self.text
        rows = [np.concatenate([[text.cls], ids[: longest - 2], [text.sep]]) for ids in text.encode_exact(list(texts))]

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
            tokens, mask = text.batch([rows[i] for i in index])
            return {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}

        return Batches(len(rows), make, np.array([len(row) for row in rows]))

    def typed(self, text: str) -> pl.DataFrame:
        """A text that a person typed, as a row of the table."""
        return pl.DataFrame({self.column: [text]})

    def read_one(self, source: Any, answered: bool) -> Data:
        if answered or not isinstance(source, str) or path_like(source):
            return super().read_one(source, answered)
        data = super().read_one(self.typed(source), answered)
        data.manifest.files[0] = replace(data.manifest.files[0], path=source)  # it is called by what it says
        data.rows = data.rows.with_columns(pl.lit(None, pl.Int64).alias(LINE))
        return data


def path_like(text: str) -> bool:
    """Whether a person who typed this means a file, a folder or a sample rather than a text."""
    if len(text.split()) == 1 and ("/" in text or Path(text).suffix):
        return True
    return text in SAMPLES or (0 < len(text) < 256 and Path(text).exists())
