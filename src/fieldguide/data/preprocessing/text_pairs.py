"""Tables of texts that belong together: finding the columns, and one row per pair of an anchor and a positive.

Read are pairs (anchor, positive), triplets (with a negative), several negatives (columns `negative_1`, `negative_2`, ..., or one
column of lists, in a CSV as JSON text), several positives (a list), and pairs with a score. The names are those of
sentence-transformers, FlagEmbedding and of collections of queries and passages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.column_spec import ColumnSpec, normalize_name
from fieldguide.data.dataset import Column, Data, Finding, Kind
from fieldguide.data.preprocessing.qa_windows import name_variants
from fieldguide.data.validation import checks
from fieldguide.data.validation.findings import places

ANCHORS = ("anchor", "query", "question", "sentence1", "sentence_1", "sentence_a", "text1", "text_1", "premise")
POSITIVES = (
    *("positive", "positives", "pos", "passage", "document", "answer", "response", "context", "duplicate"),
    *("sentence2", "sentence_2", "sentence_b", "text2", "text_2", "hypothesis", "text"),
)
NEGATIVES = ("negative", "negatives", "neg", "hard_negative", "hard_negatives")
NUMBERED_NEGATIVE = re.compile(r"(hard_)?neg(ative)?s?_?\d+")
SCORES = ("score", "similarity", "similarity_score", "sim", "label", "relevance")
NEGATIVES_COLUMN = "#negatives"  # list of the negatives of a row
ANCHOR_GROUP = "same anchor"  # group column that keeps rows with equal anchors in the same split
MIN_NUMERIC_FRACTION = 0.9  # of the values of a column that holds scores
MAX_NUMBERED = 32  # numbered columns whose type is known by their name
TEXTS = pl.List(pl.String)


@dataclass(frozen=True)
class PairColumns:
    """The names of the columns: `score` is "" and `negatives` empty if there are none."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()
    score: str = ""


def find_columns(data: Data, anchor: str | None = None, positive: str | None = None) -> PairColumns | None:
    """Find the columns by name; if the data has exactly two other text columns, these in their order. None without a pair."""
    columns = {
        c.name: c for c in data.columns.values() if c.name in data.rows.columns and c.role in ("feature", "target", "ignored")
    }
    negatives = tuple(name for name in columns if is_negative(name) and name not in (anchor, positive))
    target = data.target.name if data.target else ""
    free = [name for name in columns if name not in negatives and name != target]
    anchor = anchor or find_name(ANCHORS, free)
    positive = positive or find_name(POSITIVES, [name for name in free if name != anchor])
    texts = [name for name in free if columns[name].kind == "text"]
    if not (anchor and positive) and len(texts) == 2:
        anchor = anchor or next(name for name in texts if name != positive)
        positive = next(name for name in texts if name != anchor)
    if not {anchor, positive} <= columns.keys():
        return None
    rest = [name for name in free if name not in (anchor, positive)]
    score = target or find_name(SCORES, [name for name in rest if holds_numbers(data.rows[name])])
    return PairColumns(str(anchor), str(positive), negatives, score)


def is_negative(name: str) -> bool:
    """Return whether the name of a column is one of negatives."""
    plain = normalize_name(name)
    return plain in NEGATIVES or NUMBERED_NEGATIVE.fullmatch(plain) is not None


def find_name(known: Sequence[str], among: Sequence[str]) -> str:
    """Return the first of the names that is known, by the order of the known ones; "" if none is."""
    return next((name for one in known for name in among if normalize_name(name) == one), "")


def holds_numbers(values: pl.Series) -> bool:
    """Return whether most values are numbers, true or false."""
    if values.dtype.is_nested() or not values.len():
        return False
    return (
        values.drop_nulls().len() > 0
        and to_numbers(values).drop_nulls().len() >= MIN_NUMERIC_FRACTION * values.drop_nulls().len()
    )


def to_numbers(values: pl.Series) -> pl.Series:
    """Return finite numbers; null for what is none."""
    numbers = values.cast(pl.Float64, strict=False)
    return pl.select(pl.when(numbers.is_finite()).then(numbers)).to_series()


def to_texts(value: Any) -> list[str] | None:
    """Return the texts of a cell: one text, a list, or a list written as JSON; None if that JSON is malformed."""
    if value is None:
        return []
    if isinstance(value, str) and value.lstrip().startswith('["'):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list):
        return [str(value)] if str(value).strip() else []
    if not all(one is None or isinstance(one, str) for one in value):
        return None
    return [one for one in value if one and one.strip()]


def simplify(text: str) -> str:
    """Return a text as it is compared with others: in lower case, with single spaces."""
    return " ".join(text.lower().split())


@dataclass
class Pairs:
    """The checked rows of a table: positives and negatives of each, scores (NaN without), unusable rows, and findings."""

    anchors: list[str]
    positives: list[list[str]]
    negatives: list[list[str]]
    scores: np.ndarray
    bad: np.ndarray
    findings: list[Finding]


def check_pairs(data: Data, columns: PairColumns) -> Pairs:
    """Read the texts of every row and collect findings."""
    count = len(data)
    seen = {key: np.zeros(count, dtype=bool) for key in ("anchor", "positive", "list", "score", "same", "both", "again")}
    anchors = [str(text or "") for text in data.rows[columns.anchor].to_list()]
    cells = [data.rows[name].to_list() for name in (columns.positive, *columns.negatives)]
    positives: list[list[str]] = []
    negatives: list[list[str]] = []
    known: set[tuple[str, ...]] = set()
    for row, (anchor, *values) in enumerate(zip(anchors, *cells)):
        texts = [to_texts(value) for value in values]
        seen["list"][row] = None in texts
        good, *others = [one or [] for one in texts]
        mine = {simplify(text) for text in good}
        wrong = [text for each in others for text in each]
        kept = [text for text in wrong if simplify(text) not in mine]
        seen["anchor"][row] = not anchor.strip()
        seen["positive"][row] = not good and texts[0] is not None
        seen["both"][row] = len(kept) < len(wrong)
        seen["same"][row] = bool(anchor.strip()) and simplify(anchor) in mine
        key = (simplify(anchor), *sorted(mine))
        seen["again"][row] = key in known
        known.add(key)
        positives.append(good)
        negatives.append(kept)
    scores = np.full(count, np.nan)
    if columns.score:
        scores = to_numbers(data.rows[columns.score]).fill_null(np.nan).to_numpy().copy()
        seen["score"] = np.isnan(scores)
        seen["both"][:] = False
    bad = seen["anchor"] | seen["positive"] | seen["list"] | seen["score"]
    return Pairs(anchors, positives, negatives, scores, bad, [*describe_problems(data, seen, columns, scores)])


def describe_problems(data: Data, seen: dict[str, np.ndarray], columns: PairColumns, scores: np.ndarray) -> Iterator[Finding]:
    """Yield the findings about the checked rows."""
    counted = np.zeros(len(data), dtype=bool)
    unusable = {
        "anchor": ("empty-anchor", f"rows with an empty {columns.anchor!r}", "Add the text or remove the rows."),
        "positive": ("empty-positive", f"rows without a text in {columns.positive!r}", "Add the text or remove the rows."),
        "list": (
            "malformed-list",
            "rows with a list of texts that is not valid JSON",
            'Write it as ["first text", "second text"], or use a column for each: negative_1, negative_2.',
        ),
        "score": (
            "no-score",
            f"rows without a number in {columns.score!r}",
            "Fill in the numbers or remove the rows.",
        ),
    }
    others = {
        "both": ("negative-is-positive", "rows whose negatives contain the positive; it is left out there", "Correct them."),
        "same": (
            "equal-texts",
            f"rows whose {columns.anchor!r} and {columns.positive!r} are equal; nothing can be learned from them",
            "Remove them.",
        ),
        "again": ("duplicate-pair", "rows that repeat an earlier pair", "Remove them; each counts twice."),
    }
    for key, (check, what, remedy) in {**unusable, **others}.items():
        rows = seen[key]
        if rows.any():
            lost = int((rows & ~counted).sum()) if key in unusable else 0
            counted |= rows & (key in unusable)
            yield Finding(check, "warning", what, places(data, rows), int(rows.sum()), remedy, lost)
    known = scores[~np.isnan(scores)]
    if columns.score and len(known) > 1 and known.min() == known.max():
        where = (f"column {columns.score!r}",)
        yield Finding(
            "equal-scores", "error", f"all scores are {known[0]:g}: nothing can be learned from them", where, 1,
            "If all rows are pairs that belong together, remove the column.",
        )  # fmt: skip


def check(data: Data) -> Iterator[Finding]:
    """Run the data checks for pairs of texts."""
    if columns := find_columns(data):
        yield from check_pairs(data, columns).findings


KINDS: dict[str, Kind] = {
    **name_variants(ANCHORS, "text"),
    **name_variants((*POSITIVES, *(f"{name}_{i}" for name in ("negative", "neg") for i in range(MAX_NUMBERED))), "text"),
    **name_variants(("negative", "neg", "hard_negative"), "text"),
    **name_variants(("positives", "pos", "negatives", "neg", "hard_negatives"), "list"),
}
COLUMN_SPEC = ColumnSpec("none", columns=KINDS, gaps=True, checks=(checks.check_duplicate_columns, check))


def prepare(data: Data, columns: PairColumns) -> Data:
    """Return one row per anchor and positive, with the negatives in a column of lists; unusable rows are left out."""
    found = check_pairs(data, columns)
    rows = np.repeat(np.arange(len(data)), [0 if bad else len(p) for p, bad in zip(found.positives, found.bad)])
    if not len(rows):
        raise DataError(f"{data.source}: no row has a text in both {columns.anchor!r} and {columns.positive!r}.")
    positives = [text for row, bad in zip(found.positives, found.bad) if not bad for text in row]
    made = data.take(rows)
    made.rows = made.rows.with_columns(
        pl.Series(columns.anchor, [found.anchors[i] for i in rows], dtype=pl.String),
        pl.Series(columns.positive, positives, dtype=pl.String),
        pl.Series(NEGATIVES_COLUMN, [found.negatives[i] for i in rows], dtype=TEXTS),
        pl.Series(ANCHOR_GROUP, [simplify(found.anchors[i]) for i in rows], dtype=pl.String),
        *([pl.Series(columns.score, found.scores[rows])] if columns.score else []),
    )
    used = {columns.anchor, columns.positive}
    kept = {c.name: c if c.name in used or c.role != "feature" else replace(c, role="ignored") for c in data.columns.values()}
    kept |= {name: replace(kept[name], role="feature") for name in used}
    if columns.score:
        kept[columns.score] = replace(kept[columns.score], kind="number", role="target")
    kept[ANCHOR_GROUP] = Column(ANCHOR_GROUP, "category", "group", "derived from the anchor")
    made.columns = kept
    lost = data.drop_rows(found.bad).manifest if found.bad.any() else data.manifest
    made.manifest = lost
    checked = {f.check for f in data.findings}
    made.findings = data.findings + [f for f in found.findings if f.check not in checked]
    return made


# Candidates of queries

PASSAGES_COLUMN, RELEVANCE_COLUMN = "#passages", "#relevance"  # lists of the candidates of a query


@dataclass(frozen=True)
class CandidateColumns:
    """What the rows of queries were made from: the names of the columns of queries and passages, and all columns."""

    query: str
    passage: str
    columns: dict[str, Column]


def group_candidates(data: Data, columns: PairColumns) -> Data:
    """Return one row per query, with its passages and their relevance as lists; unusable rows are left out.

    The relevance is the score of a row, or 1 for positives and 0 for negatives. A query is in the split of its first row. Raises
    `DataError` if there are neither scores nor negatives.
    """
    if not columns.score and not columns.negatives:
        raise DataError(
            f"{data.source}: there is neither a column of labels nor one of negatives. Add a column label (1 relevant, 0 not) or "
            "negative; or learn embeddings from the pairs with --task text-embedding."
        )
    found = check_pairs(data, columns)
    firsts: dict[str, int] = {}
    passages: dict[str, dict[str, tuple[str, float]]] = {}  # by query and simplified text
    mixed, conflicts = np.zeros(len(data), dtype=bool), np.zeros(len(data), dtype=bool)
    for row in np.flatnonzero(~found.bad).tolist():
        query = simplify(found.anchors[row])
        first = firsts.setdefault(query, row)
        mixed[row] = data.splits is not None and data.splits[row] != data.splits[first]
        mine = passages.setdefault(query, {})
        positive = 1.0 if np.isnan(found.scores[row]) else float(found.scores[row])
        for text, relevance in [(t, positive) for t in found.positives[row]] + [(t, 0.0) for t in found.negatives[row]]:
            known = mine.setdefault(simplify(text), (text, relevance))
            conflicts[row] |= known[1] != relevance
            mine[simplify(text)] = known[0], max(known[1], relevance)
    if not firsts:
        raise DataError(f"{data.source}: no row has a text in both {columns.anchor!r} and {columns.positive!r}.")
    made = data.take(list(firsts.values()))
    listed = [list(passages[query].values()) for query in firsts]
    made.rows = made.rows.drop(columns.positive, *columns.negatives, *([columns.score] if columns.score else [])).with_columns(
        pl.Series(columns.anchor, [found.anchors[row] for row in firsts.values()], dtype=pl.String),
        pl.Series(PASSAGES_COLUMN, [[text for text, _ in row] for row in listed], dtype=TEXTS),
        pl.Series(RELEVANCE_COLUMN, [[value for _, value in row] for row in listed], dtype=pl.List(pl.Float64)),
    )
    used = {columns.anchor, columns.positive}
    kept = {c.name: c if c.name in used or c.role != "feature" else replace(c, role="ignored") for c in data.columns.values()}
    kept |= {name: replace(kept[name], role="feature") for name in used}
    if columns.score:
        kept[columns.score] = replace(kept[columns.score], kind="number", role="target")
    made.context = CandidateColumns(columns.anchor, columns.positive, kept)
    made.columns = {name: column for name, column in kept.items() if name in made.rows.columns}
    made.manifest = data.drop_rows(found.bad).manifest
    checked = {f.check for f in data.findings}
    made.findings = data.findings + [f for f in found.findings if f.check not in checked]
    moved = "rows in another split than the first row of their query; they are moved there"
    doubted = "rows whose passage has another label for the same query; the higher one is used"
    for check, rows, what, remedy in (
        ("mixed-splits", mixed, moved, "Split by query."),
        ("conflicting-labels", conflicts, doubted, "Correct them."),
    ):
        if rows.any():
            made.findings.append(Finding(check, "warning", what, places(data, rows), int(rows.sum()), remedy))
    return made
