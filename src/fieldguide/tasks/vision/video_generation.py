"""Video generation: videos like those of a folder, by class or caption if it has them, and from a given first frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.report_elements import Gallery, Picture, ReportElement
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data.column_spec import CAPTION_NAMES, ColumnSpec
from fieldguide.data.dataset import CHANNELS, FRAMES, HEIGHT, WIDTH, Column, Data, Manifest
from fieldguide.data.loader import Batches
from fieldguide.data.media import video
from fieldguide.data.preprocessing import ImageTransform, suggest_side
from fieldguide.objectives import Objective, build_process
from fieldguide.objectives.diffusion import VideoDiffusion, evaluate
from fieldguide.objectives.noise import Noise
from fieldguide.tasks.base import Arrays, Media, Metric
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.vision.image_generation import ImageGeneration
from fieldguide.tasks.vision.image_generation_conditions import infer_target_kind, is_captioned
from fieldguide.tasks.vision.image_generation_evaluator import METRICS
from fieldguide.tasks.vision.image_generation_options import GenerationOptions, SampleOptions
from fieldguide.tasks.vision.image_generation_sampling import build_sampler, check_sampler
from fieldguide.tasks.vision.signature import VideoGenerationSignature
from fieldguide.tasks.vision.video_evaluator import VideoEvaluator, build_attribute_metrics, find_attributes
from fieldguide.tasks.vision.video_report import VideoReport, encode_webp, join_side_by_side
from fieldguide.tasks.vision.video_requests import VideoRequest, read_requests

VIDEO_SIDES = (16, 32, 64)
MAX_SIDE_BY_DEVICE = {"cpu": 32, "mps": 64, "cuda": 64}  # maximum pixels per side by device, if the user sets no size
FRAMES_BY_DEVICE = {"cpu": 8, "mps": 16, "cuda": 16}  # frames by device
DEFAULT_FIRST_FRAME = 0.25  # fraction of training videos whose first frame is given


class VideoGeneration(VideoGenerationSignature, VideoEvaluator, VideoReport, ImageGeneration):
    name = "video-generation"
    reads = (
        "a folder of videos, optionally one folder per class or a table of captions: MP4 and similar, GIF or WebP, or strips of "
        "square frames; or a table of their paths, optionally with classes or captions"
    )
    input_types = ("noisy-video",)
    feature = ("video",)
    output_types = ("video",)
    column_spec = ColumnSpec(
        "named",
        names=CAPTION_NAMES,
        kinds={"target": infer_target_kind},
        columns=dict.fromkeys(CAPTION_NAMES, "text"),
        media={"image": "video"},
    )
    metrics = (
        Metric("frame_distance", "min", "Fréchet distance of frames in the features of a small CNN trained on this data"),
        Metric(
            "video_distance",
            "min",
            "Fréchet distance of videos in the features of a small CNN that sees a frame and the changes (FVD in other features)",
        ),
        Metric(
            "recognised",
            "max",
            "of generated videos in which a CNN trained on real videos recognizes the class, or all that it knows of the caption",
            percent=True,
        ),
        Metric(
            "caption_match",
            "max",
            "of generated videos whose caption a model trained on real pairs picks out of ten, if no columns say what captions ask for",
            percent=True,
        ),
        *(metric for metric in METRICS if metric.name in ("clip_score", "reference_distance")),
        Metric("consistency_gap", "min", "difference to real videos in the similarity of consecutive frames"),
        Metric(
            "next_frame_psnr",
            "max",
            "dB between the next frame predicted from the frames before it and the real one",
            label="next-frame PSNR",
        ),
        Metric(
            "continuation_psnr",
            "max",
            "dB between the frames generated from the first one, with the class or caption, and the real ones",
            label="continuation PSNR",
        ),
        Metric("held_out_loss", "min", "noise prediction error on held-out videos"),
    )
    max_validation_examples, max_test_examples = 100, 100
    each = 1  # videos generated per requested label or caption
    max_batch_size, min_batch_size = 32, 8

    @dataclass(frozen=True)
    class Options(GenerationOptions):
        frames: int | None = None  # frames per video
        stride: int = 1  # use every n-th frame of a video
        first_frame: float | None = None  # fraction of training videos whose first frame is given, to learn to continue images

    @dataclass(frozen=True)
    class PredictOptions(SampleOptions):
        guidance: Annotated[float, Limits(0, 100)] = 3.0  # classifier-free guidance scale; 3 shows the class better than 1.5

    # Videos as tensors

    def __init__(self, columns: list[Column], options: Any):
        super().__init__(columns, options)
        self.set_attributes({})
        self.set_row_form()

    def set_attributes(self, attributes: dict[str, list[str]]) -> None:
        """Set what captions ask for; each attribute has a metric."""
        self.attributes = attributes
        vars(self)["metrics"] = (*type(self).metrics, *build_attribute_metrics(list(attributes)))

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        return None if len(data.features("video")) == 1 else "a video column"

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task, captioned = cls(list(data.columns.values()), options), is_captioned(data)
        if other := [f"task.{name}" for name in ("unclip", "upsamplers") if getattr(options, name) is not None]:
            raise SettingsError(f"{', '.join(other)}: an option of image generation. Leave it out.")
        if options.first_frame is not None and not 0 <= options.first_frame < 1:
            raise SettingsError(f"task.first_frame={options.first_frame} must be at least 0 and below 1")
        kind, shortest = device().type, int(data.rows.select(pl.min(FRAMES)).item())
        most = min(suggest_side(data.rows[WIDTH], data.rows[HEIGHT]), MAX_SIDE_BY_DEVICE[kind])
        side = options.side or max((s for s in VIDEO_SIDES if s <= most), default=VIDEO_SIDES[0])
        channels = options.channels or (3 if (data.rows[CHANNELS] == 3).any() else 1)
        frames = options.frames or max(2, min(FRAMES_BY_DEVICE[kind], shortest // options.stride))
        task.pictures = ImageTransform(side, channels, (0.5,) * channels, (0.5,) * channels)  # -1 .. 1
        task.fit_labels(data)
        predicts = build_process(options.schedule, options.predicts).predicts
        known = {"side": side, "channels": channels, "frames": frames, "first_frame": DEFAULT_FIRST_FRAME}
        task.options = fill_options(options, **known, predicts=predicts)
        task.set_row_form()
        task.note_classes()
        if captioned:
            texts = data.rows[data.required_target.name].fill_null("").to_list()
            task.fit_captions(texts, task.fit_tokenizer(texts))
            task.set_attributes(find_attributes(data, data.required_target.name))
        if short := int((data.rows[FRAMES] < frames * options.stride).sum()):
            task.notes.append(f"{short} videos are shorter than {frames} frames: their last frame is repeated")
        task.check_reference_networks()
        return task

    def model_dims(self) -> dict[str, Any]:
        return {**super().model_dims(), "frames": self.options.frames}

    @classmethod
    def student_options(cls, teacher: Any, card: Card) -> dict[str, Any] | None:
        return None

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        if self.options.method != "diffusion":
            raise SettingsError(f"method={self.options.method!r} is an option of image generation; videos have diffusion only.")
        plain = self.build_diffusion(model, "video")
        return VideoDiffusion(model, plain.process, plain.weighting, given=self.options.first_frame or 0.0)

    def load_videos(self, data: Data) -> list[np.ndarray]:
        return video.load(data.rows[self.column].to_list(), self.pictures.side, self.pictures.channels)

    def cut_frames(self, clip: np.ndarray, start: float) -> np.ndarray:
        """Return `frames` frames; `start` places them from the beginning (0) to the end (1) of the video."""
        wanted = self.options.frames * self.options.stride
        first = int(start * max(len(clip) - wanted + 1, 0))
        index = np.minimum(first + np.arange(0, wanted, self.options.stride), len(clip) - 1)
        return clip[index]

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        videos, label = self.load_videos(data), torch.from_numpy(self.codes(data))

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            start = torch.rand(len(index), generator=generator).tolist() if generator is not None else [0.5] * len(index)
            x = torch.from_numpy(np.stack([self.cut_frames(videos[i], s) for i, s in zip(index, start)]))
            if generator is not None and self.options.flip:
                x = torch.where((torch.rand(len(x), generator=generator) < 0.5).view(-1, 1, 1, 1, 1), x.flip(-1), x)
            rows = torch.from_numpy(index)
            return {"video": self.pictures.apply(x), "label": label[rows], "row": rows}

        return Batches(len(videos), make)

    def load_middles(self, data: Data) -> Tensor:
        """Return the middle of each video, (N, F, C, S, S) in -1 .. 1."""
        return self.pictures.apply(torch.from_numpy(np.stack([self.cut_frames(f, 0.5) for f in self.load_videos(data)])))

    # Generation

    def generate(
        self,
        objective: Any,
        label: Tensor,
        numbers: Sequence[int],
        predict_options: Any,
        first: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:  # -> B F C S S
        """Generate videos of these labels or captions (0 = none). `first` B C S S are their first frames where `known` B is True."""
        p = self.pictures
        check_sampler(predict_options, is_consistency=False)
        return objective.sample(
            label,
            (self.options.frames, p.channels, p.side, p.side),
            build_sampler(predict_options),
            seed=predict_options.seed,
            numbers=numbers,
            guidance=predict_options.guidance if self.labels or self.text else 1.0,
            first=first,
            known=known,
        ).clamp(-1, 1)

    def read(self, sources: Sequence[Any], *, answered: bool = False) -> Data:
        """Read classes or captions, first frames, or both; without input, all classes or some training captions in turn."""
        if answered:
            return super().read(sources, answered=True)
        requests = read_requests(sources, self.request_column)
        if self.text is None:
            self.check_classes([request.text for request in requests if request.text])
        if any(request.image for request in requests) and not self.options.first_frame:
            raise DataError(
                "an image is given, but the network was trained without given first frames. Train it with --set task.first_frame=0.25."
            )
        count, others = self.predict_options.count, self.captions or self.labels or [""]
        wanted = [r for request in requests for r in [request] * count]
        wanted = wanted or [VideoRequest(others[i % len(others)]) for i in range(count)]
        rows = {"wanted": [r.text for r in wanted], "image": [r.image for r in wanted]}
        return Data("made", pl.DataFrame(rows), {}, Manifest(""))

    @property
    def request_column(self) -> str:
        """Return the name of the class or caption in requests."""
        return "caption" if self.text is not None else "class"

    def predict_batches(self, data: Data, card: Card) -> Batches:
        named = super().predict_batches(data, card)
        if not self.options.first_frame:
            return named
        paths = data.rows["image"].to_list()
        different = list(dict.fromkeys(path for path in paths if path))
        p, row_of = self.pictures, {path: i for i, path in enumerate(different)}
        frames = p.apply(p.load(different)) if different else torch.zeros(0, p.channels, p.side, p.side)

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            known = torch.tensor([bool(paths[i]) for i in index])
            first = torch.zeros(len(index), p.channels, p.side, p.side)
            first[known] = frames[torch.tensor([row_of[paths[i]] for i in index if paths[i]], dtype=torch.int64)]
            return {**named.make(index, generator), "first": first, "known": known}

        return Batches(len(data), make)

    def predict_step(self, objective: Objective) -> Any:
        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            extra = torch.arange(self.each, device=batch["label"].device)
            label, numbers = batch["label"][:, None], batch["row"][:, None] * self.each + extra.cpu()
            if self.labels:  # the sample's own class first, then the others in turn
                label = (label - 1 + extra) % len(self.labels) + (label > 0)
            label = label.expand(-1, self.each, *label.shape[2:])
            given = {k: batch[k].repeat_interleave(self.each, 0) for k in ("first", "known") if k in batch}
            samples = self.generate(objective, label.flatten(0, 1), numbers.flatten().tolist(), self.predict_options, **given)
            found = {"samples": samples.unflatten(0, label.shape[:2]), "label": label}
            if "video" in batch:
                found |= objective.outputs(batch) | {"next": self.predict_last_frame(objective, batch)}
                if self.options.first_frame:
                    found["continued"] = self.continue_first_frame(objective, batch)
            return found

        return answer

    def continue_first_frame(self, objective: Objective, batch: dict[str, Tensor]) -> Tensor:  # -> B F C S S
        """Generate videos from the first frames of real ones and their labels or captions."""
        first, numbers = batch["video"][:, 0], batch["row"].tolist()
        known = torch.ones(len(first), dtype=torch.bool)
        return self.generate(objective, batch["label"], numbers, self.predict_options, first, known)

    def predict_last_frame(self, objective: Any, batch: dict[str, Tensor]) -> Tensor:  # -> B C S S
        """Predict the last frame from those before it.

        At each sampler step the known frames are restored with the noise of that step (Lugmayr et al. 2022,
        arXiv:2201.09865, equation 8, without resampling).
        """
        clip, label, process = batch["video"], batch["label"], objective.process
        draw = Noise(self.predict_options.seed, batch["row"].tolist(), clip.shape[1:], clip)
        noise, sampler = draw(), build_sampler(self.predict_options)
        state = sampler.start(process, draw, noise=noise)
        while not state.done:
            state.x[:, :-1] = process.add_noise(clip, noise, state.level)[:, :-1]
            sampler.step(state, evaluate(objective.model, process, state, label))
        return state.x[:, -1].clamp(-1, 1)

    def postprocess(self, outputs: Arrays) -> Arrays:
        return {**outputs, **{k: np.concatenate(list(outputs[k])) for k in ("samples", "label")}}

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        names = self.text is not None or bool(self.labels)
        known = [{self.request_column: self.name_request(label)} if names else {} for label in outputs["label"].astype(int)]
        return [{**name, "video": Media(encode_webp(x), ".webp")} for name, x in zip(known, outputs["samples"])]

    def name_request(self, label: np.ndarray) -> str:
        """Return the class or caption of a request; "" for none."""
        return self.decode_caption(label) if self.text is not None else ["", *self.labels][int(label)]

    def log_eval_samples(self, objective: Objective) -> list[ReportElement]:
        label = self.sample_labels(max(2, min(len(self.labels or self.captions), 8)))
        made = self.generate(objective, label, range(len(label)), self.PredictOptions()).cpu().numpy()
        return [
            Gallery(
                "Samples during training",
                "Generated from the same noise each time.",
                [Picture(encode_webp(join_side_by_side(made)), "")],
            )
        ]

    # Saved with the run

    STATE: ClassVar = {"attributes?": dict[str, list[str]]}

    def state(self) -> dict[str, Any]:
        return super().state() | {"attributes": self.attributes}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = super().from_state(columns, options, state, folder)
        task.set_attributes(state.get("attributes", {}))
        return task


TASKS = (VideoGeneration,)
