"""Objectives of text encoders: masked language modeling, token classification and span prediction (Devlin et al. 2018,
arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective

ROWS_PER_CHUNK = 64  # rows that span prediction evaluates at once; a long text may have many windows


def mask_tokens(
    tokens: Tensor,
    open_to: Tensor,
    mask_token: int,
    first: int,
    vocab: int,
    generator: torch.Generator | None = None,
    share: float = 0.15,
) -> tuple[Tensor, Tensor]:  # B T int64, B T bool -> B T int64, B T int64
    """Mask tokens for masked language modeling. Return the masked tokens and the targets, -1 elsewhere (section 3.1 and
    appendix A.1).

    A fraction `share` of the positions in `open_to` is selected, at least one per row that has any. Of those, 80 % become
    `mask_token`, 10 % a random token from `first` .. `vocab` - 1, and 10 % stay unchanged. The selection is random on
    each call (RoBERTa, section 4.1) and uses a CPU generator for every device.
    """
    draw = lambda: torch.rand(tokens.shape, generator=generator).to(tokens.device)
    lot, fate = draw().masked_fill(~open_to, 2.0), draw()
    selected = (lot < share) | (lot == lot.amin(1, keepdim=True))
    selected &= open_to
    other = torch.randint(first, vocab, tokens.shape, generator=generator).to(tokens.device)
    shown = torch.where(fate < 0.8, mask_token, torch.where(fate < 0.9, other, tokens))
    return torch.where(selected, shown, tokens), torch.where(selected, tokens, -1)


class MaskedLM(Objective):
    """Mean cross-entropy of `target` (B T int64, -1 = ignored) at the masked positions.

    A network with output type "words" encodes the whole row, but computes logits only at the masked positions, because
    logits at all positions would take longer than the rest of the network.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str]):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        logits, target, _ = self.compute_masked_logits(batch)
        return {"loss": F.cross_entropy(logits, target, reduction="sum") / max(len(target), 1)}

    def compute_masked_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits at the N masked positions, their targets and their rows: N vocab, N, N."""
        selected = batch["target"] >= 0
        hidden = self.model.features(*(batch.get(name) for name in self.inputs))
        row = selected.nonzero()[:, 0]
        return self.model.forward_head(hidden[selected]).float(), batch["target"][selected], row

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `nats`, `right` (correct predictions) and `count` over the masked positions of each row: B, B, B."""
        logits, target, row = self.compute_masked_logits(batch)
        nats = F.cross_entropy(logits, target, reduction="none")
        rows = len(batch["target"])
        sums = lambda x: torch.zeros(rows, dtype=x.dtype, device=x.device).index_add_(0, row, x)
        return {"nats": sums(nats), "right": sums((logits.argmax(-1) == target).long()), "count": sums(torch.ones_like(row))}


class TokenClassificationObjective(Objective):
    """Mean cross-entropy of a class per token; `target` is B T int64, -1 = ignored."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], smoothing: float = 0.0):
        super().__init__()
        self.model, self.inputs, self.smoothing = model, tuple(inputs), smoothing

    def compute_logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(*(batch.get(name) for name in self.inputs)).float()

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        logits, target = self.compute_logits(batch).flatten(0, 1), batch["target"].flatten()
        # Not reduction="mean", which would be NaN for a batch without targets.
        nats = F.cross_entropy(logits, target, ignore_index=-1, label_smoothing=self.smoothing, reduction="sum")
        return {"loss": nats / (target >= 0).sum().clamp(min=1)}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `label`, the most likely class of each word (-1 for padding), and its `probability`: B W, B W.

        `words` (B W int64) holds the token position at which each word is classified, -1 for padding. Without it every
        token is a word.
        """
        best = self.compute_logits(batch).softmax(-1).max(-1)
        if "words" not in batch:
            return {"label": best.indices, "probability": best.values}
        none, place = batch["words"] < 0, batch["words"].clamp(min=0)
        return {
            "label": best.indices.gather(1, place).masked_fill(none, -1),
            "probability": best.values.gather(1, place).masked_fill(none, torch.nan),
        }


class SpanPrediction(Objective):
    """Start and end positions of an answer: the mean of two cross-entropies over the positions of a row (BERT, section 4.2).

    The targets `first` and `last` are B int64; position 0, the class token, means that the row has no answer.
    `answerable` (B T bool) marks the positions where an answer may be; position 0 is always allowed. Predicted answers
    have at most `longest` tokens.
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
        """Return the best answer of each row: `place` B 2 (first and last token), its log-probability `score` B, and that
        of no answer, `none` B. `place` is 0 0 if a row has no position for an answer.

        If the rows are windows of longer texts, `window` (B int64) holds the index of the text of each. Then there is one
        output per text: the best answer of its windows, and the lowest `none` of its windows (as BERT does for SQuAD 2.0,
        section 4.3). With `characters` (B T 2), the character range of each token, the answer's character range is
        returned as `begin` and `end`, which is exclusive.
        """
        parts = [
            self.find_best_spans({name: x[i : i + ROWS_PER_CHUNK] for name, x in batch.items()})
            for i in range(0, len(batch["answerable"]), ROWS_PER_CHUNK)
        ]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if "window" not in batch:
            return found
        text, rows = batch["window"], torch.arange(len(batch["window"]), device=batch["window"].device)
        best = found["score"].new_full((int(text.max()) + 1,), -torch.inf).scatter_reduce(0, text, found["score"], "amax")
        reached = torch.where(found["score"] >= best[text], rows, len(rows))
        winner = torch.full_like(best, len(rows), dtype=torch.int64).scatter_reduce(0, text, reached, "amin")
        none = torch.full_like(best, torch.inf).scatter_reduce(0, text, found["none"], "amin")
        return {**{name: x[winner] for name, x in found.items()}, "none": none}

    def find_best_spans(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `place`, `score`, `none` and, if available, `begin` and `end` of each row; see `outputs`."""
        begin, end = self.compute_logits(batch).log_softmax(1).unbind(-1)  # B T each
        # For each first token, the scores of the `longest` possible last tokens.
        place = torch.arange(end.shape[1], device=end.device)[:, None] + torch.arange(self.longest, device=end.device)
        ends = F.pad(end, (0, self.longest - 1), value=-torch.inf)[:, place]  # B T longest
        best, at = (begin[..., None] + ends)[:, 1:].flatten(1).max(1)
        first = at // self.longest + 1
        place = torch.stack([first, first + at % self.longest], 1)
        place = torch.where(best[:, None] > -torch.inf, place, 0)
        found = {"place": place, "score": best, "none": begin[:, 0] + end[:, 0]}
        if "characters" in batch:
            covered = batch["characters"].take_along_dim(place[..., None], 1)  # B 2 2
            found |= {"begin": covered[:, 0, 0], "end": covered[:, 1, 1]}
        return found
