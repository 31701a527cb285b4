"""An encoder-decoder that has read its sources: to what makes networks go on, one like any other."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.models.layers.kv_cache import Cache

ANY = 1 << 30  # tokens, where a network has no longest row


class Sourced:
    """Takes and gives what decoders do (`new_cache`, `last`, `config.length`); row by row what it says is of `source`.

    `source` B S and `mask` B S are read once. A cache has a row for each source, or for each several that follow one
    another, the beams of a search.
    """

    def __init__(self, network: Any, source: Tensor, mask: Tensor | None):
        self.network = network
        self.config = SimpleNamespace(length=network.longest or ANY)
        with torch.inference_mode():
            self.cross = network.remember(source, mask)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    def new_cache(self, rows: int, length: int) -> Cache:
        cache = self.network.new_cache(rows, length)
        cache.cross = self.cross
        return cache

    def last(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # B T -> B vocab
        return self.network.last(tokens, mask, cache)
