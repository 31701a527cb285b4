"""An encoder-decoder with encoded sources, which the generation functions use like a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.models.layers.kv_cache import Cache

UNLIMITED_TOKENS = 1 << 30  # maximum length of a model without a limit


class EncoderDecoderState:
    """An encoder-decoder with its encoded source, with the interface of a decoder (`new_cache`, `last`,
    `config.length`).

    `source` B S and `mask` B S are encoded once. A cache has one row per source, or several consecutive rows per
    source: the beams of a search.
    """

    def __init__(self, network: Any, source: Tensor, mask: Tensor | None):
        self.network = network
        self.config = SimpleNamespace(length=network.max_target_length or UNLIMITED_TOKENS)
        with torch.inference_mode():
            self.cross = network.encode_source(source, mask)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    def new_cache(self, rows: int, length: int) -> Cache:
        cache = self.network.new_cache(rows, length)
        cache.cross = self.cross
        return cache

    def last(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # B T -> B vocab
        return self.network.last(tokens, mask, cache)
