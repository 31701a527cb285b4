"""The report of image generation: samples by class, caption and number of steps, and the nearest training images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.report_elements import Gallery, Picture, ReportElement, Table
from fieldguide.data.dataset import Data
from fieldguide.metrics import generative
from fieldguide.objectives import Diffusion, Objective
from fieldguide.tasks.base import Arrays, ReportBuilder
from fieldguide.tasks.report_builder import ExampleInput
from fieldguide.tasks.vision.image_encoding import encode_sheet

SHEET_IMAGES = 16  # images of a sheet


class GenerationReport(ReportBuilder):
    """Shows generated images, and whether they are copies of training images."""

    judge: Any
    labels: list[str]
    text: Any
    captions: list[str]
    known: Tensor
    PredictOptions: Any
    generate: Callable[..., Tensor]
    sample_labels: Callable[[int], Tensor]
    decode_caption: Callable[[np.ndarray], str]
    evaluate_samples: Callable[..., dict[str, Any]]
    compare_with_teacher: Callable[..., list[ReportElement]]

    def log_eval_samples(self, objective: Objective) -> list[ReportElement]:
        label = self.sample_labels(2 * SHEET_IMAGES)
        made = self.generate(objective, label, range(len(label)), self.PredictOptions())
        return [
            Gallery(
                "Samples during training",
                "Generated from the same noise each time.",
                [Picture(encode_sheet(made.cpu().numpy()), "")],
            )
        ]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        samples = outputs["samples"]
        shown: list[ReportElement] = [self.show_samples(samples, outputs["label"].astype(int))]
        if self.text is not None:
            shown.append(self.show_caption_pairs(outputs, targets))
        if objective is not None and isinstance(objective, Diffusion):
            shown.append(self.show_steps(objective))
        shown += self.compare_with_teacher(objective, targets)
        return {"Samples": shown, "Memory": self.memorization_elements(samples, targets)}

    def show_samples(self, samples: np.ndarray, label: np.ndarray) -> Gallery:  # N C S S, N or N T
        """Return images by class, if there are classes."""
        rows = sheets_by_class(samples, label, self.labels) if self.labels else []
        sheets = rows or [Picture(encode_sheet(samples[: 4 * SHEET_IMAGES]), "")]
        return Gallery("Samples", "Generated for the test, unselected.", sheets)

    def show_caption_pairs(self, outputs: Arrays, targets: Arrays) -> Gallery:
        """Return generated images next to the test images of their captions."""
        samples, label = outputs["samples"], outputs["label"].astype(int)
        matched = self.evaluate_samples(outputs, targets)["matched"]
        pairs = [
            Picture(encode_sheet(np.stack([samples[i], targets["real"][i]])), self.decode_caption(label[i]), bad=not matched[i])
            for i in range(min(3 * SHEET_IMAGES, len(samples)))
        ]
        return Gallery(
            "By caption",
            "Left the generated image, right the test image of that caption; framed if the "
            "evaluation model would pick another caption for the generated image.",
            pairs,
        )

    def show_steps(self, objective: Diffusion) -> Gallery:
        """Return images of the same noise with several numbers of sampler steps."""
        wanted = self.sample_labels(SHEET_IMAGES)
        sheets = []
        for steps in (1, 2, 4, 8) if objective.generates_in_few_steps else (2, 5, 10, 20, 50):
            made = self.generate(objective, wanted, range(len(wanted)), self.PredictOptions(steps=steps))
            sheets.append(Picture(encode_sheet(made.cpu().numpy()), f"{steps} steps"))
        return Gallery("By sampler steps", "Generated from the same noise: more steps are slower and add detail.", sheets)

    def memorization_elements(self, samples: np.ndarray, targets: Arrays) -> list[ReportElement]:
        """Return the nearest training image of a few samples, and whether samples are closer than expected."""
        known = generative.extract_features(self.judge, self.known)
        made, real = (generative.extract_features(self.judge, torch.from_numpy(x[:300])) for x in (samples, targets["real"]))
        far_made, far_real = generative.pairwise_distances(made, known), generative.pairwise_distances(real, known)
        nearest_images = [self.known[int(far.argmin())].numpy() for far in far_made[:12]]
        pairs = [
            Picture(encode_sheet(np.stack([samples[i], other])), f"{far_made[i].min():.2f}")
            for i, other in enumerate(nearest_images)
        ]
        closer = float((far_made.min(1) < np.quantile(far_real.min(1), 0.05)).mean())
        return [
            Gallery(
                "Samples and their nearest training images",
                "Left the sample, right the nearest training image in the features of the evaluation CNN, with "
                "the distance. Equal pairs indicate memorization.",
                pairs,
            ),
            Table(
                "Memorization",
                "Distances to the nearest training image. Samples closer than almost all test images may be "
                "copies; 5 % are expected.",
                ("", "value"),
                [
                    ("median distance of samples", float(np.median(far_made.min(1)))),
                    ("median distance of test images", float(np.median(far_real.min(1)))),
                    ("samples closer than 95 % of test images", f"{100 * closer:.0f} %"),
                ],
            ),
        ]

    def example_input(self, test: Data) -> ExampleInput | None:
        known = self.captions or self.labels
        return ExampleInput(known[0] if known else None, note="The input is what to generate." if known else "")


def sheets_by_class(samples: np.ndarray, label: np.ndarray, names: list[str]) -> list[Picture]:  # N C S S, N
    """Return some images of each class that occurs."""
    return [Picture(encode_sheet(samples[label == k][:SHEET_IMAGES]), names[k - 1]) for k in np.unique(label)]
