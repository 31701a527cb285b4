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
