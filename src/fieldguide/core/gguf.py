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


def open_file(path: Path) -> Any:
    """Map a file into memory. Raises `WeightsError` if it is not GGUF or the package is missing."""
    return open_reader(path, path.stat().st_mtime_ns)


@functools.lru_cache(1)  # reading the vocabulary takes seconds, and it is needed twice
def open_reader(path: Path, changed: int) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise WeightsError(f"to read {path} install the reader of such files: pip install 'fieldguide[gguf]'") from None
    try:
        return GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise WeightsError(f"{path} is damaged, cut short or no GGUF file: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    from gguf import dequantize

    return {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in open_file(path).tensors}


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata as nested dictionaries: {"general": {"architecture": "llama"}, ...}."""
    said: dict[str, Any] = {}
    for key, field in open_file(path).fields.items():
        *parents, last = key.split(".")
        part = said
        for parent in parents:
            part = part.setdefault(parent, {})
            if not isinstance(part, dict):
                break
        else:
            value = field.contents()
            part[last] = float(f"{value:.6g}") if isinstance(value, float) else value  # stored as float32
    # By how much rotations are slowed down, at most, is said by a tensor alone.
    for tensor in open_file(path).tensors:
        if tensor.name == "rope_freqs.weight":
            said["slowest"] = float(tensor.data.max())
    return said


# How a text is parted before pairs are merged, by the file's name for it: as the models' own tokenizers do.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PARTED = {"llama-bpe": LLAMA3, "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")}


def read_tokenizer(path: Path) -> tuple[Any, dict[str, str], str | None]:
    """Return the tokenizer of a file, its special tokens by name, and its chat template.

    Raises `WeightsError` for tokenizers other than byte-level BPE.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    said = read_metadata(path).get("tokenizer", {})
    ggml = said.get("ggml", {})
    kind, parted = ggml.get("model"), ggml.get("pre", "default")
    if kind != "gpt2" or parted not in ("default", "gpt-2", "smollm", *PARTED):
        raise WeightsError(
            f"{path}: its tokenizer is {kind!r} ({parted!r}); read are byte-level pairs of the kinds gpt-2, "
            f"smollm, {', '.join(PARTED)}. Give a folder with its tokenizer.json instead."
        )
    tokens = ggml["tokens"]
    made = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(merge.split(" ", 1)) for merge in ggml["merges"]],
            ignore_merges=parted == "llama-bpe",
        )
    )
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=parted not in PARTED)
    before: list[pre_tokenizers.PreTokenizer] = []
    if parted in PARTED:
        before = [pre_tokenizers.Split(Regex(PARTED[parted]), "isolated")]
    elif parted == "smollm":
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
    if (begin := named.get("bos_token")) and ggml.get("add_bos_token", parted in BEGUN):
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, ggml["bos_token_id"])]
        )
    return made, named, said.get("chat_template")


BEGUN = ("llama-bpe",)  # texts begin with a token of their own where the file does not say so
CONTROL = 3  # the type of tokens that no text spells
