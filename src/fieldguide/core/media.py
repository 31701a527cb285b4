"""Values that are files: images, videos and sounds that a network generates or draws."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Media:
    """A prediction value that is written as a file: its content and its file suffix (".png", ".wav", ...)."""

    content: bytes = field(repr=False)  # not printed
    suffix: str
