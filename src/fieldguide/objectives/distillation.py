"""Distillation: a network learns from the truth and from what a trained one says (Touvron et al. 2020, arXiv:2012.12877).

With Z_s the student's logits, Z_t the teacher's, y the truth (section 3):
    hard (equation 3)   1/2 CE(Z_s, y) + 1/2 CE(Z_s, argmax Z_t)
    soft (equation 2)   (1 - lambda) CE(Z_s, y) + lambda tau^2 KL(softmax(Z_t / tau) || softmax(Z_s / tau))
A student with a distillation token answers twice in training: the first term is its class token's, the second the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.supervised import Classification, Supervised, flatten_ensemble

TeacherInputs = Callable[[dict[str, Tensor]], Sequence[Tensor]]


class Distillation(Supervised):
    """A student, the loss of its task, and a teacher, which is in evaluation mode, never trained and never stored.

    `show` makes a batch into the teacher's inputs; without it, it takes the student's. Where the student's `taught` names
    one of its answers in training (B K C), that one learns from the teacher and the others the truth; else all learn both.
    Teachers that answer several times (B K C) say the mean of their probabilities. `share` is lambda, `temperature` tau.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[str],
        loss: Classification,
        teacher: nn.Module,
        *,
        teacher_inputs: TeacherInputs | None = None,
        hard: bool = True,
        temperature: float = 3.0,
        share: float = 0.1,
    ):
        super().__init__(model, inputs, loss)
        if temperature <= 0 or not 0 <= share <= 1:
            raise SettingsError(f"temperature={temperature} must be above 0 and share={share} from 0 to 1")
        self.hard, self.temperature, self.share = hard, temperature, share
        self.teacher_inputs = teacher_inputs or (lambda batch: [batch[name] for name in self.inputs])
        # In a tuple, so that it is no part of this module: not trained, not switched to training, not in checkpoints.
        self.frozen_teacher = (teacher.requires_grad_(False).eval(),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To another device or layout the teacher comes along."""
        self.frozen_teacher[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def teacher_logits(self, batch: dict[str, Tensor]) -> Tensor:  # -> B C
        """The teacher's logits."""
        said = self.frozen_teacher[0](*self.teacher_inputs(batch)).float()
        if said.ndim > 2:
            said = said.log_softmax(-1).flatten(1, -2)
            said = said.logsumexp(1)  # up to a constant, which no softmax sees
        return said

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        answers, said = self.compute_predictions(batch).float(), self.teacher_logits(batch)
        if said.shape[-1] != answers.shape[-1]:
            raise SettingsError(f"the teacher knows {said.shape[-1]} classes, the student {answers.shape[-1]}")
        true = taught = answers
        token = getattr(self.model, "distillation_head", None)
        if token is not None and answers.ndim > 2:
            taught = answers[:, token]
            true = answers[:, [i for i in range(answers.shape[1]) if i != token]]
        truth = self.loss(true, batch["target"])["loss"]
        if self.hard:
            lesson = F.cross_entropy(*flatten_ensemble(taught, said.argmax(-1)))
            return {"loss": (truth + lesson) / 2, "truth": truth, "teacher": lesson}
        student, teacher = flatten_ensemble(taught, said)
        lesson = self.temperature**2 * F.kl_div(
            (student / self.temperature).log_softmax(-1),
            (teacher / self.temperature).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        return {"loss": torch.lerp(truth, lesson, self.share), "truth": truth, "teacher": lesson}
