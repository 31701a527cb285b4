"""Speech recognition on real recordings: spoken digits (FSDD), if they are available (see test_data_real)."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fieldguide import fit
from fieldguide.metrics.speech import count_edits
from test_data_real import unpack

pytestmark = pytest.mark.slow
WORDS = "zero one two three four five six seven eight nine".split()
SETTINGS = {"batch": 32, "precision": "float32", "evaluate": 100}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Path, list[Path]]:
    """Return a folder of the training recordings with transcripts, and the test recordings (takes 0 to 4, as published)."""
    root = tmp_path_factory.mktemp("fsdd")
    paths = sorted((unpack("fsdd.zip", root, "recordings/") / "recordings").glob("*.wav"))
    train = root / "train"
    train.mkdir()
    with open(train / "transcripts.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "transcript"])
        for path in paths:
            if int(path.stem.split("_")[2]) >= 5:
                table.writerow([path.name, say(path)])
                path.rename(train / path.name)
    return train, [path for path in paths if path.exists()]


def say(path: Path) -> str:
    """Return the word of a recording."""
    return WORDS[int(path.name[0])]


def measure(run, paths, **options) -> float:
    """Return the word error rate."""
    found = run.predict([str(path) for path in paths], **options)
    return count_edits([say(path) for path in paths], [record["text"] for record in found]).rate


def test_fastconformer_learns_digits(digits, tmp_path):
    """8.5 % of the validation words were wrong after these steps (2026-11-30)."""
    train, test = digits
    small = {"model.dim": 64, "model.depth": 4, "model.heads": 4, "model.hidden": 256, "model.stem_channels": 64}
    settings = {**SETTINGS, **small, "steps": 300, "lr": 2e-3, "task.hop": 0.005}
    run = fit(train, out=tmp_path / "run", task="automatic-speech-recognition", model="parakeet-ctc-0.6b", settings=settings)
    plain = measure(run, test)
    assert len(test) == 300 and plain < 0.25
    assert measure(run, test, num_beams=8, language_weight=0.5, symbol_bonus=0.5) < 0.6 * plain


def test_networks_of_samples_learn_digits(digits, tmp_path):
    """A small HuBERT without pre-training: 47 % of the validation words were wrong after these steps, 30 % after 800 (2026-11-30)."""
    small = {
        "model.dim": 96,
        "model.depth": 4,
        "model.heads": 4,
        "model.hidden": 384,
        "model.pos_kernel": 32,
        "model.mask_time": 0.0,
    }
    stem = {"model.stem_dims": "(48,64,64,64,64)", "model.stem_kernels": "(10,8,4,4,4)", "model.stem_strides": "(5,4,2,2,2)"}
    stable = {"model.stem_norm": "layer", "model.stem_bias": True, "model.pre_norm": True}
    settings = {**SETTINGS, **small, **stem, **stable, "steps": 500, "lr": 2e-3}
    run = fit(digits[0], out=tmp_path / "run", task="automatic-speech-recognition", model="hubert-base", settings=settings)
    assert measure(run, digits[1]) < 0.75
