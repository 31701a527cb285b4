"""Registry of all architectures: `names`, `card` and `create`. Model files are found by walking the package."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import pkgutil
import tomllib
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fieldguide.core.card import Card, Closed
from fieldguide.core.errors import SettingsError, nearest

if TYPE_CHECKING:
    from torch import nn


@functools.cache
def cards() -> dict[str, Card]:
    """Return all cards by architecture name, in order of year, then name."""
    import fieldguide.models as root

    found = []
    for module in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        if not module.ispkg and hasattr(loaded := importlib.import_module(module.name), "CARD"):
            found.append(loaded.CARD)
    return {card.name: card for card in sorted(found, key=lambda card: (card.year, card.name))}


@functools.cache
def closed_systems() -> dict[str, Closed]:
    """Return the closed systems, whose weights are not available, by each of their names."""
    rows = tomllib.loads(files("fieldguide.models").joinpath("closed.toml").read_text(encoding="utf-8"))["system"]
    fields: list[dict[str, Any]] = [{key: tuple(x) if isinstance(x, list) else x for key, x in row.items()} for row in rows]
    systems = [Closed(**row) for row in fields]
    return {name: system for system in systems for name in system.names}


@functools.cache
def _index_sizes() -> dict[str, tuple[str, str]]:
    """Return name -> (architecture, size). The bare name of an architecture is its first size."""
    index: dict[str, tuple[str, str]] = {}
    for card in cards().values():
        for size in card.sizes:
            if size in index:
                raise ValueError(f"size {size!r} is defined by both {index[size][0]!r} and {card.name!r}")
            index[size] = (card.name, size)
    for card in cards().values():
        index.setdefault(card.name, (card.name, card.default))
    return index


def find(name: str) -> tuple[Card, str]:
    """Return the card and the size of a name.

    Raises `SettingsError` that suggests the closest known name, or describes the closed system of that name.
    """
    if name not in _index_sizes():
        if (system := closed_systems().get(name.lower().replace(" ", "-").replace("_", "-"))) is not None:
            raise SettingsError(system.text)
        raise SettingsError(f"unknown model {name!r}.{nearest(name, _index_sizes())} `fieldguide models` lists them all.")
    architecture, size = _index_sizes()[name]
    return cards()[architecture], size


def is_architecture(name: str) -> bool:
    """Return whether a name is that of an architecture with several sizes rather than of one size."""
    return name in cards() and name not in cards()[name].sizes and len(cards()[name].sizes) > 1


def card(name: str) -> Card:
    """Return the card of an architecture or of one of its sizes."""
    return find(name)[0]


def card_of(network: Any) -> Card | None:
    """Return the card of a network's class, or None if the class is not of this library."""
    return next((found for found in cards().values() if found.model is type(network)), None)


def names(
    glob: str = "*",
    *,
    family: str | None = None,
    input_type: str | None = None,
    output_type: str | None = None,
    tests: bool = False,
) -> list[str]:
    """Return the names of sizes that match a glob (`resnet*`), a family, an input type and an output type."""
    return [
        size
        for c in cards().values()
        for size in c.sizes
        if fnmatch.fnmatch(size, glob)
        and (tests or size != c.tiny)
        and family in (None, c.family)
        and input_type in (None, c.input_type)
        and output_type in (None, *c.output_types)
    ]


def create(name: str, **overrides: Any) -> nn.Module:
    """Create a network with random weights: `create("resnet50", num_classes=10, channels=1)`.

    `overrides` are fields of the config, by the common vocabulary or by the config's own names.
    Raises `SettingsError` for an unknown name or field.
    """
    found, size = find(name)
    try:
        config = found.resolve_config(size, **overrides)
    except TypeError as error:
        raise SettingsError(str(error)) from None
    return found.make(config)
