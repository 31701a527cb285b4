"""SentencePiece files, compared with the outputs of its library on unusual texts (stored in golden/pieces with the files: a
unigram model as for T5 and DeBERTa, and BPE with byte fallback as for Llama and Gemma).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fieldguide.core.errors import DataError
from fieldguide.data.preprocessing import TextTokenizer, sentencepiece

GOLDEN = Path(__file__).parent / "golden" / "pieces"
SAID = json.loads((GOLDEN / "encoded.json").read_text(encoding="utf-8"))
FILE = {"T5": "spiece.model", "DebertaV2": "spm.model", "Llama": "tokenizer.model", "Gemma": "tokenizer.model"}
FRAME = {"T5": ([], ["</s>"]), "DebertaV2": (["[CLS]"], ["[SEP]"]), "Llama": (["<s>"], []), "Gemma": (["<bos>"], [])}


def folder(tmp_path, kind, **said):
    shutil.copy(GOLDEN / f"{kind}.model", tmp_path / FILE[kind])
    if said:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    return tmp_path


@pytest.mark.parametrize("kind", FILE)
def test_pieces_equal_sentencepiece(kind, tmp_path):
    text = TextTokenizer.load(folder(tmp_path, kind))
    before, after = ([text.tokenizer.token_to_id(t) for t in tokens] for tokens in FRAME[kind])
    for one, ids, back in SAID[kind]:
        assert text.encode_exact([one])[0].tolist() == ids, one
        assert text.tokenizer.encode(one).ids == [*before, *ids, *after], one
        assert text.unknown in ids or text.decode(ids) == back, one
    assert (
        any(text.unknown in ids for _, ids, _ in SAID[kind]) != sentencepiece.parse_file(GOLDEN / f"{kind}.model").byte_fallback
    )


def test_special_tokens(tmp_path):
    for kind, end, pad, size in (
        ("T5", "</s>", "<pad>", 100),
        ("DebertaV2", "[SEP]", "[PAD]", 1),
        ("Llama", "</s>", None, 0),
        ("Gemma", "<eos>", "<pad>", 0),
    ):
        (tmp_path / kind).mkdir()
        text, found = (
            TextTokenizer.load(folder(tmp_path / kind, kind)),
            sentencepiece.parse_file(GOLDEN / f"{kind}.model").pieces,
        )
        assert text.size == len(found) + size
        assert text.end == text.tokenizer.token_to_id(end) and (pad is None or text.pad == text.tokenizer.token_to_id(pad))
        assert [text.tokenizer.id_to_token(i) for i in range(len(found))] == [piece for piece, _, _ in found]
        if kind == "T5":  # what was cut out is numbered from the end
            assert [text.tokenizer.token_to_id(f"<extra_id_{i}>") for i in (99, 0)] == [len(found), len(found) + 99]
        if kind == "DebertaV2":
            pair = text.tokenizer.encode("a", "b")
            assert text.mask_token == len(found) and pair.type_ids == [0, 0, 0, 1, 1] and pair.ids[2] == pair.ids[4] == text.sep
        if kind == "Gemma":
            turn = text.tokenizer.encode("<start_of_turn>user")
            assert turn.tokens == ["<bos>", "<start_of_turn>", *"user"]


def test_tokenizer_configuration_is_used(tmp_path):
    text = TextTokenizer.load(
        folder(tmp_path, "Llama", add_bos_token=False, add_eos_token=True, tokenizer_class="LlamaTokenizer")
    )
    assert text.tokenizer.encode("the cat").tokens == ["▁the", "▁cat", "</s>"]
    with pytest.raises(DataError, match="of the class XLNet"):
        TextTokenizer.load(folder(tmp_path, "Llama", tokenizer_class="XLNetTokenizer"))


@pytest.mark.parametrize(
    "content",
    [b"", b"IQ== 0\nIg== 1\n", b"\x0a\xff\x01ab", b"\x0a\x05\x0a\x01a\x15\x00", b"\x12\x02\x18\x03"],
    ids=("nothing", "tiktoken", "cut off", "cut number", "no pieces"),
)
def test_other_files_are_rejected(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.model (is damaged|contains no SentencePiece pieces)"):
        TextTokenizer.load(tmp_path)


def marian(tmp_path, **said):
    """Write a folder as for OPUS-MT: two files with pieces, and a vocabulary for both."""
    for side in ("source", "target"):
        shutil.copy(GOLDEN / f"Marian.{side}.model", tmp_path / f"{side}.spm")
    golden = json.loads((GOLDEN / "Marian.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(golden["vocab"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de", **said}))
    return golden


def test_marian_pairs_equal_sentencepiece(tmp_path):
    """Each side is split by its own file; ids are those of the vocabulary, in which characters of the other side are found."""
    golden = marian(tmp_path)
    text = TextTokenizer.load(tmp_path)
    (tmp_path / "saved").mkdir()
    text.save(tmp_path / "saved")
    for found in (text, TextTokenizer.load(tmp_path / "saved")):
        for one, source, target, back in golden["encoded"]:
            assert found.encode_exact([one])[0].tolist() == source, one
            assert found.for_targets.encode_exact([one])[0].tolist() == target, one
            assert found.tokenizer.encode(one).ids == [*source, golden["vocab"]["</s>"]]
            assert found.unknown in target or found.decode(target) == back
        assert found.tokenizer.encode(">>deu<< the cat").ids[0] == golden["vocab"][">>deu<<"]
        assert (found.end, found.pad) == (golden["vocab"]["</s>"], golden["vocab"]["<pad>"])
        assert found.size == len(golden["vocab"])


def test_damaged_marian_vocabularies_are_rejected(tmp_path):
    marian(tmp_path, separate_vocabs=True)
    with pytest.raises(DataError, match="separate_vocabs"):
        TextTokenizer.load(tmp_path)
    golden = marian(tmp_path)
    for change, said in (({"<pad>": 999}, "each once"), ({"<pad>": None}, "ids of the tokens")):
        (tmp_path / "vocab.json").write_text(json.dumps(golden["vocab"] | change))
        with pytest.raises(DataError, match=said):
            TextTokenizer.load(tmp_path)
    vocab = {("<blank>" if token == "<pad>" else token): i for token, i in golden["vocab"].items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(DataError, match="lacks the token <pad>"):
        TextTokenizer.load(tmp_path)


def test_pegasus_and_albert(tmp_path):
    """Pegasus inserts the tokens of its pre-training; ALBERT lowers letters, removes accents and frames texts like BERT."""
    found = sentencepiece.parse_file(GOLDEN / "T5.model").pieces
    shutil.copy(GOLDEN / "T5.model", tmp_path / "spiece.model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "pegasus"}))
    text = TextTokenizer.load(tmp_path)
    assert text.size == len(found) + 103 and [text.tokenizer.id_to_token(i) for i in (2, 3, 4, 104)] == [
        "<mask_1>",
        "<mask_2>",
        "<unk_2>",
        "<unk_102>",
    ]
    one, ids, _ = next(row for row in SAID["T5"] if len(row[1]) > 4)
    assert text.tokenizer.encode(one).ids == [*(i if i < 2 else i + 103 for i in ids), 1]
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "AlbertTokenizer", "cls_token": "<pad>", "sep_token": "</s>", "mask_token": "<unk>"})
    )
    text = TextTokenizer.load(tmp_path)
    plain, framed = text.encode_exact(["the cat cafe"])[0].tolist(), text.tokenizer.encode("The CAT café", "a")
    assert framed.ids[1 : 1 + len(plain)] == plain and framed.type_ids[-1] == 1
