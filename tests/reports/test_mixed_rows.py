"""Rows of numbers, categories and texts: texts are used next to numbers, and what is not used is reported."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from PIL import Image
from sklearn.feature_extraction.text import TfidfVectorizer

import fieldguide
from fieldguide.core.words import find_words
from fieldguide.data.preprocessing.text_features import TextFeatures

GOOD = ("arrived quickly and works perfectly", "great quality, very happy with it", "love it, would buy it again")
BAD = ("broke after two days, very sad", "terrible quality, want my money back", "does not work, never again")


def reviews(count=400, seed=0, noise=0.1):
    """Return rows whose class depends on the text (with noise) and on nothing else."""
    draw = np.random.default_rng(seed)
    up = draw.random(count) < 0.5
    phrases = [draw.choice(GOOD if v ^ (draw.random() < noise) else BAD) for v in up]
    texts = [f"{p}, order {draw.integers(900)} of {draw.choice(['Bob', 'Ann', 'Joe'])}" for p in phrases]
    city = draw.choice(["Rome", "Oslo"], count)
    return pl.DataFrame({"price": draw.normal(size=count), "city": city, "review": texts, "stars": np.where(up, "up", "down")})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("reviews") / "run"
    return fieldguide.fit(reviews(), "stars", out=path, settings={"steps": 120, "precision": "float32"})


def test_the_text_of_a_table_is_used(run):
    assert run.record["task"] == "tabular-classification"
    assert run.scores["accuracy"] > 0.8  # .9 is possible; .5 without the text
    baselines = {b["name"]: b["scores"]["accuracy"] for b in run.record["scores"]["baselines"]}
    assert baselines["linear"] > 0.8  # the baseline reads the same columns


def test_a_saved_run_reads_texts_as_before(run):
    again = fieldguide.open_run(run.path)
    new = reviews(30, seed=1)
    assert np.array_equal(again.predict_proba(new), run.predict_proba(new))
    row = {"price": 0.0, "city": "Rome", "review": BAD[1]}
    assert again.predict(row)[0]["label"] == "down"
    assert again.predict({**row, "review": GOOD[1]})[0]["label"] == "up"
    assert again.predict({**row, "review": None})[0]["probability"] < 0.99


def test_columns_that_cannot_be_used_are_named_and_not_required(tmp_path):
    names = []
    for i in range(40):
        names.append(f"{i:02d}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 100 + 150 * (i % 2), (12, 12, 3), dtype=np.uint8)).save(
            tmp_path / names[-1]
        )
    rows = [{"image": n, "weight": i * 1.5 + 0.25, "kind": "ab"[i % 2]} for i, n in enumerate(names)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    run = fieldguide.fit(tmp_path, "kind", out=tmp_path / "run", settings={"steps": 2, "batch_size": 8})
    assert run.record["task"] == "image-classification"
    (note,) = [n for n in run.record["data"]["notes"] if "not used" in n]
    assert "reads only image" in note and "weight" in note
    assert "weight" in (run.path / "report.html").read_text(encoding="utf-8")
    assert len(run.predict(str(tmp_path / "00.png"))) == 1


@pytest.mark.parametrize("language", ["english", "hindi", "empty"])
def test_text_features_equal_scikit_learn(language):
    texts = {
        "english": list(reviews(80)["review"]),
        "hindi": ["यह किताब अच्छी है", "यह किताब बुरी है", "फिल्म अच्छी थी", "फिल्म बुरी थी"] * 6,
        "empty": [None, "", "a b", "b c", "a b c", "c"] * 6,
    }[language]
    features = TextFeatures.fit(texts)
    reference = TfidfVectorizer(
        tokenizer=find_words, token_pattern=None, ngram_range=(1, 2), min_df=2, max_df=len(texts) - 1, sublinear_tf=True
    )
    expected = reference.fit_transform([t or "" for t in texts]).toarray()
    assert tuple(reference.get_feature_names_out()) == features.terms
    assert np.allclose(features.weigh(texts).toarray(), expected)
    # The projection keeps as much of the matrix as the best of this rank.
    kept = features.apply(texts)
    best = np.linalg.svd(expected, compute_uv=False)[: features.dimensions]
    assert np.isclose((kept**2).sum(), (best**2).sum(), rtol=1e-3)
    again = TextFeatures.from_json(json.loads(json.dumps(features.to_json())))
    assert np.array_equal(again.apply(texts), kept)


def test_texts_without_common_words_have_no_features():
    assert TextFeatures.fit([f"word{i}" for i in range(50)]) is None
    assert TextFeatures.fit([None] * 10) is None
