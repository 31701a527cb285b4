"""GGUF files of llama.cpp: tensors as float32, whatever their quantization, metadata and tokenizer.

Needs the package `gguf`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fieldguide.core.errors import WeightsError
from fieldguide.core.gguf_file import GGUFFile, parse_file, read_tensor
from fieldguide.core.validation import AGAIN, guard


def open_file(path: Path) -> GGUFFile:
    """Map a file into memory. Raises `WeightsError` if it is not GGUF or the package is missing."""
    return open_reader(path, path.stat().st_mtime_ns)


@functools.lru_cache(1)  # reading the vocabulary takes seconds, and it is needed twice
def open_reader(path: Path, modified: int) -> GGUFFile:
    """Return the reader of a file; `modified`, its time of change, is part of the cache key."""
    try:
        import gguf  # noqa: F401  (its tables of quantization)
    except ImportError:
        raise WeightsError(f"reading {path} requires an optional package: pip install 'fieldguide[gguf]'") from None
    with guard(path, WeightsError):
        return parse_file(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the dequantized tensors by name, float32."""
    file = open_file(path)
    with guard(path, WeightsError):
        if not file.tensors:
            raise WeightsError(f"{path} holds no tensors. {AGAIN}")
        return {name: torch.from_numpy(read_tensor(file, tensor)) for name, tensor in file.tensors.items()}


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata as nested dictionaries: {"general": {"architecture": "llama"}, ...}."""
    metadata: dict[str, Any] = {}
    file = open_file(path)
    for key, value in file.metadata.items():
        *parents, last = key.split(".")
        part = metadata
        for parent in parents:
            part = part.setdefault(parent, {})
            if not isinstance(part, dict):
                break
        else:
            part[last] = float(f"{value:.6g}") if isinstance(value, float) else value  # stored as float32
    if factors := file.tensors.get("rope_freqs.weight"):  # divide the rotary frequencies; stored only in a tensor
        with guard(path, WeightsError):
            metadata["rope_factors"] = read_tensor(file, factors).astype(float).ravel().tolist()
    return metadata


# Regular expressions that split a text before merging, by the name of the pre-tokenizer in the file.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLIT_PATTERNS = {"llama-bpe": LLAMA3, "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")}


def read_tokenizer(path: Path) -> tuple[Any, dict[str, str], str | None]:
    """Return the tokenizer of a file, its special tokens by name, and its chat template.

    Raises `WeightsError` for tokenizers other than byte-level BPE.
    """
    with guard(path, WeightsError):
        return build_tokenizer(path)


def build_tokenizer(path: Path) -> tuple[Any, dict[str, str], str | None]:
    """Return what `read_tokenizer` returns."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    settings = read_metadata(path).get("tokenizer", {})
    ggml = settings.get("ggml", {})
    kind, split = ggml.get("model"), ggml.get("pre", "default")
    if kind != "gpt2" or split not in ("default", "gpt-2", "smollm", *SPLIT_PATTERNS):
        raise WeightsError(
            f"{path}: the tokenizer {kind!r} ({split!r}) is not supported. Supported is byte-level BPE of the types "
            f"gpt-2, smollm, {', '.join(SPLIT_PATTERNS)}. Use a folder with a tokenizer.json instead."
        )
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
    named = {
        f"{name}_token": tokens[ggml[key]]
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


PREPENDS_BEGIN = ("llama-bpe",)  # types that put the start token before texts unless the file states otherwise
CONTROL = 3  # type of tokens that encoding a text never produces
