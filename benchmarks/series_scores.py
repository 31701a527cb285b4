"""Scores of forecasting networks on ETTh1 and ETTh2, horizon 96, next to published figures.

    FIELDGUIDE_DATA=DATA python benchmarks/series_scores.py [--networks tide nhits] [--data ETTh1] [--seeds 3] [--minutes 4] [--save]

The usual borders (8640, 2880 and 2880 steps), errors of standardized values over all windows of all seven series. Each network reads
the steps that its paper used, and is trained by `fit` with its own recipe and absolute errors. Networks that read other series
get them (`task.others`). Published figures are those of the papers' tables; those marked † are quoted from memory. Scores are not
timings, but a busy machine makes fewer steps in the same minutes.
"""

from __future__ import annotations

import statistics
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from common import make_parser, parse_options, report
from real_data import ARCHIVES

import fieldguide

# Network -> settings, and the published (MSE, MAE) on ETTh1 and ETTh2.
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


def unpack(name: str, folder: Path) -> Path:
    with zipfile.ZipFile(ARCHIVES / "series.zip") as archive:
        member = next(m for m in archive.namelist() if m.endswith(f"{name}.csv"))
        return Path(archive.extract(member, folder))


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--data", nargs="*", default=["ETTh1", "ETTh2"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each fit")
    options = parse_options(parser)
    if not (ARCHIVES / "series.zip").exists():
        raise SystemExit(f"{ARCHIVES / 'series.zip'} is not there; set FIELDGUIDE_DATA")
    rows = []
    for data in options.data:
        for name in options.networks:
            size, settings, published = NETWORKS[name]
            found = []
            for seed in range(options.seeds):
                with tempfile.TemporaryDirectory() as work:
                    run = fieldguide.fit(
                        unpack(data, Path(work)),
                        task="time-series-forecasting",
                        model=size,
                        minutes=options.minutes,
                        seed=seed,
                        out=Path(work) / "run",
                        settings={"precision": "float32", **BORDERS, **settings},
                    )
                    found.append((run.scores["mse"], run.scores["mae"], run.record["cost"].get("best_step", 0)))
                    print(
                        f"{data} {size} seed {seed}: MSE {found[-1][0]:.4f}, MAE {found[-1][1]:.4f}, step {found[-1][2]}",
                        flush=True,
                    )
            mse, mae = ([one[i] for one in found] for i in (0, 1))
            spread = lambda x: f"{statistics.mean(x):.3f}" + (f" ± {statistics.stdev(x):.3f}" if len(x) > 1 else "")
            rows.append((data, size, settings["task.length"], spread(mse), spread(mae), published.get(data, "–"), len(found)))
    report(
        f"ETTh1 and ETTh2, 96 steps forecast, {options.minutes:g} minutes each",
        ("data", "network", "steps read", "MSE", "MAE", "published MSE / MAE", "seeds"),
        rows,
        options.save,
        "† quoted from memory of the papers.",
    )


if __name__ == "__main__":
    main()
