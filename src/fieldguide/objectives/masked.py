"""Masked words: some tokens of a text are hidden, and the network guesses them (Devlin et al. 2018, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective


def hide(tokens: Tensor, open_to: Tensor, mask_token: int, first: int, vocab: int, generator: torch.Generator | None = None,
         share: float = 0.15) -> tuple[Tensor, Tensor]:  # B T int64, B T bool -> B T int64, B T int64
    """Tokens with some of them hidden, and what was there: -1 where nothing is asked (section 3.1 and appendix A.1).

    Of the places that may be hidden (`open_to`), `share` are asked, one at least in each row that has any. Of those, 80 %
    become the mask token, 10 % another token drawn from `first` .. `vocab` - 1, 10 % stay. Which ones is drawn anew each
    time (RoBERTa, section 4.1) from a generator on the CPU, whatever the device.
    """
    draw = lambda: torch.rand(tokens.shape, generator=generator).to(tokens.device)
    lot, fate = draw().masked_fill(~open_to, 2.0), draw()
    asked = (lot < share) | (lot == lot.amin(1, keepdim=True))
    asked &= open_to
    other = torch.randint(first, vocab, tokens.shape, generator=generator).to(tokens.device)
    shown = torch.where(fate < 0.8, mask_token, torch.where(fate < 0.9, other, tokens))
    return torch.where(asked, shown, tokens), torch.where(asked, tokens, -1)


class MaskedWords(Objective):
    """Cross-entropy of `target` (B T int64, -1 = not asked) at the places that are asked, mean over them.

    A network that gives "words" first reads the whole row, then says its words where they are asked and nowhere else:
    the logits of all places would take more time than the rest.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str]):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        logits, target, _ = self.answers(batch)
        return {"loss": F.cross_entropy(logits, target, reduction="sum") / max(len(target), 1)}

    def answers(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the N places that are asked, what was there, and the row of each: N vocab, N, N."""
        asked = batch["target"] >= 0
        hidden = self.model.features(*(batch.get(name) for name in self.inputs))
        row = asked.nonzero()[:, 0]
        return self.model.say(hidden[asked]).float(), batch["target"][asked], row

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nats, places that were guessed right and places asked, of each row: B, B, B."""
        logits, target, row = self.answers(batch)
        nats = F.cross_entropy(logits, target, reduction="none")
        rows = len(batch["target"])
        sums = lambda x: torch.zeros(rows, dtype=x.dtype, device=x.device).index_add_(0, row, x)
        return {"nats": sums(nats), "right": sums((logits.argmax(-1) == target).long()),
                "count": sums(torch.ones_like(row))}


class TokenLabels(Objective):
    """Cross-entropy of a class for each token: `target` B T int64, -1 where none is asked; mean over those asked."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], smoothing: float = 0.0):
        super().__init__()
        self.model, self.inputs, self.smoothing = model, tuple(inputs), smoothing

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(*(batch.get(name) for name in self.inputs)).float()

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        logits, target = self.logits(batch).flatten(0, 1), batch["target"].flatten()
        # The sum is divided by hand: where a batch asks for nothing, the loss is 0, not NaN.
        nats = F.cross_entropy(logits, target, ignore_index=-1, label_smoothing=self.smoothing, reduction="sum")
        return {"loss": nats / (target >= 0).sum().clamp(min=1)}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The likeliest class of each word, -1 where there is none, and its probability: B W, B W. `words` (B W int64) says
        at which token each word is asked, -1 for none; without it every token is a word."""
        best = self.logits(batch).softmax(-1).max(-1)
        if "words" not in batch:
            return {"label": best.indices, "probability": best.values}
        none, place = batch["words"] < 0, batch["words"].clamp(min=0)
        return {"label": best.indices.gather(1, place).masked_fill(none, -1),
                "probability": best.values.gather(1, place).masked_fill(none, torch.nan)}


class Span(Objective):
    """Where an answer begins and ends in a row of tokens: the mean of two cross-entropies over the places of a row
    (BERT, section 4.2). `first` and `last`: B int64; place 0, the class token, means that the row has no answer.
    `answerable` (B T bool) says where an answer may stand, and place 0 always may.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str]):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:                        # -> B T 2
        logits = self.model(*(batch.get(name) for name in self.inputs)).float()
        allowed = batch["answerable"].clone()
        allowed[:, 0] = True
        return logits.masked_fill(~allowed[..., None], -torch.inf)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        logits = self.logits(batch)
        first, last = F.cross_entropy(logits[..., 0], batch["first"]), F.cross_entropy(logits[..., 1], batch["last"])
        return {"loss": (first + last) / 2, "first": first, "last": last}

    def outputs(self, batch: dict[str, Tensor], longest: int = 30) -> dict[str, Tensor]:
        """The best answer of at most so many tokens in each row, and how much better it is than none: `place` B 2 and
        `score`, `none` B, logarithms of what the two ends have. `place` is 0 0 where a row has no room for an answer."""
        begin, end = self.logits(batch).log_softmax(1).unbind(-1)                # B T each
        none = begin[:, 0] + end[:, 0]
        pairs = begin[:, 1:, None] + end[:, None, 1:]                            # B first last
        steps = pairs.shape[1]
        place = torch.arange(steps, device=pairs.device)
        width = place - place[:, None]
        pairs = pairs.masked_fill((width < 0) | (width >= longest), -torch.inf)
        best, at = pairs.flatten(1).max(1)
        found = torch.stack([at // steps, at % steps], 1) + 1
        return {"place": torch.where(best[:, None] > -torch.inf, found, 0), "score": best, "none": none}
