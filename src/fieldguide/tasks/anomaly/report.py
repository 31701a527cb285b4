"""Report elements of anomaly detection: scores of normal examples and anomalies, alarms over time, what they are due to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fieldguide.core.report_elements import Bars, Lines, Numbers, ReportElement, Table
from fieldguide.metrics.anomalies import count_at_thresholds

LISTED_EXAMPLES = 20
SHOWN_SERIES = 3
MAX_SHOWN_STEPS = 1500
BINS = 40


def draw_scores(score: np.ndarray, label: np.ndarray) -> Lines:
    """Return the distribution of the logarithm of the scores."""
    logs = np.log10(np.maximum(score, 1e-4))
    edges = np.linspace(logs.min(), max(logs.max(), logs.min() + 1e-6), BINS + 1)
    middle = 10 ** ((edges[1:] + edges[:-1]) / 2)
    groups = {"normal": label == 0, "anomaly": label == 1} if (label == 1).any() else {"examples": np.ones(len(label), bool)}
    lines: dict[str, tuple[Numbers, Numbers]] = {
        name: (np.log10(middle), np.histogram(logs[mask], edges)[0] / max(mask.sum(), 1)) for name, mask in groups.items()
    }
    return Lines(
        "Scores",
        "How often each score occurs among the test examples. Above the threshold, at 0, is an alarm.",
        x="logarithm of score / threshold",
        y="fraction",
        lines=lines,
        marks={"threshold": 0.0},
    )


def draw_precision(curves: Mapping[str, np.ndarray], label: np.ndarray) -> Lines:
    """Return precision against recall of several detectors."""
    known = label >= 0
    is_anomaly = label[known] == 1
    lines = {}
    for name, score in curves.items():
        hits, flagged = count_at_thresholds(score[known], is_anomaly)
        keep = np.unique(np.linspace(0, len(hits) - 1, 200).round().astype(int))
        lines[name] = (hits[keep] / is_anomaly.sum(), hits[keep] / flagged[keep])
    return Lines(
        "Precision and recall",
        "Each point is a threshold: the fraction of anomalies above it, and the fraction of alarms that are anomalies.",
        x="recall",
        y="precision",
        lines=lines,
    )


def list_examples(
    places: Sequence[str],
    score: np.ndarray,
    label: np.ndarray,
    reasons: Sequence[str],
    cells: Sequence[Sequence[Any]],
    header: Sequence[str],
) -> list[ReportElement]:
    """Return the highest scores, and the anomalies with the lowest."""
    words = {1: "anomaly", 0: "normal", -1: ""}
    row = lambda i: (places[i], float(score[i]), words[int(label[i])], reasons[i], *cells[i])
    head = ("row", "score", "label", "mostly due to", *header)
    order = np.argsort(-score, kind="stable")
    found: list[ReportElement] = [
        Table(
            "Highest scores",
            "The most unusual test examples. Of those labeled normal: is the alarm wrong, or the label?",
            head,
            [row(i) for i in order[:LISTED_EXAMPLES]],
        )
    ]
    missed = [i for i in order[::-1] if label[i] == 1 and score[i] < 1][:LISTED_EXAMPLES]
    if missed:
        found.append(
            Table("Missed anomalies", "Anomalies with the lowest scores, below the threshold.", head, [row(i) for i in missed])
        )
    return found


def draw_causes(shares: np.ndarray, names: Sequence[str], alarm: np.ndarray) -> list[ReportElement]:  # B F, B bool
    """Return the mean share of each column in the scores of alarms."""
    if not alarm.any() or len(names) < 2:
        return []
    means = 100 * shares[alarm].mean(0)
    order = np.argsort(-means)[:30]
    return [
        Bars(
            "What alarms are due to",
            "Mean share of each column in the score of the alarms.",
            {names[i]: float(means[i]) for i in order},
            unit="%",
        )
    ]


def draw_timeline(
    names: Sequence[str], score: np.ndarray, label: np.ndarray, values: np.ndarray, channels: Sequence[str]
) -> list[ReportElement]:
    """Return the score over time for some series, most alarms first; `values` B C are standardized."""
    found: list[ReportElement] = []
    series = np.array(names)
    alarms = {name: int(((series == name) & (score >= 1)).sum()) for name in dict.fromkeys(names)}
    for name in sorted(alarms, key=lambda n: -alarms[n])[:SHOWN_SERIES]:
        rows = np.flatnonzero(series == name)
        first = 0
        if len(rows) > MAX_SHOWN_STEPS:  # the stretch with the most alarms
            counts = np.convolve(score[rows] >= 1, np.ones(MAX_SHOWN_STEPS), "valid")
            first = int(counts.argmax())
            rows = rows[first : first + MAX_SHOWN_STEPS]
        x = first + np.arange(len(rows))
        lines: dict[str, tuple[Numbers, Numbers]] = {
            "logarithm of score / threshold": (x, np.log10(np.maximum(score[rows], 1e-2)))
        }
        if (label[rows] == 1).any():
            lines["labeled as anomaly"] = (x, np.where(label[rows] == 1, 1.0, np.nan))
        faint = list(channels[:3])
        lines |= {channel: (x, np.clip(values[rows, i], -6, 6) / 2 - 4) for i, channel in enumerate(faint)}
        found.append(
            Lines(
                f"Alarms over time{': ' + name if name else ''}",
                "Above 0 is an alarm. Below are the channels, standardized and shifted.",
                x="test step",
                lines=lines,
                faint=faint,
            )
        )
    return found
