"""Tokenizers in GGUF files of llama.cpp: byte-level BPE (`gpt2`), and SentencePiece's BPE with byte fallback (`llama`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldguide.core.errors import WeightsError
from fieldguide.core.gguf import read_metadata
from fieldguide.core.validation import guard
from fieldguide.data.preprocessing import sentencepiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Regular expressions that split a text before merging, by the name of the pre-tokenizer in the file.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLIT_PATTERNS = {"llama-bpe": LLAMA3, "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")}
PREPENDS_BEGIN = ("llama-bpe", "llama")  # kinds that put the start token before texts unless the file states otherwise
CONTROL = 3  # type of tokens that encoding a text never produces


def read_tokenizer(path: Path) -> tuple[Any, dict[str, str], str | None]:
    """Return the tokenizer of a file, its special tokens by name, and its chat template.

    Raises `WeightsError` for other tokenizers.
    """
    with guard(path, WeightsError):
        return build_tokenizer(path)


def build_tokenizer(path: Path) -> tuple[Any, dict[str, str], str | None]:
    """Return what `read_tokenizer` returns."""
    from tokenizers import processors

    settings = read_metadata(path).get("tokenizer", {})
    ggml = settings.get("ggml", {})
    kind, split = ggml.get("model"), ggml.get("pre", "default")
    if kind == "llama":
        split, made = kind, build_pieces(path, ggml)
    elif kind == "gpt2" and split in ("default", "gpt-2", "smollm", *SPLIT_PATTERNS):
        made = build_bytes(ggml, split)
    else:
        raise WeightsError(
            f"{path}: the tokenizer {kind!r} ({split!r}) is not supported. Supported are SentencePiece ('llama') and byte-level BPE of "
            f"the types gpt-2, smollm, {', '.join(SPLIT_PATTERNS)}. Use a folder with a tokenizer.json instead."
        )
    named = {
        f"{name}_token": ggml["tokens"][ggml[key]]
        for name, key in (
            ("bos", "bos_token_id"),
            ("eos", "eos_token_id"),
            ("unk", "unknown_token_id"),
            ("pad", "padding_token_id"),
        )
        if key in ggml
    }
    if (begin := named.get("bos_token")) and ggml.get("add_bos_token", split in PREPENDS_BEGIN):
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, ggml["bos_token_id"])]
        )
    return made, named, settings.get("chat_template")


def build_bytes(ggml: Mapping[str, Any], split: str) -> Tokenizer:
    """Return the byte-level BPE tokenizer of a file."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = ggml["tokens"]
    made = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(merge.split(" ", 1)) for merge in ggml["merges"]],
            ignore_merges=split == "llama-bpe",
        )
    )
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split not in SPLIT_PATTERNS)
    before: list[pre_tokenizers.PreTokenizer] = []
    if split in SPLIT_PATTERNS:
        before = [pre_tokenizers.Split(Regex(SPLIT_PATTERNS[split]), "isolated")]
    elif split == "smollm":
        before = [pre_tokenizers.Digits(individual_digits=True)]
    made.pre_tokenizer = pre_tokenizers.Sequence([*before, whole])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, ggml["token_type"]) if kind == CONTROL]
    )
    return made


def build_pieces(path: Path, ggml: Mapping[str, Any]) -> Tokenizer:
    """Return the SentencePiece tokenizer of a file, whose types of tokens are those of SentencePiece."""
    pieces = list(zip(ggml["tokens"], ggml["scores"], ggml["token_type"], strict=True))
    model = sentencepiece.SentencePieceModel(
        pieces,
        sentencepiece.BPE,
        byte_fallback=any(kind == sentencepiece.BYTE for _, _, kind in pieces),
        add_dummy_prefix=ggml.get("add_space_prefix", True),
        remove_extra_whitespace=False,
    )
    return sentencepiece.build_tokenizer(path, model)
