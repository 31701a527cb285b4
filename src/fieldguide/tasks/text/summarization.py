"""Summarization: a document and its summary."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from torch import Tensor

from fieldguide.core.report_elements import Bars, ReportElement, Table
from fieldguide.core.structure import Limits
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import Data
from fieldguide.metrics import rouge
from fieldguide.models.generation import MAX_NEW_TOKENS, BeamSearch
from fieldguide.objectives import Objective
from fieldguide.tasks.base import Arrays, Baseline, Metric, Task
from fieldguide.tasks.text.translation import SHOWN_SENTENCES, Translation

MAX_DOCUMENT_TOKENS = 512  # maximum tokens of a document, if the user sets no length
LEAD_SENTENCES = 3  # leading sentences of a document: a strong baseline for news
SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n+")


class Summarization(Translation):
    """Summarization, trained like translation and scored by ROUGE."""

    name = "summarization"
    reads = "a table with a document column (document, article, text) and a summary column (summary, highlights)"
    column_spec = ColumnSpec(
        "named", names=("summary", "highlights", "summaries", "tldr"), kinds={"target": "text", "feature": "text"}
    )
    metrics = (
        Metric("rouge1", "max", "ROUGE-1", percent=True, label="ROUGE-1"),
        Metric("rouge2", "max", "ROUGE-2", percent=True, label="ROUGE-2"),
        Metric("rougeL", "max", "ROUGE-L", percent=True, label="ROUGE-L"),
        Metric("loss", "min", "nats per token"),
    )
    max_test_examples = 400  # beam search over a hundred tokens and more is slow
    longest: ClassVar[int] = MAX_DOCUMENT_TOKENS
    made: ClassVar[str] = "Summaries"

    @dataclass(frozen=True)
    class PredictOptions(BeamSearch):
        max_new_tokens: Annotated[int, Limits(1, MAX_NEW_TOKENS)] = 128  # maximum tokens of a summary

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if len(data.features("text")) != 1:
            return "one document column"
        return None if data.target and data.required_target.kind == "text" else "a summary column (name it with --target)"

    @classmethod
    def match(cls, data: Data) -> str | None:
        return None  # two text columns are a translation by default

    def limits(self, lengths: Tensor) -> Tensor:  # B source lengths -> B maximum output lengths
        return lengths.new_full(lengths.shape, self.predict_options.max_new_tokens)

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        scores = {}
        if "rouge" in outputs:
            scores = dict(zip(rouge.ROUGE_NAMES, outputs["rouge"].mean(0).tolist()))
        elif "text" in outputs:
            scores = dict(zip(rouge.ROUGE_NAMES, rouge.score_texts(outputs["text"], targets["text"]).mean(0).tolist()))
        if "nats" in outputs:
            scores["loss"] = float(outputs["nats"].sum(dtype=np.float64) / max(outputs["count"].sum(), 1))
        return scores

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        scored = {"rouge": rouge.score_texts(outputs["text"], targets["text"])} if "text" in outputs else {}
        return Task.intervals(self, {**outputs, **scored}, targets)  # each summary is scored once, not once per repeat

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        said = [first_sentences(text) for text in self.texts(test)]
        return [Baseline("lead", f"the first {LEAD_SENTENCES} sentences", {"text": np.array(said, dtype=object)})]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        said, right, source = outputs["text"].tolist(), targets["text"].tolist(), targets["source"].tolist()
        each = rouge.score_texts(said, right)
        length = np.array([len(s.split()) for s in source])
        groups = [
            (f"{low}-{high} words", (length >= low) & (length <= high))
            for low, high in ((1, 50), (51, 150), (151, 300), (301, 600), (601, 100_000))
        ]
        row = lambda i: (test.locate_row(int(i)), shorten(source[i]), right[i], said[i], 100 * float(each[i, 0]))
        header = ("row", "document", "reference summary", "predicted summary", "ROUGE-1")
        order = np.argsort(each[:, 0], kind="stable")
        return {
            "Summaries": [
                Bars(
                    "ROUGE-1 by length of the document",
                    "F-measure in percent; words in lower case, not stemmed.",
                    {name: 100 * float(each[rows, 0].mean()) for name, rows in groups if rows.any()},
                ),
                Table(
                    "Worst",
                    "Test documents with the lowest ROUGE-1: wrong predictions or wrong references.",
                    header,
                    [row(i) for i in order[:SHOWN_SENTENCES]],
                    heat=("ROUGE-1",),
                ),
                Table(
                    "Random sample",
                    "Random test documents.",
                    header,
                    [row(i) for i in np.random.default_rng(0).permutation(len(each))[: SHOWN_SENTENCES // 2]],
                    heat=("ROUGE-1",),
                ),
            ]
        }


def first_sentences(text: str, count: int = LEAD_SENTENCES) -> str:
    return " ".join([s for s in SENTENCE.split(text.strip()) if s][:count])


def shorten(text: str, most: int = 300) -> str:
    return text if len(text) <= most else text[:most] + " …"


TASKS = (Summarization,)
