"""Text: a byte-level BPE tokenizer learnt on training texts, so no character is unknown; or a given one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fieldguide.data.preprocessing import tokenizer_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|endoftext|>"  # between texts that stand in one row
SPECIAL = ("<pad>", "<unk>", "<cls>", "<sep>", "<mask>")  # indices 0 to 4
ENOUGH = 20_000_000  # characters; more teach the tokenizer nothing and take minutes
BLANKS = np.array([c for c in range(0x3001) if chr(c).isspace()], dtype=np.uint32)


class Text:
    """Texts as token indices below `size`, padded with `pad`; an empty text is the one token `unknown`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        lower: bool = False,
        learnt_on: int = 0,
        special: Mapping[str, str] | None = None,
        template: str | None = None,
        ends: Sequence[str] = (),
    ) -> None:
        """`special`: what its tokens are called (eos_token, ...), by which they are found before their usual names are
        tried. `template` writes conversations; `ends` are all tokens that end an answer."""
        self.tokenizer, self.lower, self.learnt_on, self.template = tokenizer, lower, learnt_on, template
        self.special = dict(special or {})
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        called = self.special.get
        self.pad = self.token(called("pad_token"), "<pad>", "[PAD]", "<|endoftext|>", called("eos_token"), default=0)
        self.unknown = self.token(called("unk_token"), "<unk>", "[UNK]", "<s>", "<|endoftext|>", default=self.pad)
        self.cls = self.token(called("cls_token"), "<cls>", "[CLS]", called("bos_token"), "<s>", default=self.unknown)
        self.sep = self.token(called("sep_token"), "<sep>", "[SEP]", called("eos_token"), "</s>", default=self.unknown)
        self.hidden = self.token(called("mask_token"), "<mask>", "[MASK]", default=self.unknown)
        self.end = self.token(
            called("eos_token"), *ends[:1], END, "<eos>", "</s>", "<sep>", "[SEP]", "<|end_of_text|>", default=self.pad
        )
        more = (self.token(token, default=self.end) for token in ends)
        self.ends = tuple(dict.fromkeys((self.end, *more)))

    @classmethod
    def fit(cls, texts: Iterable[str], *, size: int | None = None, lower: bool = True) -> Text:
        """Learn from training texts; `size` of the vocabulary by the amount of text if None.

        Learns on evenly spread texts of at most 20 million characters in all.
        """
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        texts = list(texts)
        total = sum(map(len, texts))
        if total > ENOUGH:
            texts = texts[:: math.ceil(total / ENOUGH)]
        tokenizer = Tokenizer(models.BPE())
        steps = [normalizers.NFC(), *([normalizers.Lowercase()] if lower else [])]
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size or suggest_size(total),
            special_tokens=list(SPECIAL),
            min_frequency=2,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        tokenizer.train_from_iterator(batches(texts, 1000), trainer, length=len(texts))
        return cls(tokenizer, lower=lower, learnt_on=len(texts))

    @classmethod
    def learn_exact(
        cls, texts: Iterable[str], *, size: int | None = None, characters: bool = False, special: Sequence[str] = (END,)
    ) -> Text:
        """Learn tokens that spell texts back to the byte: byte-level BPE, or one token a character.

        Tokens in `special` are never read out of texts, only put between them. Characters that the texts lack are
        `END` tokens, which says that they cannot be read.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        texts = list(texts)
        total = sum(map(len, texts))
        if characters:
            found = sorted(set().union(*map(set, texts)) if texts else ())
            tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *found])}, unk_token=END))
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            tokenizer.decoder = decoders.Fuse()
            tokenizer.add_special_tokens(list(special))
        else:
            if total > ENOUGH:
                texts = texts[:: math.ceil(total / ENOUGH)]
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
            tokenizer.train_from_iterator(batches(texts, 1000), trainer, length=len(texts))
        return cls(tokenizer, learnt_on=len(texts))

    def exactly(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token indices of each text, int64, all of it and nothing more: no token is put before or after, and special
        tokens that are spelt out in a text are plain characters."""
        self.tokenizer.encode_special_tokens = True
        return [
            np.array(e.ids, dtype=np.int64)
            for some in batches(texts, 1000)
            for e in self.tokenizer.encode_batch(list(some), add_special_tokens=False)
        ]

    def located(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each text its tokens as `exactly` gives them, N int64, and which characters of it each covers, N 2 int64: the
        first, blanks left out, and the one behind the last."""
        self.tokenizer.encode_special_tokens = True
        found = []
        for some in batches(texts, 1000):
            for text, e in zip(some, self.tokenizer.encode_batch(list(some), add_special_tokens=False)):
                spans = np.array(e.offsets, dtype=np.int64).reshape(-1, 2)
                letters = np.flatnonzero(~np.isin(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32), BLANKS))
                after = np.append(letters, len(text))[np.searchsorted(letters, spans[:, 0])]
                spans[:, 0] = np.minimum(after, spans[:, 1])
                found.append((np.array(e.ids, dtype=np.int64), spans))
        return found

    def opening(self) -> list[int]:
        """The tokens that the tokenizer itself puts before a text."""
        seen = self.tokenizer.encode("a")
        return seen.ids[: next((i for i, text in enumerate(seen.sequence_ids) if text is not None), 0)]

    def spelt(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of texts that spell out all of their special tokens, as chat templates write them: the tokens of each, N int64, and
        which characters of it each covers, N 2 int64."""
        before, self.tokenizer.encode_special_tokens = self.tokenizer.encode_special_tokens, False
        found = [
            (np.array(e.ids, dtype=np.int64), np.array(e.offsets, dtype=np.int64).reshape(-1, 2))
            for some in batches(texts, 1000)
            for e in self.tokenizer.encode_batch(list(some), add_special_tokens=False)
        ]
        self.tokenizer.encode_special_tokens = before
        return found

    def bytes_of(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int64; special tokens stand for none."""
        special = self.tokenizer.get_added_tokens_decoder()
        byte_level = "ByteLevel" in str(self.tokenizer.decoder)
        words = [self.tokenizer.id_to_token(i) or "" for i in range(self.size)]
        return np.array([0 if i in special else len(w) if byte_level else len(w.encode()) for i, w in enumerate(words)])

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def token(self, *names: str | None, default: int) -> int:
        found = (self.tokenizer.token_to_id(n) for n in names if n)
        return next((i for i in found if i is not None), default)

    def encode(self, texts: Sequence[str], length: int, *, cls: bool = False) -> tuple[list[np.ndarray], int]:
        """Token indices of each text, int64, at most `length`, and how many texts were cut to it.

        `cls` puts the class token first (unless the given tokenizer does that itself).
        """
        out, cut = [], 0
        for some in batches(texts, 1000):
            for encoding in self.tokenizer.encode_batch([t or "" for t in some]):
                ids = encoding.ids or [self.unknown]
                if cls and ids[0] != self.cls:
                    ids = [self.cls, *ids]
                cut += len(ids) > length
                out.append(np.array(ids[:length], dtype=np.int64))
        return out, cut

    def apply(self, texts: Sequence[str], length: int, *, cls: bool = False) -> tuple[np.ndarray, np.ndarray, int]:
        """Texts as one padded batch: indices (int64, N x L), mask (bool, N x L, True for tokens), texts cut.

        L is the longest of these texts, at most `length`.
        """
        ids, cut = self.encode(texts, length, cls=cls)
        return *self.batch(ids), cut

    def batch(self, ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Token indices padded to the longest: indices (int64, N x L) and mask (bool, True for tokens)."""
        sizes = np.array([len(i) for i in ids])
        mask = np.arange(sizes.max(initial=1))[None] < sizes[:, None]
        out = np.full(mask.shape, self.pad, dtype=np.int64)
        if len(ids):
            out[mask] = np.concatenate(list(ids))
        return out, mask

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.tokenizer.decode([int(i) for i in ids])

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and text.json."""
        folder = Path(folder)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "text.json").write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        said = {"lower": self.lower, "learnt_on": self.learnt_on, "size": self.size}
        if not self.special and self.template is None and len(self.ends) == 1:
            return said
        return {
            **said,
            "special": self.special,
            "template": self.template,
            "ends": [self.tokenizer.id_to_token(i) for i in self.ends],
        }

    @classmethod
    def load(cls, path: str | Path) -> Text:
        """From a folder that `save` wrote, or from what lies beside published weights: any tokenizer.json, the folder of
        another form of tokenizer, a GGUF file (see `text_files`). Raises DataError if it is none."""
        path = Path(path)
        words = tokenizer_files.read(path)
        saved = tokenizer_files.parsed(path / tokenizer_files.OURS)
        return cls(
            words.tokenizer,
            lower=saved.get("lower", False),
            learnt_on=saved.get("learnt_on", 0),
            special=words.special,
            template=words.template,
            ends=words.ends,
        )


def suggest_size(characters: int) -> int:
    """Tokens for so much text: a power of two from 512 to 32,768, growing with the root of the text."""
    return 2 ** round(min(15.0, max(9.0, math.log2(4 * math.sqrt(max(characters, 1))))))


def suggest_length(sizes: Sequence[int] | np.ndarray, most: int = 512) -> int:
    """A length that 95 % of the texts fit in: a multiple of 8, at most `most`."""
    return int(min(most, max(8, 8 * math.ceil(np.quantile(np.asarray(sizes), 0.95) / 8))))


def batches(texts: Sequence[str], size: int) -> Iterator[Any]:
    return (texts[i : i + size] for i in range(0, len(texts), size))
