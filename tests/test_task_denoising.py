"""Denoising: corrupted rows of both kinds, tokenizers with and without sentinels, scores, and the task from file to
prediction.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from fieldguide import fit
from fieldguide.automl.fit import resume
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.inference.run import open_run
from fieldguide.models.registry import card, cards, create
from fieldguide.objectives import DenoisingObjective
from fieldguide.tasks import get_requested_task, task
from fieldguide.tasks.text.denoising import SENTINELS
from fieldguide.training.state import Interrupted
from test_task_encoders import NOUNS, sentences
from test_task_encoders import WORDS as WORDS_OF
from test_task_writers import tokenizer
from test_tasks_resume import StopAt, log
from writers import network

KIND = task("denoising")
SMALL = {
    "precision": "float32",
    "task.vocab": 420,
    "task.length": 40,
    "model.dim": 64,
    "model.heads": 2,
    "model.hidden": 128,
    "model.depth": 2,
    "model.decoder_depth": 2,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(600)))
    return path


def made(file, **options):
    data = read(file, column_spec=KIND.column_spec)
    assert get_requested_task("denoising", data) is KIND
    data = KIND.build_examples(data, KIND.options_from(options))
    return KIND.fit(data, KIND.options_from(options)), data


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def together(one, batch, row: int) -> list[int]:
    """Return the text of a row, joined by hand from source and target."""
    source = batch["source"][row][batch["source_mask"][row]].tolist()
    target = [t for t in batch["target"][row].tolist() if t >= 0]
    assert target.pop() == one.frame.end
    if one.options.damage == "infill":
        return target
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in one.sentinels:
            spans[token] = last = []
        else:
            last.append(token)
    assert source.pop() == one.frame.end and list(spans) == one.sentinels[: len(spans)].tolist()
    assert not spans.popitem()[1] and [t for t in source if t in one.sentinels] == list(spans)
    return [t for s in source for t in spans.get(s, [s])]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rows_contain_the_texts(file, name):
    """Source and target together contain all texts of a row; corruption depends on the generator only."""
    one, data = made(file, length=40, vocab_size=420)
    batches = one.batches(data, card(name), Settings())
    assert one.options.damage == {"t5": "spans", "bart": "infill"}[name] == card(name).pretraining_objective
    index, text = np.arange(len(batches)), one.text
    first, again = (batches.make(index[::step].copy(), None) for step in (1, -1))
    assert all(torch.equal(first[k], again[k].flip(0)) for k in first)  # the same, whoever shares the batch
    ids = [t for row in index for t in together(one, first, row)]
    assert text.decode([t for t in ids if t != text.sep]) == "".join(data.rows["text"].to_list())
    assert ids.count(text.sep) == len(data) and one.frame.end not in ids
    for batch in (first, batches.make(index, generator(1))):
        removed, target = batch["removed"], batch["target"]
        share = removed.sum() / (len(ids) - len(data))
        assert {"spans": 0.13, "infill": 0.2}[one.options.damage] < share < {"spans": 0.17, "infill": 0.31}[one.options.damage]
        assert not np.isin(target[removed].numpy(), [*one.sentinels, text.sep, text.pad, one.frame.end, -1]).any()
        assert torch.equal(batch["tokens"][:, 0], torch.full((len(index),), one.frame.target_start[0]))
        follows = torch.where(target[:, :-1] < 0, text.pad, target[:, :-1])
        assert torch.equal(batch["tokens"][:, 1:], follows) and max(x.shape[1] for x in batch.values()) <= 40
    drawn = [batches.make(index, generator(seed)) for seed in (1, 1, 2)]
    assert len({tuple(together(one, drawn[0], row)) for row in index}) > 0.9 * len(index) > 50  # pieces of all texts
    assert torch.equal(drawn[0]["source"], drawn[1]["source"])
    assert drawn[0]["source"].shape != drawn[2]["source"].shape or not torch.equal(drawn[0]["source"], drawn[2]["source"])
    assert {text.decode(t[:3]) for t in drawn[0]["source"].tolist()} != {text.decode(t[:3]) for t in first["source"].tolist()}


def test_removed_tokens_are_the_scored_ones(file):
    """For BART: the tokens that the source lacks."""
    one, data = made(file, length=40, vocab_size=420, damage="infill")
    batch = one.batches(data, card("t5")).make(np.arange(20), None)  # as the user says, not as the card does
    for row in range(20):
        source = [t for t in batch["source"][row][batch["source_mask"][row]].tolist() if t != one.text.mask_token]
        removed, target = batch["removed"][row].tolist(), batch["target"][row].tolist()
        kept = [t for t, a in zip(target, removed) if not a and t >= 0 and t != one.frame.end]
        assert [t for t in source if t != one.text.sep] == [t for t in kept if t != one.text.sep] and any(removed)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_texts_shorter_than_a_row_have_as_many_targets_as_removed_marks(file, name):
    one, data = made(file, length=40, vocab_size=420)
    data.rows = data.rows[:1].with_columns(text=pl.lit("a few words"))
    batch = one.batches(data, card(name), Settings()).make(np.arange(1), None)
    assert batch["removed"].shape == batch["target"].shape == batch["tokens"].shape
    assert batch["target"].shape[1] < 40


def test_scores_count_removed_tokens_only():
    torch.manual_seed(0)
    model, length = create("bart-test").eval(), 7
    tokens, target = torch.randint(5, 30, (3, length)), torch.randint(5, 30, (3, length))
    removed = torch.zeros(3, length, dtype=torch.bool)
    removed[0, 2:4], removed[1, 0], target[2] = True, True, -1
    batch = {
        "source": tokens,
        "source_mask": torch.ones(3, length, dtype=torch.bool),
        "tokens": tokens,
        "target": target,
        "removed": removed,
    }
    with torch.no_grad():
        found = DenoisingObjective(model, cards()["bart"].inputs).outputs(batch)
        logp = model(tokens, batch["source_mask"], tokens).log_softmax(-1)
    want = [-sum(logp[row, t, target[row, t]].item() for t in range(length) if removed[row, t]) for row in range(3)]
    assert found["nats"].tolist() == pytest.approx(want, rel=1e-5) and found["count"].tolist() == [2, 1, 0]
    right = [sum(int(logp[row, t].argmax() == target[row, t]) for t in range(length) if removed[row, t]) for row in range(3)]
    assert found["right"].tolist() == right


def test_frequency_baseline(file):
    one, data = made(file, length=40, vocab_size=420)
    one.batches(data, card("t5"))
    (baseline,) = one.baselines(data, data)
    truth = one.targets(data)
    target = truth["target"][truth["target"] >= 0]
    share = (one.counts + 1) / (one.counts + 1).sum()
    scores = one.score(baseline.outputs, truth)
    assert scores["loss"] == pytest.approx(-np.log(share[target]).mean())
    assert scores["accuracy"] == pytest.approx((target == one.counts.argmax()).mean())
    assert not np.isin(target, one.sentinels).any() and one.counts[one.sentinels].sum() == 0


WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def given(tmp_path, special=WORDS, **options):
    """Return a task with a word tokenizer, on texts of its words."""
    path = tokenizer(tmp_path / "tokenizer.json", ("<s>",), ("</s>",), special)
    rows = pl.DataFrame({"text": ["a cat sees a dog", "katze sieht eine hund", "a dog sees a cat a cat"] * 30})
    data = KIND.build_examples(read(rows, column_spec=KIND.column_spec), KIND.Options())
    return KIND.fit(data, KIND.options_from({"tokenizer": path, "length": 24, **options})), data


def test_missing_sentinels_are_added(tmp_path):
    one, data = given(tmp_path)
    assert (
        len(one.sentinels) == 100
        and one.text.size == 10 + len(WORDS) + 100 == one.options.vocab_size == one.model_dims()["vocab_size"]
    )
    assert len(one.counts) == one.text.size and "are added" in one.notes[-1]
    one.batches(data, card("t5"))
    batch = one.batches(data, card("t5")).make(np.arange(4), None)
    assert (batch["source"] == one.sentinels[0]).sum() == 4 and int(batch["target"].max()) < one.text.size
    one.save(tmp_path / "saved")
    again = KIND.load(tmp_path / "saved")
    assert again.sentinels.tolist() == one.sentinels.tolist() and again.options.damage == "spans"
    # Nothing stands between texts where the separator ends answers, too.
    assert one.separator == [] and not (batch["source"][:, 1:-2] == one.text.sep).any()


def test_checkpoint_without_sentinels_is_rejected(tmp_path):
    one, data = given(tmp_path, begin=2)
    assert len(one.sentinels) == 0 and one.text.size == 10 + len(WORDS)
    with pytest.raises(SettingsError, match=r"has 0 tokens <extra_id_0> .*task\.damage=infill"):
        one.batches(data, card("t5"))
    two, data = given(tmp_path, begin=2, damage="infill")
    batch = two.batches(data, card("bart")).make(np.arange(2), None)
    name = two.text.tokenizer.id_to_token
    assert [name(i) for i in batch["tokens"][0, :2].tolist()] == ["</s>", "<s>"] and batch["target"][0, 0] == -1
    real = batch["source"][0][batch["source_mask"][0]].tolist()
    assert name(real[0]) == "<s>" and name(real[-1]) == "</s>" and "<mask>" in map(name, real)
    three, data = given(tmp_path, WORDS[:-1], begin=2)
    with pytest.raises(SettingsError, match="has no mask token"):
        three.batches(data, card("bart"))


def test_invalid_settings_are_rejected(file):
    for options, words in (
        ({"damage": "holes"}, "is unknown. Choose one of spans, infill"),
        ({"share": 1.5}, "between 0 and 1"),
        ({"mean": 0.5}, "at least 1"),
        ({"length": 5}, "at least 11"),
    ):
        with pytest.raises(SettingsError, match=words):
            made(file, vocab_size=420, **options)
    one, data = made(file, vocab_size=420, length=1000, share=0.5, mean=1.0)
    with pytest.raises(SettingsError, match=r"rows of 1000 tokens need 500. Use shorter rows"):
        one.batches(data, card("t5"))


def test_gap_notations(file):
    one, _ = made(file, length=40, vocab_size=420)
    removed = lambda *texts: one.predict_batches(one.read([pl.DataFrame({"text": texts})]), card("t5"))
    texts = ["We saw the <mask> house", "We saw the ___ house and [MASK] tree", "<extra_id_7> saw the house"]
    batch = removed(*texts).make(np.arange(3), None)
    for row, gaps in enumerate((1, 2, 1)):
        ids = batch["source"][row][batch["source_mask"][row]].tolist()
        assert [t for t in ids if t in one.sentinels] == one.sentinels[:gaps].tolist()
        assert ids[-2:] == [one.text.sep, one.frame.end]  # as where a text ends in a row
        assert int(batch["gaps"][row]) == gaps
    assert one.text.decode(batch["source"][0][: batch["source"][0].tolist().index(one.sentinels[0])].tolist()) == "We saw the"
    with pytest.raises(DataError, match=r"has no gap\. Write <mask>"):
        removed("all is here")
    with pytest.raises(DataError, match="the model reads at most 40"):
        removed("<mask> " + "one two three " * 20)
    # What was written, taken apart: out of order, twice, or not at all.
    s, (red, blue) = one.sentinels.tolist(), (int(ids[0]) for ids in one.text.encode_exact([" a", "b"]))
    assert one.split_fillings([s[1], red, s[0], blue, red, s[2], one.frame.end], 2) == [[blue, red], [red]]
    assert one.split_fillings([red, s[0], blue], 3) == [[blue], [], []]
    one.request = [one.split_at_gaps("We saw the <mask> house and ___")]
    house = one.text.encode_exact([" red"])[0].tolist()
    (record,) = one.format_predictions({"said": np.array([[s[0], *house, s[1], *house, s[2], -1, -1]])})
    assert record == {"text": "We saw the red house and red", "gaps": ["red", "red"]}
    one.options = replace(one.options, damage="infill")
    (record,) = one.format_predictions({"said": np.array([[*one.text.encode_exact(["We saw"])[0], one.text.sep, *house, -1]])})
    assert record == {"text": "We saw"}


@pytest.mark.parametrize("name", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_stopped_and_resumed(name, file, tmp_path):
    settings = {**SMALL, "steps": 6, "evaluate": 2, "batch": 8}
    arguments = {"task": "denoising", "model": f"{name}-test", "settings": settings}
    whole = fit(file, out=tmp_path / "whole", **arguments)
    with pytest.raises(Interrupted, match="after step 3 of 6"):
        fit(file, out=tmp_path / "stopped", callback=StopAt(3), **arguments)
    again = resume(tmp_path / "stopped")
    assert log(tmp_path / "whole") == log(tmp_path / "stopped") and again.scores == whole.scores
    assert (whole.path / "model.safetensors").read_bytes() == (again.path / "model.safetensors").read_bytes()


def test_starts_from_a_checkpoint_and_serves_as_one(file, tmp_path):
    """BART of transformers is trained further on texts; the result is fine-tuned on a task with its tokenizer."""
    theirs = network(create("bart-test", begin=2, length=40))
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer(tmp_path / "theirs" / "tokenizer.json", ("<s>",), ("</s>",), WORDS)
    run = fit(
        file,
        task="denoising",
        out=tmp_path / "run",
        weights=tmp_path / "theirs",
        settings={"steps": 1, "batch": 8, "precision": "float32", "lr": 1e-8, "tune": "whole", "task.length": 24},
    )
    assert run.task.options.damage == "infill" and run.record["model"]["fresh"] == []
    torch.testing.assert_close(
        run.model.embed.weight.detach(), theirs.get_input_embeddings().weight.detach(), rtol=0, atol=1e-5
    )
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"en": f"a cat sees {'a ' * i}dog", "de": f"eine katze sieht {'a ' * i}hund"}) + "\n" for i in range(20)
        )
    )
    again = fit(
        pairs,
        task="translation",
        target="de",
        weights=run.path,
        out=tmp_path / "next",
        settings={"steps": 1, "batch": 4, "precision": "float32", "column.en": "text", "column.de": "text"},
    )
    assert again.task.frame == run.task.frame == replace(run.task.frame) and again.record["model"]["fresh"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("t5", 120), ("bart", 50)])
def test_learns_to_restore(name, steps, file, tmp_path):
    """From texts to predictions: far better than token frequency."""
    run = fit(
        file,
        task="denoising",
        model=f"{name}-test",
        out=tmp_path / "run",
        settings={
            **SMALL,
            "steps": steps,
            "evaluate": steps // 2,
            "batch": 24,
            **({"model.width": 32} if name == "t5" else {}),
        },
    )
    scores = run.record["scores"]
    assert scores["test"]["loss"] < 0.85 * scores["baselines"][0]["scores"]["loss"] and scores["test"]["accuracy"] > 0.25
    again = open_run(run.path)
    records = again.predict(pl.DataFrame({"text": ["Anna saw the red <mask> on Monday .", "<mask> saw ___ house"]}), beams=2)
    assert [set(r) for r in records] == [{"input", "text"} | ({"gaps"} if name == "t5" else set())] * 2
    assert again.evaluate(file)["scores"]["loss"] == pytest.approx(scores["test"]["loss"], rel=1e-4)
    report = (run.path / "report.html").read_text()
    assert "Corrupted texts and their removed spans" in report and "Loss by test row" in report


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_fills_gaps(name, file, tmp_path):
    run = fit(
        file,
        task="denoising",
        model=f"{name}-test",
        out=tmp_path / "run",
        settings={**SMALL, "steps": 500, "evaluate": 100, "batch": 24, **({"model.width": 32} if name == "t5" else {})},
    )
    scores = run.record["scores"]
    assert scores["test"]["loss"] < 0.5 * scores["baselines"][0]["scores"]["loss"]
    if name == "t5":
        return
    # The noun follows from the adjective.
    texts = {f"Anna and Ben saw the {adjective} {noun} on Monday .": noun for adjective, noun in zip(WORDS_OF, NOUNS)}
    said = run.predict(pl.DataFrame({"text": [text.replace(f" {noun}", " <mask>") for text, noun in texts.items()]}))
    assert sum(record["text"] == text for record, text in zip(said, texts)) >= 3, said


def test_sentinels_equal_t5():
    assert SENTINELS[0] == "<extra_id_0>" and SENTINELS[-1] == "<extra_id_99>" and len(set(SENTINELS)) == 100
