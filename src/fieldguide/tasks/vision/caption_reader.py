"""How captions become what a network that generates images reads: tokens of its own, or those of a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.objectives import Diffusion


class CaptionReader(Protocol):
    """Tokens of captions, and what follows from them for networks and objective."""

    @property
    def text(self) -> TextTokenizer:
        """The tokenizer."""

    @property
    def limit(self) -> int | None:
        """Number of tokens that can be read at most; None if it is the user's choice."""

    @property
    def further_networks(self) -> Mapping[str, str]:
        """Sizes of networks that are trained beside the one that generates images, by name."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text."""

    def tokenize(self, texts: Sequence[str], length: int) -> np.ndarray:  # -> N length int64
        """Return tokens, 0 beyond the end of a text and for an empty one; longer texts are truncated."""

    def model_dims(self, length: int) -> dict[str, Any]:
        """Return the fields of a network's config that depend on captions."""

    def choose_objective(self, parts: Mapping[str, Any]) -> Callable[..., Diffusion]:
        """Return the class of the objective; `parts` are the further networks."""

    def state(self) -> dict[str, Any]:
        """Return what is saved as JSON values."""

    def save(self, folder: Path) -> None:
        """Write files to a folder."""


class CaptionTokens:
    """Captions as tokens that the network itself reads."""

    limit: ClassVar[int | None] = None
    further_networks: ClassVar[Mapping[str, str]] = {}

    def __init__(self, text: TextTokenizer):
        self.text = text

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.text.encode(list(texts), 100_000)[0]]

    def tokenize(self, texts: Sequence[str], length: int) -> np.ndarray:  # -> N length int64
        out = np.zeros((len(texts), length), dtype=np.int64)
        for row, text, ids in zip(out, texts, self.text.encode(list(texts), length)[0]):
            row[: len(ids)] = ids if text else 0
        return out

    def model_dims(self, length: int) -> dict[str, Any]:
        return {"num_classes": 0, "vocab_size": self.text.size, "length": length}

    def choose_objective(self, parts: Mapping[str, Any]) -> Callable[..., Diffusion]:
        return Diffusion

    def state(self) -> dict[str, Any]:
        return {}

    def save(self, folder: Path) -> None:
        self.text.save(folder)
