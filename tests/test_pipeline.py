"""`pipeline`: one API for runs and pretrained models, whose predictors hold no state of a request."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fieldguide
from fieldguide.core.errors import RunError, SettingsError
from fieldguide.inference.predictor import Predictor
from fieldguide.inference.run import Run
from fieldguide.tasks.base import Media

GOLDEN = Path(__file__).parent / "golden"

# Task -> several different requests. Predictions of each must not depend on what other threads ask at the same time.
REQUESTS = {
    "text-generation": [{"max_new_tokens": n, "seed": s} for n in (3, 9) for s in (0, 1)],
    "translation": [{"num_beams": n} for n in (1, 2, 4)],
    "summarization": [{"num_beams": 1, "max_new_tokens": n} for n in (2, 8)],
    "denoising": [{"num_beams": n} for n in (1, 3)],
    "fill-mask": [{"top": n} for n in (1, 3, 5)],
    "question-answering": [{"threshold": t} for t in (-100.0, 100.0)],
    "object-detection": [{"threshold": t, "overlap": o} for t in (0.001, 0.2) for o in (0.1, 0.9)],
    "image-segmentation": [{}],
    "image-generation": [{"count": 1, "steps": 2, "seed": s} for s in (0, 1, 2)],
    "video-generation": [{"count": 1, "steps": 2, "seed": s} for s in (0, 1)],
    "time-series-forecasting": [{"interval": i} for i in (0.8, 0.9)],
    "automatic-speech-recognition": [{"num_beams": n} for n in (1, 4)],
    "recommendation": [{"count": n} for n in (1, 3, 10)],
    "image-text": [{"classes": c} for c in ("digit,nothing", "white digit,black digit,gray")],
    "visual-question-answering": [{}],
    "tabular-regression": [{}],
    "click-prediction": [{}],
}


def plain(value):
    """Return a prediction in a form that can be compared."""
    if isinstance(value, Media):
        return value.suffix, value.content
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def inputs_of(folder: Path) -> list[str]:
    names = json.loads((folder / "expected.json").read_text())["inputs"]
    return [str(folder / name) if (folder / name).exists() else name for name in names]


@pytest.mark.parametrize("task", REQUESTS)
def test_one_predictor_serves_many_threads(task):
    folder = GOLDEN / f"v1-{task}"
    predictor, inputs = fieldguide.pipeline(folder), inputs_of(folder)
    assert isinstance(predictor, Run) and isinstance(predictor, Predictor)

    def request(options):
        return plain(list(predictor.predict(inputs, **options)))

    alone = [request(options) for options in REQUESTS[task]]
    if len(alone) > 1:
        assert any(other != alone[0] for other in alone[1:]), "the requests do not differ: they test nothing"
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(request, REQUESTS[task] * 3))
    assert together == alone * 3
    assert predictor.task.predict_options == predictor.task.PredictOptions() and not predictor.task.notes


def test_option_aliases():
    predictor = fieldguide.pipeline(GOLDEN / "v1-translation")
    text = ["In summer an old house sells a good bird."]
    assert predictor.predict(text, beams=2, penalty=0.3) == predictor.predict(text, num_beams=2, length_penalty=0.3)
    with pytest.raises(SettingsError, match="Did you mean 'num_beams'"):
        predictor.predict(text, numbeams=2)


def test_streamed_text_is_the_predicted_text():
    predictor = fieldguide.pipeline(GOLDEN / "v1-text-generation")
    options = {"max_new_tokens": 8, "temperature": 0.0}
    assert "".join(predictor.stream("Rain fell on", **options)) == predictor.predict("Rain fell on", **options)[0]["text"]
    assert fieldguide.pipeline(GOLDEN / "v1-tabular-regression").stream("x.csv") is None


def test_text_embeddings():
    vectors = fieldguide.pipeline(GOLDEN / "v1-fill-mask").embed(["Rain fell.", "Essen played Worms."])
    assert vectors.shape[0] == 2 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with pytest.raises(SettingsError, match="does not embed texts"):
        fieldguide.pipeline(GOLDEN / "v1-tabular-regression").embed(["a"])


def test_invalid_sources_are_rejected(tmp_path):
    with pytest.raises(RunError, match=r"is not a run folder: it has no run\.json|does not exist"):
        fieldguide.pipeline(tmp_path)
    with pytest.raises(SettingsError, match="weights: not a load option"):
        fieldguide.pipeline(GOLDEN / "v1-fill-mask", weights="int8")
