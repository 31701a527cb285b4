"""Scores of generated images: distances to real ones in the features of networks, what their captions ask for, and what a classifier
learns from them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.errors import SettingsError
from fieldguide.data.dataset import Data
from fieldguide.metrics import generative
from fieldguide.tasks.base import Arrays, Baseline, Evaluator, Metric
from fieldguide.tasks.supervised_evaluator import binomial_interval
from fieldguide.tasks.vision.reference_networks import CaptionScorer, FeatureNetwork

MAX_EVALUATION_IMAGES = 10_000  # maximum training images for the evaluation models
METRICS = (
    Metric("feature_distance", "min", "Fréchet distance in the features of a small CNN trained on this data"),
    Metric("kernel_distance", "min", "squared maximum mean discrepancy in the same features (KID in other features)"),
    Metric("precision", "max", "of generated images look real", percent=True),
    Metric("recall", "max", "of real images are covered by generated ones", percent=True),
    Metric("density", "max", "how densely generated images lie where real ones are; about 1 for real images"),
    Metric("coverage", "max", "of real images have a generated one among their neighbors", percent=True),
    Metric(
        "classifier_accuracy",
        "max",
        "of real test images classified correctly by a CNN trained on generated images alone",
        percent=True,
    ),
    Metric(
        "caption_match", "max", "of generated images whose caption a model trained on real pairs picks out of ten", percent=True
    ),
    Metric("clip_score", "max", "100 times the similarity of images and captions to the network that task.clip names"),
    Metric(
        "reference_distance",
        "min",
        "Fréchet distance in the features of the network that task.features names: FID if it is inception-v3-fid",
    ),
    Metric("held_out_loss", "min", "on held-out images: noise prediction error; for GANs a distance of thumbnails"),
)
MEANS = {"right": "classifier_accuracy", "matched": "caption_match", "clip": "clip_score"}  # of values per image -> metric


class GenerationEvaluator(Evaluator):
    """Scores generated images. Networks that judge them are trained on the real training images only."""

    judge: Any
    matcher: Any
    text: Any
    labels: list[str]
    options: Any
    pictures: Any
    memo: dict[int, dict[str, Any]]
    column: Any
    codes: Any  # rows -> labels from 1, N, or caption tokens, N T; 0 means none
    decode_caption: Any

    @functools.cached_property
    def reference(self) -> FeatureNetwork | None:
        """The network whose features `reference_distance` compares; None if the options name none."""
        return FeatureNetwork.load(self.options.features) if self.options.features else None

    @functools.cached_property
    def caption_scorer(self) -> CaptionScorer | None:
        """The network of `clip_score`; None if the options name none."""
        return CaptionScorer.load(self.options.clip) if self.options.clip else None

    def check_reference_networks(self) -> None:
        """Load the networks that scores need. Raises `SettingsError` and `WeightsError` before any training."""
        if self.options.clip and self.text is None:
            raise SettingsError("task.clip scores images by their captions, but the data has none. Leave it out.")
        if self.reference is not None:
            self.reference.extract(torch.zeros(1, self.pictures.channels, self.pictures.side, self.pictures.side))
        _ = self.caption_scorer

    def estimate_scoring_seconds(self) -> float:
        steps = generative.TRAINING_STEPS * (1 + bool(self.labels or self.text))
        return steps * generative.measure_step_seconds(self.pictures.channels, self.pictures.side)

    def prepare_test(self, train: Data, held: Data) -> None:
        rows = np.random.default_rng(0).permutation(len(train))[:MAX_EVALUATION_IMAGES]
        some = train.take(np.sort(rows))
        self.known = self.pictures.apply(self.pictures.load(some.rows[self.column].to_list()))
        codes = torch.from_numpy(self.codes(some))
        self.known_labels = codes if self.text else codes - 1
        self.matcher = generative.train_caption_matcher(self.known, codes, self.text.size) if self.text else None
        self.judge = generative.train_classifier(self.known, self.known_labels if self.labels else None, len(self.labels))

    def targets(self, data: Data) -> Arrays:
        real = self.pictures.apply(self.pictures.load(data.rows[self.column].to_list()))
        return {"real": real.numpy(), "label": self.codes(data)}

    def evaluate_samples(self, outputs: Arrays, targets: Arrays) -> dict[str, Any]:
        """Return what scores are computed from, once for each set of samples: features of generated and real images, and whether
        classes and captions are recognized (see `judge_requests`)."""
        key = id(outputs["samples"])
        if key not in self.memo:
            made, real = torch.from_numpy(outputs["samples"]), torch.from_numpy(targets["real"])
            found: dict[str, Any] = {
                "made": generative.extract_features(self.judge, made),
                "real": generative.extract_features(self.judge, real),
            }
            found |= self.judge_requests(outputs, targets, made, real)
            if self.reference is not None:
                found["reference_made"] = self.reference.extract(made)
                found["reference_real"] = self.extract_real_features(real)
            if self.caption_scorer is not None and "label" in outputs:
                captions = [self.decode_caption(tokens) for tokens in outputs["label"].astype(int)]
                found["clip"] = self.caption_scorer.score(made, captions)
            self.memo[key] = found | {"kept": outputs["samples"]}  # keeps the array alive, so that its id stays unique
        return self.memo[key]

    def judge_requests(self, outputs: Arrays, targets: Arrays, made: Tensor, real: Tensor) -> Arrays:
        """Return `right`, whether a CNN trained on the samples classifies each real image correctly, and `matched`, whether each
        sample matches its caption.

        Training images (`known`) are scored with the CNN that was trained on them. Samples without labels have neither.
        """
        found: Arrays = {}
        if "label" not in outputs:
            return found
        label = torch.from_numpy(outputs["label"].astype(np.int64))
        if self.labels:
            pupil = self.judge if "known" in outputs else generative.train_classifier(made, label - 1, len(self.labels))
            found["right"] = generative.extract_features(pupil, real, return_classes=True) == targets["label"] - 1
        if self.matcher is not None:
            found["matched"] = generative.match_captions(self.matcher, made, label, torch.from_numpy(targets["label"]))
        return found

    def extract_real_features(self, real: Tensor) -> np.ndarray:
        """Return the features of real images, computed once for all that is compared with them."""
        assert self.reference is not None
        key = real.data_ptr()
        if key not in self.memo:
            self.memo[key] = {"features": self.reference.extract(real), "kept": real}
        return self.memo[key]["features"]

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        scores = {}
        if "samples" in outputs and self.judge is not None:
            found = self.evaluate_samples(outputs, targets)
            if "blind" in outputs:  # real images: only their match with the captions is scored
                return {"caption_match": float(found["matched"].mean())}
            scores = {
                "feature_distance": generative.frechet_distance(found["real"], found["made"]),
                **generative.compute_cloud_scores(found["real"], found["made"]),
            }
            scores |= {metric: float(found[name].mean()) for name, metric in MEANS.items() if name in found}
            if "reference_made" in found:
                scores["reference_distance"] = generative.frechet_distance(found["reference_real"], found["reference_made"])
        if "loss" in outputs:
            scores["held_out_loss"] = float(outputs["loss"].mean())
        elif "samples" in outputs:
            scores["held_out_loss"] = generative.frechet_distance(
                compute_thumbnails(outputs["samples"]), compute_thumbnails(targets["real"])
            )
        return scores

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return bootstrap intervals over images; scores by neighbors use halves."""
        found = self.evaluate_samples(outputs, targets)
        ranges = {"feature_distance": generative.bootstrap_distance_interval(found["real"], found["made"])}
        ranges |= generative.jackknife_cloud_intervals(found["real"], found["made"])
        ranges["held_out_loss"] = (
            generative.bootstrap_mean_interval(outputs["loss"])
            if "loss" in outputs
            else generative.bootstrap_distance_interval(
                compute_thumbnails(outputs["samples"]), compute_thumbnails(targets["real"])
            )
        )
        for name, metric in MEANS.items():
            if name in found and found[name].dtype == bool:
                ranges[metric] = binomial_interval(int(found[name].sum()), len(found[name]))
            elif name in found:
                ranges[metric] = generative.bootstrap_mean_interval(found[name])
        if "reference_made" in found:
            ranges["reference_distance"] = generative.bootstrap_distance_interval(
                found["reference_real"], found["reference_made"], resamples=generative.FEW_RESAMPLES
            )
        return ranges

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        rng = np.random.default_rng(0)
        label = self.codes(test)
        noise = rng.uniform(-1, 1, (len(test), *self.known.shape[1:])).astype(np.float32)
        if self.labels:  # training images of the same classes
            own = [np.flatnonzero(self.known_labels.numpy() == k - 1) for k in range(1, len(self.labels) + 1)]
            rows = np.array([rng.choice(own[k - 1]) for k in label])
        else:
            rows = rng.permutation(len(self.known))[: len(test)]
        copies = self.known[rows].numpy()
        shuffled = []
        if self.text:
            other = self.known[rng.permutation(len(self.known))[: len(test)]].numpy()
            shuffled = [
                Baseline(
                    "shuffled captions",
                    "training images with captions of other images",
                    {"samples": other, "label": label[: len(other)], "blind": np.ones(len(other))},
                )
            ]
            label = self.known_labels[rows].numpy()
        return [
            Baseline("noise", "random pixels", {"samples": noise}),
            *shuffled,
            Baseline(
                "training images",
                "the training data itself: an upper bound",
                {"samples": copies, "label": label[: len(copies)], "known": np.ones(len(copies))},
                bound=True,
            ),
        ]


def compute_thumbnails(pictures: np.ndarray) -> np.ndarray:  # N C S S -> N C * 64
    """Return 8 x 8 thumbnails as vectors."""
    return torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(pictures)), 8).flatten(1).numpy()
