"""Token classification: CoNLL files and JSON Lines, entities counted as by conlleval, and the task from file to prediction."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fieldguide import fit
from fieldguide.core.errors import DataError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.inference.run import open_run
from fieldguide.metrics.entities import count_entities, extract_entities
from fieldguide.models.registry import card
from fieldguide.tasks import infer_task, task

PEOPLE = ["Anna", "Ben", "Clara", "David", "Emma", "Fritz", "Greta", "Hans"]
TOWNS = ["Bonn", "Kiel", "Ulm", "Trier", "Jena", "Hof"]
LAST = ["Berg", "Stein", "Jena", "Hof", "Baum"]  # two of which are towns, too: the word alone does not say


def sentence(rng) -> tuple[list[str], list[str]]:
    words, tags = [str(rng.choice(PEOPLE))], ["B-PER"]
    if rng.random() < 0.6:
        words.append(str(rng.choice(LAST)))
        tags.append("I-PER")
    words += [str(rng.choice(["visits", "leaves", "likes"])), str(rng.choice(TOWNS))]
    tags += ["O", "B-LOC"]
    if rng.random() < 0.5:
        words += ["on", str(rng.integers(1, 31)), "May"]
        tags += ["O", "O", "O"]
    return [*words, "."], [*tags, "O"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("tags"), np.random.default_rng(0)
    lines = ["-DOCSTART- -X- O O", ""]
    for _ in range(400):
        for word, tag in zip(*sentence(rng)):
            lines.append(f"{word} NN {tag}")
        lines.append("")
    (path / "words.conll").write_text("\n".join(lines))
    return path


def slow(tags: list[str]) -> set[tuple[int, int, str]]:
    """Return entities by the rules of conlleval, word by word."""
    found, start, before = set(), None, ("O", "")
    for i, tag in enumerate([*tags, "O"]):
        now = (tag[0], tag[2:]) if tag != "O" else ("O", "")
        ends = before[0] in "ES" or (before[0] in "BI" and now[0] in "BSO") or (before[0] != "O" and before[1] != now[1])
        begins = now[0] in "BS" or (now[0] in "EI" and before[0] in "ESO") or (now[0] != "O" and before[1] != now[1])
        if start is not None and ends:
            found.add((start, i - 1, before[1]))
            start = None
        if begins:
            start = i
        before = now
    return found


@pytest.mark.parametrize("letters", ["BI", "I", "BIES"])
def test_entities_equal_conlleval(letters):
    rng = np.random.default_rng(0)
    tags = ["O", *(f"{letter}-{kind}" for letter in letters for kind in ("PER", "LOC"))]
    real, said = (rng.integers(len(tags), size=(300, 9)) for _ in range(2))
    said = np.where(rng.random(said.shape) < 0.7, real, said)
    length = rng.integers(1, 10, 300)
    real[np.arange(9) >= length[:, None]] = -1
    said[real < 0] = -1
    right = claimed = there = 0
    for a, b, n in zip(real, said, length):
        one, other = (slow([tags[t] for t in row[:n]]) for row in (a, b))
        assert set(extract_entities(a, tags)) == one and set(extract_entities(b, tags)) == other
        right, claimed, there = right + len(one & other), claimed + len(other), there + len(one)
    assert [int(x.sum()) for x in count_entities(real, said, tags)] == [right, claimed, there] and right > 100


def test_known_cases_of_entities():
    tags = ["O", "B-A", "I-A", "B-B", "I-B"]
    assert extract_entities(np.array([1, 2, 1, 0, 4, 4]), tags) == [(0, 1, "A"), (2, 2, "A"), (4, 5, "B")]
    assert extract_entities(np.array([1, 4]), tags) == [(0, 0, "A"), (1, 1, "B")]
    assert extract_entities(np.array([0, 1, 1]), ["DT", "NN"]) == [(0, 0, "DT"), (1, 1, "NN"), (2, 2, "NN")]
    assert extract_entities(np.array([0, 1, 2]), ["U-A", "B-A", "L-A"]) == [(0, 0, "A"), (1, 2, "A")]


def test_conll_files(folder, tmp_path):
    data = read(folder / "words.conll", column_spec=task("token-classification").column_spec)
    assert len(data) == 400 and data.target.name == "tags" and infer_task(data)[0].name == "token-classification"
    rng = np.random.default_rng(0)
    words, tags = sentence(rng)
    assert data.rows["tokens"][0].to_list() == words and data.rows["tags"][0].to_list() == tags
    assert data.locate_row(0) == "words.conll:3"
    (tmp_path / "train.txt").write_text("A\tO\nb\tB-X\n\nc\tO\n\n" * 5)
    (tmp_path / "test.txt").write_text("A O\r\nb B-X\r\n\r\nc O\r\nd O")
    parts = read(tmp_path, column_spec=task("token-classification").column_spec)
    assert len(parts) == 12 and (parts.splits == "test").sum() == 2
    (tmp_path / "bad.conll").write_text("A O\nb\n")
    with pytest.raises(DataError, match=r"bad\.conll:2: 'b' has no tag"):
        read(tmp_path / "bad.conll")


def made(source, **options):
    kind = task("token-classification")
    data = read(source, column_spec=kind.column_spec)
    return kind.fit(data, kind.options_from(options)), data


def test_json_lines_and_their_errors(tmp_path):
    rows = [dict(zip(("tokens", "ner_tags"), sentence(np.random.default_rng(i)))) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, data = made(tmp_path / "a.jsonl", vocab_size=300)
    assert one.tags == ["O", "B-LOC", "B-PER", "I-PER"] and infer_task(data)[0].name == "token-classification"
    rows[7]["ner_tags"].pop()
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"'tokens' and 'ner_tags' differ in length.*b\.jsonl:8"):
        made(tmp_path / "b.jsonl", vocab_size=300)
    rows[7]["ner_tags"].append("B-NEW")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = one.targets(read(tmp_path / "c.jsonl", schema=one.columns))["label"]
    assert target.max() == 4 and one.all_tags[4] == "B-NEW" and any("not in the training data" in note for note in one.notes)


def test_words_are_classified_at_their_first_token(folder):
    one, data = made(folder / "words.conll", vocab_size=270, length=40)
    batch = one.batches(data, card("bert"), Settings()).make(np.arange(20), None)
    truth = one.targets(data)["label"]
    for row in range(20):
        words = data.rows["tokens"][row].to_list()
        tokens, places = batch["tokens"][row].tolist(), [p for p in batch["words"][row].tolist() if p >= 0]
        assert tokens[0] == one.text.cls and len(places) == len(words)
        ends = [*places[1:], int(batch["mask"][row].sum()) - 1]
        assert tokens[ends[-1]] == one.text.sep
        for number, (first, last) in enumerate(zip(places, ends)):
            assert one.text.decode(tokens[first:last]).strip() == words[number]
            assert batch["target"][row, first] == truth[row, number]
        assert (batch["target"][row] >= 0).sum() == len(words)
    short, _ = made(folder / "words.conll", vocab_size=270, length=8)
    cut = short.batches(data, card("bert"))
    batch = cut.make(np.arange(20), None)
    assert batch["tokens"].shape[1] <= 8 and "words are beyond the first 8 tokens" in short.notes[-1]
    real = truth[:20]
    scores = short.score({"label": np.full((20, 2), short.tags.index("O"))}, {"label": real})
    assert scores["recall"] == 0 and scores["accuracy"] == pytest.approx((real[real >= 0] == short.tags.index("O")).mean())


def test_scores_and_the_baseline(folder):
    one, data = made(folder / "words.conll", vocab_size=300)
    truth = one.targets(data)
    assert set(one.score({"label": truth["label"]}, truth).values()) == {1.0}
    (baseline,) = one.baselines(data, data)
    scores = one.score(baseline.outputs, truth)
    assert 0.6 < scores["f1"] < 1.0  # words that are names of two kinds are beyond it
    assert one.intervals(baseline.outputs, truth)["f1"][0] <= scores["f1"] <= one.intervals(baseline.outputs, truth)["f1"][1]


def test_the_report_shows_wrong_and_correct_sentences(folder):
    one, data = made(folder / "words.conll", vocab_size=300)
    truth = one.targets(data)
    wrong = truth["label"].copy()
    wrong[3] = one.tags.index("O")
    errors = one.report_elements(data, {"label": wrong, "probability": np.ones(wrong.shape)}, truth)["Errors"]
    worst, right = errors[-2:]
    (quote,) = worst.quotes
    assert quote.text == " ".join(data.rows["tokens"][3].to_list()) and "missed: " in quote.caption and quote.bad
    assert len(right.quotes) == 8 and all("(PER)" in q.caption and not q.bad for q in right.quotes)


def test_learns_to_tag(folder, tmp_path):
    run = fit(
        folder / "words.conll",
        model="bert-tiny",
        out=tmp_path / "run",
        settings={
            "steps": 60,
            "evaluate": 30,
            "batch": 32,
            "lr": 4e-3,
            "precision": "float32",
            "task.vocab": 400,
            "model.dim": 64,
            "model.heads": 2,
            "model.hidden": 128,
        },
    )
    scores = run.record["scores"]
    assert run.record["task"] == "token-classification" and run.record["model"]["config"]["output_type"] == "labels"
    assert scores["test"]["f1"] > max(0.9, scores["baselines"][0]["scores"]["f1"])
    again = open_run(run.path)
    (record,) = again.predict("Clara Jena visits Hof.")
    assert record["tokens"] == ["Clara", "Jena", "visits", "Hof", "."] and record["tags"][3:] == ["B-LOC", "O"]
    assert {(e["text"], e["type"]) for e in record["entities"]} == {("Clara Jena", "PER"), ("Hof", "LOC")}
    assert all(0 < e["probability"] <= 1 for e in record["entities"])
    assert again.evaluate(folder / "words.conll")["scores"]["f1"] == pytest.approx(scores["test"]["f1"])
    report = (run.path / "report.html").read_text()
    assert "By type" in report and "Tags of words" in report
