"""Report elements of extractive question answering: scores by question type, answer length and threshold, and
mistakes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from fieldguide.core.report_elements import Bars, Lines, Quote, Quotes, ReportElement, Table
from fieldguide.data.dataset import Data
from fieldguide.tasks.base import Arrays
from fieldguide.tasks.text.windows import answer_span

if TYPE_CHECKING:
    from fieldguide.tasks.text.question_answering import QuestionAnswering

SHOWN, SHOWN_CORRECT, AROUND = 24, 8, 160  # answers in the report, correct ones, and characters of context on either side


def build_elements(task: QuestionAnswering, test: Data, outputs: Arrays, targets: Arrays) -> dict[str, list[ReportElement]]:
    each, right = task.score_questions(outputs, targets), task.known_answers(test)
    table = pl.DataFrame(
        {"kind": [" ".join(q.lower().split()[:2]) for q in task.questions_of(test)], "exact": each[:, 0], "f1": each[:, 1]}
    )
    kinds = [
        (name[0], len(rows), rows.select(pl.mean("exact")).item(), rows.select(pl.mean("f1")).item())
        for name, rows in table.group_by("kind", maintain_order=True)
    ]
    length = np.array([len(a[0]["text"].split()) if a else 0 for a in right])
    groups = {
        "no answer": length == 0,
        "1 word": length == 1,
        "2 words": length == 2,
        "3 to 5 words": (length > 2) & (length < 6),
        "6 to 10 words": (length > 5) & (length < 11),
        "more": length > 10,
    }
    elements: list[ReportElement] = [
        Table(
            "By question word",
            "Test questions; rare types are left out.",
            ("question", "examples", "exact", "F1"),
            sorted(kinds, key=lambda row: -row[1])[:20],
            heat=("exact", "F1"),
        ),
        Bars(
            "F1 by length of the answer",
            "Length of the first answer in the data.",
            {name: float(each[rows, 1].mean()) for name, rows in groups.items() if rows.any()},
        ),
    ]
    if task.silent:
        elements.append(threshold_curve(task, outputs, targets))
    return {"Questions": elements, "Answers": show_answers(task, test, outputs, each)}


def threshold_curve(task: QuestionAnswering, outputs: Arrays, targets: Arrays) -> ReportElement:
    """Return F1 by the threshold on the margin over no answer."""
    margin, given, none = task.margins_and_f1(outputs, targets)
    at = np.unique(np.quantile(margin, np.linspace(0, 1, 50)))
    f1 = [float(np.where(margin > edge, given, none).mean()) for edge in at]
    return Lines(
        "Threshold for answering",
        "F1 on the test questions by the margin over no answer that an answer needs. The mark was chosen "
        "on the validation questions.",
        x="threshold (nats)",
        y="F1",
        lines={"F1": (at.tolist(), f1)},
        marks={"chosen": task.threshold},
    )


def show_answers(task: QuestionAnswering, test: Data, outputs: Arrays, each: np.ndarray) -> list[ReportElement]:
    """Return wrong answers with the highest confidence next to correct ones, in their contexts."""
    contexts, questions, right = task.contexts(test), task.questions_of(test), task.known_answers(test)
    sure = np.where(outputs["given"], outputs["score"], outputs["none"])
    said = task.answer_texts(outputs, contexts)

    def quote(row: int) -> Quote:
        spot = answer_span(right[row][0]) if right[row] else (int(outputs["begin"][row]), int(outputs["end"][row]))
        known = "; ".join(dict.fromkeys(a["text"] for a in right[row])) or "no answer"
        caption = (
            f"{questions[row]} · predicted: {said[row] or 'no answer'} ({100 * np.exp(sure[row]):.0f} % confident)"
            + (f" · target: {known}" if each[row, 1] < 1 else "")
            + f" · {test.locate_row(row)}"
        )
        return Quote(mark_span(contexts[row], *spot), caption, bad=bool(each[row, 1] < 1))

    order = [int(row) for row in np.lexsort((-sure, each[:, 1])) if each[row, 1] < 1]
    correct = np.random.default_rng(0).permutation(np.flatnonzero(each[:, 0] >= 1))[:SHOWN_CORRECT]
    shown = [
        Quotes(
            "Lowest F1",
            "Test questions with the lowest F1, most confident first. ⟦ ⟧ marks the answer in the data, or the prediction if there "
            "is none.",
            [quote(row) for row in order[:SHOWN]],
        ),
        Quotes("Correct answers", "Random test questions.", [quote(int(row)) for row in correct]),
    ]
    return [quotes for quotes in shown if quotes.quotes]


def mark_span(text: str, begin: int, end: int) -> str:
    """Return a piece of a text in brackets, with the text around it."""
    before, behind = text[max(0, begin - AROUND) : begin], text[end : end + AROUND]
    before, behind = ("… " if begin > AROUND else "") + before, behind + (" …" if end + AROUND < len(text) else "")
    return f"{before}⟦{text[begin:end]}⟧{behind}"
