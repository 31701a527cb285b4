"""Tasks of text encoders, from files to predictions."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import torch

from fieldguide import fit
from fieldguide.core.errors import DataError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.inference.run import open_run
from fieldguide.models.registry import card
from fieldguide.tasks import get_requested_task, task

WORDS = ["red", "green", "blue", "old", "new", "small"]
NOUNS = ["house", "tree", "river", "stone"]
WHO = ["Anna", "Ben", "Clara", "David", "Emma", "Fritz", "Greta", "Hans", "Ida", "Jan"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return sentences whose noun follows from the adjective."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        which = int(rng.integers(len(WORDS)))
        out.append(f"{rng.choice(WHO)} and {rng.choice(WHO)} saw the {WORDS[which]} {NOUNS[which % 4]} on {rng.choice(DAYS)} .")
    return sorted(set(out))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(600)))
    return path


def made(file, **options):
    kind = task("fill-mask")
    data = read(file, column_spec=kind.column_spec)
    assert get_requested_task("fill-mask", data) is kind
    data = kind.build_examples(data, kind.options_from(options))
    return kind.fit(data, kind.options_from(options)), data


def test_masked_rows(file):
    one, data = made(file, length=24, vocab_size=300)
    batches = one.batches(data, card("bert"), Settings())
    text, index = one.text, np.arange(len(batches))
    first, again = (batches.make(index[::step].copy(), None) for step in (1, -1))
    assert torch.equal(first["tokens"], again["tokens"].flip(0))  # the same words, whoever shares the batch
    tokens, target = first["tokens"], first["target"]
    assert tokens.shape == (len(batches), 24) and (tokens[:, 0] == text.cls).all()
    asked = target >= 0
    real = tokens != text.pad
    assert 0.1 < asked.sum() / real.sum() < 0.2 and not (asked & ~real).any()
    assert not (asked & (tokens == text.sep)).any() and not asked[:, 0].any()
    original = torch.where(asked, target, tokens)
    spelt = text.decode([t for t in original.flatten().tolist() if t not in (text.cls, text.pad, text.sep)])
    assert spelt == "".join(data.rows["text"].to_list())
    assert (original == text.sep).sum() == len(data)  # one behind each text
    generator = lambda seed: torch.Generator().manual_seed(seed)
    drawn = [batches.make(index, generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0]["tokens"], drawn[1]["tokens"]) and not torch.equal(drawn[0]["tokens"], drawn[2]["tokens"])
    assert "mask" not in drawn[0] and not torch.equal(drawn[0]["tokens"], tokens)


def test_text_shorter_than_a_row_is_padded(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "One little text."}\n{"text": "Another."}\n')
    one, data = made(tmp_path / "a.jsonl", length=64, vocab_size=300)
    batch = one.batches(data, card("bert")).make(np.arange(1), torch.Generator().manual_seed(0))
    assert batch["mask"].sum() < 64 and not (batch["target"][~batch["mask"]] >= 0).any()


def test_frequency_baseline(file):
    one, data = made(file, length=24, vocab_size=300)
    (baseline,) = one.baselines(data, data)
    truth = one.targets(data)
    scores = one.score(baseline.outputs, truth)
    target = truth["target"][truth["target"] >= 0]
    share = (one.counts + 1) / (one.counts + 1).sum()
    assert scores["loss"] == pytest.approx(-np.log(share[target]).mean())
    assert scores["accuracy"] == pytest.approx((target == one.counts.argmax()).mean())
    assert scores["perplexity"] == pytest.approx(np.exp(scores["loss"]))


def test_gap_notations(file):
    one, _ = made(file, length=24, vocab_size=300)
    text = one.text
    for blank in ("<mask>", "[MASK]", "___", "______"):
        ids, places = one.encode_gaps(f"We saw the {blank} house")
        assert len(places) == 1 and ids[places[0]] == text.mask_token and ids[0] == text.cls and ids[-1] == text.sep
        assert text.decode(ids[1 : places[0]]) == "We saw the" and text.decode(ids[places[0] + 1 : -1]) == " house"
    assert len(one.encode_gaps("<mask> and <mask>")[1]) == 2
    with pytest.raises(DataError, match=r"has no gap\. Write <mask>"):
        one.predict_batches(one.read([pl.DataFrame({"text": ["all is here"]})]), card("bert"))
    with pytest.raises(DataError, match="the model reads at most 24"):
        one.predict_batches(one.read([pl.DataFrame({"text": ["<mask> " + "one two three " * 20]})]), card("bert"))


def test_learns_to_fill_masks(file, tmp_path):
    """From texts to predictions: far better than token frequency, and nouns are predicted for nouns."""
    run = fit(
        file,
        task="fill-mask",
        model="modernbert-mini",
        out=tmp_path / "run",
        settings={
            "steps": 80,
            "evaluate": 40,
            "batch": 24,
            "lr": 4e-3,
            "precision": "float32",
            "task.length": 24,
            "model.dim": 64,
            "model.heads": 2,
            "model.hidden": 96,
            "model.depth": 2,
        },
    )
    scores = run.record["scores"]
    assert scores["test"]["loss"] < 0.7 * scores["baselines"][0]["scores"]["loss"] and scores["test"]["accuracy"] > 0.4
    again = open_run(run.path)
    text = "Anna and Ben saw the red <mask> on Monday ."
    record, other = again.predict(pl.DataFrame({"text": [text, "Hans and <mask> saw the old [MASK] on Friday ."]}), top=3)
    (words,) = record["words"]
    assert len(words) == 3 and words[0]["probability"] >= words[1]["probability"]
    assert {w["word"] for w in words} & set(NOUNS)
    assert record["text"] == text.replace("<mask>", words[0]["word"])
    assert len(other["words"]) == 2 and {w["word"] for w in other["words"][1]} & set(NOUNS)
    texts = ["Anna saw the red house .", "Anna saw the red tree .", "on Monday Monday Monday"]
    vectors = again.embed(texts)
    assert vectors.shape == (3, 64) and vectors.dtype == np.float32
    np.testing.assert_allclose((vectors**2).sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(again.embed(texts[1]), vectors[1:2], rtol=1e-4, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    ids = torch.from_numpy(again.task.text.encode_exact(texts)[0])[None]
    x = again.objective.model.features(torch.cat([torch.tensor([[2]]), ids, torch.tensor([[3]])], 1))[0].mean(0)
    np.testing.assert_allclose(vectors[0], (x / x.norm()).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert again.embed([]).shape == (0, 64)
    assert again.evaluate(file)["scores"]["loss"] == pytest.approx(scores["test"]["loss"], rel=1e-4)
    report = (run.path / "report.html").read_text()
    assert "Hidden words of test texts" in report and "By word frequency" in report


# ---------------------------------------------------------------------------------------------- one text or two, a label


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Return sentence pairs labeled with whether both name the same person; a single sentence does not tell."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(500):
        one, other = rng.choice(WHO, 2, replace=False)
        same = bool(rng.random() < 0.5)
        rows.append(
            {
                "first": f"On {rng.choice(DAYS)} we met {one} at the {rng.choice(NOUNS)} .",
                "second": f"It was {one if same else other} who saw the {rng.choice(WORDS)} {rng.choice(NOUNS)} .",
                "label": "same" if same else "other",
            }
        )
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learnt_pairs(pairs, **options):
    kind = task("text-classification")
    data = read(pairs, column_spec=kind.column_spec, target="label", kinds={"first": "text", "second": "text"})
    return kind.fit(data, kind.options_from(options)), data


def test_pairs_have_special_tokens_and_segments(pairs):
    one, data = learnt_pairs(pairs, vocab=512, length=40)
    assert (one.column, one.second) == ("first", "second")
    batch = one.batches(data, card("bert"), Settings()).make(np.arange(10), None)
    text = one.text
    for row in range(10):
        real = batch["tokens"][row][batch["mask"][row]].tolist()
        places = [i for i, token in enumerate(real) if token == text.sep]
        assert real[0] == text.cls and len(places) == 2 and places[1] == len(real) - 1
        assert text.decode(real[1 : places[0]]).strip() == data.rows["first"][row].lower()
        assert text.decode(real[places[0] + 1 : -1]).strip() == data.rows["second"][row].lower()
        segments = batch["segments"][row]
        assert segments[: places[0] + 1].eq(0).all() and segments[places[0] + 1 : len(real)].eq(1).all()
        assert segments[len(real) :].eq(0).all()
    plain = one.batches(data, card("lstm"), Settings()).make(np.arange(3), None)
    assert not (plain["tokens"] == text.cls).any() and ((plain["tokens"] == text.sep).sum(1) == 1).all()


def test_long_pairs_lose_the_end_of_the_longer_text(pairs):
    one, _ = learnt_pairs(pairs, vocab=512, length=13)
    data = one.read(
        [pl.DataFrame({"first": ["red " * 40, "red", "red " * 40], "second": ["blue", "blue " * 40, "blue " * 40]})]
    )
    tokens, segments, cut = one.encode_rows(data, around=True)
    assert cut == 3 and [len(t) for t in tokens] == [13, 13, 13]
    ends = [int((s == 0).sum()) for s in segments]  # [CLS] A [SEP]
    short = len(one.text.encode_exact(["blue"])[0]), len(one.text.encode_exact(["red"])[0])
    assert ends == [2 + 10 - short[0], 2 + short[1], 7]
    with pytest.raises(DataError, match="is one text, but this run reads pairs"):
        one.read(["only one text here"])


def test_single_texts_have_special_tokens_for_encoders_only(file):
    rows = pl.DataFrame({"text": ["red house", "blue tree", "old stone"] * 10, "label": ["a", "b", "a"] * 10})
    kind = task("text-classification")
    data = read(rows, target="label", kinds={"text": "text"})
    one = kind.fit(data, kind.options_from({"vocab": 300, "length": 16}))
    framed, plain = (one.batches(data, card(name)).make(np.arange(3), None) for name in ("modernbert", "gru"))
    for row in range(3):
        a, b = (x["tokens"][row][x["mask"][row]].tolist() for x in (framed, plain))
        assert a == [one.text.cls, *b, one.text.sep]
    assert "segments" not in framed


def test_learns_from_both_texts_of_a_pair(pairs, tmp_path):
    run = fit(
        pairs,
        target="label",
        task="text-classification",
        model="bert-tiny",
        out=tmp_path / "run",
        settings={
            "steps": 4,
            "evaluate": 2,
            "batch": 16,
            "precision": "float32",
            "task.vocab": 512,
            "task.length": 40,
            "model.dim": 32,
            "model.heads": 2,
            "model.hidden": 64,
            "column.first": "text",
            "column.second": "text",
        },
    )
    assert run.record["model"]["config"]["output_type"] == "label" and run.objective.inputs == ("tokens", "mask", "segments")
    records = run.predict(pl.DataFrame({"first": ["On Monday we met Anna ."], "second": ["It was Anna ."]}))
    assert records[0]["label"] in ("same", "other")
    names = [b["name"] for b in run.record["scores"]["baselines"]]
    assert names == ["majority class", "bag-of-ngrams"]  # the latter reads both texts, and counts words that occur twice
