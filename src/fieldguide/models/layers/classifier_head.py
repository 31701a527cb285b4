"""The output layer of image models: a linear classifier, or no layer for models that return features."""

from __future__ import annotations

from typing import Any

from torch import nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.mapping.config_rules import ValueMap

OUTPUT_TYPES = ("label", "vector")


def classifier_head(config: Any, dim: int, heads: int = 1) -> nn.Module:
    """Return the output layer, B D -> B heads*classes, or the identity if `config.output_type` is "vector".

    Raises `SettingsError` for any other output type.
    """
    if config.output_type not in OUTPUT_TYPES:
        raise SettingsError(f"output_type={config.output_type!r} is not supported. Choose one of {', '.join(OUTPUT_TYPES)}.")
    return nn.Linear(dim, heads * config.num_classes) if config.output_type == "label" else nn.Identity()


def architectures(name: str, label: str = "ForImageClassification") -> ValueMap:
    """Return the rule that maps the class name in a transformers configuration to the output type."""
    return ValueMap("output_type", {name + label: "label", f"{name}Model": "vector"})
