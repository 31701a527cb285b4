"""What a causal network keeps of the tokens it has read, so that the next one costs one step, not a row."""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """Keys and values of every layer, in buffers allocated once.

    `keys[i]`, `values[i]` are B heads length d; the first `used` places are filled. `real` (B length bool) says
    which of them hold a token, not padding; `count` (B int64) how many do, which is the position of the next token
    of each row. A network calls `open` once a forward pass, then `put` once a layer; use under `torch.no_grad`.

    `cross` holds what a decoder needs of its source once it is read: keys, values and mask. It may have fewer rows than
    the rest: each source then stands for as many rows that follow one another, the beams of a search.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        layers: int,
        heads: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (rows, heads, length, dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.real = torch.zeros(rows, length, dtype=torch.bool, device=device)
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)
        self.used, self.start, self.padded = 0, 0, False
        self.cross: tuple[list[tuple[Tensor, Tensor]], Tensor | None] | None = None

    @property
    def length(self) -> int:
        """Places there are."""
        return self.real.shape[1]

    def open(self, steps: int, mask: Tensor | None) -> None:
        """Take places for new tokens; `mask` (B steps bool) says which are real. Raises `IndexError` when full."""
        if self.used + steps > self.length:
            raise IndexError(f"the cache has {self.length} places, {self.used} used: {steps} more do not fit")
        self.start, self.used = self.used, self.used + steps
        self.real[:, self.start : self.used] = True if mask is None else mask
        self.count += steps if mask is None else mask.sum(1)
        self.padded |= mask is not None

    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values, B heads steps d; returns all so far, B heads used d."""
        self.keys[layer][:, :, self.start : self.used] = key
        self.values[layer][:, :, self.start : self.used] = value
        return self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, int64 of the same number: how a beam search keeps its best beams.

        Where the source has fewer rows, each for as many beams in a row, beams must stay with their source.
        """
        for buffer in (*self.keys, *self.values):
            buffer[:, :, : self.used] = buffer[rows, :, : self.used]
        self.real, self.count = self.real[rows], self.count[rows]
        if self.cross is not None and len(self.cross[0][0][0]) == len(rows):
            pairs, mask = self.cross
            self.cross = ([(key[rows], value[rows]) for key, value in pairs], None if mask is None else mask[rows])

    def widen(self, times: int) -> None:
        """Each row `times` times, one behind the other: how the beams of a search begin once a prompt is read."""
        for buffers in (self.keys, self.values):
            buffers[:] = [buffer.repeat_interleave(times, 0) for buffer in buffers]
        self.real, self.count = self.real.repeat_interleave(times, 0), self.count.repeat_interleave(times, 0)


def positions(steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device) -> Tensor:
    """The place of each new token among the real ones of its row: T, or B T where rows differ. Call after `open`."""
    if mask is None and (cache is None or not cache.padded):
        return torch.arange(steps, device=device) + (cache.start if cache else 0)
    if cache is None:
        return (mask.cumsum(1) - 1).clamp(min=0)
    new = torch.ones_like(cache.real[:, cache.start : cache.used]) if mask is None else mask
    return ((cache.count - new.sum(1))[:, None] + new.cumsum(1) - 1).clamp(min=0)


def causal(steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device, window: int = 0) -> Tensor | None:
    """Which keys each new token may see: itself, and what is real before it, of that only the last `window` places with
    its own (0 = all). Call after `open`.

    None where plain causality says all, `is_causal` where queries and keys are as many. Otherwise bool, T K or
    B 1 T K. A padding token sees itself, so that no row of weights is empty.
    """
    padded = mask is not None or (cache is not None and cache.padded)
    start, used = (cache.start, cache.used) if cache else (0, steps)
    near = not window or used <= window  # all that is there lies in the window
    if near and not padded and (start == 0 or steps == 1):
        return None
    query, key = torch.arange(start, used, device=device)[:, None], torch.arange(used, device=device)
    seen = key <= query if near else (key <= query) & (key > query - window)
    if not padded:
        return seen
    real = mask if cache is None else cache.real[:, :used]
    return (seen & (real[:, None] | (key == query)))[:, None]
