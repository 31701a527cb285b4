"""Beam search: the most likely answers, several at a time, with a cache (Graves 2012, arXiv:1211.3711, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fieldguide.models.layers.kv_cache import Cache


@torch.inference_mode()
def beam_search(
    step: Callable[[Tensor], Tensor],
    cache: Cache,
    *,
    begin: int | Tensor,
    ends: Sequence[int],
    beams: int = 4,
    most: int = 100,
    penalty: float = 1.0,
    limits: Tensor | None = None,
    before: int = 0,
    adjust: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """For each input the `beams` best answers: tokens B K T (-1 behind the last), without `begin` and the end, best
    first, and scores B K.

    `step` maps tokens BK 1 to logits BK 1 V and fills `cache`, whose rows are the beams of the first input, then those
    of the second. `begin` is the token that all answers begin with, or of each row its own, BK. Any of `ends` ends an
    answer, and so does its length: `most` tokens, of which the end is one, or `limits` (B int64), one by one. `adjust`
    changes log-probabilities BK V by what was said, BK T.

    As in fairseq and transformers, whose answers these are: of all that could follow the beams of an input, the best K
    count; those of them that end are answers, and the best that do not are the next beams. The score of an answer is its
    log-probability divided by length^penalty, its end and `before` tokens more counted. An input is searched until its
    best beam, were it to end now, would be no better than the worst of its K answers.
    """
    width = cache.real.shape[0] // beams
    device = cache.real.device
    limits = torch.full((width,), most, device=device) if limits is None else limits.clamp(1, most)
    most = int(limits.max())
    ending = torch.tensor(list(ends), dtype=torch.int64, device=device)
    scores = torch.full((width, beams), -torch.inf, device=device)
    scores[:, 0] = 0  # the beams begin as one
    said = torch.full((width, beams, most), -1, device=device)
    done, done_scores = said.clone(), torch.full((width, beams), -torch.inf, device=device)
    going = torch.ones(width, dtype=torch.bool, device=device)
    token = begin if isinstance(begin, Tensor) else torch.full((width * beams,), begin, device=device)
    base = torch.arange(width, device=device)[:, None] * beams
    picked = lambda rows, which: rows.gather(1, which[..., None].expand(-1, -1, most))
    for length in range(1, most + 1):  # of what will have been said
        logp = step(token.reshape(-1, 1))[:, -1].float().log_softmax(-1)
        if adjust is not None:
            logp = adjust(logp, said.flatten(0, 1))
        vocab, scale = logp.shape[-1], (before + length) ** penalty
        # So many that K are left to go on with, should all ends be among the best.
        likely = scores[..., None] + logp.unflatten(0, (width, beams))  # B K V
        likely, which = likely.flatten(1).topk(min((1 + len(ending)) * beams, beams * vocab))
        parent, token = which // vocab, which % vocab  # B C
        end = torch.isin(token, ending)
        rows = picked(said, parent)
        rows[..., length - 1] = torch.where(end, -1, token)
        end |= (length >= limits)[:, None]
        fresh = (likely / scale).masked_fill(~end | ~going[:, None], -torch.inf)
        done_scores, which = torch.cat([done_scores, fresh[:, :beams]], 1).topk(beams)
        done = picked(torch.cat([done, rows[:, :beams]], 1), which)
        scores, which = likely.masked_fill(end, -torch.inf).topk(beams)
        going &= scores[:, 0] / scale > done_scores[:, -1]
        if not going.any():
            break
        said, parent, token = picked(rows, which), parent.gather(1, which), token.gather(1, which)
        cache.select((base + parent).flatten())
    return done, done_scores
