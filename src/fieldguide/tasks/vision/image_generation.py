"""Image generation: images like those of a folder, by class or caption if it has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import SettingsError
from fieldguide.core.hardware import ram
from fieldguide.core.settings import Settings
from fieldguide.data.column_spec import CAPTION_NAMES, ColumnSpec
from fieldguide.data.dataset import CHANNELS, HEIGHT, WIDTH, Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import ImageTransform, TextTokenizer, suggest_side
from fieldguide.data.preprocessing.image_transform import describe_scale, learn_scale
from fieldguide.metrics import generative
from fieldguide.objectives import (
    Adversarial,
    ConsistencyTraining,
    Diffusion,
    FewSteps,
    Objective,
    build_adversarial,
    build_process,
)
from fieldguide.objectives.diffusion.loss_weighting import WEIGHTINGS
from fieldguide.tasks.base import Metric, Task
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.vision.caption_reader import CaptionReader, CaptionTokens
from fieldguide.tasks.vision.clip_encoder import STATE as ENCODER_STATE
from fieldguide.tasks.vision.clip_encoder import ClipEncoder
from fieldguide.tasks.vision.few_step_students import FewStepStudents
from fieldguide.tasks.vision.image_generation_conditions import GenerationConditions, infer_target_kind, is_captioned
from fieldguide.tasks.vision.image_generation_evaluator import METRICS, GenerationEvaluator
from fieldguide.tasks.vision.image_generation_options import (
    METHODS,
    GenerationOptions,
    SampleOptions,
    choose_sample_options,
)
from fieldguide.tasks.vision.image_generation_report import GenerationReport
from fieldguide.tasks.vision.image_generation_sampling import build_sampler, check_one_step_options, check_sampler
from fieldguide.tasks.vision.signature import GenerationSignature
from fieldguide.tasks.vision.upsampler import STATE as UPSAMPLER_STATE
from fieldguide.tasks.vision.upsampler import Upsamplers

IMAGE_SIDES = (8, 16, 24, 28, 32, 48, 64)  # supported image sizes: doubling reaches all of them
MAX_SIDE_BY_DEVICE = {"cpu": 32, "mps": 64, "cuda": 64}  # maximum pixels per side by device, if the user sets no size
MAX_IMAGE_CACHE_FRACTION_OF_RAM = 0.3  # maximum fraction of RAM for decoded images
EVALUATION_MODELS = ("judge", "motion", "matcher")
MAX_EMBEDDED_IMAGES = 5000  # training images from which the mean of embeddings is taken


class ImageGeneration(GenerationSignature, GenerationEvaluator, GenerationReport, GenerationConditions, FewStepStudents, Task):
    name = "image-generation"
    reads = (
        "a folder of images, optionally one folder per class or a .txt caption next to each; or a table "
        "of image paths, optionally with labels or captions"
    )
    input_types: tuple[str, ...] = ("noisy", "noise")
    feature: ClassVar[tuple[str, ...]] = ("image",)
    output_types = ("image",)
    column_spec = ColumnSpec("named", names=CAPTION_NAMES, kinds={"target": infer_target_kind})
    metrics: ClassVar[tuple[Metric, ...]] = METRICS
    monitor = "held_out_loss"
    recipe: ClassVar = {"patience": 0, "epochs": 1e6}  # train on small data until the time limit
    max_validation_examples, max_test_examples = 500, 1000
    max_batch_size, min_batch_size = 64, 16

    @dataclass(frozen=True)
    class Options(GenerationOptions):
        """Options of training."""

    @dataclass(frozen=True)
    class PredictOptions(SampleOptions):
        """Options of prediction; models of few steps and of embeddings have others."""

    pictures: ImageTransform

    def __init__(self, columns: list[Column], options: Any):
        self.PredictOptions = choose_sample_options(options, type(self).PredictOptions)  # type: ignore[misc]  # of this instance
        super().__init__(columns, options)
        self.judge: Any = None  # a `FeatureClassifier`, trained for the test and saved with the run
        self.motion: generative.FeatureClassifier | None = None  # for videos
        self.matcher: generative.CaptionMatcher | None = None  # for images and captions
        self.reader: CaptionReader | None = None
        self.text: TextTokenizer | None = None
        self.captions: list[str] = []
        self.upsamplers = Upsamplers()
        self.memo: dict[int, dict[str, Any]] = {}

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        return None if len(data.features("image")) == 1 else "an image column"

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task, captioned = cls(list(data.columns.values()), options), is_captioned(data)
        fits = suggest_side(data.rows[WIDTH], data.rows[HEIGHT])
        side = options.side or max(
            (s for s in IMAGE_SIDES if s <= min(fits, MAX_SIDE_BY_DEVICE[device().type])), default=IMAGE_SIDES[0]
        )
        channels = options.channels or (3 if (data.rows[CHANNELS] == 3).any() else 1)
        scale, half = learn_scale(data.rows), (0.5,) * channels
        task.pictures = ImageTransform(side, channels, half, half, scale=scale)  # -1 .. 1
        task.notes += describe_scale(scale)
        task.fit_labels(data)
        predicts = build_process(options.schedule, options.predicts).predicts
        task.options = fill_options(options, side=side, channels=channels, predicts=predicts)
        task.note_classes()
        if options.unclip is not None and not (captioned and options.method == "diffusion"):
            raise SettingsError(
                "task.unclip generates images of captions by diffusion: it needs captions, and task.method=diffusion."
            )
        if captioned:
            texts = data.rows[data.required_target.name].fill_null("").to_list()
            task.fit_captions(texts, task.fit_encoder(data) if options.unclip else task.fit_tokenizer(texts))
        task.check_reference_networks()
        task.upsamplers = Upsamplers.load(options.upsamplers, side)
        return task

    def fit_encoder(self, data: Data) -> CaptionReader:
        """Load CLIP, and fit the mean and the standard deviation of its embeddings."""
        encoder, paths = ClipEncoder.load(self.options.unclip), data.rows[self.column].to_list()
        some = np.random.default_rng(0).permutation(len(paths))[:MAX_EMBEDDED_IMAGES]
        encoder.fit(self.pictures.apply(self.pictures.load([paths[i] for i in some])))
        return encoder

    def fit_tokenizer(self, texts: list[str]) -> CaptionReader:
        """Fit the tokens of captions."""
        return CaptionTokens(TextTokenizer.fit(texts, size=self.options.vocab_size))

    def model_dims(self) -> dict[str, Any]:
        return {"image": self.pictures.side, "channels": self.pictures.channels, **self.describe_conditions()}

    def part_names(self, card: Card) -> Mapping[str, str]:
        return {**card.parts, **(self.reader.further_networks if self.reader is not None else {})}

    def data_facts(self) -> dict[str, Any]:
        return {"side": self.pictures.side, "num_classes": len(self.labels)}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        if card.input_type == "noise":
            classes = len(self.labels)
            noise = model.config.noise - classes
            return build_adversarial(model, parts["critic"], settings, noise=noise, real="image", num_classes=classes)
        if settings.loss or settings.penalty != "none" or settings.weight_clip or settings.augment_critic != "none":
            raise SettingsError(
                f"loss, penalty, weight_clip and augment_critic are settings of GANs, but {card.name} is a diffusion model."
            )
        kind = Diffusion if self.reader is None else self.reader.choose_objective(parts)
        return self.build_diffusion(model, "image", kind)

    def build_diffusion(self, model: Any, data: str, kind: Callable[..., Diffusion] = Diffusion) -> Diffusion:
        """Return the objective of a diffusion or consistency model. Raises `SettingsError` for an unknown option."""
        if self.options.method not in METHODS:
            raise SettingsError(f"method={self.options.method!r} is unknown. Choose one of {', '.join(METHODS)}.")
        name = self.options.weighting
        if name not in WEIGHTINGS:
            raise SettingsError(f"weighting={name!r} is unknown. Choose one of {', '.join(WEIGHTINGS)}.")
        process = build_process(self.options.schedule, self.options.predicts)
        if self.options.method == "diffusion":
            return kind(model, process=process, weighting=WEIGHTINGS[name](), data=data)
        if name != "uniform":
            raise SettingsError(
                f"weighting={name!r} is an option of method=diffusion; models of few steps have weights of their own."
            )
        if self.options.method == "adversarial":
            return FewSteps(model, process, data=data)
        return ConsistencyTraining(model, process, data=data)

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        paths, p = data.rows[self.column].to_list(), self.pictures
        stored = p.load(paths) if len(paths) * p.channels * p.side**2 < MAX_IMAGE_CACHE_FRACTION_OF_RAM * ram() else None
        label = torch.from_numpy(self.codes(data))

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            rows = torch.from_numpy(index)
            x = stored[rows] if stored is not None else p.load([paths[i] for i in index])
            if generator is not None and self.options.flip:
                x = torch.where((torch.rand(len(x), generator=generator) < 0.5)[:, None, None, None], x.flip(-1), x)
            return {"image": p.apply(x), "label": label[rows], "row": rows}

        return Batches(len(paths), make)

    # Generation

    def generate(self, objective: Any, label: Tensor, numbers: Sequence[int], predict_options: Any) -> Tensor:
        """Generate images of these labels or captions (0 = none): B C S S in -1 .. 1. Each depends only on seed and
        number.
        """
        p = self.pictures
        if isinstance(objective, Adversarial):
            check_one_step_options(predict_options)
            return objective.sample(
                [int(n) for n in numbers], label, seed=predict_options.seed, truncation=predict_options.truncation
            ).clamp(-1, 1)
        if predict_options.truncation != 1:
            raise SettingsError("truncation: not supported. It is an option of StyleGAN, and this is a diffusion model.")
        guidance = predict_options.guidance if self.labels or self.text else 1.0
        check_sampler(predict_options, objective.generates_in_few_steps)
        further = {name: value for name, value in vars(predict_options).items() if name.startswith("prior_")}
        return objective.sample(
            label,
            (p.channels, p.side, p.side),
            build_sampler(predict_options),
            seed=predict_options.seed,
            numbers=numbers,
            guidance=guidance,
            **further,
        ).clamp(-1, 1)

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            numbers = batch["row"].tolist()
            made = self.generate(objective, batch["label"], numbers, self.predict_options)
            if "image" not in batch:  # scores compare images of the size that the network was trained for
                return {"samples": self.upsamplers.enlarge(made, numbers), "label": batch["label"]}
            has_loss = not getattr(objective, "generates_in_few_steps", False)
            scored = objective.outputs(batch) if has_loss else {}
            return {**{k: v for k, v in scored.items() if k == "loss"}, "samples": made, "label": batch["label"]}

        return answer

    # Saved with the run

    STATE: ClassVar = {
        "pictures": ImageTransform.STATE,
        "labels": list[str],
        "captions?": list[str],
        "encoder?": ENCODER_STATE,
        "upsamplers?": UPSAMPLER_STATE,
    }

    def state(self) -> dict[str, Any]:
        reader = {} if self.reader is None else self.reader.state()
        further = {"upsamplers": found} if (found := self.upsamplers.to_json()) else {}
        return {"pictures": self.pictures.to_json(), "labels": self.labels, "captions": self.captions, **reader, **further}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.pictures, task.labels = ImageTransform.from_json(state["pictures"]), state["labels"]
        task.captions = state.get("captions", [])
        if task.captions:
            text = TextTokenizer.load(folder)
            encoder = state.get("encoder")
            task.set_reader(ClipEncoder.restore(folder, encoder, text) if encoder is not None else CaptionTokens(text))
        task.upsamplers = Upsamplers.restore(folder, state.get("upsamplers", ()))
        for name in EVALUATION_MODELS:
            if (folder / f"{name}.safetensors").exists():
                setattr(task, name, generative.load_state(load_file(folder / f"{name}.safetensors")))
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.reader is not None:
            self.reader.save(folder)
        self.upsamplers.save(folder)
        for name in EVALUATION_MODELS:
            if (judge := getattr(self, name)) is not None:
                save_file({k: t.contiguous() for k, t in judge.state_dict().items()}, folder / f"{name}.safetensors")


TASKS = (ImageGeneration,)
