"""Students of diffusion models, which generate in a few steps: their objectives, and how much of the teacher's quality they keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError
from fieldguide.core.report_elements import ReportElement, Table
from fieldguide.objectives import AdversarialDistillation, ConsistencyDistillation, Diffusion, FewSteps, build_process
from fieldguide.tasks.base import Arrays, Preprocessor, TaskSpec
from fieldguide.tasks.vision.image_generation_options import FewStepOptions, SampleOptions

STUDENT_LEVELS = (8, 8)  # intervals of noise of a distilled model; more need more than minutes of training
MAX_COMPARED_IMAGES = 300  # maximum images for each number of steps that is compared with the teacher


class FewStepStudents(Preprocessor, TaskSpec):
    """Distills a diffusion model to a network like it that generates in 1 to 4 steps."""

    options: Any
    pictures: Any
    labels: list[str]
    text: Any
    generate: Callable[..., Tensor]
    sample_labels: Callable[[int], Tensor]
    score: Callable[..., dict[str, float]]

    # Targets are the student's own outputs: steps of fixed size, as those of muon, add up to a drift.
    student_recipe: ClassVar = {"optimizer": "adamw", "lr": 5e-4}

    @classmethod
    def student_options(cls, teacher: Any, card: Card) -> dict[str, Any] | None:
        if card.input_type == "noise" or teacher.options.method != "diffusion":
            raise SettingsError(
                f"the teacher must be a diffusion model: {card.name} of that run generates in a few steps already."
            )
        if teacher.options.unclip is not None:
            raise SettingsError("the teacher generates from embeddings of CLIP (task.unclip), which cannot be distilled.")
        same = ("side", "channels", "schedule", "predicts", "vocab_size", "length")
        return {
            "method": "consistency",
            **{name: value for name in same if (value := getattr(teacher.options, name)) is not None},
        }

    def distill(self, model: Any, teacher: Any) -> FewSteps:
        guidance = self.options.teacher_guidance
        if not 0 <= guidance <= 100:
            raise SettingsError(f"teacher_guidance={guidance} must be from 0 to 100")
        process = build_process(self.options.schedule, self.options.predicts)
        guided = guidance if self.labels or self.text else 1.0
        if self.options.method == "adversarial":
            shape = (self.pictures.channels, self.pictures.side, self.pictures.side)
            return AdversarialDistillation(
                model, teacher, process, shape=shape, label=self.sample_labels(1)[0], guidance=guided
            )
        return ConsistencyDistillation(model, teacher, process, guidance=guided, levels=STUDENT_LEVELS)

    def compare_with_teacher(self, objective: Any, targets: Arrays) -> list[ReportElement]:
        """Return the scores of a student and its teacher by number of steps, for the first test images; nothing without a teacher."""
        if objective is None or not objective.starts_from_teacher:
            return []
        targets = {name: values[:MAX_COMPARED_IMAGES] for name, values in targets.items()}
        label = torch.from_numpy(targets["label"].astype(np.int64))
        options, guidance = SampleOptions(sampler="dpm++", steps=50), self.options.teacher_guidance
        teacher = Diffusion(objective.frozen_teacher[0], objective.process)
        runs: list[tuple[str, Any, Any]] = [
            (f"{steps} step{'s' if steps > 1 else ''}", objective, FewStepOptions(steps=steps)) for steps in (1, 2, 4)
        ]
        runs.append(("teacher, 50 steps", teacher, replace(options, guidance=guidance)))
        shown = [m for m in self.metrics if m.name in ("classifier_accuracy", "caption_match", "feature_distance", "recall")]
        scores = {}
        for name, whole, chosen in runs:
            made = [
                self.generate(whole, part, list(range(i, i + len(part))), chosen).cpu().numpy()
                for i, part in zip(range(0, len(label), 100), label.split(100))
            ]
            scores[name] = self.score({"samples": np.concatenate(made), "label": targets["label"]}, targets)
        shown = [m for m in shown if all(m.name in found for found in scores.values())]
        table = Table(
            "Fewer steps than the teacher",
            f"Images of the labels of {len(label):,} test images, from the same noise. The teacher's guidance is {guidance:g}; its "
            "network is called twice in each step if that is not 1.",
            ("", *(m.title for m in shown)),
            [
                (name, *(f"{100 * found[m.name]:.0f} %" if m.percent else f"{found[m.name]:.2f}" for m in shown))
                for name, found in scores.items()
            ],
        )
        return [table]
