"""Visual question answering: classification of image and question into the frequent training answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError
from fieldguide.core.report_elements import Gallery, Picture, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import Labels
from fieldguide.data.text_values import IMAGE_FILE_PATTERN, count_values
from fieldguide.objectives import Objective
from fieldguide.tasks.base import Arrays, Baseline, CheckpointAssets, Metric
from fieldguide.tasks.multimodal.base import ImageAndTextTask
from fieldguide.tasks.multimodal.signature import VisualQuestionSignature
from fieldguide.tasks.report_builder import ExampleInput
from fieldguide.tasks.supervised import ClassificationTask, fill_options
from fieldguide.tasks.supervised_evaluator import calibration_error

MAX_ANSWERS = 1000  # maximum number of answers, if the user sets none
MIN_ANSWER_ROWS = 2  # minimum training rows of an answer
MAX_CONFUSION_ANSWERS = 30  # maximum answers for which the report shows the confusion matrix
SHOWN_QUESTION_TYPES = 25  # question types in the report


class VisualQuestionAnswering(VisualQuestionSignature, ImageAndTextTask, ClassificationTask):
    """Visual question answering.

    `predict RUN table.csv` answers a table of images and questions; `predict RUN photo.jpg --set question="how
    many?"` asks the same question of each image.
    """

    name = "visual-question-answering"
    reads = "a table with an image column, a question column and an answer column (--target)"
    input_types = ("captioned",)
    baseline_models: ClassVar = ("bag-of-ngrams",)
    further = ("text",)
    column_spec = ColumnSpec(
        "last",
        names=("answer", "answers"),
        kinds={"target": "category"},
        columns={"question": "text", "image": "image", "image_path": "image"},
    )
    metrics = (
        Metric("accuracy", "max", "correct", percent=True),
        Metric("balanced_accuracy", "max", "mean recall over answers", percent=True),
        Metric("log_loss", "min", "nats per question with a known answer"),
        Metric("calibration_error", "min", "mean gap between confidence and accuracy"),
    )
    # Each image has several questions and is soon memorized. DAQUAR in 4 minutes on one core (375 steps of
    # 128): validation accuracy .210 with light augmentation, .222 with standard.
    recipe: ClassVar = {"augmentation": "standard", "label_smoothing": 0.05, "patience": 10}

    @dataclass(frozen=True)
    class Options:
        side: int | None = None  # pixels per side of the input image
        channels: int | None = None  # 1 gray, 3 color
        vocab_size: int | None = None  # vocabulary size if a tokenizer is fitted on the training questions
        tokenizer: str | None = None  # path of a tokenizer.json to use instead
        pixels: str | None = None  # mean and standard deviation of each channel, from 0 to 1: mean,mean,mean/std,std,std
        resize: str | None = None  # how images are resized, such as crop bicubic; default: padded with white
        length: int | None = None  # maximum tokens of a question; longer questions are truncated and counted
        answers: int | None = None  # number of answers to predict, most frequent first; others are never predicted
        flip: bool = False  # mirror images at random; false if answers mention left and right

    @dataclass(frozen=True)
    class PredictOptions:
        question: str = ""  # question about every image, in place of the questions of a table

    @classmethod
    def match(cls, data: Data) -> str | None:
        question_columns = [c.name for c in data.features("text", "category") if c.name.strip().lower() == "question"]
        if len(data.features("image")) == 1 and question_columns and data.target and data.required_target.kind != "number":
            return f"images, questions and {data.required_target.distinct} answers"
        return None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if len(data.features("image")) != 1:
            return "one image column"
        if len(data.features("text")) != 1:
            return "one question column (name it question, or use --set column.NAME=text)"
        return super().missing_requirements(data)

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        task.fit_inputs(data, task.questions_of(data))
        answers, counts = count_values(data.rows[task.target.name].cast(pl.String).drop_nulls())
        least = 1 if options.answers else MIN_ANSWER_ROWS
        kept = [answer for answer, count in zip(answers, counts) if count >= least][: options.answers or MAX_ANSWERS]
        if len(kept) < 2:
            raise DataError(
                f"{data.source}: fewer than two answers in column {task.target.name!r} occur on {MIN_ANSWER_ROWS} or more "
                "training rows. At least two are needed."
            )
        task.labels = list(Labels.fit(kept).names)
        codes = task.answer_codes(data)
        task.counts = np.bincount(codes[codes >= 0], minlength=len(kept)).tolist()
        if rare := len(answers) - len(kept):
            task.notes.append(
                f"{rare} of {len(answers)} answers are rare and cannot be predicted "
                f"({100 * (codes < 0).mean():.1f} % of the training rows). Questions with such an answer count as "
                "wrong (change this with task.answers=...)"
            )
        task.options = fill_options(task.options, answers=len(kept))
        return task

    @property
    def question_column(self) -> str:
        """Return the name of the question column."""
        return next(c.name for c in self.columns if c.kind == "text" and c.role == "feature")

    def questions_of(self, data: Data) -> list[str]:
        return data.rows[self.question_column].fill_null("").to_list()

    def read_one(self, source: Any, answered: bool) -> Data:
        if answered:
            return super().read_one(source, answered)
        if not self.predict_options.question:
            if isinstance(source, str | Path) and pl.Series([str(source)]).str.contains(IMAGE_FILE_PATTERN)[0]:
                raise DataError(f'{source}: the image has no question. Set one: --set question="...".')
            return super().read_one(source, answered)
        data = read(
            source, schema=[c for c in self.columns if c.name != self.question_column], labels_optional=True, lenient=True
        )
        data.rows = data.rows.with_columns(pl.lit(self.predict_options.question).alias(self.question_column))
        return data

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text with [CLS] first, plus the tokenizer's own special tokens."""
        rows = [encoding.ids or [self.text.unknown] for encoding in self.text.tokenizer.encode_batch(texts)]
        return [row if row[0] == self.text.cls else [self.text.cls, *row] for row in rows]

    def ends_with_special(self, row: list[int]) -> bool:
        return row[-1] == self.text.sep != self.text.unknown

    def model_dims(self) -> dict[str, Any]:
        return {**super().model_dims(), "num_classes": len(self.labels)}

    def data_facts(self) -> dict[str, Any]:
        return {**super().data_facts(), "num_classes": len(self.labels)}

    def targets(self, data: Data) -> Arrays:
        """Return the index of each row's answer; -1 for an answer that cannot be predicted."""
        codes, values = self.answer_codes(data), data.rows[self.target.name]
        if (codes < 0).any():
            names = sorted({str(v) for v in values.filter(pl.Series(codes < 0)).to_list()})
            self.add_note(
                f"{int((codes < 0).sum())} rows have answers that are rare or not in the training data "
                f"({', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}); they count as wrong"
            )
        return {"label": codes}

    def answer_codes(self, data: Data) -> np.ndarray:
        """Return the index of each row's answer, N int64; -1 for an answer that cannot be predicted."""
        return Labels(tuple(self.labels)).apply(data.rows[self.target.name]).copy()

    def answerable_rows(self, data: Data) -> Data:
        """Return the rows whose answer can be predicted."""
        return data.take(np.flatnonzero(self.answer_codes(data) >= 0))

    def train_batches(self, data: Data, card: Card, settings: Settings) -> Batches:
        return self.batches(self.answerable_rows(data), card, settings)

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        ids, cut = self.tokens(self.questions_of(data))
        if cut and not settings:
            self.note_truncated(cut, len(ids), self.options.length)
        pixels = self.pixels(data, settings) if "image" in card.inputs else None
        target = torch.from_numpy(self.answer_codes(data)) if settings else None

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            tokens, mask = self.text.batch([ids[i] for i in index])
            batch = {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}
            if pixels is not None:
                batch["image"] = pixels(index, generator)
            if target is not None:
                batch["target"] = target[torch.from_numpy(index)]
            return batch

        return Batches(len(ids), make)

    # Scores

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        p, y = outputs["probabilities"].astype(np.float64), targets["label"]
        right, known = p.argmax(1) == y, y >= 0
        of = [right[y == answer].mean() for answer in np.unique(y[known])]
        sure = p[np.flatnonzero(known), y[known]]
        return {
            "accuracy": float(right.mean()),
            "balanced_accuracy": float(np.mean(of)) if of else float("nan"),
            "log_loss": float(-np.log(np.clip(sure, 1e-12, 1)).mean()) if len(sure) else float("nan"),
            "calibration_error": calibration_error(p.max(1), right),
        }

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        return [replace(b, name="most frequent answer") for b in super().baselines(self.answerable_rows(train), test)]

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        answers = []
        for p in outputs["probabilities"]:
            best = np.argsort(-p, kind="stable")[:5]
            answers.append(
                {
                    "answer": self.labels[best[0]],
                    "probability": float(p[best[0]]),
                    "probabilities": {self.labels[i]: float(p[i]) for i in best},
                }
            )
        return answers

    # Report

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        p, y, questions = outputs["probabilities"], targets["label"], self.questions_of(test)
        known, said, right = np.flatnonzero(y >= 0), p.argmax(1), p.argmax(1) == y
        is_ = test.rows[self.target.name].cast(pl.String).fill_null("").to_list()
        table = pl.DataFrame({"type": [question_type(q) for q in questions], "right": right, "truth": is_})
        rows = [
            (
                name[0],
                len(part),
                part.select(pl.mean("right")).item(),
                max(count_values(part["truth"])[1]) / len(part),
            )
            for name, part in table.group_by("type", maintain_order=True)
        ]
        rows.sort(key=lambda row: -row[1])
        sections: dict[str, list[ReportElement]] = {
            "Questions": [
                Table(
                    "By question type",
                    "Questions grouped by their first two words. A model that uses the image is correct "
                    "more often than the most frequent answer of each type.",
                    ("questions", "examples", "correct", "most frequent"),
                    rows[:SHOWN_QUESTION_TYPES],
                    heat=("correct", "most frequent"),
                )
            ]
        }
        caption = lambda i: f"{questions[i]} {self.labels[said[i]]} ({100 * p[i].max():.0f} % confident)"
        wrong = np.flatnonzero(~right)
        worst = wrong[np.argsort(-p[wrong].max(1), kind="stable")][:16]
        shuffled = np.random.default_rng(0).permutation(len(y))
        sections["Questions"] += [
            Gallery(
                title,
                note,
                [
                    Picture(
                        self.thumbnail(test, int(i)),
                        caption(i) + (f"; target: {is_[i]}" if not right[i] else ""),
                        bad=not right[i],
                    )
                    for i in some
                ],
            )
            for title, note, some in (
                ("Worst mistakes", "Wrong with the highest confidence.", worst),
                ("Random sample", "Random test questions.", shuffled[:16]),
            )
            if len(some)
        ]
        if len(self.labels) <= MAX_CONFUSION_ANSWERS and len(known):
            sections |= super().report_elements(test.take(known), {"probabilities": p[known]}, {"label": y[known]}, objective)
        if objective is not None and hasattr(objective.model, "attention"):
            some = np.random.default_rng(1).permutation(len(y))[:12]
            where = next(objective.parameters()).device
            ids, _ = self.tokens([questions[i] for i in some])
            tokens, mask = (torch.from_numpy(a).to(where) for a in self.text.batch(ids))
            with torch.inference_mode():
                image = self.pixels(test.take(some))(np.arange(len(some)), None).to(where)
                heat = objective.model.attention(image, tokens, mask).cpu().numpy()
            sections["Attention"] = [
                Gallery(
                    "Attention",
                    "Test images; red marks the patches that contribute most to the answer (attention rollout).",
                    [Picture(self.overlay(test, int(i), h), caption(i), bad=not right[i]) for i, h in zip(some, heat)],
                    wide=True,
                )
            ]
        return sections

    def example_input(self, test: Data) -> ExampleInput | None:
        return ExampleInput(test.rows[self.column][0], {"question": self.questions_of(test)[0]}) if len(test) else None

    def state(self) -> dict[str, Any]:
        return {**super().state(), **self.target_state()}

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self | None:
        if assets.pictures is None or assets.folder is None:
            return None
        p = assets.pictures
        return cls.from_state(
            [Column("image", "image"), Column("question", "text"), Column("answer", "category", "target")],
            cls.Options(side=p.side, channels=p.channels, length=assets.length, answers=len(assets.names)),
            {"pictures": p.to_json(), "median": 0, **cls.label_state(assets.names)},
            assets.folder,
        )

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.restore_inputs(state, folder)
        task.load_target_state(state)
        return task


def question_type(question: str) -> str:
    """Return the first two words of a question."""
    return " ".join(question.lower().split()[:2])


TASKS = (VisualQuestionAnswering,)
