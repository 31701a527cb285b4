"""Extractive question answering: the model reads a question and a context and predicts the answer's span."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import DataError
from fieldguide.core.report_elements import ReportElement
from fieldguide.core.settings import Settings
from fieldguide.core.words import find_words
from fieldguide.data import read
from fieldguide.data.dataset import Column, Data, SkippedInput
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.qa_windows import COLUMN_SPEC, find_columns, prepare
from fieldguide.data.preprocessing.tokenizer import suggest_length
from fieldguide.metrics import question_answering as measured
from fieldguide.objectives import Objective, SpanPrediction
from fieldguide.tasks.base import Arrays, Baseline, CheckpointAssets, Metric, Task
from fieldguide.tasks.report_builder import ExampleInput
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.base import path_like
from fieldguide.tasks.text.signature import QuestionAnsweringSignature
from fieldguide.tasks.text.windows import (
    PairTemplate,
    Windows,
    answer_span,
    covering_tokens,
    is_whole_words,
    pair_template,
    widen_to_words,
    window_starts,
)

MAX_TOKENS_BY_DEVICE = {"cpu": 256, "mps": 384, "cuda": 384}  # maximum tokens of a window by device, if the user sets no length
EXAMPLE_ROWS, MAX_EXAMPLE_CHARACTERS = 50, 400  # test rows among which the example of an input is chosen, and its length
MAX_QUESTION_TOKENS = 64  # maximum tokens of a question (as in BERT's code for SQuAD)
TOKENS_PER_STEP = 8192  # approximate tokens per step, if the user sets no batch size
MAX_ANSWER_TOKENS = 30  # maximum tokens of an answer (as in BERT's code for SQuAD), if no training answers are known
PUBLISHED_WINDOW_TOKENS = 384  # tokens of a window of published models (same source), if they read that many
# Widen predictions to whole words if at least this fraction of training answers is at word boundaries.
MIN_WHOLE_WORD_FRACTION = 0.97
SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")


class QuestionAnswering(QuestionAnsweringSignature, Task):
    """Extractive question answering. Examples are questions; training rows are windows: [CLS] question [SEP] context
    piece [SEP].

    The prediction is the best answer over all windows of a question, or no answer if none exceeds the null score by
    more than a threshold.
    """

    name = "question-answering"
    reads = (
        "SQuAD JSON (1.1, 2.0), or a table (CSV, JSON Lines) with columns context, question, answer and optionally answer_start"
    )
    input_types = ("tokens",)
    output_types = ("span",)
    feature = ("text",)
    column_spec = COLUMN_SPEC
    metrics = (
        Metric("f1", "max", "F1 over words", percent=True, label="F1"),
        Metric("exact_match", "max", "exact match", percent=True),
        Metric("answered", "max", "F1 over questions that have an answer", percent=True),
        Metric("unanswered", "max", "of questions without an answer predicted to have none", percent=True),
    )
    recipe: ClassVar = {"grad_clip": 1.0, "patience": 8}

    @dataclass(frozen=True)
    class Options:
        context: str | None = None  # name of the context column, if it is not "context"
        question: str | None = None  # name of the question column
        length: int | None = None  # tokens of a window: question and context piece
        stride: int | None = None  # maximum tokens between the starts of consecutive windows
        longest: int | None = None  # maximum tokens of an answer
        vocab_size: int | None = None  # vocabulary size if a tokenizer is fitted on the training texts
        tokenizer: str | None = None  # path of a tokenizer.json to use instead

    @dataclass(frozen=True)
    class PredictOptions:
        question: str = ""  # question about every text, in place of the questions of a table
        threshold: float | None = None  # minimum margin of an answer over no answer, in nats; None: chosen on validation data

    text: TextTokenizer
    frame: PairTemplate  # special tokens around question and context
    median: int  # tokens of a question with its context
    whole: bool  # whether answers are whole words
    silent: bool  # whether some questions have no answer
    threshold: float = 0.0

    @classmethod
    def match(cls, data: Data) -> str | None:
        columns = find_columns(data)
        if columns is None:
            return None
        named = {columns.context.lower(), columns.question.lower()} == {"context", "question"}
        return (
            f"questions on texts with answers in {columns.answers!r}"
            if named and not cls.missing_requirements(data) and data.required_target.name.lower().startswith("answer")
            else None
        )

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        columns = find_columns(data)
        if columns is None:
            return "a context column `context` and a question column `question`"
        return None if columns.answers else "an answer column `answer` (name it with --target)"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        columns = find_columns(data, options.context, options.question)
        if columns is None:
            raise DataError(
                f"{data.source}: task.context and task.question must name text columns of the data: {', '.join(data.columns)}."
            )
        return prepare(data, columns)

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        columns = find_columns(data, options.context, options.question)
        assert columns is not None  # checked by `build_examples`
        task.options = options = replace(options, context=columns.context, question=columns.question)
        contexts, which = np.unique(np.array(task.contexts(data), dtype=object), return_inverse=True)
        questions = task.questions_of(data)
        task.text = (
            TextTokenizer.load(options.tokenizer)
            if options.tokenizer
            else TextTokenizer.fit([*contexts, *questions], size=options.vocab_size)
        )
        task.frame = pair_template(task.text)
        located = task.text.encode_with_spans(contexts.tolist())
        around = task.frame.size
        lengths = [len(ids) for ids in task.text.encode_exact(questions)]
        sizes = [around + min(n, MAX_QUESTION_TOKENS) + len(located[i][0]) for n, i in zip(lengths, which)]
        task.median = int(np.median(sizes))
        rows = [(contexts[i], located[i][1], a[0]) for i, a in zip(which, task.known_answers(data)) if a]
        if not rows:
            raise DataError(f"{data.source}: no training question has an answer. Add rows with answers.")
        tokens = [1 + np.ptp(covering_tokens(spans, *answer_span(answer))) for _, spans, answer in rows]
        task.whole = (
            float(np.mean([is_whole_words(context, *answer_span(answer)) for context, _, answer in rows]))
            >= MIN_WHOLE_WORD_FRACTION
        )
        task.silent = len(rows) < len(data)
        length = options.length or suggest_length(sizes, MAX_TOKENS_BY_DEVICE[device().type])
        if length < around + 16:
            raise DataError(f"task.length={length} has no room for a question and a context piece. Use at least {around + 16}.")
        task.options = fill_options(
            options,
            length=length,
            stride=length // 2,
            vocab_size=task.text.size,
            longest=int(max(30, 1.5 * np.quantile(tokens, 0.99))),
        )
        if task.options.stride < 1:
            raise DataError("task.stride must be at least 1.")
        if long := sum(n > task.options.longest for n in tokens):
            task.notes.append(
                f"{long} training answers are longer than {task.options.longest} tokens; such answers are not "
                "predicted (change this with task.longest=...)"
            )
        if cut := sum(n > task.max_question_tokens for n in lengths):
            task.notes.append(f"{cut} questions are longer than {task.max_question_tokens} tokens and are truncated")
        if several := sum(n > length for n in sizes):
            task.notes.append(
                f"{100 * several / len(sizes):.1f} % of the contexts are read in windows of {length} tokens, at "
                f"most {task.options.stride} tokens apart (change this with task.length=... and task.stride=...)"
            )
        return task

    # Rows

    @property
    def column(self) -> str:
        return self.options.context

    def contexts(self, data: Data) -> list[str]:
        return data.rows[self.options.context].fill_null("").to_list()

    def questions_of(self, data: Data) -> list[str]:
        return data.rows[self.options.question].fill_null("").to_list()

    def known_answers(self, data: Data) -> list[list[dict[str, Any]]]:
        """Return the known answers of each row: {"text", "start"}."""
        return [row or [] for row in data.rows[self.target.name].to_list()]

    @property
    def max_question_tokens(self) -> int:
        """Return the maximum tokens of a question."""
        return min(MAX_QUESTION_TOKENS, (self.options.length - self.frame.size) // 2)

    def read_one(self, source: Any, answered: bool) -> Data:
        if answered:
            data = super().read_one(source, answered)
            if self.target.name not in data.rows.columns:
                raise DataError(
                    f"{data.source}: evaluation needs the answer column {self.target.name!r}, which is "
                    "missing. To predict without answers, use `fieldguide predict`."
                )
            return data
        typed = isinstance(source, str) and not path_like(source)
        if self.predict_options.question:
            source = pl.DataFrame({self.options.context: [source]}) if typed else source
            data = read(
                source, schema=[c for c in self.columns if c.name != self.options.question], labels_optional=True, lenient=True
            )
            data.rows = data.rows.with_columns(pl.lit(self.predict_options.question).alias(self.options.question))
        elif typed:
            raise DataError(f'{source[:40]!r} is a text without a question. Set one: --set question="...".')
        else:
            data = super().read_one(source, answered)
        pairs = zip(self.contexts(data), self.questions_of(data))
        bad = np.array([not (context.strip() and question.strip()) for context, question in pairs], dtype=bool)
        if bad.all():
            raise DataError(f"{data.source}: every row has an empty context or question.")
        before = np.cumsum(~bad)
        data.skipped += [
            SkippedInput(int(before[row]), data.locate_row(int(row)), "the context or the question is empty")
            for row in np.flatnonzero(bad)
        ]
        return data.drop_rows(bad)

    def model_dims(self) -> dict[str, Any]:
        return {"vocab_size": self.text.size, "length": self.options.length}

    def data_facts(self) -> dict[str, Any]:
        length = self.options.length
        return {"vocab_size": self.text.size, "length": length, "tokens": min(self.median, length)}

    @property
    def max_batch_size(self) -> int:
        return int(np.clip(2 ** int(np.log2(TOKENS_PER_STEP / max(min(self.median, self.options.length), 1))), 16, 128))

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        also = ("segments",) if "segments" in card.optional_inputs else ()
        return SpanPrediction(model, (*card.inputs, *also), self.options.longest)

    # Windows

    def windows(self, data: Data) -> Windows:
        """Return every window of every question."""
        contexts, which = np.unique(np.array(self.contexts(data), dtype=object), return_inverse=True)
        located = []
        for text, (ids, spans) in zip(contexts.tolist(), self.text.encode_with_spans(contexts.tolist())):
            located.append((ids, widen_to_words(text, spans) if self.whole else spans, spans))
        questions = [ids[: self.max_question_tokens] for ids in self.text.encode_exact(self.questions_of(data))]
        rows = []
        for number, (ids, context) in enumerate(zip(questions, which)):
            room = self.options.length - self.frame.size - len(ids)
            # Consecutive windows overlap by the longest answer, or by half if there is little room: else an
            # answer might be in no window.
            stride = min(self.options.stride, max(room // 2, room - self.options.longest))
            rows += [(number, first) for first in window_starts(len(located[context][0]), room, stride)]
        numbers, firsts = np.array(rows, dtype=np.int64).reshape(-1, 2).T
        return Windows(self.text, self.frame, self.options.length, located, which, questions, numbers, firsts)

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Return the questions, each with all its windows."""
        windows = self.windows(data)
        last = np.searchsorted(windows.number, np.arange(len(data)), "right")
        count = np.diff(last, prepend=0)

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            rows = np.concatenate([np.arange(last[i] - count[i], last[i]) for i in index])
            return {
                **windows.batch(rows),
                "window": torch.from_numpy(np.repeat(np.arange(len(index)), count[index])),
                "characters": torch.from_numpy(windows.characters(rows)),
            }

        return Batches(len(data), make, windows.sizes[last - 1] * count if len(data) else None)

    def train_batches(self, data: Data, card: Card, settings: Settings) -> Batches:
        """Return the windows with the span of the first answer, or with no answer if the span is not wholly inside."""
        windows = self.windows(data)
        spots = windows.answer_positions(self.known_answers(data))

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            first, last = torch.from_numpy(spots[index]).unbind(1)
            return {**windows.batch(index), "first": first, "last": last}

        return Batches(len(windows.number), make, windows.sizes)

    def predict_batches(self, data: Data, card: Card) -> Batches:
        self.request = self.contexts(data)
        return self.batches(data, card)

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return the contexts, and tuples of the correct answers; empty for questions without one."""
        return {
            "context": object_array(self.contexts(data)),
            "answers": object_array([tuple(a["text"] for a in row) for row in self.known_answers(data)]),
        }

    def postprocess(self, outputs: Arrays) -> Arrays:
        least = self.threshold if self.predict_options.threshold is None else self.predict_options.threshold
        given = outputs["end"] > outputs["begin"]
        if self.silent or self.predict_options.threshold is not None:
            given &= outputs["score"] - outputs["none"] > least
        return {**outputs, "given": given}

    def answer_texts(self, outputs: Arrays, contexts: Iterable[str], everything: bool = False) -> list[str]:
        """Return the answers as text. With `everything`, include those below the threshold."""
        return [
            text[int(begin) : int(end)].strip() if given or everything else ""
            for text, begin, end, given in zip(contexts, outputs["begin"], outputs["end"], outputs["given"])
        ]

    def score_questions(self, outputs: Arrays, targets: Arrays) -> np.ndarray:
        """Return exact match and F1 of each question: (N, 2)."""
        return measured.score_answers(self.answer_texts(outputs, targets["context"]), targets["answers"])

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        outputs = outputs if "given" in outputs else self.postprocess(outputs)
        each = outputs["each"] if "each" in outputs else self.score_questions(outputs, targets)
        none = np.array([not a for a in targets["answers"]], dtype=bool)
        mean = lambda values: float(values.mean()) if len(values) else float("nan")
        scores = {"f1": mean(each[:, 1]), "exact_match": mean(each[:, 0])}
        return {**scores, "answered": mean(each[~none, 1]), "unanswered": mean(each[none, 1])} if none.any() else scores

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        return super().intervals(
            {**outputs, "each": self.score_questions(outputs, targets)}, targets
        )  # scored once, not once per repeat

    def margins_and_f1(self, outputs: Arrays, targets: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return, per question, the best answer's margin over no answer in nats, F1 if it is given, and F1 if none is
        given.
        """
        margin = np.clip(outputs["score"].astype(np.float64) - outputs["none"], -1e6, 1e6)
        given = self.score_questions({**outputs, "given": outputs["end"] > outputs["begin"]}, targets)[:, 1]
        return margin, given, np.array([float(not answers) for answers in targets["answers"]])

    def calibrate(self, outputs: Arrays, targets: Arrays) -> None:
        if self.silent:
            self.threshold = measured.find_threshold(*self.margins_and_f1(outputs, targets))

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        contexts = set(self.contexts(train))
        seen = Counter(word for text in contexts for word in set(words(text)))
        rare = lambda word: math.log((1 + len(contexts)) / (1 + seen[word]))
        near = np.array(
            [find_nearest_sentence(*pair, rare) for pair in zip(self.questions_of(test), self.contexts(test))]
        ).reshape(-1, 2)
        found = [
            Baseline(
                "nearest sentence",
                "the sentence that shares most words with the question, weighted by rarity",
                {"begin": near[:, 0], "end": near[:, 1], "given": near[:, 1] > near[:, 0]},
            )
        ]
        if self.silent:
            nothing = np.zeros(len(test), dtype=np.int64)
            found.append(
                Baseline("no answer", "always predicts no answer", {"begin": nothing, "end": nothing, "given": nothing > 0})
            )
        return found

    # Predictions

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        records = []
        for text, begin, end, given, score, none in zip(
            self.request,
            outputs["begin"].astype(int),
            outputs["end"].astype(int),
            outputs["given"],
            outputs["score"],
            outputs["none"],
        ):
            if not given:
                records.append({"answer": "", "start": None, "end": None, "probability": float(np.exp(none))})
                continue
            piece = text[begin:end]
            begin = int(begin) + len(piece) - len(piece.lstrip())
            piece = piece.strip()
            records.append({"answer": piece, "start": begin, "end": begin + len(piece), "probability": float(np.exp(score))})
        return records

    # Report

    def example_input(self, test: Data) -> ExampleInput | None:
        if not len(test):
            return None
        texts = self.contexts(test.take(np.arange(min(len(test), EXAMPLE_ROWS))))
        row = min(range(len(texts)), key=lambda i: len(texts[i]))  # a short one, to be readable
        context = " ".join(texts[row].split())
        return ExampleInput(context[:MAX_EXAMPLE_CHARACTERS], {"question": self.questions_of(test)[row]})

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        from fieldguide.tasks.text import question_answering_report

        return question_answering_report.build_elements(self, test, outputs, targets)

    # Saved with the run

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self:
        """Return a task that answers every question unless `threshold` is set: weights alone do not tell whether some
        have none.
        """
        length = min(assets.length, PUBLISHED_WINDOW_TOKENS)
        options = cls.Options("context", "question", length=length, stride=length // 2, longest=MAX_ANSWER_TOKENS)
        return cls.from_state(
            [Column("context", "text"), Column("question", "text"), Column("answer", "list", "target")],
            options,
            {"median": 0, "whole": False, "silent": False, "threshold": 0.0},
            assets.tokenizer_folder,
        )

    STATE: ClassVar = {"median": float, "whole": bool, "silent": bool, "threshold": float}

    def state(self) -> dict[str, Any]:
        return {"median": self.median, "whole": self.whole, "silent": self.silent, "threshold": self.threshold}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.text = TextTokenizer.load(folder)
        task.frame = pair_template(task.text)
        task.median, task.whole, task.silent, task.threshold = (state[k] for k in ("median", "whole", "silent", "threshold"))
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.text.save(folder)


def words(text: str) -> list[str]:
    return find_words(text.lower())


def find_nearest_sentence(question: str, context: str, rare: Callable[[str], float]) -> tuple[int, int]:
    """Return the span of the sentence that shares most words with the question, weighted by rarity."""
    wanted = set(words(question))
    best = max(SENTENCE.finditer(context), key=lambda m: sum(map(rare, sorted(wanted & set(words(m.group()))))), default=None)
    return best.span() if best else (0, len(context))


def object_array(values: Sequence[Any]) -> np.ndarray:
    """Return a one-dimensional object array of the values."""
    array = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        array[place] = value
    return array


TASKS = (QuestionAnswering,)
