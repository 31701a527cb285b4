"""Exports of networks that read samples, compared with the run in a process without torch."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

import fieldguide
from fieldguide.exporting.verify import verify

STEM = {"model.stem_dims": (8, 8, 8), "model.stem_kernels": (10, 8, 4), "model.stem_strides": (5, 4, 4)}
SETTINGS = {"steps": 4, "evaluate": 4, "precision": "float32", "batch": 8, **STEM}


def write_recordings(folder, column, names, seed=0):
    """Write tones of several lengths and rates, one of two channels, and one that is shorter than a window of the network."""
    rng, lines = np.random.default_rng(seed), [f"file,{column}"]
    folder.mkdir()
    for i in range(36):
        rate, seconds = (8000, 16000, 11025)[i % 3], rng.uniform(0.05, 0.4)
        count = 30 if i == 5 else round(rate * seconds)
        tone = np.sin(np.cumsum(rng.uniform(200, 600) * (1 + i % 2) + np.zeros(count)) / rate * 2 * np.pi) * rng.uniform(
            0.1, 0.5
        )
        tone = 0.05 + tone + rng.normal(0, 0.01, count)
        soundfile.write(folder / f"{i}.wav", np.stack([tone, 0.5 * tone], 1) if i == 4 else tone, rate)
        lines.append(f"{i}.wav,{names[i % 2]}")
    (folder / "recordings.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    "kind, model",
    [
        ("classes", "wav2vec2-test"),
        *(
            pytest.param(kind, model, marks=pytest.mark.slow)
            for kind, model in [
                ("classes", "hubert-test"),
                ("transcripts", "wav2vec2-test"),
                ("transcripts", "hubert-test"),
                ("transcripts", "wav2vec2-conformer-test"),
            ]
        ),
    ],
)
@pytest.mark.slow
def test_raw_recordings_of_several_lengths(kind, model, tmp_path):
    is_text = kind == "transcripts"
    names = ("low tone", "a high one") if is_text else ("low", "high")
    source = write_recordings(tmp_path / "data", "transcript" if is_text else "label", names)
    task = "automatic-speech-recognition" if is_text else "audio-classification"
    settings = SETTINGS if is_text else SETTINGS | {"task.seconds": 0.3}
    run = fieldguide.fit(source, task=task, model=model, out=tmp_path / "run", settings=settings, allow_bad=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in run.model.head.parameters():  # symbols that differ from frame to frame
        parameter.data += torch.randn(parameter.shape, generator=generator)
    again = str(write_recordings(tmp_path / "again", "transcript" if is_text else "label", names, 1) / "recordings.csv")
    done = run.export(out=tmp_path / "export", data=again)
    assert done.passed and done.verification.rows >= 30, done.verification.problems
    assert len((done.path / "run.py").read_text().splitlines()) < 150
    values = json.loads((done.path / "export.json").read_text())
    changes = {"symbols": ["", *values["symbols"][:0:-1]]} if is_text else {"rate": 2 * values["rate"], "samples": 800}
    for key, value in changes.items():
        shutil.copytree(done.path, tmp_path / key)
        (tmp_path / key / "export.json").write_text(json.dumps(values | {key: value}))
        assert not verify(run, tmp_path / key, again).passed
