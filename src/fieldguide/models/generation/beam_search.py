"""Batched beam search with a key/value cache (Graves 2012, arXiv:1211.3711, algorithm 1)."""

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
    eos_token_ids: Sequence[int],
    num_beams: int = 4,
    max_new_tokens: int = 100,
    length_penalty: float = 1.0,
    max_lengths: Tensor | None = None,
    prefix_length: int = 0,
    adjust: Callable[[Tensor, Tensor], Tensor] | None = None,
    early_stopping: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the `num_beams` best sequences of each input: tokens B K T (-1 after the end), without `begin` and the end
    token, best first, and scores B K.

    `step` maps tokens BK 1 to logits BK 1 V and fills `cache`, whose rows are the beams of the first input, then
    those of the second, and so on. `begin` is the first token of all sequences, or a tensor BK with one per row. A
    sequence ends with any of `eos_token_ids` or at the maximum length: `max_new_tokens` including the end token, or
    `max_lengths` (B int64) per input. `adjust` changes log-probabilities BK V given the tokens generated so far, BK
    T.

    As in fairseq and transformers, only the K best continuations of an input are considered: those that end become
    finished sequences, and the best of the others become the next beams. The score of a sequence is its
    log-probability divided by length^length_penalty, where the length includes the end token and `prefix_length` more
    tokens. The search of an input stops when its best beam, if it ended now, would not score higher than the worst of
    its K finished sequences; with `early_stopping`, as soon as it has K finished sequences.
    """
    inputs = cache.real.shape[0] // num_beams
    device = cache.real.device
    max_lengths = (
        torch.full((inputs,), max_new_tokens, device=device) if max_lengths is None else max_lengths.clamp(1, max_new_tokens)
    )
    max_new_tokens = int(max_lengths.max())
    ending = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
    scores = torch.full((inputs, num_beams), -torch.inf, device=device)
    scores[:, 0] = 0  # all beams start equal, so only the first one counts
    tokens_so_far = torch.full((inputs, num_beams, max_new_tokens), -1, device=device)
    done, done_scores = tokens_so_far.clone(), torch.full((inputs, num_beams), -torch.inf, device=device)
    going = torch.ones(inputs, dtype=torch.bool, device=device)
    token = begin if isinstance(begin, Tensor) else torch.full((inputs * num_beams,), begin, device=device)
    base = torch.arange(inputs, device=device)[:, None] * num_beams
    picked = lambda rows, which: rows.gather(1, which[..., None].expand(-1, -1, max_new_tokens))
    for length in range(1, max_new_tokens + 1):  # number of generated tokens after this step
        logp = step(token.reshape(-1, 1))[:, -1].float().log_softmax(-1)
        if adjust is not None:
            logp = adjust(logp, tokens_so_far.flatten(0, 1))
        vocab, scale = logp.shape[-1], (prefix_length + length) ** length_penalty
        # Enough candidates that K unfinished ones remain even if all end tokens are among the best.
        likely = scores[..., None] + logp.unflatten(0, (inputs, num_beams))  # B K V
        likely, which = likely.flatten(1).topk(min((1 + len(ending)) * num_beams, num_beams * vocab))
        parent, token = which // vocab, which % vocab  # B C
        end = torch.isin(token, ending)
        rows = picked(tokens_so_far, parent)
        rows[..., length - 1] = torch.where(end, -1, token)
        end |= (length >= max_lengths)[:, None]
        fresh = (likely / scale).masked_fill(~end | ~going[:, None], -torch.inf)
        done_scores, which = torch.cat([done_scores, fresh[:, :num_beams]], 1).topk(num_beams)
        done = picked(torch.cat([done, rows[:, :num_beams]], 1), which)
        scores, which = likely.masked_fill(end, -torch.inf).topk(num_beams)
        going &= done_scores[:, -1].isneginf() if early_stopping else scores[:, 0] / scale > done_scores[:, -1]
        if not going.any():
            break
        tokens_so_far, parent, token = picked(rows, which), parent.gather(1, which), token.gather(1, which)
        cache.select((base + parent).flatten())
    return done, done_scores
