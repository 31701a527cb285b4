"""Tokenizers of published weights, compared with transformers on unusual texts; and fits that start from them."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from fieldguide.automl import finetune
from fieldguide.automl.fit import NullCallback, build_plan
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.load import Checkpoint
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.models.registry import card, create
from fieldguide.tasks.text.text_classification import TextClassification
from tv import transformers

TEXTS = [
    "",
    " ",
    "the cat sat on the mat",
    "  The   Cat\tsat\non THE mat.  ",
    "don't you'll we've",
    "Ünïcödé naïve café",
    "cafe\u0301 Ångström",
    "你好，世界 the 猫",
    "日本語のテキスト",
    "👩‍👩‍👧 🙂 emoji ☃",
    "zzzqqq xylophonist",
    "1234567 3.14 2026-11-23",
    "a\u00a0b\u2028c\u200bd\x00e\ufffd",
    "x" * 120,
    "hello [MASK] there <mask> and</s><s>",
    "<|endoftext|> a <|endoftext|>",
    "İstanbul ǅ ﬁne",
    "\r\n\r\n",
    "مرحبا שלום",
    "C++ f(x)=x**2;  // no",
]
LEARNT = [t for t in TEXTS if t.strip()] * 3 + ["the cat ran to the mat and sat"] * 9


class Said(NullCallback):
    def __init__(self):
        self.words = []

    def log(self, text):
        self.words.append(text)


def wordpieces(folder, size=260, lower=True, **said):
    """Write a folder with a vocab.txt, as for BERT."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lower)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        LEARNT,
        trainers.WordPieceTrainer(
            vocab_size=size,
            special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
            show_progress=False,
            limit_alphabet=70,
        ),
    )
    folder.mkdir(exist_ok=True)
    words = sorted(made.get_vocab(), key=made.get_vocab().get)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    if said:
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return len(words)


def merged(folder, special, **said):
    """Write a folder with vocab.json and merges.txt, as for GPT-2 and RoBERTa."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        LEARNT,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    folder.mkdir(exist_ok=True)
    made.model.save(str(folder))
    if said:
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return made.get_vocab_size()


def same(ours: TextTokenizer, theirs, texts=TEXTS, pairs=True):
    """Compare single texts and pairs, special tokens and segments, and every token id."""
    for text in texts:
        assert ours.tokenizer.encode(text).ids == theirs(text).input_ids, text
    for a, b in zip(texts[2:], texts[3:] if pairs else ()):
        mine, other = ours.tokenizer.encode(a, b), theirs(a, b, return_token_type_ids=True)
        assert (mine.ids, mine.type_ids) == (other.input_ids, other.token_type_ids), (a, b)
    assert ours.tokenizer.get_vocab() == theirs.get_vocab()
    for name in ("pad", "unk", "cls", "sep", "mask", "eos"):
        wanted = getattr(theirs, f"{name}_token_id")
        mine = getattr(ours, {"unk": "unknown", "mask": "mask_token", "eos": "end"}.get(name, name))
        assert wanted is None or mine == wanted, name


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    ],
    ids=str,
)
def test_bert_tokenizer(said, tmp_path):
    wordpieces(tmp_path / "bert", lower=said.get("do_lower_case", True), **said)
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path / "bert")
    ours = TextTokenizer.load(tmp_path / "bert")
    same(ours, theirs)
    assert ours.decode(ours.encode_exact(["the cat sat"])[0]) == "the cat sat"
    assert any(ours.unknown in ids for ids in ours.encode_exact(TEXTS))  # some words here are not known


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"add_prefix_space": True},
        {
            "tokenizer_class": "GPT2Tokenizer",
            "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False},
            "pad_token": None,
        },
    ],
    ids=str,
)
def test_gpt2_tokenizer(said, tmp_path):
    merged(tmp_path / "gpt2", ["<|endoftext|>"], **said)
    ours = TextTokenizer.load(tmp_path / "gpt2")
    same(ours, transformers.GPT2TokenizerFast.from_pretrained(tmp_path / "gpt2"))
    assert all(ours.decode(i) == t for i, t in zip(ours.encode_exact(TEXTS), TEXTS) if not said.get("add_prefix_space"))


@pytest.mark.parametrize("said", [{}, {"add_prefix_space": True, "tokenizer_class": "RobertaTokenizer"}], ids=str)
def test_roberta_tokenizer(said, tmp_path):
    merged(tmp_path / "roberta", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], **said)
    # As in the published tokenizer.json: blanks before a word that is missing belong to it.
    mask = AddedToken("<mask>", lstrip=True)
    theirs = transformers.RobertaTokenizerFast.from_pretrained(tmp_path / "roberta", mask_token=mask)
    ours = TextTokenizer.load(tmp_path / "roberta")
    same(ours, theirs)
    hidden = ours.tokenizer.encode("the <mask>").ids
    assert len(hidden) == 4 and hidden[-2:] == [4, 2] and ours.end == ours.sep == 2


def test_deberta_tokenizer(tmp_path):
    merged(tmp_path / "deberta", ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"], do_lower_case=False, vocab_type="gpt2")
    mask = AddedToken("[MASK]", lstrip=True)
    theirs = transformers.DebertaTokenizerFast.from_pretrained(tmp_path / "deberta", mask_token=mask)
    ours = TextTokenizer.load(tmp_path / "deberta")
    same(ours, theirs, pairs=False)
    # Theirs of version 5 puts two separators between; their converter of the published files, and its authors, one.
    pair, (one, two) = ours.tokenizer.encode("the cat", "a mat"), theirs(["the cat", "a mat"]).input_ids
    assert pair.ids == [*one, *two[1:]] and pair.type_ids == [0] * len(one) + [1] * (len(two) - 1)


def test_qwen_tokenizer(tmp_path):
    said = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "added_tokens_decoder": {},
    }
    size = merged(tmp_path / "qwen", ["<|endoftext|>"])
    for place, token in ((size, "<|im_start|>"), (size + 1, "<|im_end|>")):
        said["added_tokens_decoder"][str(place)] = {
            "content": token,
            "special": True,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        }
    (tmp_path / "qwen" / "tokenizer_config.json").write_text(json.dumps(said))
    ours = TextTokenizer.load(tmp_path / "qwen")
    same(ours, transformers.Qwen2Tokenizer.from_pretrained(tmp_path / "qwen"), [*TEXTS, "<|im_start|>user\nhi<|im_end|>"])
    assert ours.end == size + 1
    said["added_tokens_decoder"] = {str(size + 7): "<|im_start|>"}
    (tmp_path / "qwen" / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match=f"should have the id {size + 7} but gets {size}"):
        TextTokenizer.load(tmp_path / "qwen")


def test_tokenizer_is_saved_completely(tmp_path):
    merged(tmp_path / "roberta", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    (tmp_path / "roberta" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    (tmp_path / "roberta" / "chat_template.jinja").write_text("{{ messages }}")
    first = TextTokenizer.load(tmp_path / "roberta")
    (tmp_path / "run").mkdir()
    first.save(tmp_path / "run")
    again = TextTokenizer.load(tmp_path / "run")
    for name in ("pad", "unknown", "cls", "sep", "mask_token", "end", "ends", "special", "template"):
        assert getattr(again, name) == getattr(first, name), name
    assert first.ends == (2, 3) and first.template == "{{ messages }}" and first.special["mask_token"] == "<mask>"
    assert np.array_equal(again.encode_exact(TEXTS[2:3])[0], first.encode_exact(TEXTS[2:3])[0])


@pytest.mark.parametrize(
    "name, said, end",
    [
        ("tokenizer_config.json", {"eos_token": "<eos>"}, 1),
        ("special_tokens_map.json", {"eos_token": {"content": "<bos>"}}, 2),
        ("generation_config.json", {"eos_token_id": [4, 1]}, 4),
        ("config.json", {"eos_token_id": 2}, 2),
        (None, None, 1),
    ],
    ids=str,
)
def test_end_tokens_are_read(name, said, end, tmp_path):
    """As for Gemma, whose vocabulary also contains HTML tags."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>", "</s>", "<s>"]
    Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    if name:
        (tmp_path / name).write_text(json.dumps(said))
    text = TextTokenizer.load(tmp_path)
    assert text.end == end and text.ends[0] == end and TextTokenizer.load(tmp_path / "tokenizer.json").end == end
    if name == "generation_config.json":
        assert text.ends == (4, 1)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"vocab.txt": "a\nb\n"}, "lacks the token .UNK. for unknown words"),
        (
            {"vocab.txt": "[UNK]\na", "tokenizer_config.json": '{"tokenizer_class": "BertJapaneseTokenizer"}'},
            "belongs to a BertJapanese",
        ),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\n"}, "\\(not specified\\)"),
        ({"vocab.json": '{"a": 0', "merges.txt": "#version: 0.2\n"}, "cannot be read"),
        (
            {"vocab.json": '{"<|endoftext|>": 0}', "merges.txt": "", "tokenizer_config.json": "{"},
            "_config.json is not valid JSON",
        ),
        (
            {
                "vocab.json": '{"<unk>": 0}',
                "merges.txt": "",
                "tokenizer_config.json": '{"tokenizer_class": "RobertaTokenizer"}',
            },
            "lacks the token </s>",
        ),
        ({"vocab.json": "{}"}, "no tokenizer found"),
    ],
    ids=range(7),
)
def test_invalid_tokenizers_are_rejected(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        TextTokenizer.load(tmp_path)


# Fits


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "t.csv"
    rng = np.random.default_rng(0)
    rows = [f"the {rng.choice(['cat', 'mat', 'café'])} sat {k} on,{'ab'[k % 2]}" for k in range(60)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def bert(folder, size, length=32):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.BertModel(
            transformers.BertConfig(
                vocab_size=size,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=length,
            )
        ).save_pretrained(folder)
    return folder


# Special tokens that are spelt out in a text of a table are plain characters here, on purpose.
PLAIN = [t for t in TEXTS if t.strip() and not any(s in t for s in ("<s>", "<|", "[MASK]"))]


@pytest.mark.parametrize("seconds", [PLAIN[2:9], ["a", *PLAIN[3:9]]], ids=("awkward", "short"))
@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_pair_format_of_the_checkpoint_is_used(kind, seconds, tmp_path):
    if kind == "bert":
        wordpieces(tmp_path / kind)
    else:
        merged(tmp_path / kind, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    theirs = {"bert": transformers.BertTokenizerFast, "roberta": transformers.RobertaTokenizerFast}[kind].from_pretrained(
        tmp_path / kind
    )
    firsts = PLAIN[5:12]
    rows = pl.DataFrame({"first": firsts, "second": seconds, "label": list("abababa")})
    data = read(rows, target="label", kinds={"first": "text", "second": "text"})
    made = TextClassification.fit(data, TextClassification.Options(tokenizer=str(tmp_path / kind), length=400))
    batch = made.batches(data, card(kind), Settings()).make(np.arange(len(rows)), None)
    for row, a, b in zip(range(len(rows)), firsts, seconds):
        there = batch["mask"][row]
        wanted = theirs(a, b, return_token_type_ids=True)
        assert batch["tokens"][row][there].tolist() == wanted.input_ids
        assert batch["segments"][row][there].tolist() == wanted.token_type_ids
    longest = max(len(theirs(a, b).input_ids) for a, b in zip(firsts, seconds))
    one = TextClassification.fit(data, TextClassification.Options(tokenizer=str(tmp_path / kind), length=longest))
    short = TextClassification.fit(data, TextClassification.Options(tokenizer=str(tmp_path / kind), length=longest - 1))
    assert not any("truncated" in note for note in one.notes) and any("truncated" in note for note in short.notes)
    rows, _, cut = short.encode_rows(data, True)
    assert max(map(len, rows)) == longest - 1 and cut == sum(
        len(theirs(a, b).input_ids) == longest for a, b in zip(firsts, seconds)
    )


STEPS = {"steps": 2, "batch": 8, "precision": "float32"}


def test_fit_uses_the_tokenizer_of_the_checkpoint(table, tmp_path):
    folder = bert(tmp_path / "bert", wordpieces(tmp_path / "bert"))
    plan = build_plan(read(table), weights=folder, settings=STEPS, callback=(said := Said()))
    theirs = transformers.BertTokenizerFast.from_pretrained(folder)
    texts = plan.source.take(plan.splits.train).rows["text"].to_list()
    batch = plan.train_batches.make(np.arange(len(texts)), None)
    assert [[i for i, there in zip(*row) if there] for row in zip(batch["tokens"].tolist(), batch["mask"].tolist())] == [
        ids[:32] for ids in theirs(texts).input_ids
    ]
    assert not any("WARNING" in text for text in said.words)


def test_rows_fit_the_length_of_the_checkpoint(table, tmp_path):
    folder = bert(tmp_path / "bert", wordpieces(tmp_path / "bert"), length=6)
    plan = build_plan(read(table), weights=folder, settings=STEPS, callback=(said := Said()))
    assert plan.task.options.length == 6 and plan.train_batches.make(np.arange(8), None)["tokens"].shape[1] == 6
    assert any("task.length=6" in text and "the maximum of" in text for text in said.words)
    assert any("longer than 6 tokens" in text for text in said.words)
    with pytest.raises(SettingsError, match=r"task\.length=7 exceeds the 6 tokens"):
        build_plan(read(table), weights=folder, settings={**STEPS, "task.length": 7})


def test_rows_are_not_shortened_for_unlimited_networks():
    """T5's `length` is only the length in training."""
    begun = Checkpoint(None, card("t5"), None, {}, {})
    learnt = SimpleNamespace(model_dims=lambda: {"vocab_size": 30, "length": 900})
    assert (
        finetune.limit_length(learnt, None, card("t5").resolve_config(length=512), begun, {"length": 900}, NullCallback())
        is learnt
    )
    with pytest.raises(SettingsError, match="900 exceeds the 512"):
        finetune.limit_length(
            learnt,
            None,
            card("bart").resolve_config(length=512),
            replace(begun, card=card("bart")),
            {"length": 900},
            NullCallback(),
        )


def test_missing_tokenizer_is_warned_about(table, tmp_path):
    folder = bert(tmp_path / "bert", 700)
    build_plan(read(table), weights=folder, settings=STEPS, callback=(said := Said()))
    warning = next(text for text in said.words if text.startswith("WARNING"))
    assert "no tokenizer found" in warning and "--set task.tokenizer=PATH" in warning
    (folder / "vocab.txt").write_text("a\n")
    build_plan(read(table), weights=folder, settings=STEPS, callback=(said := Said()))
    assert any(text.startswith("WARNING") and "lacks the token [UNK]" in text for text in said.words)
    build_plan(read(table), weights=folder, settings={**STEPS, "task.tokenizer": "none"}, callback=(said := Said()))
    assert not any("WARNING" in text for text in said.words)  # it was asked for


def test_fit_uses_the_tokenizer_of_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    size = merged(tmp_path / "words", ["<|endoftext|>"])
    merges = (tmp_path / "words" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    vocab = json.loads((tmp_path / "words" / "vocab.json").read_text(encoding="utf-8"))
    net = create(
        "llama-test", dim=16, hidden=16, heads=2, kv_heads=1, rope_scaling=(), tie_embeddings=True, vocab_size=size, length=48
    )
    c, writer = net.config, gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    for key, value in {
        "vocab_size": c.vocab_size,
        "context_length": c.length,
        "embedding_length": c.dim,
        "block_count": c.depth,
        "feed_forward_length": c.hidden,
        "head_count": c.heads,
        "head_count_kv": c.kv_heads,
        "layer_norm_rms_eps": c.eps,
        "rope_freq_base": c.rope_theta,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "gpt-2",
        "token_list": sorted(vocab, key=vocab.get),
        "token_merges": merges,
        "token_types": [3] + [1] * (size - 1),
        "eos_token_id": 0,
        "chat_template": "{{ eos_token }}",
    }.items():
        getattr(writer, f"add_{key}")(value)
    state = {k: v for k, v in net.state_dict().items() if k != "head.weight"}
    for name, tensor in weights.translate(state, weights.get_tables(net)["gguf"], reverse=True).items():
        writer.add_tensor(name, tensor.detach().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    (tmp_path / "t.txt").write_text("".join(f"the cat sat on mat {i}\n" for i in range(400)))
    plan = build_plan(
        read(tmp_path / "t.txt"), task="text-generation", weights=tmp_path / "t.gguf", callback=(said := Said()), settings=STEPS
    )
    theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path / "words")
    assert all(ids.tolist() == theirs(text).input_ids for ids, text in zip(plan.task.text.encode_exact(TEXTS[:15]), TEXTS))
    assert plan.task.text.end == 0 and not any("WARNING" in text for text in said.words)
    assert plan.task.options.length == 48 and any("task.length=48" in text for text in said.words)
    assert plan.task.text.template == "{{ eos_token }}" and plan.task.text.special == {"eos_token": "<|endoftext|>"}
