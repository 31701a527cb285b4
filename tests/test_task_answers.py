"""Question answering: files and their errors, windows, SQuAD scores, and the task from file to prediction."""

from __future__ import annotations

import collections
import json
import re
import string

import numpy as np
import polars as pl
import pytest
import torch

import encoders
from damage import checks, finding, refused
from fieldguide import fit
from fieldguide.checkpoints import load
from fieldguide.core.errors import DataError
from fieldguide.core.settings import Settings
from fieldguide.data import read, split
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.qa_windows import find_occurrence
from fieldguide.inference.run import open_run
from fieldguide.metrics import question_answering as measured
from fieldguide.models.registry import card, cards, create
from fieldguide.objectives import SpanPrediction, masked_lm
from fieldguide.tasks import infer_task, task
from fieldguide.tasks.text.windows import (
    PairTemplate,
    covering_tokens,
    is_whole_words,
    pair_template,
    widen_to_words,
    window_starts,
)

WHO = ["Anna", "Ben", "Clara", "David", "Emma", "Fritz", "Greta", "Hans", "Ida", "Jan"]
TOWNS = ["Bonn", "Kiel", "Ulm", "Trier", "Jena", "Hof"]
THINGS = ["bread", "milk", "red wine", "old cheese", "a small boat"]
KIND = task("question-answering")


def squad(count: int, seed: int = 0, none: bool = True) -> dict:
    """Return short reports and questions in SQuAD format, some of which are unanswerable."""
    rng, paragraphs = np.random.default_rng(seed), []
    for number in range(count):
        who, town, thing, day = rng.choice(WHO), rng.choice(TOWNS), rng.choice(THINGS), str(rng.integers(1, 31))
        said = [f"{who} went to {town}.", f"There was {thing} to buy.", f"It was on the {day}. of May."]
        said += [f"It rained {rng.choice(['a little', 'all day', 'at night'])}."] * int(rng.integers(0, 3))
        rng.shuffle(said)
        context = "  " * (number % 2) + "  ".join(said)
        asked = [("Who went away?", who), ("Where was it?", town), ("What was to be bought?", thing), ("On which day?", day)]
        qas = [
            {
                "id": f"{number}.{i}",
                "question": q,
                "is_impossible": False,
                "answers": [{"text": a, "answer_start": context.index(a)}],
            }
            for i, (q, a) in enumerate(asked)
        ]
        if none and rng.random() < 0.5:
            qas.append(
                {
                    "id": f"{number}.x",
                    "question": "What did it cost?",
                    "answers": [],
                    "is_impossible": True,
                    "plausible_answers": [{"text": thing, "answer_start": context.index(thing)}],
                }
            )
        paragraphs.append({"context": context, "qas": qas})
    return {"version": "v2.0", "data": [{"title": "Reports", "paragraphs": paragraphs}]}


def stored(path, document) -> str:
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return str(path)


def table(path, rows: list[dict]) -> str:
    return stored(path, "".join(json.dumps(row) + "\n" for row in rows))


def made(source, **options):
    data = KIND.build_examples(
        read(source, column_spec=KIND.column_spec, **options.pop("reading", {})), KIND.options_from(options)
    )
    return KIND.fit(data, KIND.options_from(options)), data


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("squad") / "reports.json", squad(140))


# ---------------------------------------------------------------------------------------------- scores


def reference(said: str, right: str) -> tuple[float, float]:
    """Return exact match and F1 by the paper's definition: case, punctuation, articles and whitespace are ignored."""

    def tokens(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return [w for w in re.sub(r"\b(?:a|an|the)\b", " ", text).split(" ") if w.strip()]

    mine, theirs = tokens(said), tokens(right)
    if not mine or not theirs:
        return float(mine == theirs), float(mine == theirs)
    left, shared = list(theirs), 0
    for word in mine:
        if word in left:
            left.remove(word)
            shared += 1
    precision, recall = shared / len(mine), shared / len(theirs)
    return float(mine == theirs), 2 * precision * recall / (precision + recall) if shared else 0.0


def test_scores_equal_the_squad_script():
    rng = np.random.default_rng(0)
    words = ["the", "a", "Cat", "cat", "dog.", "an", "The", "sat", "(sat)", "on", "of", "theatre", "a-b", "ab", ""]
    one, other = ([" ".join(rng.choice(words, rng.integers(0, 6))) for _ in range(600)] for _ in range(2))
    many = [[other[i], other[(i * 7) % 600]][: 1 + i % 2] for i in range(600)]
    want = [np.max([reference(said, right) for right in references], axis=0) for said, references in zip(one, many)]
    found = measured.score_answers(one, many)
    np.testing.assert_allclose(found, want)
    assert 0.05 < found[:, 0].mean() < 0.5 and (found[:, 1] > found[:, 0]).sum() > 100


def test_scores_by_hand():
    cases = [
        ("The  Eiffel Tower!", ["Eiffel tower"], 1, 1),
        ("tower", ["the Eiffel Tower", "a Tower"], 1, 1),
        ("Paris, France", ["Paris"], 0, 2 / 3),
        ("", ["Paris"], 0, 0),
        ("Paris", [], 0, 0),
        ("", [], 1, 1),
        ("the", [], 1, 1),
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3),
        ("1,000", ["1000"], 1, 1),
    ]
    said, right, exact, f1 = zip(*cases)
    np.testing.assert_allclose(measured.score_answers(said, right), np.stack([exact, f1], 1))


def test_threshold_is_optimal():
    rng = np.random.default_rng(0)
    for _ in range(200):
        margins = np.round(rng.normal(size=12), 1)
        given, silent = rng.random(12), rng.integers(0, 2, 12).astype(float)
        at = measured.find_threshold(margins, given, silent)
        total = [float(np.where(margins > edge, given, silent).sum()) for edge in [at, -9, 9, *margins, *(margins - 0.01)]]
        assert total[0] == pytest.approx(max(total))
    assert measured.find_threshold(np.array([1.0]), np.array([1.0]), np.array([0.0])) < 1.0


# ---------------------------------------------------------------------------------------------- files


def test_squad_locations_are_reported(file):
    data = read(file, column_spec=KIND.column_spec)
    assert infer_task(data)[0] is KIND and data.target.name == "answers" and data.locate_row(3) == "reports.json:4"
    data = KIND.build_examples(data, KIND.Options())
    for context, answers, impossible in data.rows.select("context", "answers", "is_impossible").iter_rows():
        assert context == context.strip() and bool(answers) != impossible
        assert all(context[a["start"] : a["start"] + len(a["text"])] == a["text"] for a in answers)
    assert {c.name for c in data.features()} == {"context", "question"} and not checks(data) & {"answer-moved", "no-answer"}
    parts = split(data)
    sides = [set(data.rows["context"].gather(rows.tolist())) for rows in (parts.train, parts.validation, parts.test)]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2] and min(map(len, sides)) > 10


def test_every_layout_gives_the_same(tmp_path):
    """SQuAD 1.1, records of Hugging Face, JSON Lines and CSV."""
    entries = [
        (f"On day {i} Anna paid {i + 3} crowns in Bonn.", f"How much was paid on day {i}?", str(i + 3)) for i in range(20)
    ]
    one = {
        "version": "1.1",
        "data": [
            {
                "title": "T",
                "paragraphs": [
                    {
                        "context": c,
                        "qas": [{"id": q, "question": q, "answers": [{"text": a, "answer_start": c.index(f"paid {a}") + 5}]}],
                    }
                    for c, q, a in entries
                ],
            }
        ],
    }
    flat = [
        {"id": q, "context": c, "question": q, "answers": {"text": [a], "answer_start": [c.index(f"paid {a}") + 5]}}
        for c, q, a in entries
    ]
    sources = [
        stored(tmp_path / "a.json", one),
        stored(tmp_path / "b.json", {"data": flat}),
        stored(tmp_path / "c.json", flat),
        stored(tmp_path / "d.json", one["data"][0]["paragraphs"]),
        table(tmp_path / "e.jsonl", flat),
        table(
            tmp_path / "f.jsonl",
            [{"passage": c, "query": q, "answer": a, "answer_start": c.index(f"paid {a}") + 5} for c, q, a in entries],
        ),
    ]
    pl.DataFrame(
        [{"Question": q, "Context": c, "Answer": a, "answer_start": c.index(f"paid {a}") + 5} for c, q, a in entries]
    ).write_csv(tmp_path / "g.csv")
    frame = pl.DataFrame(
        [
            {"context": c, "question": q, "answers": {"text": [a], "answer_start": [c.index(f"paid {a}") + 5]}}
            for c, q, a in entries
        ]
    )
    for source in [*sources, str(tmp_path / "g.csv"), frame]:
        data = KIND.build_examples(read(source, column_spec=KIND.column_spec), KIND.Options())
        found = [(row[0]["text"], row[0]["start"]) for row in data.rows[data.target.name].to_list()]
        assert found == [(a, c.index(f"paid {a}") + 5) for c, _, a in entries], source
        assert KIND.fit(data, KIND.options_from({"vocab": 300})).options.context in ("context", "passage", "Context")


def test_files_by_split(tmp_path):
    stored(tmp_path / "train-v2.0.json", squad(6))
    stored(tmp_path / "dev-v2.0.json", squad(3, seed=1))
    data = read(tmp_path, column_spec=KIND.column_spec)
    assert (data.splits == "val").sum() == sum(len(p["qas"]) for p in squad(3, seed=1)["data"][0]["paragraphs"])
    stored(tmp_path / "test.json", {"data": []})
    with pytest.raises(DataError, match=r"test\.json: no questions found"):
        read(tmp_path, column_spec=KIND.column_spec)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("data",), {"qas": []}, r"b\.json: data is \{.qas.: \[\]\} but must be a list"),
        (("data", 0, "paragraphs"), None, r"data\[0\]\.paragraphs is null but must be a list"),
        (("data", 0, "paragraphs", 2, "context"), 7, r"data\[0\]\.paragraphs\[2\]\.context is 7 but must be text"),
        (
            ("data", 0, "paragraphs", 1, "qas", 0, "question"),
            ...,
            r"paragraphs\[1\]\.qas\[0\] lacks the key 'question' \(it has 'id'",
        ),
        (("data", 0, "paragraphs", 1, "qas", 2, "answers", 0), "Bonn", r"qas\[2\]\.answers\[0\] is \"Bonn\".*an object with a"),
        (("data", 0, "paragraphs", 1, "qas", 2, "answers", 0, "answer_start"), "3", r"answer_start is \"3\".*an integer"),
        (
            ("data", 0, "paragraphs", 1, "qas", 2, "is_impossible"),
            "no",
            r"is_impossible is \"no\" but must be true or false",
        ),
    ],
)
def test_malformed_entries_are_located(tmp_path, place, value, words):
    document = squad(4)
    at = document
    for key in place[:-1]:
        at = at[key]
    if value is ...:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    with pytest.raises(DataError, match=words):
        read(stored(tmp_path / "b.json", document), column_spec=KIND.column_spec)


def test_damaged_files(tmp_path):
    whole = json.dumps(squad(4))
    with pytest.raises(DataError, match=r"cut\.json is not valid JSON: .*line 1 column"):
        read(stored(tmp_path / "cut.json", whole[:-40]), column_spec=KIND.column_spec)
    context = "Zoë said: the café of Orléans is old. It has twelve tables."
    document = {
        "data": [
            {
                "context": context,
                "qas": [
                    {
                        "id": str(i),
                        "question": f"How many, {i}?",
                        "answers": [{"text": "twelve", "answer_start": context.index("twelve")}],
                    }
                    for i in range(4)
                ],
            }
        ]
    }
    (tmp_path / "old.json").write_bytes(json.dumps(document, ensure_ascii=False).encode("cp1252"))
    data = read(tmp_path / "old.json", column_spec=KIND.column_spec)
    assert "Windows-1252" in finding(data, "encoding").what and "answer-moved" not in checks(data)
    assert KIND.build_examples(data, KIND.Options()).rows["context"][0] == context


def rows(count: int = 150) -> list[dict]:
    return [
        {
            "id": f"q{i}",
            "context": f"In the year {i} Anna built house {i + 500} in Bonn.",
            "question": f"Which house of {i}?",
            "answer": f"house {i + 500}",
            "answer_start": len(f"In the year {i} Anna built "),
        }
        for i in range(count)
    ]


def test_answers_missing_from_their_context(tmp_path):
    some = rows()
    some[7]["answer"] = "house number 507"
    data = read(table(tmp_path / "a.jsonl", some), column_spec=KIND.column_spec)
    said = finding(data, "answer-not-there")
    assert (said.count, said.unusable, said.places) == (1, 1, ("a.jsonl:8",))
    kept = KIND.build_examples(data, KIND.Options())
    assert len(kept) == 149 and kept.manifest.files[0].dropped == 1 and len(data) == 150
    for row in (8, 9):
        some[row]["answer"] = "the town hall"
    with refused("answer-not-there", "3 of 150", "a.jsonl:8"):
        read(table(tmp_path / "a.jsonl", some), column_spec=KIND.column_spec)
    assert (
        len(KIND.build_examples(read(tmp_path / "a.jsonl", column_spec=KIND.column_spec, allow_bad=True), KIND.Options()))
        == 147
    )


def test_wrong_answer_starts_are_corrected(tmp_path):
    some = rows()
    some[3]["context"], some[3]["answer"], some[3]["answer_start"] = "Bonn or Ulm or Bonn or Hof or Bonn?", "Bonn", 17
    some[4]["answer_start"], some[5]["answer_start"], some[6]["answer"] = 10_000, -4, some[6]["answer"].upper()
    data = read(table(tmp_path / "a.jsonl", some), column_spec=KIND.column_spec)
    said = finding(data, "answer-moved")
    assert (said.count, said.unusable, said.places[0]) == (3, 0, "a.jsonl:4") and "'answer_start'" in said.what
    answers = KIND.build_examples(data, KIND.Options()).rows["answer"].to_list()
    assert answers[3] == [{"text": "Bonn", "start": 15}] and answers[6][0]["text"] == "house 506"
    assert [a[0]["start"] for a in answers[4:6]] == [some[2]["answer_start"]] * 2
    for text, near, want in (("ab", 0, 0), ("ab", 3, 4), ("ab", 2, 0), ("ab", 99, 8), ("ab", None, 0), ("x", 2, -1)):
        assert find_occurrence(text, "ab..ab..ab", near) == want


def test_first_occurrence_is_used_without_starts(tmp_path):
    some = [{k: v for k, v in row.items() if k != "answer_start"} for row in rows(30)]
    some[2]["context"] = "house 502 is house 502."
    data = read(table(tmp_path / "a.jsonl", some), column_spec=KIND.column_spec)
    assert finding(data, "answer-many-times").places == ("a.jsonl:3",)
    assert KIND.build_examples(data, KIND.Options()).rows["answer"][2].to_list() == [{"text": "house 502", "start": 0}]


def test_empty_questions_contexts_and_answers(tmp_path):
    some = rows(300)
    some[1]["question"], some[2]["context"], some[3]["answer"] = "  ", "", ""
    data = read(table(tmp_path / "a.jsonl", some), column_spec=KIND.column_spec)
    assert finding(data, "empty-question").places == ("a.jsonl:2",) and finding(data, "empty-context").places == ("a.jsonl:3",)
    assert finding(data, "no-answer").places == ("a.jsonl:4",) and finding(data, "no-answer").unusable == 0
    assert sum(f.unusable for f in data.findings) == 2 and len(KIND.build_examples(data, KIND.Options())) == 298


def test_duplicate_ids_and_answers_to_impossible_questions(tmp_path):
    some = [{**row, "is_impossible": i == 5} for i, row in enumerate(rows(30))]
    some[9]["id"] = some[4]["id"]
    data = read(table(tmp_path / "a.jsonl", some), column_spec=KIND.column_spec)
    assert finding(data, "duplicate-id").places == ("a.jsonl:10",)
    assert finding(data, "answer-to-impossible").places == ("a.jsonl:6",)
    assert KIND.build_examples(data, KIND.Options()).rows["answer"][5].to_list() == []


def test_trained_task_reads_tables_consistently(tmp_path):
    """Columns, starts and marks as in training; answers may be absent only for prediction."""
    some = [{**row, "is_impossible": i % 7 == 0, "note": "x" * i} for i, row in enumerate(rows(40))]
    path = table(tmp_path / "a.jsonl", some)
    one, data = made(path, vocab_size=300)
    again = one.read([path], answered=True)
    assert again.rows["answer"].to_list() == data.rows["answer"].to_list() and one.targets(again)["answers"][0] == ()
    assert one.targets(again)["answers"][1] == ("house 501",)
    table(
        tmp_path / "b.jsonl",
        [{"context": row["context"], "question": row["question"] if i else " "} for i, row in enumerate(some)],
    )
    asked = one.read([tmp_path / "b.jsonl"])
    assert len(asked) == 39 and [(u.before, u.place) for u in asked.skipped] == [(0, "b.jsonl:1")]
    with pytest.raises(DataError, match="use `fieldguide predict`"):
        one.read([tmp_path / "b.jsonl"], answered=True)


def test_columns_with_other_names(tmp_path):
    some = [{"report": row["context"], "what": row["question"], "said": row["answer"]} for row in rows(40)]
    data = read(table(tmp_path / "a.jsonl", some), column_spec=KIND.column_spec, target="said")
    one = KIND.fit(KIND.build_examples(data, KIND.Options()), KIND.options_from({"vocab": 300}))
    assert (one.options.context, one.options.question) == ("report", "what")
    with pytest.raises(DataError, match=r"task\.context and task\.question must name text columns"):
        KIND.build_examples(data, KIND.options_from({"context": "reports"}))
    (tmp_path / "b.csv").write_text("context,answer\n" + "one text here,one\n" * 5)
    assert "a question column `question`" in KIND.missing_requirements(read(tmp_path / "b.csv", column_spec=KIND.column_spec))


# ---------------------------------------------------------------------------------------------- tokens and windows


def test_token_character_spans():
    texts = ["  The  Café costs — 1,000\n dollars", "İstanbul, naïve ﬁnd", "", " \t ", "日本語 text"]
    learnt = TextTokenizer.fit([t for t in texts if t] * 5, size=300)
    for text, (ids, spans), want in zip(texts, learnt.encode_with_spans(texts), learnt.encode_exact(texts)):
        assert ids.tolist() == want.tolist() and spans.shape == (len(ids), 2)
        assert (spans[:, 0] <= spans[:, 1]).all() and (np.diff(spans[:, 1]) >= 0).all()
        for begin, end in spans:
            assert text[begin:end] == text[begin:end].lstrip()
        said = {i for begin, end in spans for i in range(begin, end)}
        assert {i for i, c in enumerate(text) if not c.isspace()} <= said


def test_whole_words():
    text = "It's 1,000 Orléans-based (ab) cd"
    spans = np.array([(b, e) for b in range(len(text)) for e in range(b, len(text) + 1)])
    for (begin, end), (first, last) in zip(spans, widen_to_words(text, spans)):
        inside = lambda i: 0 < i < len(text) and bool(re.match(r"\w\w", text[i - 1 : i + 1]))
        b, e = int(begin), int(end)
        while inside(b):
            b -= 1
        while begin < end and inside(e):
            e += 1
        assert (first, last) == (b, e)
    assert (
        is_whole_words(text, 5, 6)
        and not is_whole_words(text, 12, 18)
        and widen_to_words("", spans[:2]).tolist() == spans[:2].tolist()
    )


def test_windows_cover_every_text():
    for tokens in range(1, 40):
        for room in (5, 8):
            for stride in (1, 3, 5, 50):
                begins = window_starts(tokens, room, stride)
                seen = {i for b in begins for i in range(b, min(b + room, tokens))}
                assert seen == set(range(tokens)) and begins == sorted(set(begins)) and begins[-1] == max(0, tokens - room)
    assert window_starts(20, 8, 4) == [0, 4, 8, 12] and window_starts(8, 8, 4) == [0]


@pytest.mark.parametrize(("whole", "stride"), [(True, 7), (False, 1000)])
def test_windows_hold_questions_contexts_and_answers(tmp_path, whole, stride):
    """Each window decodes to its question and a part of its context, and the span to its answer."""
    rng, some = np.random.default_rng(0), []
    for i in range(60):
        words = [str(rng.choice(WHO + TOWNS + ["and", "with,", "(or)", "then"])) for _ in range(int(rng.integers(5, 60)))]
        place = int(rng.integers(len(words)))
        text = words[place].strip(",()")
        context, begin = " ".join(words), len(" ".join(words[:place])) + (place > 0) + words[place].index(text)
        if not whole:
            text, begin = text[1:], begin + 1
        some.append({"context": context, "question": f"What is word {i}?", "answers": [{"text": text, "start": begin}]})
    one, data = made(pl.DataFrame(some), vocab_size=300, length=32, stride=stride)
    assert one.whole is whole and any("windows of 32 tokens" in note for note in one.notes)
    lessons = one.train_batches(data, card("bert"), Settings())
    batch, text = lessons.make(np.arange(len(lessons)), None), one.text
    windows = one.windows(data)
    assert len(lessons) == len(windows.number) > 100 and batch["tokens"].shape[1] <= 32
    chars = windows.characters(np.arange(len(lessons)))
    held = collections.Counter()
    for row, number in enumerate(windows.number.tolist()):
        real = batch["tokens"][row][batch["mask"][row]].tolist()
        first = real.index(text.sep)
        assert real[0] == text.cls and real[-1] == text.sep
        assert text.decode(real[1:first]).strip() == some[number]["question"].lower()
        segments = batch["segments"][row][: len(real)].tolist()
        assert segments == [0] * (first + 1) + [1] * (len(real) - first - 1)
        assert batch["answerable"][row].nonzero().flatten().tolist() == list(range(first + 1, len(real) - 1))
        begin, end = int(batch["first"][row]), int(batch["last"][row])
        if begin:
            held[number] += 1
            piece = some[number]["context"][chars[row, begin, 0] : chars[row, end, 1]]
            right = some[number]["answers"][0]
            if whole:
                assert piece == right["text"]
            assert right["text"] in piece
            assert chars[row, begin, 0] <= right["start"] and chars[row, end, 1] >= right["start"] + len(right["text"])
        else:
            assert end == 0
    assert set(held) == set(range(60)) and max(held.values()) > 1
    # As they are asked: every question once, all of its windows with it, wherever it stands in the batch.
    asked = one.batches(data, card("bert"))
    every = asked.make(np.array([5, 0, 59]), None)
    counts = np.bincount(windows.number)
    assert every["window"].tolist() == [0] * counts[5] + [1] * counts[0] + [2] * counts[59]
    rows_of = np.concatenate([np.flatnonzero(windows.number == n) for n in (5, 0, 59)])
    width = every["tokens"].shape[1]
    assert torch.equal(every["tokens"], batch["tokens"][rows_of, :width])
    assert np.array_equal(every["characters"].numpy(), chars[rows_of, :width])


def test_answer_token_spans():
    spans = np.array([[0, 2], [2, 2], [3, 5], [5, 8], [9, 12]])
    assert (
        covering_tokens(spans, 3, 8) == (2, 3)
        and covering_tokens(spans, 4, 6) == (2, 3)
        and covering_tokens(spans, 0, 1) == (0, 0)
    )
    assert covering_tokens(spans, 8, 9) == (-1, -1) and covering_tokens(spans, 2, 12) == (2, 4)


def test_pair_templates_of_given_tokenizers(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "a", "b"]

    def saved(pair: str):
        made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        if pair:
            used = [w for w in names if w in pair]
            made.post_processor = processors.TemplateProcessing(
                single="$A", pair=pair, special_tokens=[(w, made.token_to_id(w)) for w in used]
            )
        made.save(str(tmp_path / "t.json"))
        return TextTokenizer.load(tmp_path / "t.json")

    assert pair_template(saved("[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")) == PairTemplate((3,), (4,), (4,), (0, 1))
    assert pair_template(saved("<s>:0 $A:0 </s>:0 </s>:0 $B:0 </s>:0")) == PairTemplate((0,), (1, 1), (1,), (0, 0))
    assert pair_template(saved("")) == PairTemplate((3,), (4,), (4,), (0, 1))


def test_best_answer_over_all_windows(monkeypatch):
    """Against a slow search, for any number of windows per batch."""
    torch.manual_seed(0)
    model = create("bert-test", output_type="span")
    objective = SpanPrediction(model, ("tokens", "mask"), longest=3)
    tokens, mask = torch.randint(5, 30, (11, 9)), torch.ones(11, 9, dtype=torch.bool)
    answerable = torch.zeros(11, 9, dtype=torch.bool)
    answerable[:, 3:8] = True
    answerable[4:6] = False  # a text of whose windows none has room
    chars = torch.arange(11 * 9 * 2).view(11, 9, 2)
    chars[:, 0] = 0
    window = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 3])
    batch = {"tokens": tokens, "mask": mask, "answerable": answerable, "characters": chars, "window": window}
    with torch.no_grad():
        found = objective.outputs(batch)
        logits = model(tokens, mask).float()
        monkeypatch.setattr(masked_lm, "ROWS_PER_CHUNK", 4)
        for name, value in objective.outputs(batch).items():
            torch.testing.assert_close(value, found[name])
    for text in range(4):
        best, none = (-np.inf, 0, 0), np.inf
        for row in (window == text).nonzero().flatten().tolist():
            allowed = [0, *answerable[row].nonzero().flatten().tolist()]
            begin, end = (logits[row, :, side] - logits[row, allowed, side].logsumexp(0) for side in (0, 1))
            none = min(none, float(begin[0] + end[0]))
            best = max(
                [
                    best,
                    *(
                        (float(begin[i] + end[j]), int(chars[row, i, 0]), int(chars[row, j, 1]))
                        for i in allowed[1:]
                        for j in allowed[1:]
                        if i <= j < i + 3
                    ),
                ]
            )
        assert found["none"][text].item() == pytest.approx(none, abs=1e-4)
        assert (found["begin"][text].item(), found["end"][text].item()) == best[1:]
        assert found["score"][text].item() == pytest.approx(best[0], abs=1e-4)


# ---------------------------------------------------------------------------------------------- the task


def test_scores_baselines_and_the_threshold(file):
    one, data = made(file, vocab_size=300)
    truth = one.targets(data)
    spots = np.array([(a[0]["start"], a[0]["start"] + len(a[0]["text"])) if a else (0, 0) for a in one.known_answers(data)])
    right = {"begin": spots[:, 0], "end": spots[:, 1], "given": spots[:, 1] > 0}
    assert set(one.score(right, truth).values()) == {1.0} and one.silent
    near, nothing = one.baselines(data, data)
    scores = one.score(near.outputs, truth)
    assert 0.02 < scores["f1"] < 0.4 and scores["unanswered"] == 0
    assert one.intervals(near.outputs, truth)["f1"][0] < scores["f1"] < one.intervals(near.outputs, truth)["f1"][1]
    none = np.array([not a for a in truth["answers"]])
    assert one.score(nothing.outputs, truth) == {"f1": none.mean(), "exact_match": none.mean(), "answered": 0, "unanswered": 1}
    # A network that is sure of all that has an answer by more than 2 nats, and of the others by less.
    sure = {
        "begin": np.zeros(len(data), int),
        "end": np.where(none, 5, spots[:, 1]),
        "none": np.zeros(len(data)),
        "score": np.where(none, 1.9, 2.1),
    }
    sure["begin"] = np.where(none, 0, spots[:, 0])
    one.calibrate(sure, truth)
    assert 1.9 < one.threshold < 2.1 and set(one.score(one.postprocess(sure), truth).values()) == {1.0}
    one.predict_options = one.parse_predict_options({"threshold": 5.0})
    assert one.score(one.postprocess(sure), truth)["answered"] == 0
    one.predict_options = one.parse_predict_options({})
    one.silent = False
    assert one.postprocess(sure)["given"].all()


def learnt(path, out, **more):
    return fit(
        path,
        model="bert-tiny",
        out=out,
        settings={
            "steps": 90,
            "evaluate": 45,
            "batch": 32,
            "lr": 4e-3,
            "precision": "float32",
            "task.vocab": 420,
            "model.dim": 64,
            "model.heads": 2,
            "model.hidden": 128,
            **more,
        },
    )


@pytest.mark.slow
def test_learns_to_answer(file, tmp_path):
    """From file to prediction: far better than the nearest sentence, and no answer if there is none."""
    run = learnt(file, tmp_path / "run")
    scores, base = run.record["scores"]["test"], run.record["scores"]["baselines"]
    assert run.record["task"] == "question-answering" and run.record["model"]["config"]["output_type"] == "span"
    assert scores["f1"] > 0.85 and scores["exact_match"] > 0.8 and scores["unanswered"] > 0.8
    assert max(b["scores"]["f1"] for b in base) < 0.4
    again = open_run(run.path)
    context = "Emma went to Kiel. There was milk to buy."
    (record,) = again.predict(context, question="Where was it?")
    assert record["answer"] == "Kiel" == context[record["start"] : record["end"]] and 0 < record["probability"] <= 1
    (tmp_path / "two.csv").write_text(
        'context,question\n"Hans went to Bonn.",Who went away?\n"It rained.",What did it cost?\n"",Where was it?\n'
    )
    who, none, wrong = again.predict(tmp_path / "two.csv")
    assert who["answer"] == "Hans" and (none["answer"], none["start"]) == ("", None) and "empty" in wrong["error"]
    assert again.predict(tmp_path / "two.csv", threshold=-1000.0)[1]["answer"]
    with pytest.raises(DataError, match="is a text without a question"):
        again.predict("Emma went to Kiel. There was milk.")
    assert again.evaluate(file)["scores"] == pytest.approx(scores)
    bare = squad(20, seed=5)
    for paragraph in bare["data"][0]["paragraphs"]:
        for entry in paragraph["qas"]:
            del entry["answers"], entry["is_impossible"]
    records = again.predict(stored(tmp_path / "bare.json", bare))
    want = [q["answers"] for p in squad(20, seed=5)["data"][0]["paragraphs"] for q in p["qas"]]
    assert np.mean([r["answer"] == (w[0]["text"] if w else "") for r, w in zip(records, want, strict=True)]) > 0.75
    report = (run.path / "report.html").read_text()
    assert "By question word" in report and "Threshold for answering" in report and "F1 by length of the answer" in report
    load.save(again.model, tmp_path / "hf", "hf")
    theirs = encoders.transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "hf").eval()
    batch = again.task.batches(again.task.read([file], answered=True), again.card).make(np.arange(8), None)
    with torch.no_grad():
        ours = again.model(batch["tokens"], batch["mask"], batch["segments"])
        peer = theirs(input_ids=batch["tokens"], attention_mask=batch["mask"].long(), token_type_ids=batch["segments"])
    keep = batch["mask"]
    torch.testing.assert_close(ours[..., 0][keep], peer.start_logits[keep], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[..., 1][keep], peer.end_logits[keep], rtol=1e-4, atol=1e-4)


def test_starts_from_a_transformers_folder(file, tmp_path):
    """A trained network with its tokenizer gives the same logits."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    document = squad(140)
    texts = [x for p in document["data"][0]["paragraphs"] for x in (p["context"], *(q["question"] for q in p["qas"]))]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for t in texts for w in re.findall(r"\w+|[^\w\s]", t)})]
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(0)
    config = cards()["bert"].resolve_config("bert-test", output_type="span", vocab_size=len(vocab), length=64)
    theirs = encoders.network("bert", config)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens.save(str(tmp_path / "theirs" / "tokenizer.json"))
    run = fit(
        file,
        task="question-answering",
        weights=tmp_path / "theirs",
        out=tmp_path / "run",
        settings={"steps": 1, "batch": 8, "lr": 1e-9, "precision": "float32", "tune": "whole"},
    )
    assert run.record["model"]["fresh"] == [] and run.task.frame == PairTemplate((2,), (3,), (3,), (0, 1))
    pair = tokens.encode(texts[1], texts[0].strip())
    data = run.task.read([file], answered=True)
    batch = run.task.batches(data, run.card).make(np.array([0]), None)
    assert batch["tokens"][0].tolist() == pair.ids and batch["segments"][0].tolist() == pair.type_ids
    peer = theirs.eval()(input_ids=batch["tokens"], token_type_ids=batch["segments"])
    ours = run.model(batch["tokens"], batch["mask"], batch["segments"])
    torch.testing.assert_close(ours[..., 0], peer.start_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[..., 1], peer.end_logits, rtol=1e-4, atol=1e-5)
