"""Every architecture by name: `names`, `card`, `create`. Finds model files by looking; nothing is listed twice."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import pkgutil
import tomllib
from importlib.resources import files
from typing import Any

from fieldguide.core.card import Card, Closed
from fieldguide.core.errors import SettingsError, nearest


@functools.cache
def cards() -> dict[str, Card]:
    """All cards by architecture name, in order of year, then name."""
    import fieldguide.models as root

    found = []
    for module in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        if not module.ispkg and hasattr(loaded := importlib.import_module(module.name), "CARD"):
            found.append(loaded.CARD)
    return {card.name: card for card in sorted(found, key=lambda card: (card.year, card.name))}


@functools.cache
def closed() -> dict[str, Closed]:
    """The systems that nobody outside has, by each of their names."""
    rows = tomllib.loads(files("fieldguide.models").joinpath("closed.toml").read_text("utf-8"))["system"]
    fields: list[dict[str, Any]] = [{key: tuple(x) if isinstance(x, list) else x for key, x in row.items()} for row in rows]
    systems = [Closed(**row) for row in fields]
    return {name: system for system in systems for name in system.names}


@functools.cache
def _index() -> dict[str, tuple[str, str]]:
    """Name -> (architecture, size). Sizes are global names; an architecture's bare name is its first size."""
    index: dict[str, tuple[str, str]] = {}
    for card in cards().values():
        for size in card.sizes:
            if size in index:
                raise ValueError(f"size {size!r} is named by both {index[size][0]!r} and {card.name!r}")
            index[size] = (card.name, size)
    for card in cards().values():
        index.setdefault(card.name, (card.name, card.default))
    return index


def find(name: str) -> tuple[Card, str]:
    """The card and size that a name means. Raises `SettingsError` with the nearest known name, or with what is known of a
    closed system."""
    if name not in _index():
        if (system := closed().get(name.lower().replace(" ", "-").replace("_", "-"))) is not None:
            raise SettingsError(system.text)
        raise SettingsError(f"no model is called {name!r}.{nearest(name, _index())} `fieldguide models` lists them all.")
    architecture, size = _index()[name]
    return cards()[architecture], size


def card(name: str) -> Card:
    """The card of an architecture or of one of its sizes."""
    return find(name)[0]


def card_of(network: Any) -> Card | None:
    """The card of a network's class; None for a network of somebody else's."""
    return next((found for found in cards().values() if found.model is type(network)), None)


def names(
    glob: str = "*",
    *,
    family: str | None = None,
    input_type: str | None = None,
    output_type: str | None = None,
    tests: bool = False,
) -> list[str]:
    """Size names that match a glob (`resnet*`), a family (a folder of models), and what they take and give."""
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


def create(name: str, **overrides: Any) -> Any:
    """A freshly initialised network: `create("resnet50", classes=10, channels=1)`.

    Overrides are the project's vocabulary or the config's own field names.
    Raises `SettingsError` for an unknown name or field.
    """
    found, size = find(name)
    try:
        config = found.settle(size, **overrides)
    except TypeError as error:
        raise SettingsError(str(error)) from None
    return found.make(config)
