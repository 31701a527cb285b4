"""What tasks share whose input a person may type: texts, prompts, questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from fieldguide.blocks.padding import masked_mean
from fieldguide.card import Card
from fieldguide.data.batches import Batches
from fieldguide.data.dataset import LINE, Data
from fieldguide.errors import SettingsError
from fieldguide.objectives import Objective
from fieldguide.samples import SAMPLES
from fieldguide.tasks.base import Task
from fieldguide.train.distributed import device
from fieldguide.train.evaluate import collect


class Typed(Task):
    """A task with one column of text as its input, which may also be given as the text itself."""

    feature = ("text",)

    def texts(self, data: Data) -> list[str]:
        return data.rows[self.column].fill_null("").to_list()

    def embed(self, objective: Objective, card: Card, texts: Sequence[str]) -> np.ndarray:
        """A vector of length 1 for each text: the mean over its tokens of what the network reads, N D float32. Raises
        `SettingsError` for a network that is no encoder of texts."""
        if "vector" not in card.answers or not hasattr(self, "text"):
            raise SettingsError(f"{card.name} makes no vectors of texts; networks that read both sides of a word do, such as "
                                "BERT and ModernBERT.")
        longest, text = objective.model.config.length - 2, self.text
        rows = [np.concatenate([[text.cls], ids[:longest], [text.sep]]) for ids in text.exactly(list(texts))]

        def make(index: np.ndarray, generator: Any) -> dict[str, torch.Tensor]:
            tokens, mask = text.batch([rows[i] for i in index])
            return {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}

        def answer(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            mean = masked_mean(objective.model.features(batch["tokens"], batch["mask"]).float(), batch["mask"])
            return {"vector": torch.nn.functional.normalize(mean, dim=-1)}

        if not rows:
            return np.zeros((0, objective.model.config.dim), dtype=np.float32)
        return collect(objective, Batches(len(rows), make, np.array(list(map(len, rows)))), batch=64, device=device(),
                       ask=answer)["vector"]

    def read_one(self, source: Any, answered: bool) -> Data:
        if answered or not isinstance(source, str) or path_like(source):
            return super().read_one(source, answered)
        data = super().read_one(pl.DataFrame({self.column: [source]}), answered)
        data.manifest.files[0] = replace(data.manifest.files[0], path=source)      # it is called by what it says
        data.rows = data.rows.with_columns(pl.lit(None, pl.Int64).alias(LINE))
        return data


def path_like(text: str) -> bool:
    """Whether a person who typed this means a file, a folder or a sample rather than a text."""
    if len(text.split()) == 1 and ("/" in text or Path(text).suffix):
        return True
    return text in SAMPLES or (0 < len(text) < 256 and Path(text).exists())
