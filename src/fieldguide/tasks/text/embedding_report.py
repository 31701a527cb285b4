"""Report elements of text embedding: retrieved passages, ranks, and similarities by score."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fieldguide.core.report_elements import Bars, ReportElement, Scatter, Table
from fieldguide.data.dataset import Data
from fieldguide.metrics.ranking import score_queries
from fieldguide.tasks.base import Arrays

if TYPE_CHECKING:
    from fieldguide.tasks.text.text_embedding import TextEmbedding

SHOWN, SHOWN_CHARACTERS = 20, 240  # rows of a table, and characters of a text
RANKS = ((1, 1), (2, 5), (6, 10), (11, 100), (101, 10**9))
MAX_POINTS = 500


def describe_retrieval(task: TextEmbedding, test: Data, outputs: Arrays, targets: Arrays) -> dict[str, list[ReportElement]]:
    """Return the distribution of ranks, and anchors with the passages that they find."""
    from fieldguide.tasks.text.text_embedding import list_passages, take_distinct

    _, rank = task.rank(outputs, targets)
    ids, vectors = list_passages(outputs, targets)
    passages, candidates = take_distinct(ids, vectors)
    found = task.number_texts(test)
    names = dict(zip(found.positive_ids.tolist(), found.positives))
    for row, texts in zip(targets["negatives"], found.negatives):
        names |= {int(i): text for i, text in zip(row, texts) if i >= 0}
    right = set(zip(found.anchor_ids.tolist(), found.positive_ids.tolist()))
    first = np.unique(found.anchor_ids, return_index=True)[1]

    def describe(row: int) -> tuple[str, str, str, str, str, float]:
        anchor = int(found.anchor_ids[row])
        near = candidates @ outputs["anchor"][row]
        near[passages == anchor] = -np.inf
        best = int(passages[near.argmax()])
        hit = (anchor, best) in right
        return (
            test.locate_row(row),
            shorten(found.anchors[row]),
            shorten(found.positives[row]),
            "the right one" if hit else shorten(names[best]),
            f"{near.max():.2f}",
            float(near.max() - outputs["anchor"][row] @ outputs["positive"][row]),
        )

    sample = np.random.default_rng(0).permutation(first)[: 10 * SHOWN]
    rows = [describe(int(row)) for row in sample]
    worst = sorted((row for row in rows if row[3] != "the right one"), key=lambda row: -row[5])[:SHOWN]
    header = ("row", task.options.anchor, task.options.positive, "found first", "similarity")
    elements: list[ReportElement] = [
        Bars(
            "Rank of the right passage",
            f"Fraction of the {len(rank):,} test pairs by the rank among {len(passages):,} passages.",
            {
                f"{low}" if low == high else f"{low} to {high}" if high < 10**9 else f"above {low - 1}": float(
                    ((rank >= low) & (rank <= high)).mean()
                )
                for low, high in RANKS
            },
        ),
    ]
    if task.widths:
        elements.append(compare_widths(task, outputs, targets))
    if worst:
        elements.append(
            Table(
                "Wrong passages first",
                f"Of {len(rows)} random anchors, those with a much nearer wrong passage: mistakes, or passages that fit as well.",
                header,
                [row[:5] for row in worst],
            )
        )
    elements.append(Table("Random anchors", "", header, [row[:5] for row in rows[:SHOWN]]))
    return {"Retrieval": elements}


def compare_widths(task: TextEmbedding, outputs: Arrays, targets: Arrays) -> ReportElement:
    """Return the scores with the first numbers of the vectors."""
    rows = []
    for width in dict.fromkeys((*task.widths, outputs["anchor"].shape[1])):
        cut = {
            name: x[..., :width] / np.maximum(np.linalg.norm(x[..., :width], axis=-1, keepdims=True), 1e-12)
            for name, x in outputs.items()
        }
        each = score_queries(*task.rank(cut, targets))
        rows.append((width, float(each["ndcg_10"].mean()), float(each["recall_1"].mean())))
    return Table("Shorter vectors", "Only the first numbers of each vector are used.", ("numbers", "NDCG@10", "recall@1"), rows)


def describe_scores(task: TextEmbedding, test: Data, outputs: Arrays, targets: Arrays) -> dict[str, list[ReportElement]]:
    """Return cosine similarities next to scores, and the pairs that differ most."""
    from fieldguide.tasks.text.text_embedding import compute_cosines

    cosine, score = compute_cosines(outputs), targets["score"]
    expected = (score - task.low) / (task.high - task.low)
    some = np.random.default_rng(0).permutation(len(score))[:MAX_POINTS]
    worst = np.argsort(-np.abs(cosine - expected), kind="stable")[:SHOWN]
    texts = [test.rows[name].to_list() for name in (task.options.anchor, task.options.positive)]
    rows = [
        (test.locate_row(int(i)), *(shorten(column[i]) for column in texts), f"{score[i]:g}", f"{cosine[i]:.2f}") for i in worst
    ]
    return {
        "Similarity": [
            Scatter(
                "Similarities and scores",
                "Random test pairs: the score in the data, and the cosine similarity of the vectors.",
                x="score",
                y="cosine similarity",
                points=[(float(score[i]), float(cosine[i])) for i in some],
            ),
            Table(
                "Largest differences",
                "Test pairs whose cosine similarity is farthest from the score.",
                ("row", task.options.anchor, task.options.positive, "score", "similarity"),
                rows,
            ),
        ]
    }


def shorten(text: str) -> str:
    """Return a text on one line, and its beginning if it is long."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS].rsplit(" ", 1)[0] + " …"
