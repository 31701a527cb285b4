"""Video generation: videos like those of a folder, by class if it has classes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
import polars as pl
import torch
from PIL import Image
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.report_elements import Gallery, Picture, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import CHANNELS, FRAMES, HEIGHT, WIDTH, Data
from fieldguide.data.loader import Batches
from fieldguide.data.media import video
from fieldguide.data.preprocessing import ImageTransform, Labels, suggest_side
from fieldguide.metrics import generative
from fieldguide.objectives import Objective, build_process
from fieldguide.objectives.diffusion import evaluate
from fieldguide.objectives.noise import Noise
from fieldguide.tasks.base import Arrays, Baseline, Media, Metric
from fieldguide.tasks.supervised import fill_options, is_discrete
from fieldguide.tasks.supervised_evaluator import binomial_interval
from fieldguide.tasks.vision.image_generation import ImageGeneration, build_sampler, check_sampler, encode_png
from fieldguide.tasks.vision.signature import VideoGenerationSignature

VIDEO_SIDES = (16, 32, 64)
MAX_SIDE_BY_DEVICE = {"cpu": 32, "mps": 64, "cuda": 64}  # maximum pixels per side by device, if the user sets no size
FRAMES_BY_DEVICE = {"cpu": 8, "mps": 16, "cuda": 16}  # frames by device
MIN_TEST_VIDEOS = 64  # minimum number of videos generated for a test
SHOWN_PER_CLASS = 3  # videos of each class in the report
FRAME_MILLISECONDS = 120  # milliseconds per frame


class VideoGeneration(VideoGenerationSignature, ImageGeneration):
    name = "video-generation"
    reads = (
        "a folder of videos, optionally one folder per class: MP4 and similar, GIF or WebP, or strips of "
        "square frames; or a table of their paths"
    )
    input_types = ("noisy-video",)
    feature = ("video",)
    output_types = ("video",)
    column_spec = ColumnSpec("named", media={"image": "video"})
    metrics = (
        Metric("frame_distance", "min", "Fréchet distance of frames in the features of a small CNN trained on this data"),
        Metric(
            "recognised",
            "max",
            "of generated videos assigned to the requested class by a CNN trained on real videos",
            percent=True,
        ),
        Metric("consistency_gap", "min", "difference to real videos in the similarity of consecutive frames"),
        Metric(
            "next_frame_psnr",
            "max",
            "dB between the next frame predicted from the frames before it and the real one",
            label="next-frame PSNR",
        ),
        Metric("held_out_loss", "min", "noise prediction error on held-out videos"),
    )
    max_validation_examples, max_test_examples = 100, 100
    each = 1  # videos generated per requested label
    max_batch_size, min_batch_size = 32, 8

    @dataclass(frozen=True)
    class Options(ImageGeneration.Options):
        frames: int | None = None  # frames per video
        stride: int = 1  # use every n-th frame of a video

    @dataclass(frozen=True)
    class PredictOptions(ImageGeneration.PredictOptions):
        guidance: Annotated[float, Limits(0, 100)] = 3.0  # classifier-free guidance scale; 3 shows the class better than 1.5

    # Videos as tensors

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        return None if len(data.features("video")) == 1 else "a video column"

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        if data.target is not None and not is_discrete(data.target):
            raise DataError(
                f"{data.source}: the label column {data.required_target.name!r} must hold classes, but holds {data.required_target.kind}."
            )
        kind, shortest = device().type, int(data.rows.select(pl.min(FRAMES)).item())
        most = min(suggest_side(data.rows[WIDTH], data.rows[HEIGHT]), MAX_SIDE_BY_DEVICE[kind])
        side = options.side or max((s for s in VIDEO_SIDES if s <= most), default=VIDEO_SIDES[0])
        channels = options.channels or (3 if (data.rows[CHANNELS] == 3).any() else 1)
        frames = options.frames or max(2, min(FRAMES_BY_DEVICE[kind], shortest // options.stride))
        task.pictures = ImageTransform(side, channels, (0.5,) * channels, (0.5,) * channels)  # -1 .. 1
        task.labels = list(Labels.fit(data.rows[data.required_target.name]).names) if data.target else []
        predicts = build_process(options.schedule, options.predicts).predicts
        task.options = fill_options(options, side=side, channels=channels, frames=frames, predicts=predicts)
        task.note_classes()
        if short := int((data.rows[FRAMES] < frames * options.stride).sum()):
            task.notes.append(f"{short} videos are shorter than {frames} frames: their last frame is repeated")
        return task

    def model_dims(self) -> dict[str, Any]:
        return {**super().model_dims(), "frames": self.options.frames}

    @classmethod
    def student_options(cls, teacher: Any, card: Card) -> dict[str, Any] | None:
        return None

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        if self.options.method != "diffusion":
            raise SettingsError(f"method={self.options.method!r} is an option of image generation; videos have diffusion only.")
        return self.build_diffusion(model, "video")

    def load_videos(self, data: Data) -> list[np.ndarray]:
        return video.load(data.rows[self.column].to_list(), self.pictures.side, self.pictures.channels)

    def cut_frames(self, film: np.ndarray, start: float) -> np.ndarray:
        """Return `frames` frames; `start` places them from the beginning (0) to the end (1) of the video."""
        wanted = self.options.frames * self.options.stride
        first = int(start * max(len(film) - wanted + 1, 0))
        index = np.minimum(first + np.arange(0, wanted, self.options.stride), len(film) - 1)
        return film[index]

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        films, label = self.load_videos(data), torch.from_numpy(self.codes(data))

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            start = torch.rand(len(index), generator=generator).tolist() if generator is not None else [0.5] * len(index)
            x = torch.from_numpy(np.stack([self.cut_frames(films[i], s) for i, s in zip(index, start)]))
            if generator is not None and self.options.flip:
                x = torch.where((torch.rand(len(x), generator=generator) < 0.5).view(-1, 1, 1, 1, 1), x.flip(-1), x)
            rows = torch.from_numpy(index)
            return {"video": self.pictures.apply(x), "label": label[rows], "row": rows}

        return Batches(len(films), make)

    def load_middles(self, data: Data) -> Tensor:
        """Return the middle of each video, (N, F, C, S, S) in -1 .. 1."""
        return self.pictures.apply(torch.from_numpy(np.stack([self.cut_frames(f, 0.5) for f in self.load_videos(data)])))

    # Generation

    def generate(self, objective: Any, label: Tensor, numbers: Sequence[int], predict_options: Any) -> Tensor:
        p = self.pictures
        check_sampler(predict_options, is_consistency=False)
        return objective.sample(
            label,
            (self.options.frames, p.channels, p.side, p.side),
            build_sampler(predict_options),
            seed=predict_options.seed,
            numbers=numbers,
            guidance=predict_options.guidance if self.labels else 1.0,
        ).clamp(-1, 1)

    def predict_step(self, objective: Objective) -> Any:
        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            extra = torch.arange(self.each, device=batch["label"].device)
            label, numbers = batch["label"][:, None], batch["row"][:, None] * self.each + extra.cpu()
            if self.labels:  # the sample's own class first, then the others in turn
                label = (label - 1 + extra) % len(self.labels) + 1
            label = label.expand(-1, self.each)
            samples = self.generate(objective, label.flatten(), numbers.flatten().tolist(), self.predict_options)
            found = {"samples": samples.unflatten(0, label.shape), "label": label}
            if "video" in batch:
                found |= objective.outputs(batch) | {"next": self.predict_last_frame(objective, batch)}
            return found

        return answer

    def predict_last_frame(self, objective: Any, batch: dict[str, Tensor]) -> Tensor:  # -> B C S S
        """Predict the last frame from those before it.

        At each sampler step the known frames are restored with the noise of that step (Lugmayr et al. 2022,
        arXiv:2201.09865, equation 8, without resampling).
        """
        film, label, process = batch["video"], batch["label"], objective.process
        draw = Noise(self.predict_options.seed, batch["row"].tolist(), film.shape[1:], film)
        noise, sampler = draw(), build_sampler(self.predict_options)
        state = sampler.start(process, draw, noise=noise)
        while not state.done:
            state.x[:, :-1] = process.add_noise(film, noise, state.level)[:, :-1]
            sampler.step(state, evaluate(objective.model, process, state, label))
        return state.x[:, -1].clamp(-1, 1)

    def postprocess(self, outputs: Arrays) -> Arrays:
        return {**outputs, **{k: np.concatenate(list(outputs[k])) for k in ("samples", "label")}}

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        names = ["", *self.labels]
        return [
            {**({"class": names[int(label)]} if self.labels else {}), "video": Media(encode_webp(x), ".webp")}
            for x, label in zip(outputs["samples"], outputs["label"].astype(int))
        ]

    # Evaluation

    def prepare_test(self, train: Data, held: Data) -> None:
        self.known, self.known_labels = self.load_middles(train), torch.from_numpy(self.codes(train)) - 1
        label = self.known_labels if self.labels else None
        frames = self.options.frames
        self.judge = generative.train_classifier(
            self.known.flatten(0, 1), None if label is None else label.repeat_interleave(frames), len(self.labels)
        )
        self.motion = generative.train_classifier(motion_image(self.known), label, len(self.labels)) if self.labels else None

    def prepare_scoring(self, rows: int) -> None:
        self.each = -(-MIN_TEST_VIDEOS // rows)

    def targets(self, data: Data) -> Arrays:
        return {"real": self.load_middles(data).numpy(), "label": self.codes(data)}

    def evaluate_samples(self, outputs: Arrays, targets: Arrays) -> dict[str, Any]:
        key = id(outputs["samples"])
        if key not in self.memo:
            made, real = torch.from_numpy(outputs["samples"]), torch.from_numpy(targets["real"])
            see = lambda x: generative.extract_features(self.judge, x.flatten(0, 1)).reshape(len(x), x.shape[1], -1)
            found: dict[str, Any] = {"made": see(made), "real": see(real), "kept": outputs["samples"]}
            if self.motion is not None:
                found["right"] = (
                    generative.extract_features(self.motion, motion_image(made), return_classes=True)
                    == outputs["label"].astype(int) - 1
                )
            self.memo[key] = found
        return self.memo[key]

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        scores: dict[str, float] = {}
        if "samples" in outputs and self.judge is not None:
            scores |= compute_feature_scores(self.evaluate_samples(outputs, targets))
        if "next" in outputs:
            scores["next_frame_psnr"] = float(decibels(outputs["next"], targets["real"][:, -1]).mean())
        if "loss" in outputs:
            scores["held_out_loss"] = float(outputs["loss"].mean())
        return scores

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return bootstrap intervals over videos."""
        found, ranges = self.evaluate_samples(outputs, targets), {}
        ranges["frame_distance"] = generative.bootstrap_distance_interval(found["real"], found["made"])
        ranges["consistency_gap"] = gap_interval(*(consistencies(found[k]) for k in ("made", "real")))
        if "right" in found:
            ranges["recognised"] = binomial_interval(int(found["right"].sum()), len(found["right"]))
        if "next" in outputs:
            ranges["next_frame_psnr"] = generative.bootstrap_mean_interval(decibels(outputs["next"], targets["real"][:, -1]))
        if "loss" in outputs:
            ranges["held_out_loss"] = generative.bootstrap_mean_interval(outputs["loss"])
        return ranges

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        rng, label, real = np.random.default_rng(0), self.codes(test), self.load_middles(test).numpy()
        own = self.known_labels.numpy() + 1
        rows = np.array([rng.choice(np.flatnonzero(own == k)) for k in label])
        copies = self.known[rows].numpy()
        return [
            Baseline("copy-last", "repeats the last frame", {"next": real[:, -2]}),
            Baseline(
                "noise",
                "random pixels",
                {"samples": rng.uniform(-1, 1, copies.shape).astype(np.float32), "label": label},
            ),
            Baseline("training videos", "the training data itself", {"samples": copies, "label": label}, bound=True),
        ]

    # Report

    def log_eval_samples(self, objective: Objective) -> list[ReportElement]:
        count = max(2, min(len(self.labels), 8))
        label = torch.arange(count) % max(len(self.labels), 1) + bool(self.labels)
        made = self.generate(objective, label, range(count), self.PredictOptions()).cpu().numpy()
        return [
            Gallery(
                "Samples during training",
                "Generated from the same noise each time.",
                [Picture(encode_webp(join_side_by_side(made)), "")],
            )
        ]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        samples, label = outputs["samples"], outputs["label"].astype(int)
        names = ["videos", *self.labels]
        shown = [
            Picture(encode_webp(samples[i]), names[k])
            for k in np.unique(label)
            for i in np.flatnonzero(label == k)[:SHOWN_PER_CLASS]
        ]
        real = [
            Picture(encode_webp(targets["real"][i]), names[k]) for k in np.unique(label) for i in np.flatnonzero(label == k)[:1]
        ]
        comparisons = [
            Picture(
                encode_png(np.concatenate([targets["real"][i, -2], targets["real"][i, -1], outputs["next"][i]], 2)),
                f"{psnr(outputs['next'][i], targets['real'][i, -1]):.1f} dB",
            )
            for i in range(len(outputs["next"]))[:8]
        ]
        by_class = (
            [
                (names[k], int((label == k).sum()), float(self.evaluate_samples(outputs, targets)["right"][label == k].mean()))
                for k in np.unique(label)
            ]
            if self.labels
            else []
        )
        return {
            "Samples": [
                Gallery("Generated videos", "Random samples.", shown),
                Gallery("Real test videos", "For comparison.", real),
                *(
                    [
                        Table(
                            "Recognized",
                            "Fraction of the generated videos that a CNN trained on real videos assigns to the "
                            "requested class.",
                            ("class", "videos", "recognised"),
                            by_class,
                        )
                    ]
                    if by_class
                    else []
                ),
                Gallery("Next frame", "The last known frame, the real next frame, and the predicted next frame.", comparisons),
            ],
            "Memory": self.memorization_elements(samples, targets),
        }

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


def compute_feature_scores(found: dict[str, Any]) -> dict[str, float]:
    """Return the scores from features `made` and `real` (N, F, D) and predictions `right` (N)."""
    scores = {
        "frame_distance": generative.frechet_distance(*(found[k].reshape(-1, found[k].shape[-1]) for k in ("real", "made"))),
        "consistency_gap": abs(mean_consistency(found["made"]) - mean_consistency(found["real"])),
    }
    return scores | ({"recognised": float(found["right"].mean())} if "right" in found else {})


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


def motion_image(films: Tensor) -> Tensor:  # N F C S S -> N 3C S S
    """Return each video as one image: its middle frame, the mean change between frames, and the first half minus the
    second half.
    """
    half = films.shape[1] // 2
    change = (films[:, 1:] - films[:, :-1]).abs().mean(1)
    return torch.cat([films[:, half], change, films[:, :half].mean(1) - films[:, half:].mean(1)], 1)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(max(((a - b) ** 2).mean() / 4, 1e-10)))


def join_side_by_side(films: np.ndarray) -> np.ndarray:  # N F C S S -> F C S N*S
    return np.concatenate(list(films), -1)


def encode_webp(film: np.ndarray) -> bytes:  # F C S S in -1 .. 1 -> WebP that plays
    frames = [Image.open(io.BytesIO(encode_png(frame))).convert("RGB") for frame in film]
    scale = max(1, 96 // frames[0].height)
    frames = [f.resize((f.width * scale, f.height * scale), Image.Resampling.NEAREST) for f in frames]
    out = io.BytesIO()
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], duration=FRAME_MILLISECONDS, loop=0, lossless=True)
    return out.getvalue()


TASKS = (VideoGeneration,)
