"""Siblings of reported faults: integer tags, parts of speech in .txt files, opposite-phase stereo, large numbers, constant columns."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import soundfile

import fieldguide
from fieldguide.core.errors import DataError
from fieldguide.core.numbers import format_plain
from fieldguide.data.preprocessing.speech import to_mono
from fieldguide.tasks import get_requested_task, infer_task, task
from fieldguide.tasks.base import Metric

SETTINGS = {"steps": 2, "batch_size": 8, "precision": "float32"}


@pytest.mark.parametrize("column, outside", [("ner_tags", "O"), ("tags", "O"), ("pos_tags", "0")])
def test_integer_tag_0_is_outside_except_for_parts_of_speech(column, outside, tmp_path):
    rows = [{"tokens": [f"w{i}", "in", f"Town{i}"], column: [0, 0, 5 if i % 2 else 3]} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = fieldguide.read(tmp_path / "a.jsonl", target=column)
    kind = task("token-classification")
    fitted = kind.fit(data, kind.Options(vocab_size=300))
    assert set(fitted.tags) == {outside, "3", "5"}
    target = fitted.targets(data)["label"]
    right = np.where(np.arange(3) < 2, target, -1)  # every 0 right, every entity missed
    scores = fitted.score({"label": right}, {"label": target})
    assert (scores["recall"] == 0) == (outside == "O")


def test_integer_tags_survive_a_run(tmp_path):
    rows = [{"tokens": [f"w{i}", "in", f"Town{i}"], "ner_tags": [0, 0, 5]} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = fieldguide.fit(tmp_path / "a.jsonl", model="bert-test", out=tmp_path / "run", settings=SETTINGS)
    assert set(run.task.tags) == {"O", "5"} and run.evaluate(tmp_path / "a.jsonl")["rows"] > 0


POS = [("The", "DT"), ("cat", "NN"), ("sat", "VBD"), ("on", "IN"), ("mats", "NNS"), (".", "."), ("Anna", "NNP"), ("'s", "POS")]


@pytest.mark.parametrize("separator", [" ", "\t", "  "])
def test_parts_of_speech_in_a_text_file_are_read_as_tags(separator, tmp_path):
    lines = []
    for i in range(40):
        lines += [f"{word}{i if word.isalpha() and len(word) > 2 else ''}{separator}{tag}" for word, tag in POS] + [""]
    (tmp_path / "pos.txt").write_text("\n".join(lines))
    data = fieldguide.read(tmp_path / "pos.txt")
    assert infer_task(data)[0].name == "token-classification" and len(data) == 40
    assert data.rows["tags"][0].to_list() == [tag for _, tag in POS]


@pytest.mark.parametrize(
    "text", ["a poem\nof two\n\nwords a\nline yes\n", "ID NAME\nX1 FOO\n\nX2 BAR\n", "hello WORLD\n\nbye WORLD\n"]
)
def test_other_texts_are_not_read_as_tags(text, tmp_path):
    (tmp_path / "a.txt").write_text(text * 4)
    try:
        data = fieldguide.read(tmp_path / "a.txt")
    except DataError:
        return
    assert "tags" not in data.columns


TONE = np.sin(np.arange(8000) / 8000 * 440 * 2 * np.pi) * 0.5


@pytest.mark.parametrize(
    "channels, expected",
    [
        ((TONE, -TONE), TONE),  # opposite phase
        ((TONE, -0.98 * TONE), TONE),
        ((TONE, TONE), TONE),
        ((TONE, 0 * TONE), TONE / 2),
        ((0 * TONE, 0 * TONE), 0 * TONE),
        ((TONE, -TONE, 0 * TONE), TONE),
    ],
)
def test_channels_that_cancel_out_do_not_become_silence(channels, expected):
    np.testing.assert_allclose(to_mono(np.stack(channels, 1)), expected, atol=1e-6)


def test_recordings_whose_channels_cancel_are_reported(tmp_path):
    for i in range(6):
        wave = np.sin(np.arange(8000) / 8000 * (300 + 50 * i) * 2 * np.pi) * 0.5
        soundfile.write(tmp_path / f"{i}.wav", np.stack([wave, -wave if i == 2 else wave], 1), 8000)
    (tmp_path / "metadata.csv").write_text(
        "file_name,transcription\n" + "".join(f"{i}.wav,word number {i}\n" for i in range(6))
    )
    found = next(f for f in fieldguide.read(tmp_path).findings if f.check == "cancelling-channels")
    assert found.count == 1 and found.places[0] == "metadata.csv:4"


@pytest.mark.parametrize(
    "value, text",
    [
        (4.1234e12, "4,123,400,000,000"),
        (12345.6, "12,346"),
        (0.98612, "0.9861"),
        (-54321.0, "-54,321"),
        (1e-7, "1e-07"),
        (1e20, "1e+20"),
    ],
)
def test_large_numbers_are_written_out(value, text):
    assert format_plain(value) == text and Metric("rmse", "min", "").text(value) == text


def test_a_constant_answer_column_is_named_as_the_cause():
    rows = {
        "context": [f"Anna lives in town {i}." for i in range(20)],
        "question": ["Who lives there?"] * 19 + ["Who?"],
        "answer": ["Anna"] * 20,
    }
    for name in ("answer", "note"):
        rows[name] = rows.pop("answer")
        with pytest.raises(DataError, match=rf"{name}.* is 'Anna' in every row|{name} \(constant, ignored: "):
            get_requested_task("question-answering", fieldguide.read(pl.DataFrame(rows), target="question"))
