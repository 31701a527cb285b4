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
