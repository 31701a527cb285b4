"""Pre-training on spoken digits without labels, then fine-tuning on 10 recordings of each digit, against training from scratch.

The Free Spoken Digit Dataset with its official test set (the first five takes). Pre-training reads all other recordings, without
labels; both networks are the same, train for the same steps on the same 100 labeled recordings, and keep the weights that score best
on 50 more. Needs `fsdd.zip` in $FIELDGUIDE_DATA (by default ../shared/data).

    python benchmarks/speech_pretraining.py --objective clusters --pretraining 1500 --steps 300
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import describe_machine, read_commit

from fieldguide import fit

DATA = Path(os.environ.get("FIELDGUIDE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MODELS = {"clusters": "hubert-xs", "contrastive": "wav2vec2-xs"}
LABELED, VALIDATION, TEST_TAKES = 10, 5, 5  # recordings of each digit; takes of each speaker and digit
NETWORK = {
    "model.dim": 64,
    "model.depth": 3,
    "model.hidden": 256,
    "model.stem_dims": (64,) * 5,
    "model.contrast_dim": 32,
    "model.projection": 64,
    "model.dropout": 0.0,
}


def write_recordings(folder: Path, seed: int) -> None:
    """Write `unlabeled`, and `labeled` with train, val and test."""
    groups = defaultdict(list)
    with zipfile.ZipFile(DATA / "fsdd.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".wav")):
            digit, take = Path(name).name[0], int(Path(name).stem.rpartition("_")[2])
            groups[digit, take < TEST_TAKES].append(name)
        for (digit, is_test), names in groups.items():
            random.Random(f"{seed} {digit}").shuffle(names)
            for number, name in enumerate(names):
                part = "test" if is_test else "train" if number < LABELED else "val" if number < LABELED + VALIDATION else ""
                places = [f"labeled/{part}/{digit}"] * bool(part) + ["unlabeled"] * (not is_test)
                for place in places:
                    (folder / place).mkdir(parents=True, exist_ok=True)
                    (folder / place / Path(name).name).write_bytes(archive.read(name))


def compare(objective: str, pretraining: int, steps: int, seed: int) -> dict[str, float]:
    """Return the accuracies on the test set, and that of pre-training on hidden frames."""
    shared: dict[str, Any] = {"precision": "float32", "lr": 1e-3, "warmup": 0.1}
    tuning = {**shared, "steps": steps, "batch": 20, "eval_steps": steps // 5, "augmentation": "none", "schedule": "cosine"}
    whole = {"finetune": "whole", "keep_frozen": False, "layer_decay": 1.0}
    first = {**shared, "lr": 2e-3, "steps": pretraining, "batch": 24, "eval_steps": pretraining // 3}
    first |= {"task.objective": objective, "task.span": 5, "task.share": 0.1}
    with tempfile.TemporaryDirectory() as work:
        folder, model = Path(work), MODELS[objective]
        write_recordings(folder, seed)
        start = fit(
            folder / "unlabeled", task="speech-pretraining", model=model, out=folder / "start", settings=NETWORK | first
        )
        labeled = folder / "labeled"
        tuned = fit(labeled, weights=str(start.path), out=folder / "tuned", seed=seed, settings=tuning | whole)
        scratch = fit(labeled, model=model, out=folder / "scratch", seed=seed, settings=NETWORK | tuning)
        return {
            "hidden frames": start.scores["accuracy"],
            "hidden frames, baseline": start.record["scores"]["baselines"][0]["scores"]["accuracy"],
            "pre-trained": tuned.scores["accuracy"],
            "from scratch": scratch.scores["accuracy"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objective", choices=MODELS, default="clusters")
    parser.add_argument("--pretraining", type=int, default=1500, help="steps of 24 recordings")
    parser.add_argument("--steps", type=int, default=300, help="of 20 labeled recordings")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    scores = compare(a.objective, a.pretraining, a.steps, a.seed)
    print(f"\n{read_commit()}, {describe_machine()}\n{a.objective}, {a.pretraining:,} steps, then {a.steps:,}, seed {a.seed}")
    for name, value in scores.items():
        print(f"{name:<24} {100 * value:.1f} %")


if __name__ == "__main__":
    main()
