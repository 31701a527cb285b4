"""SentencePiece files (`spiece.model`, `spm.model`, `tokenizer.model`) as tokenizers (Kudo and Richardson 2018,
arXiv:1808.06226): pieces with scores, segmented by maximum likelihood (unigram; Kudo 2018, arXiv:1804.10959) or by merging
the best pair first (BPE).

The file format is a protocol buffer (sentencepiece_model.proto): numbered fields with typed values.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldguide.core.errors import DataError
from fieldguide.core.validation import AGAIN, describe
from fieldguide.data.preprocessing.charsmap import check_charsmap

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNIGRAM, BPE = 1, 2  # model types
UNKNOWN, CONTROL, WHOLE, UNUSED, BYTE = 2, 3, 4, 5, 6  # piece types other than normal (1)
SPACE = "▁"
MAX_VARINT_BITS = 70  # of a number in the file: ten bytes of seven bits
MAX_PIECE_CHARACTERS = 1_000


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of a file: pieces as (text, score, type), the model type and the normalization settings."""

    pieces: list[tuple[str, float, int]]
    model: int = UNIGRAM
    byte_fallback: bool = False  # unknown characters are encoded as bytes
    whitespace_as_suffix: bool = False  # whitespace is a suffix of the preceding word
    charsmap: bytes = b""  # compiled character normalization map
    add_dummy_prefix: bool = True  # a space is prepended to texts
    remove_extra_whitespace: bool = True  # repeated spaces are merged, and leading and trailing ones removed


def read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of the fields of a message; values are integers or bytes. Raises ValueError if malformed."""
    at = 0

    def number() -> int:
        """Read a varint."""
        nonlocal at
        value, shift = 0, 0
        while True:
            if at >= len(data):
                raise ValueError("the file ends within a number")
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if shift > MAX_VARINT_BITS:
                raise ValueError("a number is too long")
            if data[at - 1] < 0x80:
                return value

    while at < len(data):
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, number()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"field {key >> 3} has an unknown wire type")
        size = number() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(data):
            raise ValueError(f"field {key >> 3} is truncated")
        yield key >> 3, data[at : at + size]
        at += size


def parse_file(file: Path) -> SentencePieceModel:
    """Parse a SentencePiece file. Raises DataError for other files, and for word and character models."""
    try:
        pieces = []
        trainer: dict[int, Any] = {}
        normal: dict[int, Any] = {}
        for field, value in read_fields(file.read_bytes()):
            if field == 1:
                piece = dict(read_fields(value))
                pieces.append((piece[1].decode("utf-8"), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, 1)))
            elif field in (2, 3):
                (trainer if field == 2 else normal).update(read_fields(value))
        check_content(pieces, trainer, normal)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise DataError(f"{file} is damaged or not a SentencePiece file: {describe(error)}. {AGAIN}") from None
    if not pieces or (model := trainer.get(3, UNIGRAM)) not in (UNIGRAM, BPE):
        raise DataError(f"{file} contains no SentencePiece pieces, or is a word or character model, which is not supported.")
    return SentencePieceModel(
        pieces,
        model,
        bool(trainer.get(35, 0)),
        bool(trainer.get(24, 0)),
        normal.get(2, b""),
        bool(normal.get(3, 1)),
        bool(normal.get(4, 1)),
    )


def check_content(pieces: list[tuple[str, float, int]], trainer: Mapping[int, Any], normal: Mapping[int, Any]) -> None:
    """Raise ValueError for content that the tokenizers library or `merge_pairs` cannot handle."""
    for number, (piece, score, kind) in enumerate(pieces):
        if not 0 < len(piece) <= MAX_PIECE_CHARACTERS or not isinstance(kind, int) or not math.isfinite(score):
            raise ValueError(f"piece {number} is empty, longer than {MAX_PIECE_CHARACTERS} characters, or has no finite score")
    if trainer.get(3, UNIGRAM) == UNIGRAM and pieces and all(kind != UNKNOWN for _, _, kind in pieces):
        raise ValueError("it lacks the piece for unknown characters")
    flags = [trainer.get(key, 0) for key in (3, 24, 35)] + [normal.get(key, 0) for key in (3, 4)]
    if not all(isinstance(flag, int) for flag in flags) or not isinstance(charsmap := normal.get(2, b""), bytes):
        raise ValueError("a setting has the wrong type")
    if charsmap:
        check_charsmap(charsmap)


def build_tokenizer(file: Path, model: SentencePieceModel) -> Tokenizer:
    """Build the equivalent tokenizer. Control tokens are special; no tokens are added around texts.

    Raises DataError if whitespace is a suffix of words.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if model.whitespace_as_suffix:
        raise DataError(f"{file}: whitespace as a suffix of words (treat_whitespace_as_suffix) is not supported.")
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    after: list[decoders.Decoder]
    if model.remove_extra_whitespace:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    unknown = next((i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN), None)
    if model.model == UNIGRAM:
        tokenizer = Tokenizer(
            models.Unigram(
                [(piece, score) for piece, score, _ in model.pieces], unk_id=unknown, byte_fallback=model.byte_fallback
            )
        )
        scheme = "always" if model.add_dummy_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)
        after = [decoders.Metaspace(SPACE, prepend_scheme=scheme)]
    else:
        steps += [normalizers.Prepend(SPACE)] if model.add_dummy_prefix else []
        steps.append(normalizers.Replace(" ", SPACE))
        vocab = {piece: i for i, (piece, _, _) in enumerate(model.pieces)}
        tokenizer = Tokenizer(
            models.BPE(
                vocab,
                merge_pairs(model, vocab),
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
                unk_token=None if unknown is None else model.pieces[unknown][0],
            )
        )
        after = [decoders.Replace(SPACE, " ")]
    if model.byte_fallback:
        after += [decoders.ByteFallback(), decoders.Fuse()]
    if model.model == BPE:
        after.append(decoders.Fuse())
        if model.add_dummy_prefix:
            after.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(steps), decoders.Sequence(after)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece, _, kind in model.pieces if kind == WHOLE])
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False) for piece, _, kind in model.pieces if kind in (CONTROL, UNKNOWN)]
    )
    return tokenizer


def merge_pairs(model: SentencePieceModel, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Return all pairs of pieces whose concatenation is a piece, best piece first; scores give the merge order."""
    plain = {piece for piece, _, kind in model.pieces if kind == 1}
    found = [
        (-score, vocab[piece[:i]], vocab[piece[i:]], piece[:i], piece[i:])
        for piece, score, kind in model.pieces
        if kind == 1
        for i in range(1, len(piece))
        if piece[:i] in plain and piece[i:] in plain
    ]
    return [(first, second) for *_, first, second in sorted(found)]
