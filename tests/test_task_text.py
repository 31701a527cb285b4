"""Text generation and translation: documents and parallel files, complete and damaged, and the tasks to prediction."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from fieldguide import open_run
from fieldguide.automl.fit import fit
from fieldguide.automl.request import read_for
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data import read
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.splits import split
from fieldguide.data.validation.checks import BadData
from fieldguide.tasks.text.text_generation import PART_COLUMN, TextGeneration, split_passages
from fieldguide.tasks.text.translation import Translation, build_bleu_and_chrf

STORY = "\n".join(
    f"Line {i} says that {i * 7 % 13} birds sat on wall {i % 5}, and the {i * 3 % 11}th flew away." for i in range(2500)
)


def asked(path, task=None, **more):
    return read_for(
        {
            "data": str(path),
            "target": None,
            "kinds": {},
            "roles": {},
            "group": None,
            "time": None,
            "allow_bad": False,
            "task": task,
            **more,
        }
    )


# Documents


def test_long_text_is_tested_on_its_end(tmp_path):
    (tmp_path / "story.txt").write_text(STORY)
    data, kind, _ = asked(tmp_path / "story.txt")
    assert kind is TextGeneration and len(data) == 1
    rows = kind.build_examples(data, kind.Options())
    assert "".join(rows.rows["text"]) == STORY  # nothing is lost
    assert rows.rows[PART_COLUMN].to_list() == list(range(len(rows)))
    parts = split(rows, seed=3)
    assert [parts.train[-1] + 1, parts.validation[-1] + 1] == [parts.validation[0], parts.test[0]]
    assert 0.08 < len(parts.test) / len(rows) < 0.12 and 0.03 < len(parts.validation) / len(rows) < 0.07
    row = int(parts.test[0])  # places are lines of the file
    line = int(rows.locate_row(row).split(":")[1])
    assert STORY.split("\n")[line - 1] == rows.rows["text"][row].split("\n")[0]


def test_folder_names_define_splits(tmp_path):
    for name, text in {"train": STORY, "val": STORY[:5000], "test": STORY[-9000:]}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    rows = TextGeneration.build_examples(asked(tmp_path)[0], TextGeneration.Options())
    for name, side in (("train", "train"), ("val", "val"), ("test", "test")):
        assert "".join(rows.rows["text"].filter(pl.Series(rows.splits == side))) == (tmp_path / f"{name}.txt").read_text()
    (tmp_path / "val.txt").unlink()  # made from the end of the training text
    rows = TextGeneration.build_examples(asked(tmp_path)[0], TextGeneration.Options())
    text = {s: "".join(rows.rows["text"].filter(pl.Series(rows.splits == s))) for s in ("train", "val", "test")}
    assert text["test"] == STORY[-9000:] and text["train"] + text["val"] == STORY and len(text["val"]) > 2000


def test_many_short_texts_are_split_at_random(tmp_path):
    file = tmp_path / "notes.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"note {i}: {i * i} and more words"}) for i in range(60)))
    data, kind, _ = asked(file, "text-generation")
    rows = kind.build_examples(data, kind.Options())
    parts = split(rows)
    assert len(rows) == 60 and rows.splits is None and sorted([*parts.train, *parts.validation, *parts.test]) == list(range(60))


@pytest.mark.parametrize("text", ["", "a", "a\n" * 4000, "x" * 9000, "ä\r\n" * 3000, "\n\n\n" + "w " * 5000], ids=range(6))
def test_passages_join_to_the_text(text):
    assert "".join(split_passages(text)) == text


def test_damaged_documents(tmp_path):
    for i in range(300):
        (tmp_path / f"note{i}.txt").write_text(f"note {i} with words")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"some\0thing")
    (tmp_path / "old.txt").write_bytes("Wörter aus früher Zeit".encode("cp1252"))
    data = read(tmp_path)
    found = {f.check: f for f in data.findings}
    places = [p for f in data.findings if f.check == "unreadable-text" for p in f.places]
    assert len(data) == 301 and any("empty.txt" in p for p in places) and any("binary.txt" in p for p in places)
    assert sum(f.unusable for f in data.findings) == 2 and "Wörter aus früher Zeit" in data.rows["text"].to_list()
    assert any("old.txt" in str(f) for f in found.values())  # another encoding is said
    for i in range(8):
        (tmp_path / f"note{i}.txt").write_text("  \n")
    with pytest.raises(BadData, match="10 of 303"):
        read(tmp_path)
    for path in tmp_path.iterdir():
        path.write_text("")
    with pytest.raises(DataError, match="no usable text"):
        read(tmp_path)
    with pytest.raises(DataError, match="no tokenizer found"):
        TextGeneration.fit(asked_story(tmp_path), TextGeneration.Options(tokenizer=str(tmp_path / "none.json")))


def asked_story(folder):
    (folder / "story.md").write_text(STORY)
    return asked(folder / "story.md")[0]


def test_conversations(tmp_path):
    file = tmp_path / "chat.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i} and 1?"}, {"role": "assistant", "content": f"{i + 1}."}]}
        for i in range(50)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    data, kind, _ = asked(file)
    assert kind is TextGeneration and data.columns["messages"].kind == "messages"
    task = kind.fit(data, kind.Options(length=16))
    tokens, learnt = task.concatenate_texts(data)
    said = task.text.decode(tokens[learnt])
    assert said == "".join(f"{i + 1}." for i in range(50))  # only what the assistant says
    asked_ = task.predict_batches(task.read(["What is 3 and 1?"]), None).make(np.arange(1), None)["prompt"][0].tolist()
    assert asked_ == task.prompt([("user", "What is 3 and 1?")])  # typed by a person


def test_damaged_conversations(tmp_path):
    """Each problem is counted with its locations before training."""
    file = tmp_path / "chat.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i} and 1?"}, {"role": "assistant", "content": f"{i + 1}."}]}
        for i in range(600)
    ]
    rows[7]["messages"][0]["role"] = "robot"
    rows[9]["messages"][1]["role"] = None
    rows[20]["messages"][1]["content"] = None
    rows[30]["messages"], rows[40]["messages"] = [], None
    file.write_text("\n".join(map(json.dumps, rows)))
    data = asked(file)[0]
    found = {f.check: (f.count, f.places) for f in data.findings if f.unusable}
    assert found == {
        "unknown-speaker": (2, ("chat.jsonl:8", "chat.jsonl:10")),
        "no-content": (1, ("chat.jsonl:21",)),
        "no-messages": (2, ("chat.jsonl:31", "chat.jsonl:41")),
    }
    kept = TextGeneration.fit(data, TextGeneration.Options(length=16)).turns(data)
    assert len(kept) == 595 and kept[7][0][1] == "What is 8 and 1?"
    file.write_text("\n".join(map(json.dumps, rows[:50])))
    with pytest.raises(BadData, match="conversations with a role other than system, user, assistant"):
        asked(file)
    file.write_text(json.dumps({"messages": [{"who": "user", "content": "x"}]}))
    with pytest.raises(DataError):
        asked(file)
    file.write_text(file.read_text()[:-9])
    with pytest.raises(DataError, match=r"chat\.jsonl:1"):
        asked(file)


@pytest.mark.parametrize("characters", [False, True])
def test_tokens_decode_to_the_text(characters):
    texts = ["Hello wörld\n\n  two  spaces", "日本 😀\r\n\t<|endoftext|> is a text here"]
    text = TextTokenizer.fit_exact(texts, size=300, characters=characters)
    for ids, whole in zip(text.encode_exact(texts), texts):
        assert text.decode(ids) == whole and text.end not in ids
        assert text.count_token_bytes()[ids].sum() == len(whole.encode())


def test_packed_rows_contain_every_token_once(tmp_path):
    data = asked_story(tmp_path)
    rows = TextGeneration.build_examples(data, TextGeneration.Options())
    task = TextGeneration.fit(rows, TextGeneration.Options(length=32, tokenizer="characters"))
    tokens, _ = task.concatenate_texts(rows)
    batches = task.batches(rows, None)
    every = batches.make(np.arange(len(batches)), None)
    target = every["target"].flatten()
    assert target[target >= 0].tolist() == tokens[1:].tolist()
    flat = every["tokens"].flatten()[: len(tokens) - 1]
    assert flat.tolist() == tokens[:-1].tolist()
    assert task.targets(rows)["bytes"].sum() == len(STORY.encode())


# Paired files


def pair(folder, rows=200):
    (folder / "all.en").write_text("".join(f"the number {i}\n" for i in range(rows)))
    (folder / "all.de").write_text("".join(f"die Zahl {i}\n" for i in range(rows)))
    return folder


def test_paired_files(tmp_path):
    data, kind, _ = asked(pair(tmp_path), target="en")
    assert kind is Translation and data.target.name == "en" and [c.name for c in data.features()] == ["de"]
    assert data.rows["de"][7] == "die Zahl 7" and data.rows["en"][7] == "the number 7" and data.locate_row(7).endswith(":8")
    assert len(read(tmp_path / "all.de")) == 200  # one of them is enough
    for part in ("train", "dev", "test"):
        for code in ("de", "en"):
            (tmp_path / f"{part}.{code}").write_text((tmp_path / f"all.{code}").read_text())
    for code in ("de", "en"):
        (tmp_path / f"all.{code}").unlink()
    assert [int((read(tmp_path).splits == s).sum()) for s in ("train", "val", "test")] == [200, 200, 200]


def test_damaged_pairs(tmp_path):
    pair(tmp_path)
    lines = (tmp_path / "all.de").read_text().split("\n")
    (tmp_path / "all.de").write_text("\n".join(lines[:50] + lines[51:]))
    with pytest.raises(DataError, match=r"all\.de has 199 lines but all.en has 200"):
        read(tmp_path)
    pair(tmp_path)
    (tmp_path / "more.de").write_text("allein\n")
    with pytest.raises(DataError, match=r"more.de: the partner file more.en is missing"):
        read(tmp_path)
    (tmp_path / "more.de").unlink()
    blank = ["" if i == 20 else line for i, line in enumerate(lines)]
    (tmp_path / "all.de").write_text("\n".join(blank))
    data = read(tmp_path, target="en")
    assert len(data) == 199 and any(f.unusable == 1 and ":21" in f.places[0] for f in data.findings)
    (tmp_path / "all.de").write_bytes("\n".join(lines).replace("die Zahl 3\n", "Größe\n").encode("latin-1"))
    data = read(tmp_path, target="en")
    assert data.rows["de"][3] == "Größe" and any("1252" in f.what for f in data.findings)
    (tmp_path / "all.de").write_text("\n".join(["kurz", *lines[1:]]))
    (tmp_path / "all.en").write_text("\n".join(["w " * 400, *(tmp_path / "all.en").read_text().split("\n")[1:]]))
    data = read(tmp_path, target="en")
    assert any(f.check == "unlike-lengths" and f.places == ("all.de:1",) for f in data.findings)
    pair(tmp_path)
    for name in ("all.de", "all.en"):
        said = (tmp_path / name).read_text().split("\n")
        (tmp_path / name).write_text("\n".join([*said[:-2], said[0], ""]))
    again = {f.check: f.places for f in read(tmp_path, target="en").findings}
    assert again["duplicate"] == ("all.de:200 = all.de:1",)
    for content, what in ((b"", "all.de: the file is empty"), (b"\0\1\2" * 100, "all.de:1: NUL byte")):
        (tmp_path / "all.de").write_bytes(content)
        with pytest.raises(DataError, match=what):
            read(tmp_path)


def test_parallel_texts_named_by_language_only(tmp_path):
    for name, word in (("en.txt", "number"), ("de.txt", "Zahl"), ("readme.txt", "about")):
        (tmp_path / name).write_text("".join(f"{word} {i}\n" for i in range(30)))
    data, *_ = asked(tmp_path, "translation", target="de")
    assert len(data) == 30 and data.rows["de"][7] == "Zahl 7" and data.rows["en"][7] == "number 7"


def test_tables_of_pairs(tmp_path):
    (tmp_path / "pairs.tsv").write_text("en\tde\n" + "".join(f"number {i}\tZahl {i}\n" for i in range(90)))
    data, *_ = asked(tmp_path / "pairs.tsv", "translation", target="de")
    assert data.target.name == "de" and data.features()[0].kind == "text"
    rows = [{"translation": {"en": f"number {i}", "de": f"Zahl {i}"}} for i in range(90)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data, *_ = asked(tmp_path / "pairs.jsonl", "translation", target="translation.de")
    assert data.target.name == "translation.de" and data.rows["translation.en"][5] == "number 5"
    (tmp_path / "lone.csv").write_text("en\n" + "".join(f"number {i}\n" for i in range(90)))
    with pytest.raises(DataError, match="lacks what translation needs"):
        asked(tmp_path / "lone.csv", "translation")


# From data to answers


@pytest.mark.slow
def test_network_learns_to_generate_text(tmp_path):
    (tmp_path / "story.txt").write_text(STORY)
    run = fit(
        tmp_path / "story.txt",
        task="text-generation",
        model="gpt2-nano",
        minutes=1,
        out=tmp_path / "run",
        settings={
            "steps": 120,
            "batch": 16,
            "precision": "float32",
            "task.tokenizer": "characters",
            "task.length": 64,
            "evaluate": 40,
            "model.dim": 96,
        },
    )
    assert run.scores["loss"] < 1.0 and run.record["scores"]["baselines"][0]["scores"]["loss"] > 0
    assert run.scores["perplexity"] == pytest.approx(np.exp(run.scores["loss"]))
    assert run.scores["bits_per_byte"] == pytest.approx(run.scores["loss"] / np.log(2), rel=0.01)  # a byte a character
    said = run.predict(["Line 12 says"], tokens=60, temperature=0.0)[0]["text"]
    assert " that " in said and "birds" in said
    assert said == "".join(run.stream("Line 12 says", tokens=60, temperature=0.0))
    assert run.predict(["Line 12 says", "and"], tokens=40, seed=3)[0] == run.predict(["Line 12 says"], tokens=40, seed=3)[0]
    assert run.predict(["Line 12 says"], tokens=60, temperature=0.0, stop="birds")[0]["text"] == said.partition("birds")[0]
    with pytest.raises(SettingsError, match="temprature"):
        run.predict(["x"], temprature=1)
    page = (run.path / "report.html").read_text()
    assert "Samples during training" in page and "tokens per second" in page
    again = open_run(tmp_path / "run").evaluate(tmp_path / "story.txt")
    assert again["scores"] == pytest.approx(run.scores)


SMALL = {  # model -> changes of its tiny size
    "mixtral-test": {"dim": 64, "heads": 4, "kv_heads": 2, "hidden": 64},
    "deepseek-v3-test": {"dim": 64, "heads": 4, "q_rank": 32, "kv_rank": 32, "width": 16, "expert_hidden": 32, "hidden": 128},
    "gpt-oss-test": {"dim": 64, "width": 16, "hidden": 64, "window": 16, "limit": 7.0},
    "gpt-neo-test": {"dim": 64, "heads": 4, "window": 16},
    "mamba2-test": {"dim": 64, "heads": 8, "state": 16, "chunk": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("model", SMALL)
def test_other_language_models_learn_a_sample(model, tmp_path):
    """Loss, texts with a cache, and the saved run."""
    run = fit(
        "manual",
        model=model,
        minutes=2,
        out=tmp_path / "run",
        settings={
            "steps": 150,
            "batch": 16,
            "precision": "float32",
            "task.tokenizer": "characters",
            "task.length": 64,
            "evaluate": 75,
            **{f"model.{key}": value for key, value in SMALL[model].items()},
        },
    )
    assert run.scores["loss"] < 2.6  # the frequencies of characters alone give 3.2
    said = run.predict(["The value "], tokens=100, temperature=0.0)[0]["text"]  # longer than the context
    assert said == "".join(run.stream("The value ", tokens=100, temperature=0.0)) and len(said) == 100
    assert open_run(tmp_path / "run").predict(["The value "], tokens=100, temperature=0.0)[0]["text"] == said


TRANSLATORS = {  # model -> settings
    "transformer-mini": {"steps": 90, "model.dim": 96, "model.depth": 2, "model.dropout": 0.0, "lr": 6e-3},
    "t5gemma-test": {
        "steps": 200,
        "lr": 1e-2,
        "model.dim": 96,
        "model.decoder_dim": 96,
        "model.decoder_depth": 2,
        "model.width": 24,
        "model.scale": 24,
        "model.hidden": 192,
        "model.decoder_hidden": 192,
        "model.window": 8,
        "model.attn_cap": 50.0,
        "model.cap": 30.0,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("model", TRANSLATORS)
def test_network_learns_to_translate(model, tmp_path):
    run = fit(
        "phrases",
        minutes=3,
        model=model,
        out=tmp_path / "run",
        settings={"batch": 64, "precision": "float32", "evaluate": 45, **TRANSLATORS[model]},
    )
    assert run.scores["bleu"] > 85 and run.scores["chrf"] > 85
    assert run.record["scores"]["baselines"][0]["scores"]["bleu"] < 20
    answer = run.predict(["The man sees a dog today."], beams=2)[0]
    assert set(answer) == {"input", "text"} and answer["text"].endswith(".")
    page = (run.path / "report.html").read_text()
    assert "Translations during training" in page and "nrefs:1" in page


@pytest.mark.parametrize(
    "right, said, signature",
    [
        ("The cat sat on the big mat today.", "The cat sat on the big mat now.", "tok:13a"),
        ("那只大猫今天坐在垫子上。", "那只大猫昨天坐在垫子上。", "tok:zh"),
        ("今日はマットの上に猫がいます。", "昨日はマットの上に猫がいます。", "tok:char"),
        ("วันนี้แมวนั่งบนเสื่อ", "เมื่อวานแมวนั่งบนเสื่อ", "tok:char"),
    ],
    ids=["english", "chinese", "japanese", "thai"],
)
def test_bleu_counts_characters_without_word_separators(right, said, signature):
    bleu, _ = build_bleu_and_chrf([right])
    assert 20 < bleu.corpus_score([said], [[right]]).score < 95
    assert signature in str(bleu.get_signature())


def test_truncated_texts_are_noted_once():
    task = Translation([], Translation.Options())
    task.note_truncated(0, 10, 48)
    assert task.notes == []
    task.note_truncated(1, 10, 48)
    task.note_truncated(3, 20, 48)  # of another part of the data
    assert task.notes == ["10.0 % of the texts are longer than 48 tokens and are truncated (change this with task.length=...)"]
