"""Scores of detectors that are trained from the start in the same minutes: blood cells (BCCD) and scattered digits.

    FIELDGUIDE_DATA=DATA python benchmarks/detector_scores.py [--networks yolov8-pico ...] [--data bccd scattered] [--minutes 3] [--save]

Each network is trained by `fit` with its own recipe; mAP is that of the test part, over overlaps from .5 to .95. Scores are not
timings, but a busy machine makes fewer steps in the same minutes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import make_parser, parse_options, report
from real_data import prepare

import fieldguide

NETWORKS = ("yolov8-pico", "yolo11-pico", "faster-rcnn-mini", "rt-detr-mini", "detr-mini")
DATA = ("bccd", "scattered")


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--data", nargs="*", default=list(DATA), choices=list(DATA))
    parser.add_argument("--minutes", type=float, default=3.0, help="of each fit")
    parser.add_argument("--seed", type=int, default=0)
    options = parse_options(parser)
    rows = []
    for data in options.data:
        source = prepare() / data if data == "bccd" else data
        for name in options.networks:
            with tempfile.TemporaryDirectory() as work:
                run = fieldguide.fit(
                    source,
                    task="object-detection",
                    model=name,
                    minutes=options.minutes,
                    seed=options.seed,
                    out=Path(work) / "run",
                )
                cost, scores = run.record["cost"], [f"{run.scores[name]:.3f}" for name in ("map", "map50")]
                rows.append((data, name, f"{cost['parameters']:,}", *scores, cost["steps"]))
            print(" | ".join(map(str, rows[-1])), flush=True)
    report(
        f"Detectors from the start, {options.minutes:g} minutes each",
        ("data", "network", "parameters", "mAP", "mAP50", "steps"),
        rows,
        options.save,
    )


if __name__ == "__main__":
    main()
