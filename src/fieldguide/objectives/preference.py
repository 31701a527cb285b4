"""Preference tuning of language models: DPO and IPO.

Shapes: B pairs, T tokens. A batch holds the chosen answers of all pairs, then the rejected ones: 2B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.objectives.base import Objective


class Preference(Objective):
    """Make the chosen answer of each pair more likely than the rejected one, relative to a frozen reference model.

    With `h`, the log-ratio of the chosen answer minus that of the rejected one (log-probability under the network minus that under
    the reference):

    - "sigmoid": -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) (DPO, Rafailov et al. 2023, arXiv:2305.18290, equation 7;
      with label smoothing e, the probability that a label is wrong: Mitchell 2023, "A note on DPO with noisy preferences",
      equation 3).
    - "ipo": (h - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, equation 17). Here h is made of means over the tokens of
      an answer, so that long answers count no more than short ones.

    `target` (2B T int64) is the next token at each position of the answers, -1 elsewhere. `reference` is in a tuple, so that it is
    neither trained nor stored; without it the log-ratios cannot be computed, only log-probabilities.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str],
        reference: nn.Module | None = None,
        beta: float = 0.1,
        smoothing: float = 0.0,
        loss: Literal["sigmoid", "ipo"] = "sigmoid",
    ):
        super().__init__()
        self.model, self.inputs, self.frozen = model, tuple(inputs), (reference,)
        self.beta, self.smoothing, self.loss = beta, smoothing, loss

    def sum_log_probabilities(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:  # -> 2B
        """Return the log-probability of each answer under a model; for IPO the mean over its tokens."""
        logits, target = model(*(batch.get(name) for name in self.inputs)), batch["target"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="none").view_as(target)
        total = -nats.sum(1)
        return total / (target >= 0).sum(1).clamp(min=1) if self.loss == "ipo" else total

    def compute_log_probabilities(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the log-probabilities of the chosen and the rejected answers, B each, and those under the reference."""
        chosen, rejected = self.sum_log_probabilities(self.model, batch).chunk(2)
        found = {"chosen": chosen, "rejected": rejected}
        if (reference := self.frozen[0]) is not None:
            with torch.no_grad():
                before = self.sum_log_probabilities(reference.to(chosen.device), batch)
            found["reference_chosen"], found["reference_rejected"] = before.to(chosen.dtype).chunk(2)
        return found

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        found = self.compute_log_probabilities(batch)
        better, worse = (found[name] - found[f"reference_{name}"] for name in ("chosen", "rejected"))
        rewards = {"chosen": self.beta * better.detach().mean(), "rejected": self.beta * worse.detach().mean()}
        return {"loss": self.compute_losses(better - worse).mean(), **rewards}

    def compute_losses(self, h: Tensor) -> Tensor:  # B -> B
        """Return the loss of each pair from its difference of log-ratios."""
        if self.loss == "ipo":
            return (h - 1 / (2 * self.beta)) ** 2
        margin = self.beta * h
        return -(1 - self.smoothing) * F.logsigmoid(margin) - self.smoothing * F.logsigmoid(-margin)

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what `compute_log_probabilities` returns."""
        return self.compute_log_probabilities(batch)
