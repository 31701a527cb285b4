"""Image generation: images like those of a folder, by class or caption if it has them."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import DataError, SettingsError, nearest
from fieldguide.core.hardware import ram
from fieldguide.core.report_elements import Gallery, Picture, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.core.structure import MAX_SEED, Limits
from fieldguide.data.column_spec import CAPTION_NAMES, ColumnSpec
from fieldguide.data.dataset import CHANNELS, HEIGHT, WIDTH, Column, Data, Kind, Manifest
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import ImageTransform, Labels, TextTokenizer, suggest_side
from fieldguide.data.preprocessing.image_transform import describe_scale, learn_scale
from fieldguide.data.preprocessing.tokenizer import suggest_length
from fieldguide.data.text_values import blank_missing, has_sentences
from fieldguide.metrics import generative
from fieldguide.objectives import (
    DDIM,
    DDPM,
    Adversarial,
    AdversarialDistillation,
    ConsistencyDistillation,
    ConsistencyTraining,
    Diffusion,
    DPMSolver,
    Euler,
    FewSteps,
    Heun,
    Objective,
    build_adversarial,
    build_process,
)
from fieldguide.objectives.diffusion import Consistency, Sampler
from fieldguide.objectives.diffusion.loss_weighting import WEIGHTINGS
from fieldguide.objectives.diffusion.unclip import PRIOR_GUIDANCE, PRIOR_STEPS, UnCLIP
from fieldguide.tasks.base import Arrays, Media, Metric, Task
from fieldguide.tasks.report_builder import ExampleInput
from fieldguide.tasks.supervised import fill_options, is_discrete
from fieldguide.tasks.vision.clip_encoder import STATE as ENCODER_STATE
from fieldguide.tasks.vision.clip_encoder import ClipEncoder
from fieldguide.tasks.vision.image_generation_evaluator import METRICS, GenerationEvaluator
from fieldguide.tasks.vision.signature import GenerationSignature

STUDENT_LEVELS = (8, 8)  # intervals of noise of a distilled model; more need more than minutes of training
METHODS = ("diffusion", "consistency", "adversarial")
IMAGE_SIDES = (8, 16, 24, 28, 32, 48, 64)  # supported image sizes: doubling reaches all of them
MAX_SIDE_BY_DEVICE = {"cpu": 32, "mps": 64, "cuda": 64}  # maximum pixels per side by device, if the user sets no size
MAX_IMAGE_CACHE_FRACTION_OF_RAM = 0.3  # maximum fraction of RAM for decoded images
EVALUATION_MODELS = ("judge", "motion", "matcher")
MAX_COMPARED_IMAGES = 300  # maximum images for each number of steps that is compared with the teacher
PRIOR = "unclip-prior-mini"  # size of the network that generates embeddings
MAX_EMBEDDED_IMAGES = 5000  # training images from which the mean of embeddings is taken
SHEET_IMAGES = 16  # images of a sheet
MAX_READ_CAPTIONS = 10_000  # maximum captions whose tokens are counted
MAX_CAPTION_TOKENS = 64  # maximum tokens of a caption, if the user sets no length
MAX_KNOWN_CAPTIONS = 256  # training captions kept for sampling without given captions
MAX_CLASS_TEXTS = 20  # with at most this many different texts, they are class names regardless of length


def infer_target_kind(values: pl.Series) -> Kind | None:
    """Return "text" if the values of a target are captions (many different phrases), None if they look like classes."""
    present = blank_missing(values).drop_nulls() if values.dtype == pl.String else values.head(0)
    return "text" if len(present) and present.n_unique() > MAX_CLASS_TEXTS and has_sentences(present) else None


class ImageGeneration(GenerationSignature, GenerationEvaluator, Task):
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
    # Targets are the student's own outputs: steps of fixed size, as those of muon, add up to a drift.
    student_recipe: ClassVar = {"optimizer": "adamw", "lr": 5e-4}
    monitor = "held_out_loss"
    recipe: ClassVar = {"patience": 0, "epochs": 1e6}  # train on small data until the time limit
    max_validation_examples, max_test_examples = 500, 1000
    max_batch_size, min_batch_size = 64, 16

    @dataclass(frozen=True)
    class Options:
        side: int | None = None  # pixels per side
        channels: int | None = None  # 1 gray, 3 color
        flip: bool = False  # mirror training images at random
        vocab_size: int | None = None  # vocabulary size of captions
        length: int | None = None  # maximum tokens of a caption; longer captions are truncated and counted
        schedule: str = "cosine"  # noise of the diffusion model: cosine | linear | scaled-linear | edm | flow
        predicts: str | None = (
            None  # prediction target of the diffusion model: eps | v | x | velocity; of a flow velocity, else v
        )
        weighting: str = "uniform"  # weight of noise levels in the loss: uniform | min-snr | sigmoid
        method: str = (
            "diffusion"  # diffusion | consistency | adversarial (needs a teacher): the last two make images in 1 to 4 steps
        )
        teacher_guidance: float = 1.5  # guidance of a diffusion teacher, which its student learns; 1 = none
        features: str | None = None  # image classifier whose features images are compared in: PATH, or SIZE=PATH
        clip: str | None = None  # CLIP that compares images with their captions: PATH
        unclip: str | None = None  # CLIP between whose embeddings of captions and images a prior generates (DALL-E 2): PATH

    @dataclass(frozen=True)
    class PredictOptions:
        count: Annotated[int, Limits(1, 10_000)] = 16  # images in total, or per given class or caption
        steps: Annotated[int, Limits(1, 1000)] = 12  # sampler steps
        sampler: str = "dpm++-sde"  # dpm++-sde | dpm++ | ddim | ddpm | euler | heun (calls the network twice per step)
        eta: Annotated[float, Limits(0, 1)] = 0.0  # noise that ddim adds at each step; 1 = as much as ddpm
        guidance: Annotated[float, Limits(0, 100)] = 1.5  # classifier-free guidance scale; 1 = none
        seed: Annotated[int, Limits(0, MAX_SEED)] = 0  # seed of the noise
        truncation: Annotated[float, Limits(0, 2)] = 1.0  # StyleGAN: below 1 images are more typical and less varied

    @dataclass(frozen=True)
    class FewStepOptions(PredictOptions):
        """Options for prediction with a model that generates in a few steps."""

        steps: Annotated[int, Limits(1, 1000)] = 4
        sampler: str = "consistency"
        guidance: Annotated[float, Limits(0, 100)] = 1.0

    @dataclass(frozen=True)
    class UnCLIPOptions(PredictOptions):
        """Options for prediction with embeddings of CLIP."""

        prior_steps: Annotated[int, Limits(2, 1000)] = PRIOR_STEPS  # sampler steps of the prior
        prior_guidance: Annotated[float, Limits(0, 100)] = PRIOR_GUIDANCE  # guidance scale of the prior; 1 = none

    pictures: ImageTransform
    labels: list[str]  # empty if the data has no classes

    def __init__(self, columns: list[Column], options: Any):
        if options.method in ("consistency", "adversarial"):
            self.PredictOptions = self.FewStepOptions  # type: ignore[misc]  # other defaults, of this instance
        elif options.unclip is not None:
            self.PredictOptions = self.UnCLIPOptions  # type: ignore[misc]  # of this instance, too
        super().__init__(columns, options)
        self.judge: Any = None  # a `FeatureClassifier`, trained for the test and saved with the run
        self.motion: generative.FeatureClassifier | None = None  # for videos
        self.matcher: generative.CaptionMatcher | None = None  # for images and captions
        self.encoder: ClipEncoder | None = None  # set if images are generated from embeddings
        self.text: TextTokenizer | None = None  # set if the data has captions
        self.captions: list[str] = []  # a sample of the training captions
        self.memo: dict[int, dict[str, Any]] = {}

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        return None if len(data.features("image")) == 1 else "an image column"

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        captioned = data.target is not None and data.required_target.kind == "text"
        if data.target is not None and not captioned and not is_discrete(data.target):
            raise DataError(
                f"{data.source}: the label column {data.required_target.name!r} must hold classes or captions, but holds "
                f"{data.required_target.kind}."
            )
        fits = suggest_side(data.rows[WIDTH], data.rows[HEIGHT])
        side = options.side or max(
            (s for s in IMAGE_SIDES if s <= min(fits, MAX_SIDE_BY_DEVICE[device().type])), default=IMAGE_SIDES[0]
        )
        channels = options.channels or (3 if (data.rows[CHANNELS] == 3).any() else 1)
        scale, half = learn_scale(data.rows), (0.5,) * channels
        task.pictures = ImageTransform(side, channels, half, half, scale=scale)  # -1 .. 1
        task.notes += describe_scale(scale)
        task.labels = list(Labels.fit(data.rows[data.required_target.name]).names) if data.target and not captioned else []
        predicts = build_process(options.schedule, options.predicts).predicts
        task.options = fill_options(options, side=side, channels=channels, predicts=predicts)
        task.note_classes()
        if options.unclip is not None:
            task.fit_encoder(data, captioned)
        if captioned:
            task.fit_captions(data.rows[data.required_target.name].fill_null("").to_list())
        task.check_reference_networks()
        return task

    def note_classes(self) -> None:
        """Add a note with a column that could be used as class if there is no target."""
        could = [c.name for c in self.columns if c.role == "ignored" and c.kind in ("category", "boolean")]
        if could and not any(c.role == "target" for c in self.columns):
            self.notes.append(f"there is no target, so generation is unconditional: --target {could[0]} generates by class")

    def fit_encoder(self, data: Data, captioned: bool) -> None:
        """Load CLIP, and fit the mean and the standard deviation of its embeddings."""
        if not captioned or self.options.method != "diffusion":
            raise SettingsError(
                "task.unclip generates images of captions by diffusion: it needs captions, and task.method=diffusion."
            )
        self.encoder = ClipEncoder.load(self.options.unclip)
        paths = data.rows[self.column].to_list()
        some = np.random.default_rng(0).permutation(len(paths))[:MAX_EMBEDDED_IMAGES]
        self.encoder.fit(self.pictures.apply(self.pictures.load([paths[i] for i in some])))

    def fit_captions(self, texts: list[str]) -> None:
        """Fit the caption tokenizer, unless CLIP has one; sets vocab_size and length."""
        some, longest = texts[:MAX_READ_CAPTIONS], MAX_CAPTION_TOKENS
        if self.encoder is None:
            self.text = TextTokenizer.fit(texts, size=self.options.vocab_size)
            sizes = [len(ids) for ids in self.text.encode(some, 100_000)[0]]
        else:
            self.text, longest = self.encoder.text, min(longest, self.encoder.length)
            sizes = [len(ids) for ids in self.encoder.task.encode_all(some)]
        length = min(suggest_length(sizes, longest), longest)
        self.options = fill_options(self.options, vocab_size=self.text.size, length=length)
        if self.encoder is not None and self.options.length > self.encoder.length:
            raise SettingsError(
                f"task.length={self.options.length}: the CLIP of task.unclip reads {self.encoder.length} tokens."
            )
        self.note_truncated(sum(size > self.options.length for size in sizes), len(sizes), self.options.length, "captions")
        different = list(dict.fromkeys(texts))
        self.captions = [different[i] for i in np.random.default_rng(0).permutation(len(different))[:MAX_KNOWN_CAPTIONS]]

    def tokens(self, texts: list[str]) -> np.ndarray:  # -> N T int64, 0 beyond a caption's end and for an empty one
        if self.encoder is not None:
            return self.encoder.tokenize(texts, self.options.length)
        out = np.zeros((len(texts), self.options.length), dtype=np.int64)
        assert self.text is not None  # captions are read only if there is a tokenizer
        for row, text, ids in zip(out, texts, self.text.encode(texts, self.options.length)[0]):
            row[: len(ids)] = ids if text else 0
        return out

    def codes(self, data: Data) -> np.ndarray:
        """Return labels from 1 (N), or caption tokens (N, T); 0 means none."""
        target = next((c.name for c in self.columns if c.role == "target"), None)
        if self.text is not None:
            if target is None or target not in data.rows.columns:
                return np.zeros((len(data), self.options.length), dtype=np.int64)
            return self.tokens(data.rows[target].fill_null("").to_list())
        if not self.labels or target is None or target not in data.rows.columns:
            return np.zeros(len(data), dtype=np.int64)
        return Labels(tuple(self.labels)).apply(data.rows[target]) + 1

    def model_dims(self) -> dict[str, Any]:
        side, channels = self.pictures.side, self.pictures.channels
        if self.encoder is not None:
            return {"image": side, "channels": channels, "embedding": self.encoder.width, "length": self.options.length}
        return {
            "image": side,
            "channels": channels,
            "num_classes": len(self.labels),
            **({"vocab_size": self.text.size, "length": self.options.length} if self.text else {}),
        }

    def part_names(self, card: Card) -> Mapping[str, str]:
        return card.parts if self.encoder is None else {**card.parts, "prior": PRIOR}

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
        if self.encoder is not None:
            prior = parts["prior"]
            for buffer, values in ((prior.clip_mean, self.encoder.mean), (prior.clip_std, self.encoder.std)):
                buffer.copy_(torch.tensor(values))
            return self.build_diffusion(model, "image", functools.partial(UnCLIP, prior=prior, encoder=self.encoder))
        return self.build_diffusion(model, "image")

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
            made = self.generate(objective, batch["label"], batch["row"].tolist(), self.predict_options)
            has_loss = "image" in batch and not getattr(objective, "generates_in_few_steps", False)
            scored = objective.outputs(batch) if has_loss else {}
            return {**{k: v for k, v in scored.items() if k == "loss"}, "samples": made, "label": batch["label"]}

        return answer

    def read(self, sources: Sequence[Any], *, answered: bool = False) -> Data:
        """Read the classes or captions to generate; without input, all classes or some training captions in turn."""
        if answered:
            return super().read(sources, answered=True)
        if self.text is not None:
            return self.make_requests(list(map(str, sources)), self.captions)
        self.check_classes(sources)
        return self.make_requests(sources, self.labels or [""])

    def check_classes(self, names: Sequence[Any]) -> None:
        """Raise `DataError` for a name that is no class."""
        for name in names:
            if name not in self.labels:
                raise DataError(
                    f"unknown class {name!r}.{nearest(str(name), self.labels)} Classes are: "
                    f"{', '.join(self.labels) or 'none, so give no class'}."
                )

    def make_requests(self, named: Sequence[str], others: Sequence[str]) -> Data:
        """Return `count` rows of each given text, or else `count` rows of the others in turn."""
        count = self.predict_options.count
        wanted = [n for name in named for n in [name] * count] or [others[i % len(others)] for i in range(count)]
        return Data("made", pl.DataFrame({"wanted": wanted}), {}, Manifest(""))

    def predict_batches(self, data: Data, card: Card) -> Batches:
        known, wanted = {name: i for i, name in enumerate(self.labels, 1)}, data.rows["wanted"].to_list()
        label = torch.from_numpy(self.tokens(wanted)) if self.text else torch.tensor([known.get(name, 0) for name in wanted])
        return Batches(len(data), lambda index, _: {"label": label[torch.from_numpy(index)], "row": torch.from_numpy(index)})

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        if self.text is not None:
            return [
                {"caption": self.decode_caption(label), "image": Media(encode_png(x), ".png")}
                for x, label in zip(outputs["samples"], outputs["label"])
            ]
        names = ["", *self.labels]
        return [
            {**({"class": names[int(label)]} if self.labels else {}), "image": Media(encode_png(x), ".png")}
            for x, label in zip(outputs["samples"], outputs["label"].astype(int))
        ]

    def decode_caption(self, tokens: np.ndarray) -> str:
        """Return a caption as the model reads it."""
        assert self.text is not None  # only models of captions decode them
        return self.text.decode(tokens[tokens > 0]).strip()

    # Report

    def sample_labels(self, count: int) -> Tensor:
        """Return `count` classes, or training captions, in turn."""
        if self.text is not None:
            return torch.from_numpy(self.tokens([self.captions[i % len(self.captions)] for i in range(count)]))
        return torch.arange(count) % max(len(self.labels), 1) + bool(self.labels)

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
        samples, label = outputs["samples"], outputs["label"].astype(int)
        if self.text is not None:
            matched = self.evaluate_samples(outputs, targets)["matched"]
            pairs = [
                Picture(
                    encode_sheet(np.stack([samples[i], targets["real"][i]])), self.decode_caption(label[i]), bad=not matched[i]
                )
                for i in range(min(3 * SHEET_IMAGES, len(samples)))
            ]
            label = label[:, 0]
        order = np.argsort(label, kind="stable") if self.labels else np.arange(len(label))
        rows = sheets_by_class(samples, label, self.labels) if self.labels else []
        shown: list[ReportElement] = [
            Gallery(
                "Samples",
                "Generated for the test, unselected.",
                rows or [Picture(encode_sheet(samples[order[: 4 * SHEET_IMAGES]]), "")],
            )
        ]
        if self.text is not None:
            shown.append(
                Gallery(
                    "By caption",
                    "Left the generated image, right the test image of that caption; framed if the "
                    "evaluation model would pick another caption for the generated image.",
                    pairs,
                )
            )
        if objective is not None and isinstance(objective, Diffusion):
            wanted = self.sample_labels(SHEET_IMAGES)
            few = "Generated from the same noise: more steps are slower and add detail."
            by_steps = [
                Picture(
                    encode_sheet(
                        self.generate(objective, wanted, range(len(wanted)), self.PredictOptions(steps=steps)).cpu().numpy()
                    ),
                    f"{steps} steps",
                )
                for steps in ((1, 2, 4, 8) if objective.generates_in_few_steps else (2, 5, 10, 20, 50))
            ]
            shown.append(Gallery("By sampler steps", few, by_steps))
        if objective is not None and objective.starts_from_teacher:
            shown.append(self.compare_with_teacher(objective, targets))
        return {"Samples": shown, "Memory": self.memorization_elements(samples, targets)}

    def compare_with_teacher(self, objective: Any, targets: Arrays) -> Table:
        """Return the scores of a student and its teacher by number of steps, for the first test images."""
        targets = {name: values[:MAX_COMPARED_IMAGES] for name, values in targets.items()}
        label = torch.from_numpy(targets["label"].astype(np.int64))
        options, guidance = ImageGeneration.PredictOptions(sampler="dpm++", steps=50), self.options.teacher_guidance
        teacher = Diffusion(objective.frozen_teacher[0], objective.process)
        runs: list[tuple[str, Any, Any]] = [
            (f"{steps} step{'s' if steps > 1 else ''}", objective, self.FewStepOptions(steps=steps)) for steps in (1, 2, 4)
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
        return Table(
            "Fewer steps than the teacher",
            f"Images of the labels of {len(label):,} test images, from the same noise. The teacher's guidance is {guidance:g}; its "
            "network is called twice in each step if that is not 1.",
            ("", *(m.title for m in shown)),
            [
                (name, *(f"{100 * found[m.name]:.0f} %" if m.percent else f"{found[m.name]:.2f}" for m in shown))
                for name, found in scores.items()
            ],
        )

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

    # Saved with the run

    STATE: ClassVar = {"pictures": ImageTransform.STATE, "labels": list[str], "captions?": list[str], "encoder?": ENCODER_STATE}

    def state(self) -> dict[str, Any]:
        encoder = {} if self.encoder is None else {"encoder": self.encoder.to_json()}
        return {"pictures": self.pictures.to_json(), "labels": self.labels, "captions": self.captions, **encoder}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.pictures, task.labels = ImageTransform.from_json(state["pictures"]), state["labels"]
        task.captions = state.get("captions", [])
        task.text = TextTokenizer.load(folder) if task.captions else None
        if "encoder" in state:
            assert task.text is not None
            task.encoder = ClipEncoder.restore(folder, state["encoder"], task.text)
        for name in EVALUATION_MODELS:
            if (folder / f"{name}.safetensors").exists():
                setattr(task, name, generative.load_state(load_file(folder / f"{name}.safetensors")))
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.text is not None:
            self.text.save(folder)
        if self.encoder is not None:
            self.encoder.save(folder)
        for name in EVALUATION_MODELS:
            if (judge := getattr(self, name)) is not None:
                save_file({k: t.contiguous() for k, t in judge.state_dict().items()}, folder / f"{name}.safetensors")


def build_sampler(predict_options: Any) -> Sampler:
    """Return the sampler that the options name. Raises `SettingsError` for an unknown one."""
    name, steps, eta = predict_options.sampler, predict_options.steps, predict_options.eta
    samplers: dict[str, Callable[[], Sampler]] = {
        "dpm++": lambda: DPMSolver(steps=steps),
        "dpm++-sde": lambda: DPMSolver(steps=steps, stochastic=True),
        "ddim": lambda: DDIM(steps=steps, eta=eta),
        "ddpm": lambda: DDPM(steps=steps),
        "euler": lambda: Euler(steps=steps),
        "heun": lambda: Heun(steps=steps),
        "consistency": lambda: Consistency(steps=steps),
    }
    if name not in samplers:
        raise SettingsError(f"sampler={name!r} is unknown. Choose one of {', '.join(samplers)}.")
    if eta and name != "ddim":
        raise SettingsError(
            f"eta={eta} is an option of sampler=ddim, but the sampler is {name}. Leave eta out, or choose ddim."
        )
    return samplers[name]()


def check_sampler(predict_options: Any, is_consistency: bool) -> None:
    """Raise `SettingsError` if the sampler does not suit the model."""
    name = predict_options.sampler
    if is_consistency and name != "consistency":
        raise SettingsError(
            f"sampler={name!r}: this model generates in few steps. It predicts where a path ends and not its direction. Leave the sampler "
            "out, and choose steps=1 to 4."
        )
    if is_consistency and predict_options.guidance != 1:
        raise SettingsError(
            f"guidance={predict_options.guidance}: not supported by models of few steps. The guidance of the teacher is learned: "
            "--set task.teacher_guidance in training."
        )
    if not is_consistency and name == "consistency":
        raise SettingsError(
            "sampler='consistency' needs a model of few steps, and this is a diffusion model. Distill one: fieldguide fit DATA --set "
            "teacher=RUN"
        )


def check_one_step_options(predict_options: Any) -> None:
    """Raise `SettingsError` if sampler options are set for a one-step generator."""
    usual = type(predict_options)()
    if changed := [
        name for name in ("steps", "sampler", "eta", "guidance") if getattr(predict_options, name) != getattr(usual, name)
    ]:
        raise SettingsError(f"{', '.join(changed)}: not supported. This model generates an image in one step.")


def encode_png(x: np.ndarray) -> bytes:  # C S S in -1 .. 1
    array = np.rint((x + 1) * 127.5).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0)).save(out, "PNG")
    return out.getvalue()


def sheets_by_class(samples: np.ndarray, label: np.ndarray, names: list[str]) -> list[Picture]:  # N C S S, N
    """Return some images of each class that occurs."""
    return [Picture(encode_sheet(samples[label == k][:SHEET_IMAGES]), names[k - 1]) for k in np.unique(label)]


def encode_sheet(pictures: np.ndarray) -> bytes:  # N C S S in -1 .. 1 -> PNG
    """Return the images as a grid with thin lines between."""
    count, channels, side = len(pictures), *pictures.shape[1:3]
    columns = max(1, math.ceil(math.sqrt(count)))
    rows = -(-count // columns)
    whole = np.ones((channels, rows * (side + 1) - 1, columns * (side + 1) - 1), dtype=np.float32)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (side + 1), i % columns * (side + 1)
        whole[:, top : top + side, left : left + side] = picture
    return encode_png(whole)


TASKS = (ImageGeneration,)
