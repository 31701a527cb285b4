"""Sampling: one token after another, each drawn from what the network says, many rows together with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.generation.diffusion_sampling import quick


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits, in this order.

    repetition    logits of tokens that were there are divided by this where positive, else multiplied (Keskar et al.
                  2019, arXiv:1909.05858, section 4.1); 1 = off
    temperature   logits are divided by this; 0 = always the likeliest token
    top_k         only so many of the likeliest; 0 = off
    top_p         only the fewest likeliest that have this probability together (Holtzman et al. 2020,
                  arXiv:1904.09751, section 3.1); 1 = off
    min_p         only those of at least this part of the likeliest one's probability (Nguyen et al. 2024,
                  arXiv:2407.01082, section 3); 0 = off
    Raises `SettingsError` for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0

    def __post_init__(self) -> None:
        for name, fine, what in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition", self.repetition > 0, "above 0"),
        ):
            if not fine:
                raise SettingsError(f"{name}={getattr(self, name)} must be {what}.")

    def punished(self, logits: Tensor, seen: Tensor) -> Tensor:  # B V, B T (-1 = nothing) -> B V
        """Logits with those of tokens that were there made worse."""
        logits = logits.float()
        if self.repetition == 1:
            return logits
        worse = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
        return torch.where(occurs(seen, logits.shape[1]), worse, logits)

    def probabilities(self, logits: Tensor, seen: Tensor) -> Tensor:  # B V, B T (-1 = nothing) -> B V
        logits = self.punished(logits, seen)
        if self.temperature == 0:
            return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        p = logits.softmax(-1)
        if self.top_p < 1:
            ordered, index = p.sort(dim=-1, descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # what stands before is enough
            p = p.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), 0)
        if self.min_p:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0)
        return p / p.sum(-1, keepdim=True)

    def choose(self, logits: Tensor, seen: Tensor, uniform: Tensor) -> Tensor:  # B V, B T, B in [0, 1) -> B
        """The token at which the summed probability passes `uniform`: one number a row decides it."""
        if self.temperature == 0:
            return self.punished(logits, seen).argmax(-1)
        total = self.probabilities(logits, seen).double().cumsum(-1)
        return torch.searchsorted(total, uniform.double()[:, None] * total[:, -1:], right=True)[:, 0].clamp(
            max=logits.shape[-1] - 1
        )


def occurs(seen: Tensor, vocab: int) -> Tensor:  # B T (-1 = nothing) -> B V
    """Which tokens each row holds."""
    counts = torch.zeros(len(seen), vocab + 1, device=seen.device)
    return counts.scatter(1, seen + 1, 1.0)[:, 1:] > 0


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    most: int,
    *,
    sampling: Sampling | None = None,
    ends: Sequence[int] = (),
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Goes on with every prompt, one token a row at a time: yields B int64, -1 for rows that have ended.

    Rows end after one of the tokens `ends`, which is yielded, or after `most` tokens; all ended, so does the iterator.
    What chance does to a row depends on the seed and its number (by default its place), not on the rows beside it. Of
    rows longer than the network's `length` the newest half is read again each time that it is full. `model.last` gives
    the logits of rows' last places. Raises `SettingsError` for an empty prompt.
    """
    if not all(len(p) for p in prompts):
        raise SettingsError("there is nothing to go on from: a prompt is empty.")
    sampling, device, window = sampling or Sampling(), next(model.parameters()).device, model.config.length
    chance = torch.stack(
        [
            torch.rand(most, generator=torch.Generator().manual_seed(seed * 1_000_003 + int(row)))
            for row in (range(len(prompts)) if numbers is None else numbers)
        ]
    ).to(device)
    rows, mask = left_padded([list(p)[-(window - 1) :] for p in prompts], device)
    history = torch.where(mask, rows, -1)
    cache = model.new_cache(len(rows), min(window, rows.shape[1] + most))
    logits = model.last(rows, None if mask.all() else mask, cache)
    over, ending = torch.zeros(len(rows), dtype=torch.bool, device=device), torch.tensor(list(ends), device=device)
    for step in range(most):
        token = sampling.choose(logits, history, chance[:, step])
        yield torch.where(over, -1, token)
        history = torch.cat([history, torch.where(over, -1, token)[:, None]], 1)
        over = over | torch.isin(token, ending)
        if over.all() or step == most - 1:
            return
        if cache.used == cache.length:  # full: begin again with the newest half
            rows, mask = left_padded([row[row >= 0][-(window // 2) :].tolist() for row in history], device)
            cache = model.new_cache(len(rows), window)
            logits = model.last(rows, None if mask.all() else mask, cache)
        else:
            with quick(len(rows), device):
                logits = model.last(token[:, None], cache=cache)


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:  # -> B T, B T bool
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows], device=device)
    return tokens, torch.arange(width, device=device) >= width - torch.tensor([[len(r)] for r in rows], device=device)
