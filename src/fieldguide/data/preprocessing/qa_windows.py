"""Question answering tables: finding the columns, and locating answers in their contexts.

Answers in any layout are converted to one list per row of the exact text in the context and its first character:
`[{"text": "Paris", "start": 12}, ...]`, empty if the context contains no answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from fieldguide.data.column_spec import ColumnSpec, normalize_name
from fieldguide.data.dataset import Column, Data, Finding, Kind, Severity
from fieldguide.data.validation import checks
from fieldguide.data.validation.findings import places

CONTEXTS = ("context", "passage", "paragraph", "document", "article", "text")
QUESTIONS = ("question", "query")
ANSWERS = ("answers", "answer", "answer_text", "answers.text", "answer.text")
STARTS = ("answer_start", "answers.answer_start", "answer.answer_start", "answer_offset")
IDS = ("id", "qid", "question_id")
IMPOSSIBLE = ("is_impossible", "impossible", "unanswerable")
CONTEXT_GROUP = "same context"  # group column that keeps rows with equal contexts in the same split
UNUSABLE_PROBLEMS = {"context", "question", "lost"}  # problems that make a row unusable
ANSWER = pl.List(pl.Struct({"text": pl.String, "start": pl.Int64}))


def answers_type(values: pl.Series) -> Kind:
    """Return the type of an answers column."""
    return "list" if values.dtype.is_nested() else "text"


def name_variants(names: tuple[str, ...], kind: Kind) -> dict[str, Kind]:
    """Map names in lower case, capitalized and upper case to a type."""
    return {form: kind for name in names for form in (name, name.capitalize(), name.upper())}


@dataclass(frozen=True)
class Columns:
    """Column names of a question answering table; "" for optional columns that are absent."""

    context: str
    question: str
    answers: str = ""
    start: str = ""
    id: str = ""
    impossible: str = ""


def find_columns(data: Data, context: str | None = None, question: str | None = None) -> Columns | None:
    """Find the columns by name; if there are two text columns with other names, the shorter one holds the questions.

    Returns None if context and question cannot be determined.
    """
    names = [c.name for c in data.columns.values() if c.name in data.rows.columns and c.role != "target"]
    texts = [c.name for c in data.columns.values() if c.kind == "text" and c.name in names]
    first = lambda known, among: next((n for k in known for n in among if normalize_name(n) == k or n == k), "")
    question = question or first(QUESTIONS, names)
    context = context or first(CONTEXTS, [n for n in names if n != question])
    if len(texts) == 2 and not (question and context):
        length = lambda name: data.rows[name].str.len_chars().mean() or 0
        question = question or min((n for n in texts if n != context), key=length)
        context = context or next(n for n in texts if n != question)
    if not {context, question} <= set(names):
        return None
    target = data.target.name if data.target and data.target.name in data.rows.columns else ""
    return Columns(context, question, target, first(STARTS, names), first(IDS, names), first(IMPOSSIBLE, names))


def parse_answers(value: Any, start: Any) -> list[tuple[str, int | None]]:
    """Return the answers in a cell of any layout as (text, first character or None)."""
    if isinstance(value, dict):  # {"text": ..., "answer_start": ...}, possibly lists
        return parse_answers(value.get("text"), value.get("answer_start", value.get("start", start)))
    if value is None:
        return []
    if not isinstance(value, list):
        start = start[0] if isinstance(start, list) and start else start
        return [(str(value), int(start) if isinstance(start, int | float) else None)]
    if not (isinstance(start, list) and len(start) == len(value)):
        start = [start if len(value) == 1 else None] * len(value)
    return [pair for one, begin in zip(value, start) for pair in parse_answers(one, begin)]


def find_occurrence(text: str, context: str, near: int | None) -> int:
    """Return the position of a text in a context, the closest to `near` if given, else the first; -1 if not found."""
    if near is None:
        return context.find(text)
    after, before = context.find(text, max(near, 0)), context.rfind(text, 0, max(near, 0) + len(text))
    found = [at for at in (before, after) if at >= 0]
    return min(found, key=lambda at: abs(at - near)) if found else -1


@dataclass
class CheckedTable:
    """The result of checking a table: normalized answers, a mask of unusable rows, and findings."""

    answers: list[list[dict[str, Any]]]
    bad: np.ndarray
    findings: list[Finding]


def check_answers(data: Data, columns: Columns) -> CheckedTable:
    """Locate every row's answers in its context and collect findings."""
    rows = data.rows
    texts = [rows[name].fill_null("").to_list() for name in (columns.context, columns.question)]
    starts = rows[columns.start].to_list() if columns.start else [None] * len(data)
    values = rows[columns.answers].to_list() if columns.answers else [None] * len(data)
    none = (
        rows[columns.impossible].cast(pl.String).str.to_lowercase().is_in(["true", "1", "1.0", "yes"]).to_list()
        if columns.impossible
        else [False] * len(data)
    )
    answers, seen = (
        [],
        {k: np.zeros(len(data), dtype=bool) for k in ("context", "question", "lost", "moved", "many", "silent", "both")},
    )
    for row, (context, question, value, start, impossible) in enumerate(zip(*texts, values, starts, none)):
        seen["context"][row], seen["question"][row] = not context.strip(), not question.strip()
        wanted, kept = (
            [(t.strip(), s if s is None else s + len(t) - len(t.lstrip())) for t, s in parse_answers(value, start)],
            [],
        )
        wanted = [(text, at) for text, at in wanted if text]
        seen["both"][row] = bool(wanted and impossible)
        for text, at in [] if impossible else wanted:
            place = at if at is not None and at >= 0 and context.startswith(text, at) else find_occurrence(text, context, at)
            if place < 0 and len(context.lower()) == len(context):
                place = find_occurrence(text.lower(), context.lower(), at)
            if place >= 0:
                seen["moved"][row] |= at is not None and place != at
                seen["many"][row] |= at is None and context.find(text, place + 1) >= 0
                kept.append({"text": context[place : place + len(text)], "start": place})
        seen["lost"][row] = bool(wanted) and not kept and not impossible
        seen["silent"][row] = not wanted and not impossible and not columns.impossible
        answers.append(kept)
    return CheckedTable(
        answers, np.any([seen[key] for key in sorted(UNUSABLE_PROBLEMS)], axis=0), [*make_findings(data, seen, columns)]
    )


def make_findings(data: Data, seen: dict[str, np.ndarray], columns: Columns) -> Iterator[Finding]:
    """Yield the findings about the checked rows."""
    counted = np.zeros(len(data), dtype=bool)

    def report(key: str, check: str, what: str, remedy: str, severity: Severity = "warning") -> Iterator[Finding]:
        nonlocal counted
        rows, unusable = seen[key], key in UNUSABLE_PROBLEMS
        if rows.any():
            lost = int((rows & ~counted).sum()) if unusable else 0
            counted |= rows & unusable
            yield Finding(check, severity, what, places(data, rows), int(rows.sum()), remedy, lost)

    yield from report("context", "empty-context", "questions with an empty context", "Add the text or remove the rows.")
    yield from report("question", "empty-question", "rows with an empty question", "Add the question or remove the rows.")
    yield from report(
        "lost",
        "answer-not-there",
        "answers that do not occur literally in their context",
        "An answer must be a part of the context. For answers in other words, use a text generation task.",
    )
    yield from report(
        "moved",
        "answer-moved",
        f"answers that do not begin at {columns.start or 'answer_start'!r}; the closest occurrence is used",
        "Positions count characters (not bytes) from 0 in the original context.",
    )
    yield from report(
        "both",
        "answer-to-impossible",
        "questions marked as unanswerable that have an answer; treated as unanswerable",
        "Correct the mark or the answer.",
    )
    yield from report(
        "many",
        "answer-many-times",
        "answers without a start that occur several times in their context; the first occurrence is used",
        "Add a column answer_start.",
        "note",
    )
    if columns.answers:
        yield from report(
            "silent",
            "no-answer",
            "questions without an answer; treated as unanswerable",
            "If so, mark them in a column is_impossible. Otherwise add the answers.",
            "note",
        )
    if columns.id:
        again = ~data.rows.select(pl.col(columns.id).is_first_distinct() | pl.col(columns.id).is_null()).to_series().to_numpy()
        seen["again"] = again
        yield from report(
            "again",
            "duplicate-id",
            f"questions with a duplicate {columns.id!r}",
            "Check for joined files or copied rows. Each question is counted.",
        )


def check(data: Data) -> Iterator[Finding]:
    """Run the data checks for question answering."""
    if columns := find_columns(data):
        yield from check_answers(data, columns).findings


COLUMN_SPEC = ColumnSpec(
    "named",
    names=ANSWERS,
    kinds={"target": answers_type},
    gaps=True,
    checks=(*checks.CHECKS, check),
    columns={
        **name_variants(CONTEXTS, "text"),
        **name_variants(QUESTIONS, "text"),
        "answer_start": "number",
        "answers.answer_start": "list",
        "answer.answer_start": "list",
    },
)


def prepare(data: Data, columns: Columns) -> Data:
    """Return the table with normalized answers and without unusable rows; only context and question remain features."""
    seen = check_answers(data, columns)
    codes = data.rows[columns.context].rank("dense").cast(pl.Int64)
    name = columns.answers or "answers"
    rows = data.rows.with_columns(pl.Series(name, seen.answers, dtype=ANSWER), codes.alias(CONTEXT_GROUP))
    inputs = {columns.context, columns.question}
    kept = {c.name: c if c.name in inputs or c.role != "feature" else replace(c, role="ignored") for c in data.columns.values()}
    kept |= {
        name: Column(name, "list", "target", "answers located in the context"),
        CONTEXT_GROUP: Column(CONTEXT_GROUP, "category", "group", "derived from the context"),
    }
    known = {f.check for f in data.findings}
    whole = replace(data, rows=rows, columns=kept, findings=data.findings + [f for f in seen.findings if f.check not in known])
    return whole.drop_rows(seen.bad)
