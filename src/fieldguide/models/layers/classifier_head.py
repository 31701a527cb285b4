"""How a network of pictures ends: with logits of classes, or with the vector that they would be read from."""

from __future__ import annotations

from typing import Any

from torch import nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.mapping.config_rules import Known

OUTPUT_TYPES = ("label", "vector")


def classifier_head(config: Any, dim: int, heads: int = 1) -> nn.Module:
    """The last layer, B D -> B heads*classes; nothing where `config.gives` is "vector". Raises `SettingsError` for others."""
    if config.output_type not in OUTPUT_TYPES:
        raise SettingsError(f"gives={config.output_type!r} is none of {', '.join(OUTPUT_TYPES)}")
    return nn.Linear(dim, heads * config.num_classes) if config.output_type == "label" else nn.Identity()


def architectures(name: str, label: str = "ForImageClassification") -> Known:
    """Which end a configuration of transformers is of."""
    return Known("output_type", {name + label: "label", f"{name}Model": "vector"})
