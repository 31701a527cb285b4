"""Encoder-decoders in tasks: special tokens of given tokenizers, fits from random weights and from transformers folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fieldguide import fit, open_run
from fieldguide.core.errors import SettingsError
from fieldguide.data import read
from fieldguide.data.preprocessing.sequence_markers import resolve_markers
from fieldguide.models.registry import card, create
from fieldguide.tasks.text.summarization import Summarization, first_sentences
from fieldguide.tasks.text.translation import Translation
from writers import network

WORDS = ["a", "cat", "dog", "sees", "katze", "hund", "sieht", "eine"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
CODES = ["en_XX", "de_DE"]


def tokenizer(path, before=(), after=(), special=SPECIAL):
    """Write a tokenizer.json of words that adds these tokens around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = [*special, *WORDS, *CODES]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([*special, *CODES])
    frame = {name: made.token_to_id(name) for name in (*before, *after)}
    if frame:
        made.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=list(frame.items()))
    made.save(str(path))
    return str(path)


FORMS = {
    # name: around a text in the file, options, and names of tokens: before, after a source, begin of answers
    "t5": ((), ("</s>",), {"begin": 1}, ([], ["</s>"], ["<pad>"])),
    "bart": (("<s>",), ("</s>",), {"begin": 2}, (["<s>"], ["</s>"], ["</s>", "<s>"])),
    "mbart-cc25": ((), ("</s>", "en_XX"), {"target_language": "de_DE"}, ([], ["</s>", "en_XX"], ["de_DE"])),
    "mbart-50": (
        ("en_XX",),
        ("</s>",),
        {"begin": 2, "source_language": "de_DE", "target_language": "en_XX"},
        (["de_DE"], ["</s>"], ["</s>", "en_XX"]),
    ),
    # Published tokenizers of NLLB have the language last; the network reads it first.
    "nllb": ((), ("</s>", "en_XX"), {"begin": 2, "target_language": "de_DE"}, (["en_XX"], ["</s>"], ["</s>", "de_DE"])),
}


@pytest.fixture
def pairs(tmp_path):
    lines = [
        ("a cat sees a dog", "eine katze sieht eine hund"),
        ("a dog sees a cat", "eine hund sieht eine katze"),
        ("a cat sees", "eine katze sieht"),
        ("a dog sees", "eine hund sieht"),
    ] * 12
    path = tmp_path / "pairs.tsv"
    path.write_text(
        "\n".join(
            [
                "en\tde",
                *(
                    "\t".join((f"{a} {'a ' * (i // 4)}".strip(), f"{b} {'eine ' * (i // 4)}".strip()))
                    for i, (a, b) in enumerate(lines)
                ),
            ]
        )
        + "\n"
    )
    return path


@pytest.mark.parametrize("form", FORMS)
def test_sequence_markers(form, tmp_path, pairs):
    """Sources, start tokens and targets as the network was trained with."""
    before, after, options, want = FORMS[form]
    path = tokenizer(tmp_path / "tokenizer.json", before, after)
    data = Translation.build_examples(read(pairs, column_spec=Translation.column_spec), None)
    task = Translation.fit(data, Translation.options_from({"tokenizer": path, **options}))
    name = task.text.tokenizer.id_to_token
    batch = task.batches(data, card("transformer")).make([2, 0], None)
    assert [name(i) for i in batch["source"][0, : batch["source_mask"][0].sum()]] == [*want[0], "a", "cat", "sees", *want[1]]
    assert [name(i) for i in batch["tokens"][0]][: len(want[2]) + 3] == [*want[2], "eine", "katze", "sieht"]
    target = batch["target"][0][batch["target"][0] >= 0]
    assert [name(i) for i in target] == ["eine", "katze", "sieht", "</s>"]
    assert (batch["target"][0][: len(want[2]) - 1] == -1).all() and batch["tokens"].shape == batch["target"].shape
    assert (batch["tokens"][0][len(want[2]) + 3 :] == 1).all()  # <pad>


def test_beam_search_continues_from_all_start_tokens(tmp_path, pairs):
    before, after, options, _ = FORMS["mbart-50"]
    path = tokenizer(tmp_path / "tokenizer.json", before, after)
    data = read(pairs, column_spec=Translation.column_spec)
    task = Translation.fit(data, Translation.options_from({"tokenizer": path, "length": 12, **options}))
    task.predict_options = Translation.PredictOptions(num_beams=1, length_penalty=0.0)
    torch.manual_seed(0)
    model, seen = create("mbart-test", **task.model_dims()).eval(), []
    last = model.last
    model.last = lambda *a, **k: (seen.append(a[0]), last(*a, **k))[1]
    batch = task.batches(data, card("mbart")).make([0, 1], None)
    said = task.generate(model, batch["source"], batch["source_mask"])
    code = task.text.tokenizer.token_to_id
    assert seen[0].tolist() == [[2, code("en_XX")]] * 2 and all(x.shape == (2, 1) for x in seen[1:])
    assert said.shape[1] <= 10  # with its begin no longer than the network reads


def test_languages_are_required(tmp_path):
    path = tokenizer(tmp_path / "tokenizer.json", ("en_XX",), ("</s>",))
    from fieldguide.data.preprocessing import TextTokenizer

    with pytest.raises(SettingsError, match=r"default: en_XX.*task\.target_language"):
        resolve_markers(TextTokenizer.load(path), Translation.options_from({"tokenizer": path}))
    with pytest.raises(SettingsError, match=r"task\.target_language='de_DX' is not a token.*de_DE"):
        resolve_markers(TextTokenizer.load(path), Translation.options_from({"tokenizer": path, "target_language": "de_DX"}))


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "nllb", "nllb-moe"])
def test_fits_from_random_weights(name, tmp_path, pairs):
    run = fit(
        pairs,
        task="translation",
        model=f"{name}-test",
        out=tmp_path / "run",
        settings={"steps": 3, "batch": 8, "precision": "float32", "evaluate": 2, "model.length": 80},
    )
    again = open_run(run.path)
    config = again.model.config
    assert set(again.predict(["a cat sees"])[0]) == {"input", "text"}
    assert config.begin == again.task.text.cls and config.pad == again.task.text.pad and config.end == again.task.text.end


@pytest.mark.parametrize(
    ("name", "form", "more"),
    [
        ("t5", "t5", {"task.prefix": "a "}),
        ("bart", "bart", {}),
        ("mbart", "mbart-cc25", {"task.target_language": "de_DE"}),
        ("nllb", "nllb", {"task.target_language": "de_DE"}),
    ],
)
def test_fits_from_a_transformers_folder(name, form, more, tmp_path, pairs):
    """Tokenizer and start tokens come from the folder; the weights are used from the first step."""
    before, after, options, want = FORMS[form]
    changes = {} if name == "t5" else {"length": 80}
    theirs = network(create(f"{name}-test", begin=options.get("begin", 0), **changes))
    theirs.save_pretrained(tmp_path / "theirs")
    if "begin" not in options:  # as in the files of mBART of 25 languages
        config = json.loads((tmp_path / "theirs" / "config.json").read_text())
        config["decoder_start_token_id"] = None
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    tokenizer(tmp_path / "theirs" / "tokenizer.json", before, after)
    run = fit(
        pairs,
        task="translation",
        out=tmp_path / "run",
        weights=tmp_path / "theirs",
        settings={"steps": 1, "batch": 8, "precision": "float32", "lr": 1e-8, "tune": "whole", **more},
    )
    known = open_run(run.path)
    assert [known.task.text.tokenizer.id_to_token(i) for i in known.task.frame.target_start] == want[2]
    torch.testing.assert_close(
        known.model.embed.weight.detach(), theirs.get_input_embeddings().weight.detach(), rtol=0, atol=1e-5
    )
    assert set(known.predict(["a cat sees"])[0]) == {"input", "text"}


# ---------------------------------------------------------------------------------------------- summaries


def documents(tmp_path):
    facts = [
        (who, what, where)
        for who in ("Anna", "Bert", "Carl", "Dora")
        for what in ("bread", "milk", "wine", "cheese")
        for where in ("market", "harbour", "village")
    ]
    rows = [
        {
            "article": f"It was early. {who} went to the {where}. There were many people. {who} bought {what}. It rained.",
            "highlights": f"{who} bought {what}.",
        }
        for who, what, where in facts
    ]
    path = tmp_path / "news.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_document_columns_by_usual_names(tmp_path):
    data = read(documents(tmp_path), column_spec=Summarization.column_spec)
    assert data.target.name == "highlights" and Summarization.missing_requirements(data) is None
    task = Summarization.fit(data, Summarization.options_from({}))
    assert task.column == "article"
    said = task.baselines(data, data)[0].outputs["text"][0]
    assert said == "It was early. Anna went to the market. There were many people."
    scores = task.score({"text": np.array([said], dtype=object)}, {"text": np.array(["Anna bought bread."], dtype=object)})
    assert scores["rouge1"] == pytest.approx(2 * 1 / (12 + 3)) and scores["rouge2"] == 0
    (tmp_path / "t.csv").write_text('document,summary\n"A b. C d.","a"\n"E f.","e"\n')
    assert read(tmp_path / "t.csv", column_spec=Summarization.column_spec).target.name == "summary"
    assert first_sentences("One. Two!\nThree? Four.") == "One. Two! Three?" and first_sentences("") == ""


def test_network_learns_to_summarize(tmp_path):
    run = fit(
        documents(tmp_path),
        task="summarization",
        model="t5-test",
        out=tmp_path / "run",
        settings={"steps": 4, "batch": 8, "precision": "float32", "evaluate": 2, "model.dim": 32},
    )
    assert set(run.scores) == {"rouge1", "rouge2", "rougeL", "loss"}
    assert set(run.record["scores"]["baselines"][0]["scores"]) == {"rouge1", "rouge2", "rougeL"}
    again = open_run(run.path)
    answer = again.predict(["Dora bought milk."], beams=2, tokens=5)[0]
    assert set(answer) == {"input", "text"}
    task = again.task.for_request(again.task.parse_predict_options({"num_beams": 2, "max_new_tokens": 5}))
    said = again.run_batches(task, task.predict_batches(task.read(["Dora bought milk."]), again.card))["said"]
    assert said.shape[1] <= 5
    page = (run.path / "report.html").read_text()
    assert "Summaries during training" in page and "ROUGE-1 by length" in page


def test_runs_predict_like_checkpoints(tmp_path, pairs):
    """Beam search, reproducible sampling, streaming, stop strings, and the defaults."""
    run = open_run(
        fit(
            pairs,
            task="translation",
            model="bart-test",
            out=tmp_path / "run",
            settings={"steps": 3, "batch": 8, "precision": "float32", "evaluate": 2, "model.length": 80},
        ).path
    )
    texts = ["a cat sees", "a dog", "a dog sees a cat"]
    say = lambda asked, **how: [answer["text"] for answer in run.predict(asked, **how)]
    greedy = say(texts, temperature=0)
    assert "".join(run.stream(texts[0], temperature=0)).strip() == greedy[0]
    assert run.stream(texts[0]) is None  # beams: it comes as a whole
    assert say(texts) == say(texts, beams=4) and say(texts, beams=1) == greedy
    drawn = say(texts, temperature=2.0, seed=1)
    assert drawn == say(texts, temperature=2.0, seed=1) != say(texts, temperature=2.0, seed=2)
    assert say(texts[:1], temperature=2.0, seed=1) == drawn[:1]
    stop = next(c for c in greedy[2] if c.isalnum()) if any(c.isalnum() for c in greedy[2]) else greedy[2][:1]
    assert say(texts[2:], temperature=0, stop=stop or "x") == [greedy[2].partition(stop or "x")[0].strip()]
    with pytest.raises(SettingsError, match="cannot be combined with sampling"):
        run.predict(texts, beams=2, temperature=1.0)
