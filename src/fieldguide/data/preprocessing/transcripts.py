"""Transcripts: texts as CTC symbols from 1 up; 0 is the blank."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fieldguide.core.errors import DataError

SPACE = "▁"  # stands for a space in word pieces


class Transcripts:
    """Encoder and decoder of transcripts. A symbol is a character of the training transcripts, or with `pieces` a frequent
    word piece.

    Texts are normalized first: composed characters (NFC), single spaces, and lower case unless `lower` is False, since
    case is not audible. Punctuation is kept. Symbols of a published network may be upper case only: texts are then encoded as
    such, and decoded in lower case unless `lower` is False.
    """

    def __init__(self, symbols: Sequence[str], *, lower: bool = True, tokenizer: str | None = None) -> None:
        self.symbols, self.lower, self.saved = tuple(symbols), lower, tokenizer
        self.index = {symbol: i for i, symbol in reversed(list(enumerate(self.symbols, 1)))}
        letters = [symbol for symbol in self.symbols if len(symbol) == 1 and symbol.lower() != symbol.upper()]
        self.upper = bool(letters) and not tokenizer and all(symbol.isupper() for symbol in letters)
        self.alphabet = frozenset("".join(self.symbols).replace(SPACE, " ") if tokenizer else self.symbols)

    @classmethod
    def fit(cls, texts: Iterable[str], *, lower: bool = True, pieces: int | None = None) -> Transcripts:
        """Fit on training transcripts: characters, or with `pieces` about that many word pieces (byte-pair encoding).

        Raises DataError if all transcripts are empty.
        """
        texts = [normalize_text(text, lower) for text in texts]
        characters = sorted(set("".join(texts)))
        if not characters:
            raise DataError("all transcripts are empty: there is nothing to train on")
        if pieces is None:
            return cls(characters, lower=lower)
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if SPACE in characters:
            raise DataError(
                f"a transcript contains {SPACE!r}, which is reserved for spaces in word pieces: remove it, or use "
                "characters (pieces=None)"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
        tokenizer.decoder = decoders.Metaspace(SPACE)
        tokenizer.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=pieces, initial_alphabet=[SPACE, *(c for c in characters if c != " ")], show_progress=False
            ),
        )
        vocab = tokenizer.get_vocab()
        symbols = sorted(vocab, key=lambda symbol: vocab[symbol])
        return cls(symbols, lower=lower, tokenizer=tokenizer.to_str())

    def extend(self, characters: Iterable[str]) -> Transcripts:
        """Return symbols for characters as well, after those that there are."""
        new = dict.fromkeys(characters)
        return Transcripts([*self.symbols, *(c for c in new if c not in self.index)], lower=self.lower, tokenizer=self.saved)

    @cached_property
    def tokenizer(self) -> Any:
        """The BPE tokenizer, restored from its saved form."""
        from tokenizers import Tokenizer

        assert self.saved is not None  # transcripts of word pieces have one
        return Tokenizer.from_str(self.saved)

    @property
    def size(self) -> int:
        """Number of symbols including the blank: `vocab_size` of the model."""
        return 1 + len(self.symbols)

    def encode(self, texts: Sequence[str]) -> tuple[list[np.ndarray], Counter[str]]:
        """Return the symbols of each text (int64) and the count of each character that did not occur in training; these
        are dropped, as the model cannot produce them."""
        texts = [self.normalize(text) for text in texts]
        unknown: Counter[str] = Counter()
        for i, text in enumerate(texts):
            if unseen := [c for c in text if c not in self.alphabet]:
                unknown.update(unseen)
                texts[i] = self.normalize("".join(c for c in text if c in self.alphabet))
        if self.saved:
            encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
            rows = [[self.index[token] for token in encoding.tokens] for encoding in encodings]
        else:
            rows = [[self.index[c] for c in text] for text in texts]
        return [np.array(row, dtype=np.int64) for row in rows], unknown

    def normalize(self, text: str) -> str:
        """Return a text in the form that is encoded."""
        text = normalize_text(text, self.lower)
        return text.upper() if self.upper else text

    def spell(self, symbol: int) -> str:
        """Return the text of one symbol, in which a space is a space."""
        text = self.symbols[symbol - 1].replace(SPACE, " ") if self.saved else self.symbols[symbol - 1]
        return text.lower() if self.upper and self.lower else text

    def batch(self, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Pad symbols with 0 to the longest (int64, B x L) and return the length of each row (int64, B)."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        out = np.zeros((len(rows), lengths.max(initial=1)), dtype=np.int64)
        out[np.arange(out.shape[1]) < lengths[:, None]] = np.concatenate(list(rows))
        return out, lengths

    def decode(self, symbols: Sequence[int] | np.ndarray) -> str:
        """Return the text of symbols; blanks and negative values are skipped."""
        return " ".join("".join(self.spell(int(i)) for i in symbols if i > 0).split())

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dictionary."""
        return {"symbols": list(self.symbols), "lower": self.lower, "tokenizer": self.saved}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Transcripts:
        """Restore from `to_json`."""
        return cls(saved["symbols"], lower=saved["lower"], tokenizer=saved["tokenizer"])


def normalize_text(text: str, lower: bool) -> str:
    """Normalize a transcript as described in `Transcripts`. Metrics also compare texts in this form."""
    text = unicodedata.normalize("NFC", text or "")
    return " ".join(unicodedata.normalize("NFC", text.lower() if lower else text).split())
