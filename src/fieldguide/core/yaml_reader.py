"""YAML from others: plain values only, limited in size, depth, and what its aliases stand for."""

from __future__ import annotations

from typing import Any

import yaml

from fieldguide.core.errors import DataError, FieldguideError
from fieldguide.core.validation import MAX_DEPTH, decode, describe

MAX_YAML_BYTES = 1 << 20
MAX_YAML_NODES = 100_000  # with each alias counted as what it stands for: nine lines of aliases can stand for 10^9 values


class LimitedComposer(yaml.composer.Composer):
    """Counts nodes and levels while the tree is built, so that reading stops at the limit."""

    depth = nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node. Raises `ComposerError` at a limit."""
        is_alias, first = self.check_event(yaml.AliasEvent), self.nodes  # type: ignore[attr-defined]
        mark = self.peek_event().start_mark  # type: ignore[attr-defined]
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels of nesting", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias and id(node) not in self.sizes:
            raise yaml.composer.ComposerError(None, None, "an alias that contains itself", mark)
        self.nodes += self.sizes[id(node)] if is_alias else 1
        if self.nodes > MAX_YAML_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_YAML_NODES:,} values", mark)
        if not is_alias:
            self.sizes[id(node)] = self.nodes - first
        return node

    @property
    def sizes(self) -> dict[int, int]:
        """The number of nodes in each finished subtree, by the identity of its root."""
        return self.__dict__.setdefault("_sizes", {})


class TypedLoader(LimitedComposer, yaml.SafeLoader):
    """Yields numbers, dates and so on."""


class TextLoader(LimitedComposer, yaml.BaseLoader):
    """Yields all scalars as text."""


def parse_yaml(content: bytes | str, place: object, error: type[FieldguideError] = DataError, *, as_text: bool = False) -> Any:
    """Return the value of a YAML document; with `as_text` scalars stay text, so that `no` is a name.

    Raises `error` with the line for invalid YAML, tags of Python objects, and documents beyond the limits.
    """
    if len(content) > MAX_YAML_BYTES:
        raise error(f"{place} has {len(content):,} bytes, but a YAML file has at most {MAX_YAML_BYTES:,}.")
    text = decode(content, place, error) if isinstance(content, bytes) else content
    try:
        return yaml.load(text, TextLoader if as_text else TypedLoader)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(problem, "problem", None) or " ".join(str(problem).split())
        raise error(f"{place}{line}: invalid YAML ({reason}). Correct that line.") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, MemoryError) as problem:
        raise error(f"{place}: invalid YAML ({describe(problem)}). Correct it.") from None  # such as 2001-13-45
