"""Sampling of the next token, and batched autoregressive generation with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.generation.few_row_linear import few_rows_mode
from fieldguide.models.generation.token_rules import TokenRules
from fieldguide.models.layers.kv_cache import Cache


class GenerativeModel(Protocol):
    """What generation needs of a model: a decoder, or an encoder-decoder with an encoded source."""

    @property
    def config(self) -> Any:
        """The config, with `length`: the maximum number of tokens."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def new_cache(self, rows: int, length: int, /) -> Cache:
        """Return a cache for `length` tokens per row."""

    def last(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # B T -> B vocab
        """Return the logits of the last position."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits. The steps are applied in this order:

    repetition    logits of tokens that occurred before are divided by this if positive, else multiplied (Keskar et al.
                  2019, arXiv:1909.05858, section 4.1); 1 = off
    temperature   logits are divided by this; 0 = greedy: always the most likely token
    top_k         keep only the k most likely tokens; 0 = off
    top_p         keep the smallest set of most likely tokens with at least this total probability (Holtzman et al. 2020,
                  arXiv:1904.09751, section 3.1); 1 = off
    min_p         keep tokens with at least this fraction of the highest probability (Nguyen et al. 2024,
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

    def penalize_repetition(self, logits: Tensor, seen: Tensor) -> Tensor:  # B V, B T (-1 = nothing) -> B V
        """Return the logits with the repetition penalty applied to tokens that occurred before."""
        logits = logits.float()
        if self.repetition == 1:
            return logits
        worse = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
        return torch.where(token_occurrence(seen, logits.shape[1]), worse, logits)

    def probabilities(self, logits: Tensor, seen: Tensor) -> Tensor:  # B V, B T (-1 = nothing) -> B V
        """Return the probabilities of the next token after all steps."""
        logits = self.penalize_repetition(logits, seen)
        if self.temperature == 0:
            return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        p = logits.softmax(-1)
        if self.top_p < 1:
            ordered, index = p.sort(dim=-1, descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # the tokens before it already reach top_p
            p = p.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), 0)
        if self.min_p:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0)
        return p / p.sum(-1, keepdim=True)

    def choose(self, logits: Tensor, seen: Tensor, uniform: Tensor) -> Tensor:  # B V, B T, B in [0, 1) -> B
        """Return the token at which the cumulative probability exceeds `uniform`, one random number per row."""
        if self.temperature == 0:
            return self.penalize_repetition(logits, seen).argmax(-1)
        total = self.probabilities(logits, seen).double().cumsum(-1)
        return torch.searchsorted(total, uniform.double()[:, None] * total[:, -1:], right=True)[:, 0].clamp(
            max=logits.shape[-1] - 1
        )


def token_occurrence(seen: Tensor, vocab: int) -> Tensor:  # B T (-1 = nothing) -> B V
    """Return which tokens occur in each row."""
    counts = torch.zeros(len(seen), vocab + 1, device=seen.device)
    return counts.scatter(1, seen + 1, 1.0)[:, 1:] > 0


@torch.inference_mode()
def generate(
    model: GenerativeModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    eos_token_ids: Sequence[int] = (),
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    rules: TokenRules | None = None,
) -> Iterator[Tensor]:
    """Continue every prompt, one token per row at a time; yield B int64, -1 for rows that have ended.

    A row ends after one of `eos_token_ids`, which is yielded, or after `max_new_tokens` tokens; the iterator ends
    when all rows have. The random numbers of a row depend on the seed and its `row_ids` entry (by default its index),
    not on the other rows of the batch. When a row exceeds the model's `length`, its newest half is read again.
    `model.last` returns the logits of the last position of each row. `rules` constrain
    the tokens. Raises `SettingsError` for an empty prompt.
    """
    if not all(len(p) for p in prompts):
        raise SettingsError("A prompt is empty. Pass at least one token.")
    sampling, device, window = sampling or Sampling(), next(model.parameters()).device, model.config.length
    rules = rules if rules is not None and rules.is_active else None
    after_rules = sampling if rules is None else replace(sampling, repetition=1.0)  # rules come after the repetition penalty
    uniform = torch.stack(
        [
            torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed * 1_000_003 + int(row)))
            for row in (range(len(prompts)) if row_ids is None else row_ids)
        ]
    ).to(device)
    rows, mask = left_pad([list(p)[-(window - 1) :] for p in prompts], device)
    history = torch.where(mask, rows, -1)
    cache = model.new_cache(len(rows), min(window, rows.shape[1] + max_new_tokens))
    logits = model.last(rows, None if mask.all() else mask, cache)
    over, ending = torch.zeros(len(rows), dtype=torch.bool, device=device), torch.tensor(list(eos_token_ids), device=device)
    for step in range(max_new_tokens):
        if rules is not None:
            logits = rules.apply(sampling.penalize_repetition(logits, history), history, step, step == max_new_tokens - 1)
        token = after_rules.choose(logits, history, uniform[:, step])
        yield torch.where(over, -1, token)
        history = torch.cat([history, torch.where(over, -1, token)[:, None]], 1)
        over = over | torch.isin(token, ending)
        if over.all() or step == max_new_tokens - 1:
            return
        if cache.used == cache.length:  # full: restart with the newest half of each row
            rows, mask = left_pad([row[row >= 0][-(window // 2) :].tolist() for row in history], device)
            cache = model.new_cache(len(rows), window)
            logits = model.last(rows, None if mask.all() else mask, cache)
        else:
            with few_rows_mode(len(rows), device):
                logits = model.last(token[:, None], cache=cache)


def left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:  # -> B T, B T bool
    """Pad rows on the left; return the tokens and the mask of real tokens."""
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows], device=device)
    return tokens, torch.arange(width, device=device) >= width - torch.tensor([[len(r)] for r in rows], device=device)
