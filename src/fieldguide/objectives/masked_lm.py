"""Masked words: some tokens of a text are hidden, and the network guesses them (Devlin et al. 2018, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective

ROWS_PER_CHUNK = 64  # that are searched for answers at a time: a long text has many


def mask_tokens(
    tokens: Tensor,
    open_to: Tensor,
    mask_token: int,
    first: int,
    vocab: int,
    generator: torch.Generator | None = None,
    share: float = 0.15,
) -> tuple[Tensor, Tensor]:  # B T int64, B T bool -> B T int64, B T int64
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


class MaskedLM(Objective):
    """Cross-entropy of `target` (B T int64, -1 = not asked) at the places that are asked, mean over them.

    A network that gives "words" first reads the whole row, then says its words where they are asked and nowhere else:
    the logits of all places would take more time than the rest.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str]):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        logits, target, _ = self.compute_masked_logits(batch)
        return {"loss": F.cross_entropy(logits, target, reduction="sum") / max(len(target), 1)}

    def compute_masked_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the N places that are asked, what was there, and the row of each: N vocab, N, N."""
        asked = batch["target"] >= 0
        hidden = self.model.features(*(batch.get(name) for name in self.inputs))
        row = asked.nonzero()[:, 0]
        return self.model.say(hidden[asked]).float(), batch["target"][asked], row

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nats, places that were guessed right and places asked, of each row: B, B, B."""
        logits, target, row = self.compute_masked_logits(batch)
        nats = F.cross_entropy(logits, target, reduction="none")
        rows = len(batch["target"])
        sums = lambda x: torch.zeros(rows, dtype=x.dtype, device=x.device).index_add_(0, row, x)
        return {"nats": sums(nats), "right": sums((logits.argmax(-1) == target).long()), "count": sums(torch.ones_like(row))}


class TokenClassificationObjective(Objective):
    """Cross-entropy of a class for each token: `target` B T int64, -1 where none is asked; mean over those asked."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], smoothing: float = 0.0):
        super().__init__()
        self.model, self.inputs, self.smoothing = model, tuple(inputs), smoothing

    def compute_logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(*(batch.get(name) for name in self.inputs)).float()

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        logits, target = self.compute_logits(batch).flatten(0, 1), batch["target"].flatten()
        # The sum is divided by hand: where a batch asks for nothing, the loss is 0, not NaN.
        nats = F.cross_entropy(logits, target, ignore_index=-1, label_smoothing=self.smoothing, reduction="sum")
        return {"loss": nats / (target >= 0).sum().clamp(min=1)}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The likeliest class of each word, -1 where there is none, and its probability: B W, B W. `words` (B W int64) says
        at which token each word is asked, -1 for none; without it every token is a word."""
        best = self.compute_logits(batch).softmax(-1).max(-1)
        if "words" not in batch:
            return {"label": best.indices, "probability": best.values}
        none, place = batch["words"] < 0, batch["words"].clamp(min=0)
        return {
            "label": best.indices.gather(1, place).masked_fill(none, -1),
            "probability": best.values.gather(1, place).masked_fill(none, torch.nan),
        }


class SpanPrediction(Objective):
    """Where an answer begins and ends in a row of tokens: the mean of two cross-entropies over the places of a row
    (BERT, section 4.2). `first` and `last`: B int64; place 0, the class token, means that the row has no answer.
    `answerable` (B T bool) says where an answer may stand, and place 0 always may. It has at most `longest` tokens.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str], longest: int = 30):
        super().__init__()
        self.model, self.inputs, self.longest = model, tuple(inputs), longest

    def compute_logits(self, batch: dict[str, Tensor]) -> Tensor:  # -> B T 2
        logits = self.model(*(batch.get(name) for name in self.inputs)).float()
        allowed = batch["answerable"].clone()
        allowed[:, 0] = True
        return logits.masked_fill(~allowed[..., None], -torch.inf)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        logits = self.compute_logits(batch)
        first, last = F.cross_entropy(logits[..., 0], batch["first"]), F.cross_entropy(logits[..., 1], batch["last"])
        return {"loss": (first + last) / 2, "first": first, "last": last}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The best answer in each row, and how good it is beside none: `place` B 2 and `score`, `none` B, logarithms of
        what the two ends have. `place` is 0 0 where a row has no room for an answer.

        Where rows are windows of longer texts, `window` (B int64) numbers the text of each from 0. Then there is an output
        a text: the best of its windows' answers, and none as unlikely as in the window where it is least likely (the same
        way as BERT's for SQuAD 2.0, section 4.3). `characters` (B T 2), what each token covers, makes of a place the first
        character of the answer and the one behind its last, `begin` and `end`.
        """
        parts = [
            self.find_best_spans({name: x[i : i + ROWS_PER_CHUNK] for name, x in batch.items()})
            for i in range(0, len(batch["answerable"]), ROWS_PER_CHUNK)
        ]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if "window" not in batch:
            return found
        text, rows = batch["window"], torch.arange(len(batch["window"]), device=batch["window"].device)
        most = found["score"].new_full((int(text.max()) + 1,), -torch.inf).scatter_reduce(0, text, found["score"], "amax")
        reached = torch.where(found["score"] >= most[text], rows, len(rows))
        winner = torch.full_like(most, len(rows), dtype=torch.int64).scatter_reduce(0, text, reached, "amin")
        none = torch.full_like(most, torch.inf).scatter_reduce(0, text, found["none"], "amin")
        return {**{name: x[winner] for name, x in found.items()}, "none": none}

    def find_best_spans(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        begin, end = self.compute_logits(batch).log_softmax(1).unbind(-1)  # B T each
        # Each first token beside the last ones that lie so near behind it.
        ends = F.pad(end, (0, self.longest - 1), value=-torch.inf).unfold(1, self.longest, 1)  # B T longest
        best, at = (begin[..., None] + ends)[:, 1:].flatten(1).max(1)
        first = at // self.longest + 1
        place = torch.stack([first, first + at % self.longest], 1)
        place = torch.where(best[:, None] > -torch.inf, place, 0)
        found = {"place": place, "score": best, "none": begin[:, 0] + end[:, 0]}
        if "characters" in batch:
            covered = batch["characters"].take_along_dim(place[..., None], 1)  # B 2 2
            found |= {"begin": covered[:, 0, 0], "end": covered[:, 1, 1]}
        return found
