"""Scores of generated videos: frames, motion, what captions ask for, the next frame, and the continuation of a first frame."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fieldguide.core.errors import DataError
from fieldguide.data.column_spec import normalize_name
from fieldguide.data.dataset import Data
from fieldguide.data.preprocessing import Labels
from fieldguide.data.text_values import count_values
from fieldguide.metrics import generative
from fieldguide.tasks.base import Arrays, Baseline, Evaluator, Metric
from fieldguide.tasks.supervised_evaluator import binomial_interval

MIN_TEST_VIDEOS = 64  # minimum number of videos generated for a test
MAX_ATTRIBUTE_VALUES = 20  # with more values, a column says something of single videos
MIN_REPEATED_CAPTIONS = 0.5  # fraction of the training rows whose caption must occur again, so that captions imply attributes


def find_attributes(data: Data, caption: str) -> dict[str, list[str]]:
    """Return the values of the columns of classes that follow from the captions, by column.

    Equal captions have equal values, so that what a video shows can be compared with what its caption says. There are none if most
    captions occur once.
    """
    _, counts = count_values(data.rows[caption])
    if not len(data) or sum(count for count in counts if count > 1) < MIN_REPEATED_CAPTIONS * len(data):
        return {}
    found = {}
    for column in data.columns.values():
        if column.role == "target" or column.kind not in ("category", "boolean") or data.rows[column.name].null_count():
            continue
        values = data.rows.group_by(caption).agg(pl.col(column.name).n_unique())[column.name]
        names = Labels.fit(data.rows[column.name]).names
        if values.max() == 1 and 1 < len(names) <= MAX_ATTRIBUTE_VALUES:
            found[column.name] = list(names)
    return found


def build_attribute_metrics(names: list[str]) -> tuple[Metric, ...]:
    """Return a metric for each attribute of captions."""
    words = "of generated videos in which a CNN trained on real videos recognizes the {} of the caption"
    return tuple(
        Metric(f"recognised_{normalize_name(name)}", "max", words.format(name), percent=True, label=f"{name} recognized")
        for name in names
    )


class VideoEvaluator(Evaluator):
    """Scores generated videos. Networks that judge them are trained on the real training videos only."""

    judge: Any
    motion: Any
    matcher: Any
    text: Any
    labels: list[str]
    attributes: dict[str, list[str]]  # what captions ask for: values by column; empty for classes
    options: Any
    pictures: Any
    memo: dict[int, dict[str, Any]]
    load_middles: Any  # rows -> N F C S S in -1 .. 1
    codes: Any  # rows -> labels from 1, N, or caption tokens, N T; 0 means none
    decode_caption: Any
    reference: Any
    caption_scorer: Any

    def judged_attributes(self) -> dict[str, list[str]]:
        """Return the values of all that is recognized in videos: the class, or the attributes of captions."""
        return {"class": self.labels} if self.labels else self.attributes

    def list_class_counts(self) -> list[int]:
        """Return the number of values of each attribute."""
        return [len(values) for values in self.judged_attributes().values()]

    def attribute_codes(self, data: Data) -> np.ndarray | None:  # -> N A int64
        """Return the attributes of real videos; None if the data does not hold them. Raises `DataError` for unknown values."""
        if self.labels or not all(name in data.rows.columns for name in self.attributes) or not self.attributes:
            return None
        codes = np.stack([Labels(tuple(v)).apply(data.rows[name]) for name, v in self.attributes.items()], 1)
        if (codes < 0).any():
            name = list(self.attributes)[int(np.argwhere(codes < 0)[0, 1])]
            raise DataError(
                f"{data.source}: column {name!r} holds values that were not in the training data: known are "
                f"{', '.join(self.attributes[name])}. Correct them, or remove the column."
            )
        return codes

    def requested_attributes(self, outputs: Arrays, targets: Arrays) -> np.ndarray | None:  # -> N A
        """Return what each generated video should show; None if that is unknown."""
        if self.labels:
            return outputs["label"].astype(int)[:, None] - 1
        if "attributes" not in targets:
            return None
        return np.repeat(targets["attributes"], len(outputs["samples"]) // len(targets["real"]), 0)

    def recognise(self, videos: np.ndarray) -> np.ndarray:  # N F C S S -> N A
        """Return the attributes that are recognized in videos."""
        return generative.classify_attributes(self.motion, motion_image(torch.from_numpy(videos)), self.list_class_counts())

    def prepare_test(self, train: Data, held: Data) -> None:
        self.known, codes = self.load_middles(train), torch.from_numpy(self.codes(train))
        self.known_codes = codes
        frames, label = self.options.frames, codes - 1 if self.labels else None
        self.judge = generative.train_classifier(
            self.known.flatten(0, 1), None if label is None else label.repeat_interleave(frames), len(self.labels)
        )
        seen = motion_image(self.known)
        attributes = self.attribute_codes(train)
        if attributes is not None:
            self.motion = generative.train_classifier(seen, torch.from_numpy(attributes), self.list_class_counts())
        else:
            self.motion = generative.train_classifier(seen, label, len(self.labels))
        if self.text is not None and not self.attributes:  # attributes say more, and the matcher is large
            self.matcher = generative.train_caption_matcher(seen, codes, self.text.size)

    def estimate_scoring_seconds(self) -> float:
        channels, side = self.pictures.channels, self.pictures.side
        return generative.TRAINING_STEPS * sum(generative.measure_step_seconds(c, side) for c in (channels, 3 * channels))

    def prepare_scoring(self, rows: int) -> None:
        self.each = -(-MIN_TEST_VIDEOS // rows)

    def targets(self, data: Data) -> Arrays:
        attributes = self.attribute_codes(data)
        known = {} if attributes is None else {"attributes": attributes}
        return {"real": self.load_middles(data).numpy(), "label": self.codes(data), **known}

    def evaluate_samples(self, outputs: Arrays, targets: Arrays) -> dict[str, Any]:
        """Return features of generated and real frames (N F D), and which requests are recognized (`right` N A, `matched` N)."""
        key = id(outputs["samples"])
        if key not in self.memo:
            made, real = torch.from_numpy(outputs["samples"]), torch.from_numpy(targets["real"])
            see = lambda x: generative.extract_features(self.judge, x.flatten(0, 1)).reshape(len(x), x.shape[1], -1)
            found: dict[str, Any] = {"made": see(made), "real": see(real), "kept": outputs["samples"]}
            wanted = self.requested_attributes(outputs, targets)
            if self.motion is not None:  # runs of earlier versions may have none
                moves = lambda x: generative.extract_features(self.motion, motion_image(x))
                found |= {"made_motion": moves(made), "real_motion": moves(real)}
            if self.reference is not None:
                found |= {
                    f"reference_{name}": self.reference.extract(x.flatten(0, 1)) for name, x in (("made", made), ("real", real))
                }
            if self.caption_scorer is not None and "label" in outputs:
                found["clip"] = self.score_captions(made, outputs["label"])
            if wanted is not None and self.motion is not None:
                found["right"] = self.recognise(outputs["samples"]) == wanted
            if self.matcher is not None:
                asked, known = (torch.from_numpy(x["label"].astype(np.int64)) for x in (outputs, targets))
                found["matched"] = generative.match_captions(self.matcher, motion_image(made), asked, known)
            self.memo[key] = found
        return self.memo[key]

    def score_captions(self, made: Tensor, tokens: np.ndarray) -> np.ndarray:  # N F C S S, N T -> N
        """Return the mean CLIP score of the frames of each video."""
        captions = [self.decode_caption(row) for row in tokens.astype(int) for _ in range(made.shape[1])]
        return self.caption_scorer.score(made.flatten(0, 1), captions).reshape(len(made), -1).mean(1)

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        scores: dict[str, float] = {}
        if "samples" in outputs and self.judge is not None:
            found = self.evaluate_samples(outputs, targets)
            scores |= {name: float(values.mean()) for name, values in self.list_recognised(found).items()}
            if "blind" not in outputs:  # real videos: only what is recognized in them is scored
                scores |= compute_feature_scores(found)
                if "clip" in found:
                    scores["clip_score"] = float(found["clip"].mean())
        if "next" in outputs:
            scores["next_frame_psnr"] = float(decibels(outputs["next"], targets["real"][:, -1]).mean())
        if "continued" in outputs:
            scores["continuation_psnr"] = float(compare_continuations(outputs, targets).mean())
        if "loss" in outputs:
            scores["held_out_loss"] = float(outputs["loss"].mean())
        return scores

    def list_recognised(self, found: dict[str, Any]) -> dict[str, np.ndarray]:  # name -> N bool
        """Return for each generated video whether what was asked for is recognized, by metric."""
        recognised: dict[str, np.ndarray] = {}
        if "right" in found:
            recognised["recognised"] = found["right"].all(1)
            names = [metric.name for metric in build_attribute_metrics(list(self.attributes))]
            recognised |= dict(zip(names, found["right"].T))
        if "matched" in found:
            recognised["caption_match"] = found["matched"]
        return recognised

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return bootstrap intervals over videos."""
        found, ranges = self.evaluate_samples(outputs, targets), {}
        ranges["frame_distance"] = generative.bootstrap_distance_interval(found["real"], found["made"])
        if "made_motion" in found:
            ranges["video_distance"] = generative.bootstrap_distance_interval(found["real_motion"], found["made_motion"])
        if "reference_made" in found:
            ranges["reference_distance"] = generative.bootstrap_distance_interval(
                found["reference_real"], found["reference_made"], resamples=generative.FEW_RESAMPLES
            )
        if "clip" in found:
            ranges["clip_score"] = generative.bootstrap_mean_interval(found["clip"])
        ranges["consistency_gap"] = gap_interval(*(consistencies(found[k]) for k in ("made", "real")))
        for name, right in self.list_recognised(found).items():
            ranges[name] = binomial_interval(int(right.sum()), len(right))
        if "next" in outputs:
            ranges["next_frame_psnr"] = generative.bootstrap_mean_interval(decibels(outputs["next"], targets["real"][:, -1]))
        if "continued" in outputs:
            ranges["continuation_psnr"] = generative.bootstrap_mean_interval(compare_continuations(outputs, targets))
        if "loss" in outputs:
            ranges["held_out_loss"] = generative.bootstrap_mean_interval(outputs["loss"])
        return ranges

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        rng, label, real = np.random.default_rng(0), self.codes(test), self.load_middles(test).numpy()
        own = self.known_codes.numpy()
        same = [np.flatnonzero((own == k).reshape(len(own), -1).all(1)) for k in label]
        rows = np.array([rng.choice(found if len(found) else len(own)) for found in same])
        copies, others = self.known[rows].numpy(), self.known[rng.choice(len(self.known), len(test))].numpy()
        still = np.repeat(real[:, :1], real.shape[1], 1)
        judged = []
        if self.labels or self.text:
            blind = {"label": label, "blind": np.ones(len(label))}
            about = "training videos drawn regardless of the class or caption"
            judged = [
                Baseline("other videos", about, {"samples": others, **blind}),
                Baseline("test videos", "the real test videos themselves", {"samples": real, **blind}, bound=True),
            ]
        return [
            Baseline("copy-last", "repeats the last known frame", {"next": real[:, -2], "continued": still}),
            Baseline(
                "noise",
                "random pixels",
                {"samples": rng.uniform(-1, 1, copies.shape).astype(np.float32), "label": label},
            ),
            *judged,
            Baseline("training videos", "the training data itself", {"samples": copies, "label": own[rows]}, bound=True),
        ]


def compute_feature_scores(found: dict[str, Any]) -> dict[str, float]:
    """Return the scores from features of frames (`made` and `real`, N F D), of whole videos, and of a reference network, N D."""
    distance, frames = generative.frechet_distance, lambda x: x.reshape(-1, x.shape[-1])
    scores = {
        "frame_distance": distance(frames(found["real"]), frames(found["made"])),
        "consistency_gap": abs(mean_consistency(found["made"]) - mean_consistency(found["real"])),
    }
    if "made_motion" in found:
        scores["video_distance"] = distance(found["real_motion"], found["made_motion"])
    if "reference_made" in found:
        scores["reference_distance"] = distance(found["reference_real"], found["reference_made"])
    return scores


def compare_continuations(outputs: Arrays, targets: Arrays) -> np.ndarray:  # -> N
    """Return the signal-to-noise ratio in dB of the frames after the first one."""
    real, made = (x[:, 1:].reshape(len(x), -1, *x.shape[3:]) for x in (targets["real"], outputs["continued"]))
    return decibels(made, real)


def mean_consistency(features: np.ndarray) -> float:  # N F D
    """Return the mean cosine similarity of consecutive frames' features."""
    return float(consistencies(features).mean())


def consistencies(features: np.ndarray) -> np.ndarray:  # N F D -> N
    a, b = features[:, :-1], features[:, 1:]
    return ((a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-9)).mean(1)


def gap_interval(made: np.ndarray, real: np.ndarray) -> tuple[float, float]:  # N, M
    """Return the 95 % interval of the absolute difference of two means; it starts at 0 if the sign is uncertain."""
    rng = np.random.default_rng(0)
    gaps = [
        made[rng.integers(0, len(made), len(made))].mean() - real[rng.integers(0, len(real), len(real))].mean()
        for _ in range(generative.MEAN_RESAMPLES)
    ]
    low, high = np.percentile(gaps, (2.5, 97.5))
    return 0.0 if low <= 0 <= high else float(min(abs(low), abs(high))), float(max(abs(low), abs(high)))


def decibels(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # N C S S in -1 .. 1 -> N
    """Return the peak signal-to-noise ratio in dB."""
    return -10 * np.log10(np.maximum(((a - b) ** 2).mean((1, 2, 3)) / 4, 1e-10))


def motion_image(videos: Tensor) -> Tensor:  # N F C S S -> N 3C S S
    """Return each video as one image: its middle frame, the mean change between frames, and the first half minus the
    second half.
    """
    half = videos.shape[1] // 2
    change = (videos[:, 1:] - videos[:, :-1]).abs().mean(1)
    return torch.cat([videos[:, half], change, videos[:, :half].mean(1) - videos[:, half:].mean(1)], 1)
