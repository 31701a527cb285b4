"""Transcripts: what was said, as symbols from 1 up; 0 is the blank of CTC."""

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
    """Texts as symbols and back. A symbol is a character of the training transcripts, or with `pieces` a part of a
    word that is frequent in them.

    Before, texts are brought to one form: composed characters (NFC), single spaces, and lower case unless `lower` is
    False, since upper case cannot be heard. Punctuation stays where transcripts have it.
    """

    def __init__(self, symbols: Sequence[str], *, lower: bool = True, tokenizer: str | None = None) -> None:
        self.symbols, self.lower, self.saved = tuple(symbols), lower, tokenizer
        self.index = {symbol: i for i, symbol in enumerate(self.symbols, 1)}
        self.alphabet = frozenset("".join(self.symbols).replace(SPACE, " ") if tokenizer else self.symbols)

    @classmethod
    def fit(cls, texts: Iterable[str], *, lower: bool = True, pieces: int | None = None) -> Transcripts:
        """From training transcripts; with `pieces` about so many parts of words (byte-pair encoding), else characters.

        Raises `DataError` where there is nothing but empty transcripts.
        """
        texts = [normal(text, lower) for text in texts]
        characters = sorted(set("".join(texts)))
        if not characters:
            raise DataError("all transcripts are empty: there is nothing to learn to write")
        if pieces is None:
            return cls(characters, lower=lower)
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if SPACE in characters:
            raise DataError(
                f"a transcript holds {SPACE!r}, which stands for a space in word pieces: remove it, or use "
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
        symbols = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        return cls(symbols, lower=lower, tokenizer=tokenizer.to_str())

    @cached_property
    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.saved)

    @property
    def size(self) -> int:
        """Symbols with the blank: `vocab` of the network."""
        return 1 + len(self.symbols)

    def encode(self, texts: Sequence[str]) -> tuple[list[np.ndarray], Counter[str]]:
        """Symbols of each text, int64, and how often each character stood there that training never had: it is left out,
        as the network cannot write it."""
        texts, unknown = [normal(text, self.lower) for text in texts], Counter()
        for i, text in enumerate(texts):
            if strange := [c for c in text if c not in self.alphabet]:
                unknown.update(strange)
                texts[i] = normal("".join(c for c in text if c in self.alphabet), self.lower)
        if self.saved:
            rows = [[i + 1 for i in encoding.ids] for encoding in self.tokenizer.encode_batch(texts)]
        else:
            rows = [[self.index[c] for c in text] for text in texts]
        return [np.array(row, dtype=np.int64) for row in rows], unknown

    def batch(self, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Symbols padded with 0 to the longest (int64, B x L) and how many each row has (int64, B)."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        out = np.zeros((len(rows), lengths.max(initial=1)), dtype=np.int64)
        out[np.arange(out.shape[1]) < lengths[:, None]] = np.concatenate(list(rows))
        return out, lengths

    def decode(self, symbols: Sequence[int] | np.ndarray) -> str:
        """Text of symbols; blanks and whatever is below 0 are passed over."""
        text = "".join(self.symbols[int(i) - 1] for i in symbols if i > 0)
        return " ".join((text.replace(SPACE, " ") if self.saved else text).split())

    def to_json(self) -> dict[str, Any]:
        return {"symbols": list(self.symbols), "lower": self.lower, "tokenizer": self.saved}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Transcripts:
        return cls(saved["symbols"], lower=saved["lower"], tokenizer=saved["tokenizer"])


def normal(text: str, lower: bool) -> str:
    """One form of a transcript: see `Transcripts`. Scores compare texts in this form, too."""
    text = unicodedata.normalize("NFC", text or "")
    return " ".join(unicodedata.normalize("NFC", text.lower() if lower else text).split())
