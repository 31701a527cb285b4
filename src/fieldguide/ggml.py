"""GGUF files, of llama.cpp and its kin: tensors as numbers of float32, whatever they are packed in, and what the file says
of its network and tokenizer. Needs the package `gguf`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fieldguide.errors import WeightsError


def opened(path: Path) -> Any:
    """The file, mapped into memory. Raises `WeightsError` where it is none or the package is missing."""
    return reader(path, path.stat().st_mtime_ns)


@functools.lru_cache(1)                                  # its vocabulary takes seconds to read, and is asked for twice
def reader(path: Path, changed: int) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise WeightsError(f"to read {path} install the reader of such files: pip install 'fieldguide[gguf]'") from None
    try:
        return GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise WeightsError(f"{path} is damaged, cut short or no GGUF file: {error}") from None


def tensors(path: Path) -> dict[str, Tensor]:
    from gguf import dequantize
    return {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in opened(path).tensors}


def metadata(path: Path) -> dict[str, Any]:
    """What the file says, each part of a key a level: {"general": {"architecture": "llama"}, ...}."""
    said: dict[str, Any] = {}
    for key, field in opened(path).fields.items():
        *parents, last = key.split(".")
        part = said
        for parent in parents:
            part = part.setdefault(parent, {})
            if not isinstance(part, dict):
                break
        else:
            value = field.contents()
            part[last] = float(f"{value:.6g}") if isinstance(value, float) else value      # stored as float32
    # By how much rotations are slowed down, at most, is said by a tensor alone.
    for tensor in opened(path).tensors:
        if tensor.name == "rope_freqs.weight":
            said["slowest"] = float(tensor.data.max())
    return said
