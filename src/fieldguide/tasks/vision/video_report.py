"""The report of video generation: generated videos, what is recognized in them, continuations, and the nearest training videos."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fieldguide.core.report_elements import Gallery, Picture, ReportElement, Table
from fieldguide.data.dataset import Data
from fieldguide.metrics import generative
from fieldguide.objectives import Objective
from fieldguide.tasks.base import Arrays, ReportBuilder
from fieldguide.tasks.vision.image_encoding import encode_png
from fieldguide.tasks.vision.video_evaluator import decibels

SHOWN_PER_CLASS = 3  # videos of each class in the report
SHOWN_VIDEOS = 24  # of captions, and of continuations
FRAME_MILLISECONDS = 120  # milliseconds per frame
MIN_HEIGHT = 96  # pixels of encoded videos; smaller ones are enlarged by a whole number


class VideoReport(ReportBuilder):
    """Shows generated videos next to real ones."""

    judge: Any
    labels: list[str]
    text: Any
    known: Tensor
    evaluate_samples: Any
    recognise: Any
    judged_attributes: Any
    decode_caption: Any

    def name_video(self, label: np.ndarray) -> str:
        """Return the class or caption of a video."""
        return self.decode_caption(label) if self.text is not None else ["videos", *self.labels][int(label)]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        samples, label = outputs["samples"], outputs["label"].astype(int)
        shown = self.show_captions(outputs, targets) if self.text is not None else self.show_classes(outputs, targets)
        comparisons = [
            Picture(
                encode_png(np.concatenate([targets["real"][i, -2], targets["real"][i, -1], outputs["next"][i]], 2)),
                f"{psnr(outputs['next'][i], targets['real'][i, -1]):.1f} dB",
            )
            for i in range(len(outputs["next"]))[:8]
        ]
        recognised = self.tabulate_recognised(outputs, targets)
        by_class = self.tabulate_classes(label, self.evaluate_samples(outputs, targets)) if self.labels else []
        return {
            "Samples": [
                *shown,
                *recognised,
                *by_class,
                *(self.show_continuations(outputs, targets) if "continued" in outputs else []),
                Gallery("Next frame", "The last known frame, the real next frame, and the predicted next frame.", comparisons),
            ],
            "Memory": self.memorization_elements(samples, targets),
        }

    def show_classes(self, outputs: Arrays, targets: Arrays) -> list[ReportElement]:
        """Return some generated and real videos of each class."""
        label = outputs["label"].astype(int)
        rows = [(k, i) for k in np.unique(label) for i in np.flatnonzero(label == k)[:SHOWN_PER_CLASS]]
        shown = [Picture(encode_webp(outputs["samples"][i]), self.name_video(k)) for k, i in rows]
        real = [
            Picture(encode_webp(targets["real"][i]), self.name_video(k))
            for k in np.unique(targets["label"])
            for i in np.flatnonzero(targets["label"] == k)[:1]
        ]
        return [Gallery("Generated videos", "Random samples.", shown), Gallery("Real test videos", "For comparison.", real)]

    def show_captions(self, outputs: Arrays, targets: Arrays) -> list[ReportElement]:
        """Return generated videos next to the real ones of the same captions."""
        found, each = self.evaluate_samples(outputs, targets), len(outputs["samples"]) // len(targets["real"])
        right = found["right"].all(1) if "right" in found else found["matched"]
        rows = range(0, len(outputs["samples"]), each)[:SHOWN_VIDEOS]
        pairs = [
            Picture(
                encode_webp(join_side_by_side(np.stack([outputs["samples"][i], targets["real"][i // each]]))),
                self.name_video(outputs["label"][i].astype(int)),
                bad=not right[i],
            )
            for i in rows
        ]
        about = (
            "Left the generated video, right the real test video of the caption; framed if the networks trained on real videos do not "
            "recognize the caption in the generated one."
        )
        return [Gallery("Videos by caption", about, pairs)]

    def show_continuations(self, outputs: Arrays, targets: Arrays) -> list[ReportElement]:
        """Return continuations of the first frames of test videos next to these."""
        pairs = [
            Picture(
                encode_webp(join_side_by_side(np.stack([outputs["continued"][i], targets["real"][i]]))),
                self.name_video(targets["label"][i]),
            )
            for i in range(len(targets["real"]))[:SHOWN_VIDEOS]
        ]
        about = "Left the video generated from the first frame and the class or caption, right the real one."
        return [Gallery("From the first frame", about, pairs)]

    def tabulate_recognised(self, outputs: Arrays, targets: Arrays) -> list[ReportElement]:
        """Return in how many generated videos each attribute of a caption is recognized, next to the real test videos."""
        found = self.evaluate_samples(outputs, targets)
        if "attributes" not in targets or "right" not in found:
            return []
        wanted = targets["attributes"]
        columns = {"generated": found["right"]}
        if "continued" in outputs:
            columns["continued from the first frame"] = self.recognise(outputs["continued"]) == wanted
        columns["real test videos"] = self.recognise(targets["real"]) == wanted
        rows = [
            (name, *(f"{100 * right[:, i].mean():.0f} %" for right in columns.values()), f"{100 / len(values):.0f} %")
            for i, (name, values) in enumerate(self.judged_attributes().items())
        ]
        about = "Fraction of videos in which a CNN trained on real videos recognizes what the caption says. The last column is guessing."
        return [Table("Recognized", about, ("", *columns, "by chance"), rows)]

    def tabulate_classes(self, label: np.ndarray, found: dict[str, Any]) -> list[ReportElement]:
        """Return how many generated videos of each class are recognized."""
        rows = [
            (self.name_video(k), int((label == k).sum()), float(found["right"][label == k].mean())) for k in np.unique(label)
        ]
        about = "Fraction of the generated videos that a CNN trained on real videos assigns to the requested class."
        return [Table("Recognized", about, ("class", "videos", "recognised"), rows)]

    def memorization_elements(self, samples: np.ndarray, targets: Arrays) -> list[ReportElement]:
        known, made = (generative.extract_features(self.judge, x.mean(1)) for x in (self.known, torch.from_numpy(samples[:8])))
        far = generative.pairwise_distances(made, known)
        nearest = [self.known[int(row.argmin())].numpy() for row in far]
        pairs = [
            Picture(encode_webp(join_side_by_side(np.stack([samples[i], other]))), f"{far[i].min():.2f}")
            for i, other in enumerate(nearest)
        ]
        return [
            Gallery(
                "Samples and their nearest training videos",
                "Left the sample, right the nearest training video in the features of the evaluation CNN. Equal "
                "pairs indicate memorization.",
                pairs,
            )
        ]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(decibels(a.reshape(1, -1, 1, 1), b.reshape(1, -1, 1, 1))[0])


def join_side_by_side(videos: np.ndarray) -> np.ndarray:  # N F C S S -> F C S N*S
    return np.concatenate(list(videos), -1)


def encode_webp(
    clip: np.ndarray, milliseconds: int = FRAME_MILLISECONDS, lossless: bool = True
) -> bytes:  # F C H W in -1 .. 1 -> WebP that plays
    frames = [Image.open(io.BytesIO(encode_png(frame))).convert("RGB") for frame in clip]
    scale = max(1, MIN_HEIGHT // frames[0].height)
    frames = [f.resize((f.width * scale, f.height * scale), Image.Resampling.NEAREST) for f in frames]
    out = io.BytesIO()
    frames[0].save(
        out, "WEBP", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, lossless=lossless, quality=90
    )
    return out.getvalue()
