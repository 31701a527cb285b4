"""Rotary positions with YaRN (arXiv:2309.00071), for configs with the fields of `Yarn`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fieldguide.core.errors import WeightsError
from fieldguide.models.layers.rope_scaling import scale_yarn
from fieldguide.models.transformer import llama


class Yarn(Protocol):
    """The fields of a config; see `scale_yarn`."""

    @property
    def rope_theta(self) -> float: ...

    @property
    def rope_factor(self) -> float:
        """By how much sequences are longer than those of the first training; 1 = no scaling."""

    @property
    def rope_fast(self) -> float: ...

    @property
    def rope_slow(self) -> float: ...

    @property
    def rope_length(self) -> int:
        """Length of the first training, in tokens."""


def yarn_frequencies(c: Yarn, width: int, device: torch.device, truncate: bool = True) -> Tensor:  # -> d/2
    """Return the rotary frequencies of heads of this width, in radians per token."""
    plain = llama.inverse_frequencies(width, c.rope_theta, device)
    if c.rope_factor == 1:
        return plain
    return scale_yarn(plain, c.rope_theta, c.rope_factor, c.rope_fast, c.rope_slow, c.rope_length, truncate)


def get_rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings of a configuration of transformers, in the current form or that of before 2025."""
    rope = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", theirs.get("rope_theta", 10_000.0))
    return rope


def read_yarn(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Yarn` from a configuration of transformers. Raises `WeightsError` for other scalings."""
    rope = get_rope(theirs)
    values: dict[str, Any] = {"rope_theta": rope["rope_theta"], "rope_factor": 1.0}
    if (kind := rope["rope_type"]) == "yarn":
        original = rope["original_max_position_embeddings"]
        values |= {
            "rope_factor": rope.get("factor") or theirs["max_position_embeddings"] / original,
            "rope_fast": rope.get("beta_fast") or 32.0,
            "rope_slow": rope.get("beta_slow") or 1.0,
            "rope_length": original,
        }
    elif kind != "default":
        raise WeightsError(f"rope_type={kind!r} is not supported. Supported are 'yarn' and 'default' (no scaling).")
    return values


def write_yarn(c: Yarn, **more: Any) -> dict[str, Any]:
    """Return the rope_parameters of a config; `more` is written if it has YaRN."""
    if c.rope_factor == 1:
        return {"rope_type": "default", "rope_theta": c.rope_theta}
    return {
        "rope_type": "yarn",
        "rope_theta": c.rope_theta,
        "factor": c.rope_factor,
        "beta_fast": c.rope_fast,
        "beta_slow": c.rope_slow,
        "original_max_position_embeddings": c.rope_length,
        **more,
    }
