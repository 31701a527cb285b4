"""Makes the golden run folders of the present schema: python tests/golden/make.py

Run folders of every released schema are kept here and opened by tests/test_run.py, so what a user trained stays readable.
Make a folder once, when its schema is released; never make it anew to please a test.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from pathlib import Path

import polars as pl

import fieldguide
from fieldguide.core.run_record import SCHEMA
from fieldguide.data import samples

HERE = Path(__file__).parent
QUICK = {"steps": 150, "precision": "float32", "batch": 32, "lr": 0.01, "ema": 0, "evaluate": 50}
RUNS = {
    "tabular-classification": ("orders", "mlp-s", {"model.dim": 12, "model.embedding": 4}),
    "tabular-regression": ("diabetes", "mlp-s", {"model.dim": 12, "model.embedding": 4}),
    "image-classification": ("digits", "resnet20", {"model.widths": (4, 8), "model.depths": (1, 1)}),
    "text-classification": ("letters", "gru-s", {"model.dim": 8, "model.hidden": 8, "task.vocab": 320, "task.length": 16}),
}
KEPT = ("run.json", "model.safetensors", "preprocess", "splits.npz", "metrics.jsonl")


def letters(file: Path) -> Path:
    """Texts of our own, about the weather or about cooking; the sample of docstrings belongs to its libraries."""
    weather, kitchen = ("rain", "storm", "sunshine", "fog"), ("soup", "bread", "salad", "coffee")
    when = ("This morning", "Yesterday", "On Friday", "After lunch", "Late at night")
    rows = [
        (f"{w} there was {how} {thing}{end}", topic)
        for topic, things in (("weather", weather), ("kitchen", kitchen))
        for thing in things
        for w in when
        for how in ("some", "little", "plenty of")
        for end in (".", ", we hear.")
    ]
    pl.DataFrame(rows, schema=["text", "topic"], orient="row").write_csv(file)
    return file


def orders(file: Path) -> Path:
    """A table of our own with every kind of column, and values missing in each."""
    rng = random.Random(0)
    rows = []
    for i in range(240):
        colour, day = rng.choice(["red", "green", "blue", None]), f"2024-{i % 12 + 1:02d}-{i % 28 + 1:02d}"
        size = None if i % 17 == 0 else round(rng.gauss(10, 2), 2)
        rows.append(
            (
                size,
                colour,
                None if i % 19 == 0 else day,
                rng.random() < 0.5,
                "late" if i % 12 > 6 or colour == "red" else "in time",
            )
        )
    pl.DataFrame(rows, schema=["size", "colour", "day", "gift", "arrived"], orient="row").write_csv(file)
    return file


def inputs(task: str, home: Path, folder: Path) -> list[str]:
    """A few raw inputs, stored beside the answers that they got."""
    if task == "image-classification":
        chosen = sorted(home.rglob("*.png"))[::300]
        names = [f"digit-{i}.png" for i in range(len(chosen))]
        for path, name in zip(chosen, names):
            shutil.copy(path, folder / name)
        return names
    rows = pl.read_csv(home, infer_schema=False)
    rows[:: len(rows) // 6].select(rows.columns[:-1]).write_csv(folder / "inputs.csv")
    return ["inputs.csv"]


def main() -> None:
    for task, (sample, model, settings) in RUNS.items():
        folder = HERE / f"v{SCHEMA}-{task}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with tempfile.TemporaryDirectory() as work:
            made = {"letters": letters, "orders": orders}.get(sample)
            home = made(Path(work) / f"{sample}.csv") if made else samples.path(sample)
            names = inputs(task, home, folder)
            run = fieldguide.fit(home, model=model, out=Path(work) / "run", settings={**QUICK, **settings})
            for name in KEPT:
                if (run.path / name).is_dir():
                    shutil.copytree(run.path / name, folder / name)
                else:
                    shutil.copy(run.path / name, folder / name)
        scored = [x for x in (folder / "metrics.jsonl").read_text().splitlines(True) if "scores" in x]
        (folder / "metrics.jsonl").write_text("".join(scored))  # the losses would be half of the folder
        record = json.loads((folder / "run.json").read_text())
        record["data"] |= {"root": sample, "source": sample}  # no path of the machine that made it
        record["request"]["data"] = sample
        (folder / "run.json").write_text(json.dumps(record, indent=1))
        answers = fieldguide.open_run(folder).predict([str(folder / n) for n in names])
        expected = {"inputs": names, "answers": [{k: v for k, v in a.items() if k != "input"} for a in answers]}
        (folder / "expected.json").write_text(json.dumps(expected, indent=1))
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        print(f"{folder.name}: {size / 1024:.0f} KiB, {run.scores}")


if __name__ == "__main__":
    main()
