"""Samples: small, generated from installed packages, and created once."""

from __future__ import annotations

import os
import time

import pytest
from sklearn.datasets import load_diabetes, load_digits, load_wine
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import SGDClassifier

from fieldguide.automl.fit import fit
from fieldguide.automl.request import read_for
from fieldguide.core.errors import DataError
from fieldguide.data import read, samples, split
from fieldguide.data.media import images
from fieldguide.data.samples.text import TEXTS_PER_CLASS

LONG = ("captions", "puppets", "scattered", "scenery", "shapes", "utterances", "words")  # of many images or recordings


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in samples.SAMPLES])
def test_each_sample_matches_its_description(name):
    sample = samples.SAMPLES[name]
    data, task, _ = read_for(
        {"data": name, "target": None, "kinds": {}, "roles": {}, "group": None, "time": None, "allow_bad": False, "task": None}
    )
    assert task.name == sample.task and sample.what and sample.licence and sample.source
    assert (data.target.name if data.target else "") == sample.target
    assert not [f for f in data.findings if f.severity == "error"]


def test_values_equal_scikit_learn():
    digits = load_digits()
    data = read("digits")
    pixels = images.load(data.rows["image"].to_list(), 8, 1)[:, 0].numpy()
    order = [int(os.path.basename(p)[:4]) for p in data.rows["image"]]
    assert len(data) == 1797 and abs(pixels - digits.images[order] * 255 / 16).max() <= 0.5
    assert [int(n) for n in data.rows["label"]] == digits.target[order].tolist()
    wine = read("wine")
    assert wine.rows["proline"].to_list() == load_wine().data[:, -1].tolist()
    diabetes = read("diabetes").rows
    assert diabetes["progression"].to_list() == load_diabetes().target.tolist()
    assert diabetes["bmi"].mean() == pytest.approx(26.4, abs=0.1)


def test_docstrings_can_be_learned_and_are_not_trivial():
    data = read("docstrings")
    made = split(data)
    counts = data.rows["library"].value_counts()["count"].to_list()
    assert counts == [TEXTS_PER_CLASS] * 5
    text, label = data.rows["text"].to_numpy(), data.rows["library"].to_numpy()
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    linear = SGDClassifier(random_state=0).fit(words.fit_transform(text[made.train]), label[made.train])
    assert 0.72 < linear.score(words.transform(text[made.test]), label[made.test]) < 0.95


def test_manual_has_no_duplicate_paragraphs():
    texts = [path.read_text() for path in samples.path("manual").iterdir()]
    found = [" ".join(p.split()) for text in texts for p in text.split("\n\n")]
    assert len(found) == len(set(found)) and sum(map(len, texts)) > 300_000 and min(map(len, texts)) >= 200


def test_created_once_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = samples.path("iris")
    assert first == tmp_path / "fieldguide" / "samples" / f"iris-v{samples.VERSION}" / "data.csv"
    before = first.stat().st_mtime_ns
    assert samples.path("iris") == first and first.stat().st_mtime_ns == before
    assert [p.name for p in first.parent.parent.iterdir()] == [f"iris-v{samples.VERSION}"]  # no half-made folder is left


def test_failed_creation_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(folder):
        (folder / "data.csv").write_text("half")
        raise OSError("disk full")

    monkeypatch.setitem(samples.SAMPLES, "iris", samples.Sample("iris", "t", "w", "l", "s", False, "y", fail))
    with pytest.raises(DataError, match="disk full"):
        samples.path("iris")
    assert list((tmp_path / "fieldguide" / "samples").iterdir()) == []


def test_second_use_is_fast():
    samples.path("digits")
    start = time.perf_counter()
    samples.path("digits")
    assert time.perf_counter() - start < 0.1


def test_unknown_sample():
    with pytest.raises(DataError, match=r"'digit' is not a sample. Did you mean 'digits'\?"):
        samples.path("digit")


@pytest.mark.slow
@pytest.mark.parametrize("name", samples.SAMPLES)
def test_every_sample_reaches_its_stated_score(name, tmp_path):
    """With default settings."""
    run = fit(name, out=tmp_path / "run")
    metric, value = samples.SAMPLES[name].reaches
    better = next(m.better for m in run.task.metrics if m.name == metric)
    assert run.scores[metric] >= value if better == "max" else run.scores[metric] <= value
    assert run.record["cost"]["seconds"] < 2 * 60 * samples.SAMPLES[name].minutes  # other tests may run at the same time
