"""One definition of a word: combining marks belong to it, and composed and decomposed letters are equal."""

from __future__ import annotations

import unicodedata

import numpy as np
import polars as pl
import pytest

import fieldguide
from fieldguide.core.words import find_tokens, find_words
from fieldguide.data.preprocessing import Labels
from fieldguide.metrics import question_answering, rouge
from fieldguide.tasks import task
from fieldguide.tasks.text.windows import is_whole_words, widen_to_words

NFD = lambda text: unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    "text, words",
    [
        ("का की", ["का", "की"]),  # vowel signs
        ("நான் வந்தேன்", ["நான்", "வந்தேன்"]),  # Tamil virama
        ("שָׁלוֹם עוֹלָם", ["שָׁלוֹם", "עוֹלָם"]),  # Hebrew points
        ("مُحَمَّد كِتَاب", ["مُحَمَّد", "كِتَاب"]),  # Arabic harakat
        (NFD("Việt Nam café"), ["Việt", "Nam", "café"]),
        ("می‌خواهم", ["می‌خواهم"]),  # a zero-width non-joiner inside a Persian word
        ("3½ miles, a_b", ["3½", "miles", "a_b"]),
        ("👩🏽\u200d💻 ok ❤\ufe0f", ["ok"]),  # joiners and variation selectors of emoji
    ],
)
def test_words_keep_their_marks(text, words):
    assert find_words(text) == [unicodedata.normalize("NFC", word) for word in words]
    assert not text[0].isalpha() or find_tokens(text.replace(" ", ", ", 1))[0] == find_words(text)[0]


def test_rouge_distinguishes_words_that_differ_in_a_vowel_sign_and_equates_encodings():
    assert rouge.score_texts(["का"], ["की"]).max() == 0
    assert rouge.score_texts([NFD("le café noir")], ["le café noir"]).min() == 1
    assert rouge.split_words("ABC abc_d, x2") == ["abc", "abc", "d", "x2"]  # as Google's rouge_score
    assert rouge.split_words("กำลัง") and not any(unicodedata.combining(w[0]) for w in rouge.split_words("ที่นี่"))


def test_answers_are_equal_in_any_encoding():
    assert question_answering.score_answers([NFD("Café")], [["café"]]).tolist() == [[1, 1]]
    assert question_answering.score_answers(["का"], [["की"]]).tolist() == [[0, 0]]
    assert question_answering.normalize_text(NFD("á la carte")) == "á la carte"  # no English article


def test_spans_are_widened_to_whole_words_with_marks():
    text = "यह किताब है"
    begin, end = text.index("किताब"), text.index("किताब") + len("किताब")
    assert is_whole_words(text, begin, end) and not is_whole_words(text, begin, begin + 1)
    assert widen_to_words(text, np.array([[begin + 1, begin + 2]])).tolist() == [[begin, end]]


def test_a_class_is_one_class_in_any_encoding():
    values = pl.Series(["café", NFD("café"), "thé"])
    labels = Labels.fit(values)
    assert labels.names == ("café", "thé") and labels.apply(values).tolist() == [0, 0, 1]
    assert Labels((NFD("café"), "thé")).apply(values).tolist() == [0, 0, 1]  # names of an older run


def test_translations_are_equal_in_any_encoding():
    kind = task("translation")
    text = ["un café serré à côté de la fenêtre", "où êtes-vous allés hier soir"]
    arrays = lambda rows: {"text": np.array(rows, dtype=object)}
    assert kind.score(kind, arrays([NFD(t) for t in text]), arrays(text))["bleu"] == pytest.approx(100)


def test_a_sentence_is_split_at_words_and_punctuation_for_tagging(tmp_path):
    words = [["मैं", f"दिल्ली{i}", "में", "हूँ", "।"] for i in range(40)]
    tags = [["O", "B-LOC", "O", "O", "O"]] * 40
    data = pl.DataFrame({"tokens": words, "tags": tags})
    settings = {"steps": 2, "batch_size": 8, "precision": "float32"}
    fieldguide.fit(data, task="token-classification", model="bert-test", out=tmp_path / "run", settings=settings)
    answer = fieldguide.pipeline(tmp_path / "run").predict("मैं दिल्ली में हूँ।")[0]
    assert answer["tokens"] == ["मैं", "दिल्ली", "में", "हूँ", "।"]
