"""Scores of forecasting networks on ETTh1, ETTh2 and the hourly series of M4, next to published figures.

    FIELDGUIDE_DATA=DATA python benchmarks/series_scores.py [--networks tide nhits] [--data ETTh1 M4] [--seeds 3] [--minutes 4] [--save]

ETT: the usual borders (8640, 2880 and 2880 steps), 96 steps ahead, errors of standardized values over all windows of all seven series
(MSE / MAE). Each network reads the steps that its paper used. M4: 414 series, 48 steps ahead, the official test part, sMAPE / MASE,
trained on absolute errors in the unit of MASE; the last 48 steps before the test validate. The mean of all networks' forecasts is scored
too. Each network is trained by `fit` with its own recipe and absolute errors. Networks that read other series get those of ETT
(`task.others`). Published figures are those of the papers' tables; those marked † are quoted from memory.
Scores are not timings, but a busy machine makes fewer steps in the same minutes.
"""

from __future__ import annotations

import statistics
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
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
HORIZON, LENGTH, SEASON = 48, 336, 24  # of M4
M4 = {
    **{"task.horizon": HORIZON, "task.validation": HORIZON, "task.test": HORIZON},
    **{"task.length": LENGTH, "task.season": SEASON, "task.point": "mase"},
}
WINNER = "9.328 / .893 (winner), 13.912 / 1.193 (seasonal naive)"


def read_m4() -> tuple[list[list[str]], list[list[str]]]:
    """Return the training and the test part of M4's hourly series, one row each, which begins with the name."""
    with zipfile.ZipFile(ARCHIVES / "series.zip") as archive:
        texts = [archive.read(f"m4/Hourly-{part}.csv").decode().replace(chr(34), "") for part in ("train", "test")]
    first, last = ([line.rstrip(",").split(",") for line in text.splitlines()[1:]] for text in texts)
    return first, last


def write_series(rows: list[list[str]], path: Path) -> Path:
    """Write series of different lengths, one a row."""
    most = max(map(len, rows))
    write_csv(path, ["id", *(f"V{i}" for i in range(1, most))], [row + [""] * (most - len(row)) for row in rows])
    return path


def unpack(name: str, folder: Path) -> Path:
    """Return a file of a data set; the steps of M4's test follow those of its training part."""
    if name == "M4":
        return write_series([first + last[1:] for first, last in zip(*read_m4())], folder / "m4.csv")
    with zipfile.ZipFile(ARCHIVES / "series.zip") as archive:
        member = next(m for m in archive.namelist() if m.endswith(f"{name}.csv"))
        return Path(archive.extract(member, folder))


def score_m4(forecasts: np.ndarray) -> tuple[float, float]:  # 414 48
    """Return sMAPE and MASE as the competition computes them, with all steps before the test for the scale."""
    past, future = ([np.array(row[1:], dtype=float) for row in part] for part in read_m4())
    smape = [200 * np.mean(np.abs(y - f) / (np.abs(y) + np.abs(f))) for y, f in zip(future, forecasts)]
    scale = [np.abs(x[SEASON:] - x[:-SEASON]).mean() for x in past]
    mase = [np.abs(y - f).mean() / each for y, f, each in zip(future, forecasts, scale)]
    return float(np.mean(smape)), float(np.mean(mase))


def fit(data: str, name: str, seed: int, minutes: float, made: list[np.ndarray]) -> tuple[float, float]:
    """Return two test scores of a network on a data set; forecasts of M4's test are added to `made`."""
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
        if data == "M4":
            said = run.predict(write_series(read_m4()[0], Path(work) / "past.csv"))
            assert [record["series"] for record in said[::HORIZON]] == [row[0] for row in read_m4()[0]]
            made.append(np.array([record["value"] for record in said]).reshape(-1, HORIZON))
    first, second = score_m4(made[-1]) if data == "M4" else (run.scores["mse"], run.scores["mae"])
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
        made: list[np.ndarray] = []
        for name in options.networks:
            size, settings, published = NETWORKS[name]
            scores = [fit(data, name, seed, options.minutes, made) for seed in range(options.seeds)]
            length = LENGTH if data == "M4" else settings["task.length"]
            known = WINNER if data == "M4" else published.get(data, "–")
            rows.append((data, name if data == "M4" else size, length, *map(spread, zip(*scores)), known, len(scores)))
        if len(made) > 1:
            scores = [score_m4(np.mean(made, 0))]
            rows.append((data, f"mean of {len(made)}", LENGTH, *map(spread, zip(*scores)), WINNER, len(made)))
    report(
        f"Forecasts of ETT (MSE, MAE) and M4 hourly (sMAPE, MASE), {options.minutes:g} minutes each",
        ("data", "network", "steps read", "MSE or sMAPE", "MAE or MASE", "published", "seeds"),
        rows,
        options.save,
        "† quoted from memory of the papers.",
    )


if __name__ == "__main__":
    main()
