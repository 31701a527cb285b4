"""Conversations in the formats of others are read; what is not text is a finding with all places, under the 1 % rule."""

from __future__ import annotations

import json

import polars as pl
import pytest

import fieldguide
from fieldguide.data import read
from fieldguide.data.validation.checks import BadData
from fieldguide.tasks import infer_task, task
from test_speaker import TEMPLATE, bpe

WANT = [("user", "How many legs has a cat?"), ("assistant", "Four.")]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def turns(data, row=0):
    return [(m["role"], m["content"]) for m in data.rows["messages"][row].to_list()]


FORMATS = {
    "sharegpt": lambda a, b: {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]},
    "parts": lambda a, b: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": a[:4]}, {"type": "text", "text": a[4:]}]},
            {"role": "assistant", "content": [{"type": "text", "text": b}]},
        ]
    },
    "prompt and completion": lambda a, b: {"prompt": a, "completion": b},
    "prompt and completion as messages": lambda a, b: {
        "prompt": [{"role": "user", "content": a}],
        "completion": [{"role": "assistant", "content": b}],
    },
    "alpaca": lambda a, b: {"instruction": a, "input": "", "output": b},
    "alpaca without input": lambda a, b: {"instruction": a, "output": b},
    "roles of others": lambda a, b: {"messages": [{"role": "human", "content": a}, {"role": "model", "content": b}]},
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, tmp_path):
    rows = [
        FORMATS[name](a if i == 0 else f"{a} {i}", b if i == 0 else f"{b} {i}")
        for i in range(20)
        for a, b in [(WANT[0][1], WANT[1][1])]
    ]
    data = fieldguide.read(write(tmp_path / "a.jsonl", rows))
    assert turns(data) == WANT and len(data) == 20 and data.columns["messages"].kind == "messages"
    assert infer_task(data)[0].name == "text-generation"


def test_mixed_contents(tmp_path):
    """Texts and lists of parts in one file, which polars reads as text."""
    rows = [
        FORMATS["parts"](*(t for _, t in WANT)) if i % 2 else {"messages": [{"role": r, "content": t} for r, t in WANT]}
        for i in range(20)
    ]
    data = fieldguide.read(write(tmp_path / "a.jsonl", rows))
    assert turns(data, 0) == turns(data, 1) == WANT


@pytest.mark.parametrize("answers", [("yes", "no"), (True, False), ("1", "0")])
def test_short_answers_stay_text(answers, tmp_path):
    rows = [{"prompt": f"Is {i} even?", "completion": answers[i % 2]} for i in range(20)]
    data = fieldguide.read(write(tmp_path / "a.jsonl", rows))
    assert [turns(data, i)[1][1] for i in (0, 1)] == [str(a).lower() for a in answers]


def test_further_input_and_system_of_alpaca(tmp_path):
    rows = [{"instruction": f"Translate {i}.", "input": "cat", "output": "chat", "system": "Be brief."} for i in range(20)]
    data = fieldguide.read(write(tmp_path / "a.jsonl", rows))
    assert turns(data) == [("system", "Be brief."), ("user", "Translate 0.\n\ncat"), ("assistant", "chat")]


def test_a_named_target_leaves_the_columns_as_they_are(tmp_path):
    rows = [{"prompt": f"Is {i} even?", "completion": "yes" if i % 2 else "no"} for i in range(40)]
    data = fieldguide.read(write(tmp_path / "a.jsonl", rows), target="completion")
    assert infer_task(data)[0].name == "text-classification"
    table = pl.DataFrame({"instruction": ["a", "b"], "output": ["c", "d"], "price": [1.0, 2.0]})
    assert (
        "messages" not in fieldguide.data.read.__globals__["load"](table).raw.rows.columns
    )  # further columns: another kind of table


def chats(bad: dict, count=300):
    rows = [
        {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(count)
    ]
    for i, change in bad.items():
        rows[i]["messages"][1] |= change
    return rows


@pytest.mark.parametrize(
    "change, check",
    [
        ({"content": None, "tool_calls": [{"id": "1"}]}, "messages-with-tool-calls"),
        ({"content": None}, "no-content"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages-with-image-parts"),
        ({"role": "tool"}, "unknown-speaker"),
    ],
)
def test_messages_that_are_not_text_are_findings(change, check, tmp_path):
    data = fieldguide.read(write(tmp_path / "a.jsonl", chats({7: change, 9: change})))
    found = next(f for f in data.findings if f.check == check)
    assert len(data) == 298 and found.places == ("a.jsonl:8", "a.jsonl:10") and found.unusable == 2
    with pytest.raises(BadData, match=rf"5 x .*a\.jsonl:1; .*{check}"):
        fieldguide.read(write(tmp_path / "b.jsonl".replace("b", "a"), chats(dict.fromkeys(range(5), change))))


def test_counts_of_words_and_tags_that_differ_are_findings(tmp_path):
    rows = [{"tokens": [f"w{i}", "in", f"T{i}"], "tags": ["O", "O", "B-LOC"]} for i in range(300)]
    rows[4]["tags"].pop(), rows[8]["tags"].append("O")
    spec = task("token-classification").column_spec
    data = fieldguide.data.read(write(tmp_path / "a.jsonl", rows), column_spec=spec)
    found = next(f for f in data.findings if f.check == "list-lengths")
    assert len(data) == 298 and found.places == ("a.jsonl:5", "a.jsonl:9") and "3 and 2" in found.what
    for row in rows[10:20]:
        row["tags"].pop()
    with pytest.raises(BadData, match=r"12 x .*differ in length"):
        fieldguide.data.read(write(tmp_path / "a.jsonl", rows), column_spec=spec)


def test_conversations_that_the_chat_template_rejects_are_findings(tmp_path):
    tokenizer = tmp_path / "words"
    tokenizer.mkdir()
    bpe().save(str(tokenizer / "tokenizer.json"))
    template = TEMPLATE.replace("'user', 'assistant', 'system'", "'user', 'assistant'")  # as Gemma's: no system messages
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})
    )
    rows = chats({})
    for i in (7, 9):
        rows[i]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    kind, options = task("text-generation"), {"tokenizer": str(tokenizer), "length": 32}
    data = kind.build_examples(fieldguide.read(write(tmp_path / "a.jsonl", rows)), kind.options_from(options))
    found = next(f for f in data.findings if f.check == "chat-template")
    assert len(data) == 298 and found.places == ("a.jsonl:8", "a.jsonl:10") and "nobody is called system" in found.what
    assert kind.fit(data, kind.options_from(options)).tokens > 0
    for row in rows[10:20]:
        row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    with pytest.raises(BadData, match=r"(?s)12 of 300 examples.*nobody is called system"):
        kind.build_examples(fieldguide.read(write(tmp_path / "a.jsonl", rows)), kind.options_from(options))


ASKED = [{"role": "user", "content": f"q{i}"} for i in range(4)]
ANSWERED = [{"role": "assistant", "content": f"a{i}"} for i in range(4)]


def read_rows(tmp_path, rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return read(path, **options)


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": json.dumps(turns)} for turns in zip(ASKED, ANSWERED)],  # JSON in a column of text
        [{"prompt": a["content"], "response": b["content"]} for a, b in zip(ASKED, ANSWERED)],
        [{"id": 7 - i, "prompt": f"q{i}", "completion": f"a{i}", "source": "web"} for i in range(4)],
        [{"instruction": f"q{i}", "context": "", "response": f"a{i}", "category": "open"} for i in range(4)],  # Dolly
        [{"instruction": f"q{i}", "response": f"a{i}"} for i in range(4)],
        [{"messages": [{"role": r, "content": [f"{c}{i}"]} for r, c in (("user", "q"), ("assistant", "a"))]} for i in range(4)],
    ],
)
def test_further_formats(tmp_path, rows):
    data = read_rows(tmp_path, rows)
    plain = [[{"role": m["role"], "content": m["content"]} for m in row] for row in data.rows["messages"].to_list()]
    assert plain == [list(turns) for turns in zip(ASKED, ANSWERED)] and list(data.columns) == ["messages"]


@pytest.mark.parametrize("name", ["conversations", "messages"])
def test_a_system_column_is_the_first_message(tmp_path, name):
    rows = [
        {"system": "Be brief." if i else "", "messages": [a, b]}
        if name == "messages"
        else {
            "system": "Be brief." if i else "",
            name: [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}],
        }
        for i, (a, b) in enumerate(zip(ASKED, ANSWERED))
    ]
    data = read_rows(tmp_path, rows)
    found = data.rows["messages"].to_list()
    assert [len(row) for row in found] == [2, 3, 3, 3] and found[1][0] == {"role": "system", "content": "Be brief."}
    assert list(data.columns) == ["messages"]


def test_preferences_stay_columns(tmp_path):
    """Pairs of answers are no conversations; the task preference-tuning reads them."""
    rows = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(4)]
    assert list(read_rows(tmp_path, rows).columns) == ["prompt", "chosen", "rejected"]
    assert read_rows(tmp_path, rows, target="chosen").target.name == "chosen"
