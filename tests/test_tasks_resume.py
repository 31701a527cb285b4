"""Every task with a sample: a run that is stopped and resumed equals an uninterrupted one."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from fieldguide.automl.fit import NullCallback, fit, resume
from fieldguide.data import samples
from fieldguide.tasks import task
from fieldguide.training.state import Interrupted

TINY = {
    "tabular-classification": "mlp-test",
    "tabular-regression": "mlp-test",
    "image-classification": "resnet-test",
    "text-classification": "lstm-classifier-test",
    "text-generation": "gpt2-test",
    "translation": "transformer-test",
    "recommendation": "sasrec-test",
    "image-segmentation": "unet-mini",
    "object-detection": "yolov8-test",
    "keypoint-detection": "yolov8-pose-test",
    "instance-segmentation": "yolov8-seg-test",
    "panoptic-segmentation": "mask2former-test",
    "automatic-speech-recognition": "conformer-test",
    "image-to-image": "cyclegan-test",
    "audio-classification": "simplecnn-test",
    "speech-pretraining": "wav2vec2-test",
    "anomaly-detection": "conv-autoencoder-test",
    "time-series-classification": "inceptiontime-test",
    "image-text": "clip-test",
    "image-to-text": "blip-test",
    "video-generation": "latte-test",
    "visual-question-answering": "vilt-test",
    "question-answering": "bert-test",
    "summarization": "transformer-test",
    "text-embedding": "bert-test",
    "reranking": "bert-test",
    "preference-tuning": "gpt2-test",
}
SMALL = {
    "preference-tuning": {"task.vocab": "400"},
    "text-generation": {"task.vocab": "300"},
    "translation": {"task.vocab": "300"},
    "summarization": {"task.vocab": "300"},
    "image-to-text": {"task.vocab": "300", "task.side": "16"},
    "video-generation": {"task.vocab": "300", "task.frames": "4"},
    "question-answering": {"task.vocab": "300", "task.length": "128"},
    "speech-pretraining": {
        "model.stem_dims": "(8, 8, 8, 8, 8)",
        "model.stem_kernels": "(10, 8, 4, 4, 4)",
        "model.stem_strides": "(5, 4, 2, 2, 2)",
    },
}
ONE = {sample.task: name for name, sample in samples.SAMPLES.items()}  # a sample of each task


class StopAt(NullCallback):
    def __init__(self, at: int):
        self.at = at

    def on_step(self, step, losses):
        if step == self.at:
            signal.raise_signal(signal.SIGINT)


def log(run):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


QUICK = {"tabular-classification", "tabular-regression", "recommendation", "time-series-forecasting"}


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ONE])
def test_stopped_and_resumed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(task(name), "max_test_examples", 8)  # what is said of test rows is not what is looked at here
    settings = {"steps": 6, "evaluate": 2, "batch": 8, "precision": "float32", **SMALL.get(name, {})}
    arguments = {"model": TINY.get(name, "auto"), "settings": settings}
    whole = fit(ONE[name], out=tmp_path / "whole", **arguments)
    with pytest.raises(Interrupted, match="after step 3 of 6"):
        fit(ONE[name], out=tmp_path / "stopped", callback=StopAt(3), **arguments)
    again = resume(tmp_path / "stopped")
    assert log(tmp_path / "whole") == log(tmp_path / "stopped") and len(log(tmp_path / "whole")) >= 6
    for file in whole.path.glob("*.safetensors"):
        assert file.read_bytes() == (again.path / file.name).read_bytes()
    for key, value in whole.scores.items():
        np.testing.assert_equal(again.scores[key], value)
    first, second = (sorted(p.name for p in (run.path / "eval_samples").glob("*")) for run in (whole, again))
    assert first == second
