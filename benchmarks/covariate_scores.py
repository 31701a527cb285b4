"""What covariates that are known for the future bring to forecasts: hourly bike rentals with weather and holidays.

    pip download ISLP --no-deps
    unzip -j islp-*.whl ISLP/data/Bikeshare.csv
    python benchmarks/covariate_scores.py Bikeshare.csv [--networks tft tide] [--seeds 3] [--minutes 5] [--save]

The 8,645 hours of 2011 (Capital Bikeshare, in the BSD-licensed package ISLP): 24 hours are forecast from 168, all windows of the last 1,560
hours are the test. Weather and holidays count as known, as if forecasts of the weather were right. Each network is trained with and
without them, and so is LightGBM with lags, the hour and the day of the week, by direct forecasts of each hour ahead. Both sides know the
calendar. Errors are of values standardized by the 6,300 training hours.
"""

from __future__ import annotations

import csv
import datetime
import statistics
import tempfile
from pathlib import Path

import numpy as np
from common import make_parser, parse_options, report
from real_data import write_csv

import fieldguide

HORIZON, LENGTH, TRAIN, VALIDATION, TEST = 24, 168, 6300, 900, 1560
NUMBERS = ("holiday", "workingday", "temp", "hum", "windspeed")
COVARIATES = (*NUMBERS, "weathersit")
SIZES = {"tft": "tft-s", "tide": "tide-mini"}


def read_hours(path: Path) -> dict[datetime.datetime, dict[str, str]]:
    """Return the rows of the file by time."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = datetime.datetime(2011, 1, 1)
    return {first + datetime.timedelta(days=int(row["day"]) - 1, hours=int(row["hr"])): row for row in rows}


def score_network(hours: dict[datetime.datetime, dict[str, str]], size: str, known: bool, seed: int, minutes: float) -> tuple:
    columns = COVARIATES if known else ()
    settings = {"task.horizon": HORIZON, "task.length": LENGTH, "task.train": TRAIN, "task.validation": VALIDATION}
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "bikes.csv"
        rows = [(time, row["bikers"], *(row[name] for name in columns)) for time, row in hours.items()]
        write_csv(source, ("time", "bikers", *columns), rows)
        run = fieldguide.fit(
            source,
            task="time-series-forecasting",
            target="bikers",
            model=size,
            minutes=minutes,
            seed=seed,
            out=Path(work) / "run",
            settings={"precision": "float32", **settings, "task.test": TEST, "task.known": ",".join(columns)},
        )
    return run.scores["mse"], run.scores["mae"]


def score_trees(hours: dict[datetime.datetime, dict[str, str]], known: bool, seed: int) -> tuple:
    """Return the errors of LightGBM, with a row for each origin and hour ahead."""
    import lightgbm

    first = min(hours)
    total = TRAIN + VALIDATION + TEST
    grid = [hours.get(first + datetime.timedelta(hours=i)) for i in range(total)]
    value = np.array([np.nan if row is None else float(row["bikers"]) for row in grid])
    kinds = sorted({row["weathersit"] for row in hours.values()})
    weather = np.array(
        [
            [np.nan] * len(COVARIATES)
            if row is None
            else [*(float(row[name]) for name in NUMBERS), kinds.index(row["weathersit"])]
            for row in grid
        ]
    )

    def make(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        origin, ahead = (x.ravel() for x in np.meshgrid(np.arange(start, stop), np.arange(HORIZON), indexing="ij"))
        at = origin + ahead
        times = [first + datetime.timedelta(hours=int(i)) for i in range(total)]
        calendar = np.array([(time.hour, time.weekday(), time.month) for time in times])
        lags = [value[at - lag] for lag in (24, 48, 72, 144, 168)] + [value[origin - lag] for lag in (1, 2, 3)]
        features = [ahead, *calendar[at].T, *lags, *(weather[at].T if known else ())]
        real = ~np.isnan(value[at])
        return np.stack(features, 1)[real], value[at][real]

    train, held = make(LENGTH, TRAIN - HORIZON + 1), make(TRAIN, TRAIN + VALIDATION - HORIZON + 1)
    model = lightgbm.LGBMRegressor(n_estimators=2000, learning_rate=0.05, objective="mae", seed=seed, verbosity=-1, n_jobs=1)
    model.fit(*train, eval_set=[held], callbacks=[lightgbm.early_stopping(50, verbose=False)])
    x, y = make(TRAIN + VALIDATION, total - HORIZON + 1)
    error = (model.predict(x) - y) / np.nanstd(value[:TRAIN])
    return float((error**2).mean()), float(np.abs(error).mean())


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--networks", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5.0, help="of each fit")
    options = parse_options(parser)
    hours, rows = read_hours(options.file), []
    spread = lambda x: f"{statistics.mean(x):.3f}" + (f" ± {statistics.stdev(x):.3f}" if len(x) > 1 else "")
    for name in ("lightgbm", *options.networks):
        for known in (False, True):
            if name == "lightgbm":
                scores = [score_trees(hours, known, 0)]
            else:
                scores = [score_network(hours, SIZES[name], known, seed, options.minutes) for seed in range(options.seeds)]
            rows.append((SIZES.get(name, name), "yes" if known else "no", *map(spread, zip(*scores)), len(scores)))
            print(" | ".join(map(str, rows[-1])), flush=True)
    report(
        f"Bike rentals, 24 hours ahead, with and without weather and holidays, {options.minutes:g} minutes each",
        ("model", "covariates", "MSE", "MAE", "seeds"),
        rows,
        options.save,
    )


if __name__ == "__main__":
    main()
