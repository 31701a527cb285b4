"""Knowledge distillation: training on labels and on the outputs of a teacher (Touvron et al. 2020, arXiv:2012.12877).

With Z_s the student's logits, Z_t the teacher's, y the label (section 3):
    hard (equation 3)   1/2 CE(Z_s, y) + 1/2 CE(Z_s, argmax Z_t)
    soft (equation 2)   (1 - lambda) CE(Z_s, y) + lambda tau^2 KL(softmax(Z_t / tau) || softmax(Z_s / tau))
A student with a distillation token has two outputs in training: the first term uses that of the class token, the second
that of the distillation token.
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
    """Task loss of a student plus the distillation loss from a teacher.

    The teacher stays in evaluation mode and is never trained or saved. If the student has an attribute
    `distillation_head`, the index of one of its training outputs (B K C), that output is trained on the teacher and the
    others on the labels; otherwise all outputs are trained on both. If the teacher has several outputs (B K C), their
    probabilities are averaged.

    Args:
        teacher_inputs: function that returns the teacher's inputs for a batch; None passes the student's inputs.
        hard: use the teacher's most likely class as the label instead of its probabilities.
        temperature: tau of soft distillation.
        share: lambda of soft distillation.

    Raises:
        SettingsError: if `temperature` or `share` is out of range, or the numbers of classes differ.
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
        # A tuple keeps the teacher from being registered as a submodule: not trained, not in checkpoints.
        self.frozen_teacher = (teacher.requires_grad_(False).eval(),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply device and layout changes to the teacher, too."""
        self.frozen_teacher[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def teacher_logits(self, batch: dict[str, Tensor]) -> Tensor:  # -> B C
        """Return the teacher's logits, or log-probabilities up to a constant if it has several outputs."""
        logits = self.frozen_teacher[0](*self.teacher_inputs(batch)).float()
        if logits.ndim > 2:
            logits = logits.log_softmax(-1).flatten(1, -2)
            logits = logits.logsumexp(1)  # the omitted constant does not change a softmax
        return logits

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        logits, teacher_logits = self.compute_predictions(batch).float(), self.teacher_logits(batch)
        if teacher_logits.shape[-1] != logits.shape[-1]:
            raise SettingsError(f"the teacher has {teacher_logits.shape[-1]} classes, the student {logits.shape[-1]}")
        label_logits = distilled_logits = logits
        head = getattr(self.model, "distillation_head", None)
        if head is not None and logits.ndim > 2:
            distilled_logits = logits[:, head]
            label_logits = logits[:, [i for i in range(logits.shape[1]) if i != head]]
        label_loss = self.loss(label_logits, batch["target"])["loss"]
        if self.hard:
            teacher_loss = F.cross_entropy(*flatten_ensemble(distilled_logits, teacher_logits.argmax(-1)))
            return {"loss": (label_loss + teacher_loss) / 2, "truth": label_loss, "teacher": teacher_loss}
        student, teacher = flatten_ensemble(distilled_logits, teacher_logits)
        teacher_loss = self.temperature**2 * F.kl_div(
            (student / self.temperature).log_softmax(-1),
            (teacher / self.temperature).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        return {"loss": torch.lerp(label_loss, teacher_loss, self.share), "truth": label_loss, "teacher": teacher_loss}
