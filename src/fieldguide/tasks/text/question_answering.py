"""Answers that stand in a text: a network reads a question and a context, and says where the answer begins and ends."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
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
from fieldguide.core.report_elements import Exhibit
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.dataset import Column, Data, SkippedInput
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.qa_windows import COLUMN_SPEC, find_columns, prepare
from fieldguide.data.preprocessing.tokenizer import suggest_length
from fieldguide.metrics import question_answering as measured
from fieldguide.objectives import Objective, SpanPrediction
from fieldguide.tasks.base import Arrays, Baseline, CheckpointAssets, Metric, Task
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.base import path_like
from fieldguide.tasks.text.windows import Frame, Windows, covering, ends, framed, starts, whole_words, widened

MOST = {"cpu": 256, "mps": 384, "cuda": 384}  # tokens of a window, where the user names no length
QUESTION = 64  # tokens of a question that are read (BERT's code for SQuAD)
TOKENS = 8192  # a step, about, where the user names no batch
LONGEST = 30  # tokens of an answer at most (BERT's code for SQuAD), where no training answers tell
PUBLISHED = 384  # tokens of a window that published networks have learnt with (the same), where they read so many
WHOLE = 0.97  # share of training answers that are whole words above which answers are made so
WORD, SENTENCE = re.compile(r"\w+"), re.compile(r"[^.!?\n]+[.!?]*")


class QuestionAnswering(Task):
    """Examples are questions; a network learns from windows: [CLS] question [SEP] piece of the context [SEP]. The best
    answer over all windows of a question is its answer, unless none is better by more than a threshold."""

    name = "question-answering"
    reads = (
        "SQuAD's JSON (1.1, 2.0), or a table (CSV, JSON Lines) with columns context, question, answer, and maybe answer_start"
    )
    input_types = ("tokens",)
    output_types = ("span",)
    feature = ("text",)
    column_spec = COLUMN_SPEC
    metrics = (
        Metric("f1", "max", "F1 of words", percent=True),
        Metric("exact_match", "max", "the same words", percent=True),
        Metric("answered", "max", "F1 of questions that have an answer", percent=True),
        Metric("unanswered", "max", "of questions without an answer left without one", percent=True),
    )
    recipe: ClassVar = {"grad_clip": 1.0, "patience": 8}

    @dataclass(frozen=True)
    class Options:
        context: str | None = None  # the column of texts, where its name does not say so
        question: str | None = None  # the column of questions
        length: int | None = None  # tokens of a window: question and piece of the context
        stride: int | None = None  # tokens from a window's begin to that of the next one, at most
        longest: int | None = None  # tokens of an answer
        vocab_size: int | None = None  # tokens in the vocabulary learnt from the training texts
        tokenizer: str | None = None  # a tokenizer.json to use instead

    @dataclass(frozen=True)
    class PredictOptions:
        question: str = ""  # asked of every text, in place of a table's own questions
        threshold: float | None = None  # how much better than none an answer must be, in nats; None: as chosen on validation

    text: TextTokenizer
    frame: Frame  # tokens around question and context
    median: int  # tokens of a question with its context
    whole: bool  # whether answers are whole words
    silent: bool  # whether some questions have no answer
    threshold: float = 0.0

    @classmethod
    def match(cls, data: Data) -> str | None:
        columns = find_columns(data)
        named = columns and {columns.context.lower(), columns.question.lower()} == {"context", "question"}
        return (
            f"questions on texts and their answers in {columns.answers!r}"
            if named and not cls.missing_requirements(data) and data.target.name.lower().startswith("answer")
            else None
        )

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        columns = find_columns(data)
        if columns is None:
            return "a column `context` of texts and a column `question`"
        return None if columns.answers else "a column `answer` (name it with --target)"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        columns = find_columns(data, options.context, options.question)
        if columns is None:
            raise DataError(
                f"{data.source}: task.context and task.question name no columns of text that are there: "
                f"{', '.join(data.columns)}."
            )
        return prepare(data, columns)

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        columns = find_columns(data, options.context, options.question)
        task.options = options = replace(options, context=columns.context, question=columns.question)
        contexts, which = np.unique(np.array(task.contexts(data), dtype=object), return_inverse=True)
        questions = task.questions_of(data)
        task.text = (
            TextTokenizer.load(options.tokenizer)
            if options.tokenizer
            else TextTokenizer.fit([*contexts, *questions], size=options.vocab_size)
        )
        task.frame = framed(task.text)
        located = task.text.encode_with_spans(contexts.tolist())
        around = task.frame.size
        asked = [len(ids) for ids in task.text.encode_exact(questions)]
        sizes = [around + min(n, QUESTION) + len(located[i][0]) for n, i in zip(asked, which)]
        task.median = int(np.median(sizes))
        rows = [(contexts[i], located[i][1], a[0]) for i, a in zip(which, task.right(data)) if a]
        if not rows:
            raise DataError(f"{data.source}: no training question has an answer.")
        tokens = [1 + np.ptp(covering(spans, *ends(answer))) for _, spans, answer in rows]
        task.whole = float(np.mean([whole_words(context, *ends(answer)) for context, _, answer in rows])) >= WHOLE
        task.silent = len(rows) < len(data)
        length = options.length or suggest_length(sizes, MOST[device().type])
        if length < around + 16:
            raise DataError(
                f"task.length={length} has no room for a question and a piece of its context; {around + 16} at least."
            )
        task.options = fill_options(
            options,
            length=length,
            stride=length // 2,
            vocab_size=task.text.size,
            longest=int(max(30, 1.5 * np.quantile(tokens, 0.99))),
        )
        if task.options.stride < 1:
            raise DataError("task.stride is at least 1: windows must go on.")
        if long := sum(n > task.options.longest for n in tokens):
            task.notes.append(
                f"{long} training answers are longer than {task.options.longest} tokens, and answers so long are "
                "not given (task.longest=... changes that)"
            )
        if cut := sum(n > task.most_asked for n in asked):
            task.notes.append(f"{cut} questions are longer than {task.most_asked} tokens and are cut there")
        if several := sum(n > length for n in sizes):
            task.notes.append(
                f"{100 * several / len(sizes):.1f} % of the contexts are read in windows of {length} tokens, "
                f"each at most {task.options.stride} behind the last (task.length=... and task.stride=... "
                "change that)"
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

    def right(self, data: Data) -> list[list[dict[str, Any]]]:
        """The known answers of each row: {"text", "start"}."""
        return [row or [] for row in data.rows[self.target.name].to_list()]

    @property
    def most_asked(self) -> int:
        """Tokens of a question that are read."""
        return min(QUESTION, (self.options.length - self.frame.size) // 2)

    def read_one(self, source: Any, answered: bool) -> Data:
        if answered:
            data = super().read_one(source, answered)
            if self.target.name not in data.rows.columns:
                raise DataError(
                    f"{data.source}: the answers are to be in column {self.target.name!r}, which is not there. To "
                    "ask for answers, use `fieldguide predict`."
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
            raise DataError(f'{source[:40]!r} is a text: say what to ask of it: --set question="...".')
        else:
            data = super().read_one(source, answered)
        pairs = zip(self.contexts(data), self.questions_of(data))
        bad = np.array([not (context.strip() and question.strip()) for context, question in pairs], dtype=bool)
        if bad.all():
            raise DataError(f"{data.source}: every row has an empty context or question.")
        before = np.cumsum(~bad)
        data.skipped += [
            SkippedInput(int(before[row]), data.locate_row(int(row)), "its context or its question is empty")
            for row in np.flatnonzero(bad)
        ]
        return data.drop_rows(bad)

    def model_dims(self) -> dict[str, Any]:
        return {"vocab_size": self.text.size, "length": self.options.length}

    def data_facts(self) -> dict[str, Any]:
        length = self.options.length
        return {"vocab_size": self.text.size, "length": length, "tokens": min(self.median, length)}

    @property
    def most(self) -> int:
        return int(np.clip(2 ** int(np.log2(TOKENS / max(min(self.median, self.options.length), 1))), 16, 128))

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        also = ("segments",) if "segments" in card.optional_inputs else ()
        return SpanPrediction(model, (*card.inputs, *also), self.options.longest)

    # Windows

    def windows(self, data: Data) -> Windows:
        """Every window of every question."""
        contexts, which = np.unique(np.array(self.contexts(data), dtype=object), return_inverse=True)
        located = []
        for text, (ids, spans) in zip(contexts.tolist(), self.text.encode_with_spans(contexts.tolist())):
            located.append((ids, widened(text, spans) if self.whole else spans, spans))
        asked = [ids[: self.most_asked] for ids in self.text.encode_exact(self.questions_of(data))]
        rows = []
        for number, (ids, context) in enumerate(zip(asked, which)):
            room = self.options.length - self.frame.size - len(ids)
            # Windows overlap by the longest answer, or by half where they have little room, or an answer may be in none.
            stride = min(self.options.stride, max(room // 2, room - self.options.longest))
            rows += [(number, first) for first in starts(len(located[context][0]), room, stride)]
        number, first = np.array(rows, dtype=np.int64).reshape(-1, 2).T
        return Windows(self.text, self.frame, self.options.length, located, which, asked, number, first)

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Questions, each with all its windows."""
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
        """Windows: with the first of the answers, where one is wholly in it, else with none."""
        windows = self.windows(data)
        spots = windows.spots(self.right(data))

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            first, last = torch.from_numpy(spots[index]).unbind(1)
            return {**windows.batch(index), "first": first, "last": last}

        return Batches(len(windows.number), make, windows.sizes)

    def predict_batches(self, data: Data, card: Card) -> Batches:
        self.asked = self.contexts(data)
        return self.batches(data, card)

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Contexts, and tuples of the answers that are right; empty where there is none."""
        return {
            "context": objects(self.contexts(data)),
            "answers": objects([tuple(a["text"] for a in row) for row in self.right(data)]),
        }

    def postprocess(self, outputs: Arrays) -> Arrays:
        least = self.threshold if self.predict_options.threshold is None else self.predict_options.threshold
        given = outputs["end"] > outputs["begin"]
        if self.silent or self.predict_options.threshold is not None:
            given &= outputs["score"] - outputs["none"] > least
        return {**outputs, "given": given}

    def said(self, outputs: Arrays, contexts: Sequence[str], everything: bool = False) -> list[str]:
        """Answers as they stand in the contexts; `everything`: also those that were not given."""
        return [
            text[int(begin) : int(end)].strip() if given or everything else ""
            for text, begin, end, given in zip(contexts, outputs["begin"], outputs["end"], outputs["given"])
        ]

    def each(self, outputs: Arrays, truth: Arrays) -> np.ndarray:
        """Exact match and F1 of each question: N 2."""
        return measured.score_answers(self.said(outputs, truth["context"]), truth["answers"])

    def score(self, outputs: Arrays, truth: Arrays) -> dict[str, float]:
        outputs = outputs if "given" in outputs else self.postprocess(outputs)
        each = outputs["each"] if "each" in outputs else self.each(outputs, truth)
        none = np.array([not a for a in truth["answers"]], dtype=bool)
        mean = lambda values: float(values.mean()) if len(values) else float("nan")
        scores = {"f1": mean(each[:, 1]), "exact_match": mean(each[:, 0])}
        return {**scores, "answered": mean(each[~none, 1]), "unanswered": mean(each[none, 1])} if none.any() else scores

    def intervals(self, outputs: Arrays, truth: Arrays) -> dict[str, tuple[float, float]]:
        return super().intervals({**outputs, "each": self.each(outputs, truth)}, truth)  # scored once, not once a repeat

    def choices(self, outputs: Arrays, truth: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each question, how much better than none its best answer is, in nats; F1 if it is given; F1 if none is."""
        margin = np.clip(outputs["score"].astype(np.float64) - outputs["none"], -1e6, 1e6)
        given = self.each({**outputs, "given": outputs["end"] > outputs["begin"]}, truth)[:, 1]
        return margin, given, np.array([float(not answers) for answers in truth["answers"]])

    def calibrate(self, outputs: Arrays, truth: Arrays) -> None:
        if self.silent:
            self.threshold = measured.find_threshold(*self.choices(outputs, truth))

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        contexts = set(self.contexts(train))
        seen = Counter(word for text in contexts for word in set(words(text)))
        rare = lambda word: math.log((1 + len(contexts)) / (1 + seen[word]))
        near = np.array([nearest(*pair, rare) for pair in zip(self.questions_of(test), self.contexts(test))]).reshape(-1, 2)
        found = [
            Baseline(
                "nearest sentence",
                "the sentence that shares most with the question, its rare words counting more",
                {"begin": near[:, 0], "end": near[:, 1], "given": near[:, 1] > near[:, 0]},
            )
        ]
        if self.silent:
            nothing = np.zeros(len(test), dtype=np.int64)
            found.append(
                Baseline("no answer", "says that no question has one", {"begin": nothing, "end": nothing, "given": nothing > 0})
            )
        return found

    # Answers

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        records = []
        for text, begin, end, given, score, none in zip(
            self.asked,
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

    def exhibits(
        self, test: Data, outputs: Arrays, truth: Arrays, objective: Objective | None = None
    ) -> dict[str, list[Exhibit]]:
        from fieldguide.tasks.text import question_answering_report

        return question_answering_report.shown(self, test, outputs, truth)

    # Saved with the run

    @classmethod
    def published(cls, beside: CheckpointAssets) -> Self:
        """Every question is answered, unless `threshold` is named: from weights alone it cannot be seen whether some have no
        answer."""
        length = min(beside.length, PUBLISHED)
        options = cls.Options("context", "question", length=length, stride=length // 2, longest=LONGEST)
        return cls.from_state(
            [Column("context", "text"), Column("question", "text"), Column("answer", "list", "target")],
            options,
            {"median": 0, "whole": False, "silent": False, "threshold": 0.0},
            beside.folder,
        )

    def state(self) -> dict[str, Any]:
        return {"median": self.median, "whole": self.whole, "silent": self.silent, "threshold": self.threshold}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.text = TextTokenizer.load(folder)
        task.frame = framed(task.text)
        task.median, task.whole, task.silent, task.threshold = (state[k] for k in ("median", "whole", "silent", "threshold"))
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.text.save(folder)


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def nearest(question: str, context: str, rare: Callable[[str], float]) -> tuple[int, int]:
    """Where the sentence stands that has most of a question's words, rare ones counting more."""
    wanted = set(words(question))
    best = max(SENTENCE.finditer(context), key=lambda m: sum(map(rare, sorted(wanted & set(words(m.group()))))), default=None)
    return best.span() if best else (0, len(context))


def objects(values: Sequence[Any]) -> np.ndarray:
    """An array of anything, one an example."""
    array = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        array[place] = value
    return array


TASKS = (QuestionAnswering,)
