"""Scores of recommendation networks over all items, next to published figures: Beauty, LastFM and MovieLens-100k.

    FIELDGUIDE_DATA=DATA python benchmarks/recommender_scores.py [--data beauty lastfm ml-100k] [--networks sasrec hstu ...]
        [--minutes 10] [--epochs 200] [--seeds 1] [--ml-100k ml-100k.inter] [--save]

The last item of each user is the test, the last but one the validation; all items are ranked, except those of the history. Every
network reads 50 items. Published figures are those of SASRec in the same setting (leave one out, all items ranked): those of the
authors of S3-Rec for Beauty and LastFM (arXiv:2008.07873, github.com/RUCAIBox/CIKM2020-S3Rec), and RecBole's SASRec with a softmax over
all items for ml-100k (github.com/kanishkaRandunu/pswrec2k26). `ml-100k.inter` is part of RecBole's wheel. With `--epochs`, networks are
trained at a constant rate until ten evaluations bring no better validation score, however long that takes; item neighbors need seconds.
"""

from __future__ import annotations

import csv
import statistics
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from common import make_parser, parse_options, report
from real_data import ARCHIVES

import fieldguide

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "item-neighbors": ("item-neighbors", {}),
    "sasrec": ("sasrec-m", {}),
    "bert4rec": ("bert4rec-ml1m", {"model.hidden_share": 0.4}),
    "hstu": ("hstu-ml1m", {}),
}
PUBLISHED = {"beauty": ".0605 / .0318", "lastfm": ".0688 / .0390", "ml-100k": ".1198 / .0594"}  # HR@10 and NDCG@10 of SASRec
EVALUATED = {
    "beauty": 175,
    "lastfm": 45,
    "ml-100k": 40,
}  # steps of 128 users from one evaluation to the next: 1, 5 and 5 epochs
FILES = {"beauty": "Beauty", "lastfm": "LastFM"}


def write_events(name: str, folder: Path) -> Path:
    """Unpack sequences, one user a line, as a table of events; items without times are numbered."""
    with zipfile.ZipFile(ARCHIVES / "interactions.zip") as archive:
        lines = archive.read(f"sequences/{FILES[name]}.txt").decode().splitlines()
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("user", "item", "time"))
        for line in lines:
            user, *items = line.split()
            writer.writerows((user, item, when) for when, item in enumerate(items))
    return path


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--data", nargs="*", default=list(FILES), choices=[*FILES, "ml-100k"])
    parser.add_argument("--ml-100k", type=Path, help="the file of events")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each fit")
    parser.add_argument("--epochs", type=float, help="train until the validation score stops improving, at most so long")
    parser.add_argument("--set", nargs="*", default=[], help="settings of all networks, NAME=VALUE")
    options = parse_options(parser)
    if not (ARCHIVES / "interactions.zip").exists():
        raise SystemExit(f"{ARCHIVES / 'interactions.zip'} is not there; set FIELDGUIDE_DATA")
    more: dict[str, Any] = {}
    if options.epochs:
        more = {"epochs": options.epochs, "schedule": "constant", "batch_size": 128, "patience": 10}
    more |= dict(pair.split("=", 1) for pair in options.set)
    minutes = 0 if options.epochs else options.minutes
    rows = []
    for data in options.data:
        for name in options.networks:
            size, settings = NETWORKS[name]
            settings = settings | more | ({"eval_steps": EVALUATED[data]} if options.epochs else {})
            found = []
            for seed in range(options.seeds):
                with tempfile.TemporaryDirectory() as work:
                    source = options.ml_100k if data == "ml-100k" else write_events(data, Path(work))
                    run = fieldguide.fit(
                        source,
                        task="recommendation",
                        model=size,
                        minutes=minutes,
                        seed=seed,
                        out=Path(work) / "run",
                        settings={"task.length": 50, "task.repeats": False, **settings},
                    )
                    cost = run.record["cost"]
                    found.append((run.scores["hr_10"], run.scores["ndcg_10"], cost.get("steps", 0)))
                    print(f"{data} {size} seed {seed}: {found[-1]}", flush=True)
            hits, gain = ([one[i] for one in found] for i in (0, 1))
            spread = lambda x: f"{statistics.mean(x):.4f}" + (f" ± {statistics.stdev(x):.4f}" if len(x) > 1 else "")
            steps = round(statistics.mean(one[2] for one in found))
            rows.append((data, size, spread(hits), spread(gain), PUBLISHED.get(data, "–"), steps, len(found)))
    report(
        f"Recommendation, all items ranked, {f'{minutes:g} minutes each' if minutes else 'until validation stops improving'}",
        ("data", "network", "HR@10", "NDCG@10", "SASRec published", "steps", "seeds"),
        rows,
        options.save,
        "Where the minutes are short, `fit` tests a random sample of the users.",
    )


if __name__ == "__main__":
    main()
