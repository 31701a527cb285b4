"""Image compression: autoencoders that turn images into small maps of latents or codes, for latent diffusion, and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.hardware import ram
from fieldguide.core.report_elements import Gallery, Picture, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.core.signature import RecordField, Step, TensorSpec
from fieldguide.core.structure import Limits
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import CHANNELS, HEIGHT, WIDTH, Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import ImageTransform, suggest_side
from fieldguide.data.preprocessing.image_transform import describe_scale, learn_scale
from fieldguide.metrics import image_quality
from fieldguide.objectives.autoencoding import Autoencoding
from fieldguide.objectives.base import Objective
from fieldguide.objectives.gan_losses import LOSSES
from fieldguide.tasks.base import Arrays, Baseline, Media, Metric, Task
from fieldguide.tasks.signature_parts import fix_axes
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.vision.image_encoding import encode_png
from fieldguide.tasks.vision.image_to_image_report import join_images
from fieldguide.tasks.vision.reference_networks import FeatureNetwork
from fieldguide.tasks.vision.signature import ImageSignature

MAX_SIDE_BY_DEVICE = {"cpu": 64, "mps": 128, "cuda": 256}  # maximum pixels per side by device, if the user sets no size
MAX_IMAGE_CACHE_FRACTION_OF_RAM = 0.3  # maximum fraction of RAM for decoded images
MAX_BASELINE_ROWS = 1000  # training images of principal components
SHOWN_IMAGES = 12  # of each gallery
MAX_MEASURED_IMAGES = 200  # whose latents are measured


class ImageCompression(ImageSignature, Task):
    name = "image-compression"
    reads = "a folder of images, or a table of their paths; labels are not used; asked for with --task"
    input_types = ("image",)
    output_types = ("reconstruction",)
    feature = ("image",)
    column_spec = ColumnSpec("named")
    metrics = (
        Metric("l1", "min", "mean absolute error of the rebuilt pixels, as a fraction of their range"),
        Metric("psnr", "max", "dB, signal-to-noise ratio of the rebuilt images", label="PSNR"),
        Metric("ssim", "max", "structural similarity of the rebuilt images", label="SSIM"),
        Metric("codes_used", "max", "of the codebook occur in these images", percent=True),
    )
    recipe: ClassVar = {"patience": 0, "epochs": 1e6}
    max_batch_size, min_batch_size = 64, 16
    max_validation_examples, max_test_examples = 500, 2000

    @dataclass(frozen=True)
    class Options:
        side: Annotated[int, Limits(4, 4096)] | None = None  # pixels per side
        channels: int | None = None  # 1 gray, 3 color
        flip: bool = False  # mirror training images at random
        squared: bool = False  # squared instead of absolute errors of pixels
        kl: Annotated[float, Limits(0, 100)] = 1e-6  # KL autoencoders: weight of the divergence of latents from N(0, 1)
        commitment: Annotated[float, Limits(0, 100)] = 0.25  # VQGAN: weight of the distance of latents from their codes
        features: str | None = None  # checkpoint of an image classifier, for a perceptual distance
        perceptual: Annotated[float, Limits(0, 100)] = 1.0  # weight of the perceptual distance, with `features`
        adversarial: Annotated[float, Limits(0, 100)] = 0.0  # weight of a critic of patches, 0.8 for VQGAN; 0 = none
        start: Annotated[float, Limits(0, 1)] = 0.3  # fraction of the training after which the critic begins

    pictures: ImageTransform
    latent_values = 0  # numbers that an image is compressed to, or bytes of codes; known when there is a network
    codebook_size = 0  # of a network with codes

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        return None if len(data.features("image")) == 1 else "an image column"

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        side = options.side or min(suggest_side(data.rows[WIDTH], data.rows[HEIGHT]), MAX_SIDE_BY_DEVICE[device().type])
        channels = options.channels or (3 if (data.rows[CHANNELS] == 3).any() else 1)
        scale = learn_scale(data.rows)
        task.pictures = ImageTransform(side, channels, (0.5,) * channels, (0.5,) * channels, scale=scale)  # -1 .. 1
        task.notes += describe_scale(scale)
        task.options = fill_options(options, side=side, channels=channels)
        if options.features is not None:
            blank = torch.zeros(1, channels, side, side)
            FeatureNetwork.load(options.features).compute_maps(blank)  # a wrong checkpoint is an error before training
        return task

    def model_dims(self) -> dict[str, Any]:
        p = self.pictures
        return {"image": p.side, "channels": p.channels, "outputs": p.channels, "paired": False}

    def data_facts(self) -> dict[str, Any]:
        return {"side": self.pictures.side, "channels": self.pictures.channels}

    def part_names(self, card: Card) -> Mapping[str, str]:
        return {"critic": "patchgan"} if self.options.adversarial else {}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        o, places = self.options, math.ceil(self.pictures.side / model.stride) ** 2
        self.codebook_size = getattr(model.config, "codes", 0)
        size = math.log2(self.codebook_size) / 8 if self.codebook_size else model.config.latent
        self.latent_values = math.ceil(places * size)
        features = None
        if o.features is not None:
            load = functools.cache(lambda: FeatureNetwork.load(o.features))  # by the first step
            features = lambda image: load().compute_maps(image)
        return Autoencoding(
            model,
            parts.get("critic"),
            weights={"kl": o.kl, "commitment": o.commitment, "codebook": 1.0},
            squared=o.squared,
            features=features,
            perceptual=o.perceptual,
            adversarial=o.adversarial,
            start=o.start,
            loss=LOSSES[settings.loss]() if settings.loss else None,
        )

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        paths, p = data.rows[self.column].to_list(), self.pictures
        stored = p.load(paths) if len(paths) * p.channels * p.side**2 < MAX_IMAGE_CACHE_FRACTION_OF_RAM * ram() else None

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            x = stored[torch.from_numpy(index)] if stored is not None else p.load([paths[i] for i in index])
            if generator is not None and self.options.flip:
                x = torch.where((torch.rand(len(x), generator=generator) < 0.5)[:, None, None, None], x.flip(-1), x)
            return {"image": p.apply(x)}

        return Batches(len(paths), make)

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        return [{"image": Media(encode_png(made), ".png")} for made in outputs["made"]]

    # Evaluation

    def targets(self, data: Data) -> Arrays:
        return {"real": self.pictures.apply(self.pictures.load(data.rows[self.column].to_list())).numpy()}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        made, real = torch.from_numpy(outputs["made"]).clamp(-1, 1), torch.from_numpy(targets["real"])
        measures = {"l1": image_quality.absolute_error, "psnr": image_quality.psnr, "ssim": image_quality.ssim}
        scores = {name: float(measure(made, real).mean()) for name, measure in measures.items()}
        if "codes" in outputs:
            scores["codes_used"] = len(np.unique(outputs["codes"])) / self.codebook_size
        return scores

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        """Return the mean image, and principal components: as many numbers for an image as latents, or as bytes of codes."""
        rows = np.random.default_rng(0).permutation(len(train))[:MAX_BASELINE_ROWS]
        known = self.targets(train.take(np.sort(rows)))["real"].reshape(len(rows), -1)
        real = self.targets(test)["real"]
        mean = known.mean(0)
        count = min(self.latent_values, len(rows) - 1)
        components = np.linalg.svd(known - mean, full_matrices=False)[2][:count]
        rebuilt = mean + (real.reshape(len(real), -1) - mean) @ components.T @ components
        shown = lambda values: {"made": np.broadcast_to(values, (len(real), values.shape[-1])).reshape(real.shape).copy()}
        return [
            Baseline("mean image", "the mean of the training images", shown(mean)),
            Baseline("principal components", f"{count:,} numbers for each image", shown(rebuilt)),
        ]

    # Report

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        made, real = np.clip(outputs["made"], -1, 1), targets["real"]
        errors = image_quality.absolute_error(torch.from_numpy(made), torch.from_numpy(real)).numpy()
        random = np.random.default_rng(0).permutation(len(errors))[:SHOWN_IMAGES]
        shown: list[ReportElement] = []
        for title, rows in (("Random sample", random), ("Worst", np.argsort(-errors)[:SHOWN_IMAGES])):
            pictures = [
                Picture(join_images(real[i], made[i]), f"{Path(test.locate_row(int(i))).name}: {errors[i]:.3f}") for i in rows
            ]
            shown.append(Gallery(title, "Left the image, right what is rebuilt of it; L1.", pictures))
        if objective is not None:
            shown.append(self.describe_latents(objective, real))
        return {"Reconstructions": shown}

    @torch.no_grad()
    def describe_latents(self, objective: Any, real: np.ndarray) -> Table:
        """Return what a diffusion model of the latents has to know: their number and deviation."""
        model = objective.model
        image = torch.from_numpy(real[:MAX_MEASURED_IMAGES]).to(next(model.parameters()))
        encoded = model.encode(model.pad(image))
        mean = encoded[0] if isinstance(encoded, tuple) else encoded
        values, latents = image[0].numel(), mean[0].numel()
        rows = [
            ("numbers of an image", f"{values:,}"),
            ("latents", f"{' x '.join(map(str, mean.shape[1:]))} = {latents:,}"),
            ("standard deviation of the latents", f"{float(mean.std()):.4g}"),
        ]
        note = "Diffusion divides latents by their standard deviation (`scaling` is 1 / deviation)."
        return Table("Latents", note, ("", "value"), rows)

    # Saved with the run

    STATE: ClassVar = {"pictures": ImageTransform.STATE, "codebook_size": int}

    def state(self) -> dict[str, Any]:
        return {"pictures": self.pictures.to_json(), "codebook_size": self.codebook_size}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.pictures, task.codebook_size = ImageTransform.from_json(state["pictures"]), state["codebook_size"]
        return task

    # Signature

    def describe_outputs(self, outputs: Sequence[TensorSpec], network: Any) -> Sequence[TensorSpec]:
        p = self.pictures
        sizes = {"channels": p.channels, "height": p.side, "width": p.side}
        return [replace(spec, axes=fix_axes(spec.axes, sizes), about="the rebuilt image in -1 .. 1") for spec in outputs]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return [
            Step("scale_pixels", "clamp to -1 .. 1, then (value + 1) * 127.5", True),
            Step("encode_image", "encode as PNG", False),
        ]

    def describe_record(self) -> Sequence[RecordField]:
        return [RecordField("image", "string", "the rebuilt image", media_types=("image/png",))]


TASKS = (ImageCompression,)
