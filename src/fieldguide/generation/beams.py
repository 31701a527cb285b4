"""Beam search: the most likely answers, several at a time, with a cache (Graves 2012, arXiv:1211.3711, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fieldguide.blocks.cache import Cache


@torch.inference_mode()
def beam_search(step: Callable[[Tensor], Tensor], cache: Cache, *, begin: int, end: int, beams: int = 4, most: int = 100,
                penalty: float = 0.6, limits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each input the `beams` best answers: tokens B K T (-1 behind the end), without `begin` and `end`, best
    first, and scores B K.

    `step` maps tokens BK 1 to logits BK 1 V and fills `cache`, whose rows are the beams of the first input, then those
    of the second. An answer's score is its log-probability divided by ((5 + length) / 6)^penalty (Wu et al. 2016,
    arXiv:1609.08144, equation 14; the end counts as a token). `limits` (B int64) bounds the answers one by one.
    Inputs are searched until no open beam can become better than the worst of their K answers.
    """
    width = cache.real.shape[0] // beams
    device = cache.real.device
    limits = torch.full((width,), most, device=device) if limits is None else limits.clamp(max=most)
    most = int(limits.max())
    scale = lambda length: ((5 + length) / 6) ** penalty
    scores = torch.full((width, beams), -torch.inf, device=device)
    scores[:, 0] = 0                                                             # the beams begin as one
    said = torch.full((width, beams, most), -1, device=device)
    done, done_scores = said.clone(), torch.full((width, beams), -torch.inf, device=device)
    token = torch.full((width * beams, 1), begin, device=device)
    base = torch.arange(width, device=device)[:, None] * beams
    for length in range(most + 1):
        logp = step(token)[:, -1].float().log_softmax(-1).unflatten(0, (width, beams))       # B K V
        vocab = logp.shape[-1]
        # Ends first: they may take the place of a worse answer.
        over = torch.cat([done_scores, (scores + logp[..., end]) / scale(length + 1)], 1)
        done_scores, which = over.topk(beams)
        done = torch.cat([done, said], 1).gather(1, which[..., None].expand(-1, -1, most))
        if length == most:
            break
        logp[..., end] = -torch.inf
        scores, which = (scores[..., None] + logp).flatten(1).topk(beams)
        scores = scores.masked_fill((length + 1 > limits)[:, None], -torch.inf)   # no longer than it may be
        parent, token = which // vocab, which % vocab
        said = said.gather(1, parent[..., None].expand(-1, -1, most))
        said[..., length] = token
        # The best an open beam can still reach: no loss from here on, at the length that flatters it most.
        reach = scores[:, 0] / scale(limits + 1)
        if (reach <= done_scores[:, -1]).all():
            break
        cache.select((base + parent).flatten())
        token = token.reshape(-1, 1)
    return done, done_scores
