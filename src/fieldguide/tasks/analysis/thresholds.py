"""Decisions between two classes: the ROC curve, and scores by threshold."""

from __future__ import annotations

import numpy as np

from fieldguide.core.report_elements import Lines, ReportElement, Table

MAX_CURVE_POINTS = 400
LISTED_THRESHOLDS = (0.1, 0.25, 0.5, 0.75, 0.9)


def build_thresholds(
    probability: np.ndarray, positive: np.ndarray, name: str, used: float | None = None
) -> list[ReportElement]:
    """Return the ROC curve and the scores by threshold of the class `name`; nothing if only one class occurs.

    `used` is the threshold of predictions, if it is not one half.
    """
    total, others = int(positive.sum()), int((~positive).sum())
    if not total or not others:
        return []
    order = np.argsort(-probability, kind="stable")
    falling = probability[order]
    ends = np.flatnonzero(np.append(np.diff(falling) != 0, True))  # equal probabilities share a threshold
    hits, alarms = np.cumsum(positive[order])[ends], np.cumsum(~positive[order])[ends]
    recall, false_rate, precision = hits / total, alarms / others, hits / (hits + alarms)
    f1 = 2 * hits / (hits + alarms + total)
    area = float(np.trapezoid(np.append(0, recall), np.append(0, false_rate)))
    keep = np.unique(np.linspace(0, len(ends) - 1, MAX_CURVE_POINTS).round().astype(int))
    best = int(f1.argmax())
    at = falling[ends][keep]
    rows = []
    listed = [*((t, "") for t in LISTED_THRESHOLDS), (float(falling[ends][best]), "highest F1")]
    listed += [(used, "used for predictions")] if used is not None else []
    for threshold, note in listed:
        said = probability >= threshold
        right, count = int((said & positive).sum()), int(said.sum())
        rows.append(
            (
                f"{threshold:.3g}",
                count,
                right / count if count else float("nan"),
                right / total,
                int((said & ~positive).sum()) / others,
                2 * right / (count + total),
                note,
            )
        )
    rows.sort(key=lambda row: float(row[0]))
    return [
        Lines(
            "ROC curve",
            f"How many of the {total:,} examples of {name!r} are found, and how many of the {others:,} others are taken for it, "
            f"over all thresholds. The area is {area:.3f}; the diagonal is chance.",
            x="false positive rate",
            y="true positive rate",
            lines={"this model": (np.append(0, false_rate[keep]), np.append(0, recall[keep]))},
            diagonal=True,
        ),
        Lines(
            "Scores by threshold",
            f"An example counts as {name!r} from this probability on.",
            x="threshold",
            lines={"precision": (at, precision[keep]), "recall": (at, recall[keep]), "F1": (at, f1[keep])},
            marks={
                "used" if used is not None else "0.5": 0.5 if used is None else used,
                "highest F1": float(falling[ends][best]),
            },
        ),
        Table(
            "Thresholds",
            f"Choose a high threshold if false {name!r} cost more than missed ones, and a low one otherwise. The threshold with the "
            "highest F1 is chosen on these test rows, so its scores are slightly too high."
            + (" The one that is used was chosen on validation rows." if used is not None else ""),
            ("threshold", "predicted", "precision", "recall", "false positive rate", "F1", ""),
            rows,
            heat=("F1",),
        ),
    ]
