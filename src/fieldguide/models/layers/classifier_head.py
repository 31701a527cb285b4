"""How a network of pictures ends: with logits of classes, or with the vector that they would be read from."""

from __future__ import annotations

from typing import Any

from torch import nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.mapping.config_rules import Known

GIVES = ("label", "vector")


def classifier_head(config: Any, dim: int, heads: int = 1) -> nn.Module:
    """The last layer, B D -> B heads*classes; nothing where `config.gives` is "vector". Raises `SettingsError` for others."""
    if config.gives not in GIVES:
        raise SettingsError(f"gives={config.gives!r} is none of {', '.join(GIVES)}")
    return nn.Linear(dim, heads * config.classes) if config.gives == "label" else nn.Identity()


def architectures(name: str, label: str = "ForImageClassification") -> Known:
    """Which end a configuration of transformers is of."""
    return Known("gives", {name + label: "label", f"{name}Model": "vector"})
