"""The description of a model that `fieldguide show` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class Layer:
    """A module of a network: its path, class, number of parameters and output shape."""

    path: str
    kind: str
    parameters: int
    shape: str


@dataclass
class Description:
    """The description of a model. `published` is the parameter count of its authors, if they give one."""

    name: str
    architecture: str
    family: str
    summary: str
    new: str
    paper: str
    year: int
    input_type: str
    output_type: str
    tasks: list[str]
    config: dict[str, Any]
    parameters: int
    published: int | None
    multiply_adds: int
    inputs: str
    sizes: dict[str, int]
    parts: dict[str, int] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return a description from its JSON form."""
        return cls(**{**values, "layers": [Layer(**layer) for layer in values["layers"]]})
