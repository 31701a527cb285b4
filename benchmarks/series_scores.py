"""Scores of forecasting networks on ETTh1, ETTh2 and the hourly series of M4, next to published figures.

    FIELDGUIDE_DATA=DATA python benchmarks/series_scores.py [--networks tide nhits] [--data ETTh1 M4] [--seeds 3] [--minutes 4] [--save]

ETT: the usual borders (8640, 2880 and 2880 steps), 96 steps ahead, errors of standardized values over all windows of all seven series
(MSE / MAE). Each network reads the steps that its paper used. M4: 414 series, 48 steps ahead, the official test part, sMAPE / MASE; the
scale of MASE leaves out the last 48 steps before the test, which validate. Each network is trained by `fit` with its own recipe and
absolute errors. Networks that read other series get those of ETT (`task.others`). Published figures are those of the papers' tables;
those marked † are quoted from memory. Scores are not timings, but a busy machine makes fewer steps in the same minutes.
"""

from __future__ import annotations

import statistics
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from common import make_parser, parse_options, report
from real_data import ARCHIVES, write_csv

import fieldguide

# Network -> size, settings for ETT, and published scores.
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "dlinear": ("dlinear-336-96", {"task.length": 336}, {"ETTh1": ".375 / .399", "ETTh2": ".289 / .353"}),
    "patchtst": ("patchtst-etth1", {"task.length": 336}, {"ETTh1": ".370 / .400", "ETTh2": ".274 / .337"}),
    "itransformer": (
        "itransformer-etth1",
        {"task.length": 96, "task.others": True},
        {"ETTh1": ".386 / .405 †", "ETTh2": ".297 / .349 †"},
    ),
    "nhits": ("nhits-480-96", {"task.length": 480}, {}),
    "tide": (
        "tide-etth1",
        {"task.length": 720},
        {"ETTh1": ".375 / .398 †", "ETTh2": ".270 / .336 †"},
    ),
    "tft": ("tft-s", {"task.length": 168}, {}),
}
BORDERS = {"task.horizon": 96, "task.train": 8640, "task.validation": 2880, "task.test": 2880}
LENGTH = 168  # steps that are read of M4
M4 = {"task.horizon": 48, "task.validation": 48, "task.test": 48, "task.length": LENGTH, "task.season": 24}
METRICS = {"M4": ("smape", "mase")}  # MSE and MAE of others
WINNER = "9.328 / .893 (winner), 13.912 / 1.193 (seasonal naive)"


def unpack(name: str, folder: Path) -> Path:
    """Return a file of a data set; the steps of M4's test follow those of its training part."""
    with zipfile.ZipFile(ARCHIVES / "series.zip") as archive:
        if name != "M4":
            member = next(m for m in archive.namelist() if m.endswith(f"{name}.csv"))
            return Path(archive.extract(member, folder))
        parts = [
            archive.read(f"m4/Hourly-{part}.csv").decode().replace(chr(34), "").splitlines()[1:] for part in ("train", "test")
        ]
    rows = [first.rstrip(",").split(",") + last.split(",")[1:] for first, last in zip(*parts)]
    path, most = folder / "m4.csv", max(map(len, rows))
    write_csv(path, ["id", *(f"V{i}" for i in range(1, most))], [row + [""] * (most - len(row)) for row in rows])
    return path


def fit(data: str, name: str, seed: int, minutes: float) -> tuple[float, float]:
    """Return two test scores of a network on a data set."""
    size, settings, _ = NETWORKS[name]
    chosen = M4 if data == "M4" else {**BORDERS, **settings}
    with tempfile.TemporaryDirectory() as work:
        run = fieldguide.fit(
            unpack(data, Path(work)),
            task="time-series-forecasting",
            model=name if data == "M4" else size,
            minutes=minutes,
            seed=seed,
            out=Path(work) / "run",
            settings={"precision": "float32", **chosen},
        )
    first, second = (run.scores[metric] for metric in METRICS.get(data, ("mse", "mae")))
    print(f"{data} {name} seed {seed}: {first:.4f} / {second:.4f}, {run.record['cost'].get('steps')} steps", flush=True)
    return first, second


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--data", nargs="*", default=["ETTh1", "ETTh2", "M4"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each fit")
    options = parse_options(parser)
    if not (ARCHIVES / "series.zip").exists():
        raise SystemExit(f"{ARCHIVES / 'series.zip'} is not there; set FIELDGUIDE_DATA")
    spread = lambda x: f"{statistics.mean(x):.3f}" + (f" ± {statistics.stdev(x):.3f}" if len(x) > 1 else "")
    rows = []
    for data in options.data:
        for name in options.networks:
            size, settings, published = NETWORKS[name]
            scores = [fit(data, name, seed, options.minutes) for seed in range(options.seeds)]
            length = LENGTH if data == "M4" else settings["task.length"]
            known = WINNER if data == "M4" else published.get(data, "–")
            rows.append((data, name if data == "M4" else size, length, *map(spread, zip(*scores)), known, len(scores)))
    report(
        f"Forecasts of ETT (MSE, MAE) and M4 hourly (sMAPE, MASE), {options.minutes:g} minutes each",
        ("data", "network", "steps read", "MSE or sMAPE", "MAE or MASE", "published", "seeds"),
        rows,
        options.save,
        "† quoted from memory of the papers.",
    )


if __name__ == "__main__":
    main()
