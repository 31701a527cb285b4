"""The key/value cache of causal decoders, token positions and causal attention masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Cache:
    """A key/value cache of all layers, in buffers allocated once.

    `keys[i]` and `values[i]` are B heads length d, where values may have another d; the first `used` positions are filled.
    `real` (B length bool) is True for tokens that are not padding; `count` (B int64) is the number of real tokens, which is
    the position of the next token of each row. A model calls `reserve` once per forward pass and `update` once per layer.
    Use it under `torch.no_grad`.

    `states` are tensors B ... that recurrent layers keep instead; their length does not grow. A layer changes them in place.

    `cross` holds what a decoder needs of its source: keys, values and mask. It may have fewer rows than the rest;
    each source row then serves several consecutive rows, the beams of a search.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        layers: int,
        heads: int,
        dim: int,
        *,
        value_dim: int | None = None,
        states: Sequence[tuple[int, ...]] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shapes = [(heads, length, dim), (heads, length, dim if value_dim is None else value_dim)]
        self.keys, self.values = (
            [torch.zeros(rows, *shape, dtype=dtype, device=device) for _ in range(layers)] for shape in shapes
        )
        self.states = [torch.zeros(rows, *shape, dtype=dtype, device=device) for shape in states]
        self.real = torch.zeros(rows, length, dtype=torch.bool, device=device)
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)
        self.used, self.start, self.padded = 0, 0, False
        self.cross: tuple[list[tuple[Tensor, Tensor]], Tensor | None] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All keys, values and states."""
        return [*self.keys, *self.values, *self.states]

    @property
    def length(self) -> int:
        """Capacity in tokens."""
        return self.real.shape[1]

    def reserve(self, steps: int, mask: Tensor | None) -> None:
        """Reserve positions for new tokens; `mask` (B steps bool) marks the real ones. Raises `IndexError` if the cache
        is full.
        """
        if self.used + steps > self.length:
            raise IndexError(f"The cache is full: {steps} tokens do not fit, {self.used} of {self.length} positions are used.")
        self.start, self.used = self.used, self.used + steps
        self.real[:, self.start : self.used] = True if mask is None else mask
        self.count += steps if mask is None else mask.sum(1)
        self.padded |= mask is not None

    def continue_at(self, places: Tensor) -> None:
        """Set the position of the next token of each row, B int64, where positions do not count tokens, such as after images."""
        self.count, self.padded = places.clone(), True  # positions differ between rows, as with padding

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values, B heads steps d; return all stored so far, B heads used d."""
        self.keys[layer][:, :, self.start : self.used] = key
        self.values[layer][:, :, self.start : self.used] = value
        return self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]

    def select(self, rows: Tensor) -> None:
        """Reorder the rows to these indices, int64 of the same number of rows; used by beam search to keep the best
        beams.

        If the source has fewer rows (one per group of beams), beams must stay within their group.
        """
        for buffer in (*self.keys, *self.values):
            buffer[:, :, : self.used] = buffer[rows, :, : self.used]
        for state in self.states:
            state[:] = state[rows]
        self.real, self.count = self.real[rows], self.count[rows]
        if self.cross is not None and len(self.cross[0][0][0]) == len(rows):
            pairs, mask = self.cross
            self.cross = ([(key[rows], value[rows]) for key, value in pairs], None if mask is None else mask[rows])

    def widen(self, times: int) -> None:
        """Repeat each row `times` times, consecutively; used to start the beams after the prompt was read."""
        for buffers in (self.keys, self.values, self.states):
            buffers[:] = [buffer.repeat_interleave(times, 0) for buffer in buffers]
        self.real, self.count = self.real.repeat_interleave(times, 0), self.count.repeat_interleave(times, 0)


def token_positions(steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device) -> Tensor:
    """Return the position of each new token among the real tokens of its row: T, or B T if rows differ. Call it after
    `reserve`.
    """
    if mask is None and (cache is None or not cache.padded):
        return torch.arange(steps, device=device) + (cache.start if cache else 0)
    if cache is None:
        assert mask is not None
        return (mask.cumsum(1) - 1).clamp(min=0)
    new = torch.ones_like(cache.real[:, cache.start : cache.used]) if mask is None else mask
    return ((cache.count - new.sum(1))[:, None] + new.cumsum(1) - 1).clamp(min=0)


def causal_mask(steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device, window: int = 0) -> Tensor | None:
    """Return which keys each new token attends to: itself and the real tokens before it. Call it after `reserve`.

    A `window` > 0 limits attention to the last `window` positions, including the token's own. The result is None if
    plain causal attention suffices (`is_causal` if there are as many queries as keys); otherwise bool, T K or B 1 T
    K. Padding tokens attend to themselves, so that no row of the mask is empty.
    """
    padded = mask is not None or (cache is not None and cache.padded)
    start, used = (cache.start, cache.used) if cache else (0, steps)
    near = not window or used <= window  # all keys are within the window
    if near and not padded and (start == 0 or steps == 1):
        return None
    query, key = torch.arange(start, used, device=device)[:, None], torch.arange(used, device=device)
    seen = key <= query if near else (key <= query) & (key > query - window)
    if not padded:
        return seen
    real = mask if cache is None else cache.real[:, :used]
    assert real is not None
    return (seen & (real[:, None] | (key == query)))[:, None]
