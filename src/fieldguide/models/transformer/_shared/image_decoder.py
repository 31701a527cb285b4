"""Decoders with image tokens: a vision-language network with given images, as a model that generates text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fieldguide.core.errors import DataError
from fieldguide.models.layers.kv_cache import Cache


class ImageConditionedDecoder:
    """A vision-language network with given images, with the interface of a decoder (`new_cache`, `last`, `config`, `parameters`).

    The network has `language`, a decoder; `config.picture`, the image token; and `features(image, tokens, mask, cache, **sizes)`.
    """

    def __init__(self, network: Any, image: Tensor, **sizes: Tensor):
        self.network, self.image, self.sizes, self.config = network, image, sizes, network.config
        self.needs_image = True  # whether each sequence has an image

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    def new_cache(self, rows: int, length: int | None = None) -> Cache:
        return self.network.language.new_cache(rows, length)

    def last(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # B T -> B vocab
        """Return the logits of the last position; the images are encoded with the first tokens. An image token that was generated is
        an ordinary token.

        Raises `DataError` if these contain no image token, such as those of a sequence that was truncated to the
        model's length.
        """
        if cache is not None and cache.used:
            return self.network.language.last(tokens, mask, cache)
        if self.needs_image and not (tokens == self.config.picture).any(1).all():
            raise DataError(
                "A sequence has no image token, or lost it by truncation. Prompt and output together must not exceed "
                f"length={self.config.length} tokens."
            )
        x = self.network.features(self.image, tokens, mask, cache, **self.sizes)
        return self.network.language.head(x[:, -1])
