"""Text tokenizers: byte-level BPE trained on the training texts, so that no character is unknown, or a given tokenizer."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fieldguide.core.errors import DataError
from fieldguide.data.preprocessing import tokenizer_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"  # separates texts in one row
SPECIAL_TOKENS = ("<pad>", "<unk>", "<cls>", "<sep>", "<mask>")  # indices 0 to 4
MAX_TRAINING_CHARACTERS = 5_000_000  # used for training; more text takes long, and changes only rare tokens
MAX_RECENT_ENCODINGS = 4  # lists of texts whose tokens are kept: each part of the data is tokenized once
LOCK = threading.Lock()  # how special tokens are treated is state of the shared tokenizer
WHITESPACE = np.array([c for c in range(0x3001) if chr(c).isspace()], dtype=np.uint32)


class TextTokenizer:
    """A tokenizer that maps texts to token ids below `size`, padded with `pad`; an empty text is the token `unknown`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        lower: bool = False,
        learnt_on: int = 0,
        special: Mapping[str, str] | None = None,
        template: str | None = None,
        ends: Sequence[str] = (),
        target: Tokenizer | None = None,
    ) -> None:
        """Wrap a tokenizer of the tokenizers library.

        `special` maps the names of special tokens (eos_token, ...) to tokens; they are looked up before the usual ones.
        `template` is the chat template, `ends` lists the tokens that end an answer. `target` splits target texts, with the same
        ids; by default `tokenizer` does.
        """
        self.tokenizer, self.lower, self.learnt_on, self.template = tokenizer, lower, learnt_on, template
        self.special = dict(special or {})
        self.target = None if target is None else TextTokenizer(target, special=special, ends=ends)
        self.recent: dict[tuple[str, ...], list[np.ndarray]] = {}
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        special_token = self.special.get
        self.pad = self.token(
            special_token("pad_token"), "<pad>", "[PAD]", "<|endoftext|>", special_token("eos_token"), default=0
        )
        self.unknown = self.token(special_token("unk_token"), "<unk>", "[UNK]", "<s>", "<|endoftext|>", default=self.pad)
        self.cls = self.token(
            special_token("cls_token"), "<cls>", "[CLS]", special_token("bos_token"), "<s>", default=self.unknown
        )
        self.sep = self.token(
            special_token("sep_token"), "<sep>", "[SEP]", special_token("eos_token"), "</s>", default=self.unknown
        )
        self.mask_token = self.token(special_token("mask_token"), "<mask>", "[MASK]", default=self.unknown)
        self.end = self.token(
            special_token("eos_token"),
            *ends[:1],
            END_OF_TEXT,
            "<eos>",
            "</s>",
            "<sep>",
            "[SEP]",
            "<|end_of_text|>",
            default=self.pad,
        )
        more = (self.token(token, default=self.end) for token in ends)
        self.ends = tuple(dict.fromkeys((self.end, *more)))

    @classmethod
    def fit(cls, texts: Iterable[str], *, size: int | None = None, lower: bool = True) -> TextTokenizer:
        """Train byte-level BPE on texts, at most 5 million characters sampled at regular intervals.

        `size` is the vocabulary size; by default it depends on the amount of text.
        """
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        texts = list(texts)
        total = sum(map(len, texts))
        if total > MAX_TRAINING_CHARACTERS:
            texts = texts[:: math.ceil(total / MAX_TRAINING_CHARACTERS)]
        tokenizer = Tokenizer(models.BPE())
        steps = [normalizers.NFC(), *([normalizers.Lowercase()] if lower else [])]
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size or suggest_size(total),
            special_tokens=list(SPECIAL_TOKENS),
            min_frequency=2,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        tokenizer.train_from_iterator(split_chunks(texts, 1000), trainer, length=len(texts))
        return cls(tokenizer, lower=lower, learnt_on=len(texts))

    @classmethod
    def fit_exact(
        cls, texts: Iterable[str], *, size: int | None = None, characters: bool = False, special: Sequence[str] = (END_OF_TEXT,)
    ) -> TextTokenizer:
        """Train a lossless tokenizer: byte-level BPE, or with `characters` one token per character.

        Tokens in `special` are never produced by encoding text. With `characters`, characters that do not occur in the
        texts are encoded as `END`.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        texts = list(texts)
        total = sum(map(len, texts))
        if characters:
            found = sorted(set().union(*map(set, texts)) if texts else ())
            tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *found])}, unk_token=END_OF_TEXT))
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            tokenizer.decoder = decoders.Fuse()
            tokenizer.add_special_tokens(list(special))
        else:
            if total > MAX_TRAINING_CHARACTERS:
                texts = texts[:: math.ceil(total / MAX_TRAINING_CHARACTERS)]
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=size or suggest_size(total),
                special_tokens=list(special),
                min_frequency=2,
                show_progress=False,
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            )
            tokenizer.train_from_iterator(split_chunks(texts, 1000), trainer, length=len(texts))
        return cls(tokenizer, learnt_on=len(texts))

    def encode_exact(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int64, without added tokens; special tokens in a text are treated as plain
        characters."""
        key = tuple(texts)
        with LOCK:
            if (known := self.recent.pop(key, None)) is None:
                self.tokenizer.encode_special_tokens = True
                known = [
                    np.array(e.ids, dtype=np.int64)
                    for some in split_chunks(texts, 1000)
                    for e in self.tokenizer.encode_batch(list(some), add_special_tokens=False)
                ]
            self.recent[key] = known  # the most recent one last
            while len(self.recent) > MAX_RECENT_ENCODINGS:
                self.recent.pop(next(iter(self.recent)))
        return [ids.copy() for ids in known]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (tokens as from `encode_exact`, spans) for each text.

        Spans (int64, N x 2) are the start and end of the characters that each token covers, without leading whitespace.
        """
        found = []
        for some in split_chunks(texts, 1000):
            with LOCK:
                self.tokenizer.encode_special_tokens = True
                encoded = self.tokenizer.encode_batch(list(some), add_special_tokens=False)
            for text, e in zip(some, encoded):
                spans = np.array(e.offsets, dtype=np.int64).reshape(-1, 2)
                letters = np.flatnonzero(
                    ~np.isin(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32), WHITESPACE)
                )
                after = np.append(letters, len(text))[np.searchsorted(letters, spans[:, 0])]
                spans[:, 0] = np.minimum(after, spans[:, 1])
                found.append((np.array(e.ids, dtype=np.int64), spans))
        return found

    def prefix_ids(self) -> list[int]:
        """Return the token ids that the tokenizer puts before every text."""
        seen = self.tokenizer.encode("a")
        return seen.ids[: next((i for i, text in enumerate(seen.sequence_ids) if text is not None), 0)]

    def encode_rendered(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (token ids int64 N, character spans int64 N x 2) for texts in which special tokens are written out, as
        chat templates do."""
        with LOCK:
            before, self.tokenizer.encode_special_tokens = self.tokenizer.encode_special_tokens, False
            found = [
                (np.array(e.ids, dtype=np.int64), np.array(e.offsets, dtype=np.int64).reshape(-1, 2))
                for some in split_chunks(texts, 1000)
                for e in self.tokenizer.encode_batch(list(some), add_special_tokens=False)
            ]
            self.tokenizer.encode_special_tokens = before
        return found

    def count_token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes that each token stands for, int64; 0 for special tokens."""
        special = self.tokenizer.get_added_tokens_decoder()
        byte_level = "ByteLevel" in str(self.tokenizer.decoder)
        words = [self.tokenizer.id_to_token(i) or "" for i in range(self.size)]
        return np.array([0 if i in special else len(w) if byte_level else len(w.encode()) for i, w in enumerate(words)])

    @property
    def size(self) -> int:
        """The vocabulary size."""
        return self.tokenizer.get_vocab_size()

    def token_id(self, token: str) -> int:
        """Return the id of a special token. Raises `DataError` if the vocabulary has none."""
        found: int | None = self.tokenizer.token_to_id(token)
        if found is None:
            raise DataError(f"the tokenizer has no token {token!r}. Use the tokenizer that the model was trained with.")
        return found

    def token(self, *names: str | None, default: int) -> int:
        """Return the id of the first of these tokens that exists, else `default`."""
        found = (self.tokenizer.token_to_id(n) for n in names if n)
        return next((i for i in found if i is not None), default)

    def encode(self, texts: Sequence[str], length: int, *, cls: bool = False) -> tuple[list[np.ndarray], int]:
        """Return the token ids of each text (int64, truncated to `length`) and the number of truncated texts.

        `cls` puts the class token first, unless the tokenizer already does.
        """
        out, cut = [], 0
        for some in split_chunks(texts, 1000):
            for encoding in self.tokenizer.encode_batch([t or "" for t in some]):
                ids = encoding.ids or [self.unknown]
                if cls and ids[0] != self.cls:
                    ids = [self.cls, *ids]
                cut += len(ids) > length
                out.append(np.array(ids[:length], dtype=np.int64))
        return out, cut

    def apply(self, texts: Sequence[str], length: int, *, cls: bool = False) -> tuple[np.ndarray, np.ndarray, int]:
        """Return texts as one padded batch: ids (int64, N x L), mask (bool, N x L, True for tokens), number truncated.

        L is the length of the longest text, at most `length`.
        """
        ids, cut = self.encode(texts, length, cls=cls)
        return *self.batch(ids), cut

    def batch(self, ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Pad token ids to the longest: ids (int64, N x L) and mask (bool, N x L, True for tokens)."""
        sizes = np.array([len(i) for i in ids])
        mask = np.arange(sizes.max(initial=1))[None] < sizes[:, None]
        out = np.full(mask.shape, self.pad, dtype=np.int64)
        if len(ids):
            out[mask] = np.concatenate(list(ids))
        return out, mask

    @property
    def for_targets(self) -> TextTokenizer:
        """The tokenizer of target texts."""
        return self.target or self

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode([int(i) for i in ids])

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and text.json, and a file for the tokenizer of target texts if there is one."""
        folder = Path(folder)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        if self.target is not None:
            self.target.tokenizer.save(str(folder / tokenizer_files.TARGET_FILE))
        (folder / "text.json").write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """Return the settings that text.json stores."""
        state = {"lower": self.lower, "learnt_on": self.learnt_on, "size": self.size}
        if not self.special and self.template is None and len(self.ends) == 1:
            return state
        return {
            **state,
            "special": self.special,
            "template": self.template,
            "ends": [self.tokenizer.id_to_token(i) for i in self.ends],
        }

    @classmethod
    def load(cls, path: str | Path) -> TextTokenizer:
        """Load from a folder written by `save`, or from the tokenizer files of a published checkpoint.

        Any format in `tokenizer_files` is supported. Raises DataError if there is none.
        """
        path = Path(path)
        words = tokenizer_files.read(path)
        saved = tokenizer_files.read_json(path / tokenizer_files.SETTINGS_FILE)
        return cls(
            words.tokenizer,
            lower=saved.get("lower", False),
            learnt_on=saved.get("learnt_on", 0),
            special=words.special,
            template=words.template,
            ends=words.ends,
            target=words.target,
        )


def suggest_size(characters: int) -> int:
    """Return the vocabulary size for an amount of text: a power of two from 512 to 32,768, growing with its square root."""
    return 2 ** round(min(15.0, max(9.0, math.log2(4 * math.sqrt(max(characters, 1))))))


def suggest_length(sizes: Sequence[int] | np.ndarray, most: int = 512) -> int:
    """Return a length that at least 95 % of the texts fit in: a multiple of 8, at most `most`."""
    return int(min(most, max(8, 8 * math.ceil(np.quantile(np.asarray(sizes), 0.95) / 8))))


def split_chunks(texts: Sequence[str], size: int) -> Iterator[Any]:
    """Yield consecutive slices of `size` texts."""
    return (texts[i : i + size] for i in range(0, len(texts), size))
