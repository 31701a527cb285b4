"""Constraints on the next token that a publisher ships with a model: blocked n-grams, minimum length, forced and suppressed
tokens. The semantics are those of `generation_config.json` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRules:
    """Constraints that are applied to the logits of every step, in this order.

    no_repeat_ngram_size    no sequence of this many tokens occurs twice, counting the prompt (Paulus et al. 2018,
                            arXiv:1705.04304, section 2.5); 0 = off
    min_new_tokens          no end token before this many generated tokens
    forced_first_token      the first generated token
    forced_last_token       the token at the maximum length
    suppress_tokens         never generated
    begin_suppress_tokens   not generated first, or after the forced first token
    """

    eos_token_ids: tuple[int, ...] = ()
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    forced_first_token: int | None = None
    forced_last_token: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()

    @property
    def is_active(self) -> bool:
        """Whether any rule can change a step."""
        return self != TokenRules(eos_token_ids=self.eos_token_ids)

    def apply(self, logits: Tensor, history: Tensor, step: int, last: bool) -> Tensor:  # B V, B T (-1 = nothing) -> B V
        """Return the logits with forbidden tokens at -inf.

        `history` holds the prompt and the generated tokens, aligned at the end; `step` is the number of tokens generated so
        far, and `last` whether the maximum length is reached with the next one.
        """
        logits = logits.float()
        if self.no_repeat_ngram_size:
            logits = logits.masked_fill(repeated_ngrams(history, self.no_repeat_ngram_size, logits.shape[1]), -torch.inf)
        if step < self.min_new_tokens and self.eos_token_ids:
            logits = block(logits, self.eos_token_ids)
        forced = self.forced_first_token if step == 0 else self.forced_last_token if last else None
        if forced is not None:
            logits = torch.full_like(logits, -torch.inf).index_fill(1, torch.tensor([forced], device=logits.device), 0)
        if self.suppress_tokens:
            logits = block(logits, self.suppress_tokens)
        if self.begin_suppress_tokens and step == (self.forced_first_token is not None):
            logits = block(logits, self.begin_suppress_tokens)
        return logits


def block(logits: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Return the logits with these tokens at -inf. Tokens that the network does not have cannot be generated anyway."""
    known = [token for token in tokens if 0 <= token < logits.shape[1]]
    return logits.index_fill(1, torch.tensor(known, dtype=torch.long, device=logits.device), -torch.inf)


def repeated_ngrams(history: Tensor, size: int, vocab: int) -> Tensor:  # B T (-1 = nothing) -> B V bool
    """Return the tokens that would complete an n-gram that already occurs in the history."""
    banned = torch.zeros(len(history), vocab + 1, dtype=torch.bool, device=history.device)
    if history.shape[1] >= size:
        windows = history.unfold(1, size, 1)  # B W n
        before = history[:, history.shape[1] - size + 1 :]  # B n-1
        same = (windows[..., :-1] == before[:, None]).all(-1) & (windows >= 0).all(-1)
        banned.scatter_(1, torch.where(same, windows[..., -1], vocab), True)
    return banned[:, :vocab]
