"""Image to image: translates images, trained on pairs or on two domains without pairs, or restores degraded images."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from fieldguide.core.report_elements import ReportElement
from fieldguide.core.settings import Settings
from fieldguide.core.structure import MAX_SEED, Limits
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import CHANNELS, HEIGHT, WIDTH, Column, Data, Kind
from fieldguide.data.loader import Batches
from fieldguide.data.media import images
from fieldguide.data.preprocessing import ImageTransform
from fieldguide.data.preprocessing.image_transform import describe_scale, learn_scale
from fieldguide.metrics import generative, image_quality
from fieldguide.objectives import Objective
from fieldguide.objectives.diffusion import DPMSolver, build_process
from fieldguide.objectives.gan_losses import LOSSES
from fieldguide.objectives.image_translation import PairedTranslation, TranslationDiffusion, UnpairedTranslation
from fieldguide.tasks.base import Arrays, Baseline, Media, Metric, Task
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.vision.image_generation_evaluator import compute_thumbnails
from fieldguide.tasks.vision.image_restoration import DEGRADATIONS, convert_channels, degrade
from fieldguide.tasks.vision.image_to_image_baselines import fit_colors, match_colors
from fieldguide.tasks.vision.image_to_image_report import show_domains, show_pairs
from fieldguide.tasks.vision.image_to_image_signature import ImageToImageSignature

IMAGE_SIDES = (16, 32, 64, 128, 256)  # sides that networks read
MAX_SIDE_BY_DEVICE = {"cpu": 64, "mps": 128, "cuda": 256}  # maximum pixels per side by device, if the user sets no size
MAX_IMAGE_CACHE_FRACTION_OF_RAM = 0.3  # maximum fraction of RAM for decoded images
EVALUATION_ROWS = 2000  # training images that the evaluation network is trained on
ASPECT_OF_JOINED = 2  # width divided by height of files that hold the input on the left and the target on the right


def infer_target_kind(values: pl.Series) -> Kind | None:
    """Return "image" if the values of a target are names of image files, None if they look like domains."""
    some = values.drop_nulls().head(20).to_list() if values.dtype == pl.String else []
    return "image" if some and all(images.find_suffix(value) in images.IMAGE_LIKE_SUFFIXES for value in some) else None


class ImageToImage(ImageToImageSignature, Task):
    name = "image-to-image"
    reads = (
        "pairs of images: folders A and B, or input and target, with files of the same names, files with both side by side, or a "
        "table of two image columns; two domains without pairs: folders A and B, or trainA, trainB, testA, testB; or images that "
        "are degraded (task.degrade)"
    )
    input_types: tuple[str, ...] = ("image", "noisy-target")
    output_types = ("image",)
    feature = ("image",)
    column_spec = ColumnSpec(
        "named",
        names=("target_image", "output_image", "edited_image", "ground_truth", "target", "output", "domain"),
        kinds={"target": infer_target_kind},
    )
    metrics = (
        Metric("l1", "min", "mean absolute error of the pixels, as a fraction of their range"),
        Metric("ssim", "max", "structural similarity to the target", label="SSIM"),
        Metric("psnr", "max", "dB, signal-to-noise ratio of the target", label="PSNR"),
        Metric("perceptual_distance", "min", "distance from the target in the features of a small CNN trained on the targets"),
        Metric("feature_distance", "min", "Fréchet distance from real images of the domain, in the features of a small CNN"),
        Metric("round_trip_error", "min", "mean absolute error of images that are translated there and back"),
        Metric("thumbnail_distance", "min", "Fréchet distance from real images of the domain, in thumbnails of 8 x 8 pixels"),
    )
    recipe: ClassVar = {"ema": 0.99, "patience": 0, "epochs": 1e6}
    max_batch_size, min_batch_size = 16, 8
    max_validation_examples, max_test_examples = 500, 1000

    @dataclass(frozen=True)
    class Options:
        side: int | None = None  # pixels per side that images are resized to
        channels: int | None = None  # of the input: 1 gray, 3 color
        outputs: int | None = None  # channels of the output: 1 gray, 3 color
        degrade: str = ""  # make the inputs from the images: gray | 2x | 3x | 4x | 8x (super-resolution by this factor)
        reverse: bool = False  # translate from the second image or domain to the first
        flip: bool = False  # mirror training images at random
        shift: float = 0.05  # shift training images at random by up to this fraction of the side
        distance: float = 100.0  # pairs: weight of the L1 distance to the target
        adversarial: float = 1.0  # pairs: weight of the adversarial loss; 0 trains without a critic
        cycle: float = 10.0  # no pairs: weight of the change of images that are translated there and back
        identity: float = 0.5  # no pairs: weight of the change of images that are of the domain, as a fraction of `cycle`

    @dataclass(frozen=True)
    class PredictOptions:
        to: str = ""  # no pairs: the domain to translate to, by default the second
        seed: Annotated[int, Limits(-1, MAX_SEED)] = -1  # of the noise of diffusion and the dropout of Pix2Pix; -1: 0, and none
        steps: Annotated[int, Limits(1, 1000)] = 10  # sampler steps of diffusion
        guidance: Annotated[float, Limits(0, 100)] = 1.0  # of diffusion: how much the input counts; 1 = as trained

    pictures: ImageTransform
    target_pictures: ImageTransform
    domains: list[str]  # the two domains; empty for pairs
    zoom: float  # size of the output, as a multiple of that of the input

    def __init__(self, columns: list[Column], options: Any):
        super().__init__(columns, options)
        self.judge: Any = None  # a `FeatureClassifier` of targets, trained for the test and saved with the run
        self.zoom, self.joined = 1.0, False
        self.set_domains([])

    def set_domains(self, domains: list[str]) -> None:
        """Set the two domains; none for pairs. Networks that need pairs are no candidates without them."""
        self.domains = domains
        self.input_types = type(self).input_types if not domains else ("image",)

    @classmethod
    def match(cls, data: Data) -> str | None:
        if len(data.features("image")) == 1 and data.target and data.required_target.kind == "image":
            return "pairs of images"
        return None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if len(data.features("image")) != 1:
            return "one column of input images"
        if data.target and data.required_target.kind not in ("image", "category", "boolean", "text"):
            return "a column of target images, or of two domains"
        return None

    @property
    def paired(self) -> bool:
        """Whether each training image has a known target."""
        return not self.domains

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        if options.degrade not in DEGRADATIONS:
            raise SettingsError(
                f"task.degrade={options.degrade!r} is unknown.{nearest(options.degrade, DEGRADATIONS)} Choose one of "
                f"{', '.join(filter(None, DEGRADATIONS))}, or leave it out to use the targets of the data."
            )
        task = cls(list(data.columns.values()), options)
        task.find_layout(data)
        width, height = (data.rows[name].cast(pl.Float64).to_numpy() for name in (WIDTH, HEIGHT))
        if task.joined:
            width = width / ASPECT_OF_JOINED
        sizes = [np.stack([width, height], 1), task.measure_targets(data, width, height)]  # of inputs and targets, N 2
        color = 3 if (data.rows[CHANNELS] == 3).any() else 1
        counts = [color, color]  # channels of inputs and targets
        if task.paired and not options.degrade:
            counts[1] = task.count_target_channels(data)
            if options.reverse:
                sizes.reverse()
                counts.reverse()
        if options.degrade == "gray":
            counts[0] = 1
        if options.degrade.endswith("x"):
            task.zoom = float(options.degrade[:-1])
        elif task.paired:
            task.zoom = float(np.median(sizes[1][:, 1] / sizes[0][:, 1]))
        largest = float(np.median(np.maximum(sizes[0].min(1), sizes[1].min(1))))
        limit = MAX_SIDE_BY_DEVICE[device().type]
        side = options.side or max((s for s in IMAGE_SIDES if s <= min(largest, limit)), default=IMAGE_SIDES[0])
        channels, outputs = options.channels or counts[0], options.outputs or counts[1]
        if not task.paired:
            channels = outputs = options.outputs or options.channels or color
        scale = learn_scale(data.rows)
        transform = lambda count: ImageTransform(side, count, (0.5,) * count, (0.5,) * count, "stretch", scale)
        task.pictures, task.target_pictures = transform(channels), transform(outputs)
        task.notes += describe_scale(scale)
        task.options = fill_options(options, side=side, channels=channels, outputs=outputs)
        if largest > side:
            task.notes.append(task.describe_reduction(side))
        return task

    def describe_reduction(self, side: int) -> str:
        """Return a note for images that are larger than the network's input."""
        if self.options.degrade.endswith("x"):
            small = side // int(self.zoom)
            return (
                f"images are resized to {side} x {side} pixels first, so the network learns to enlarge images of {small} x {small}; larger "
                "inputs gain no details (change this with task.side=...)"
            )
        return f"images are resized to {side} x {side} pixels (change this with task.side=...), and predictions to the size of the input"

    def find_layout(self, data: Data) -> None:
        """Find out whether the data has pairs, joined pairs, two domains, or images that are degraded."""
        target = data.target
        if self.options.degrade:
            return
        if target is not None and target.kind == "image":
            return
        if target is not None:
            domains = sorted(map(str, data.rows[target.name].drop_nulls().unique()), reverse=self.options.reverse)
            if len(domains) != 2:
                raise DataError(
                    f"{data.source}: translation without pairs needs images of two domains, but {target.name!r} holds "
                    f"{len(domains)}: {', '.join(domains[:5])}."
                )
            self.set_domains(domains)
            return
        if (data.rows[WIDTH] == ASPECT_OF_JOINED * data.rows[HEIGHT]).all():
            self.joined = True
            self.notes.append("each file holds the input in its left half and the target in its right half")
            return
        raise DataError(
            f"{data.source}: the images have neither targets nor domains. Give pairs (folders A and B with files of the same names), two "
            "folders of domains, or how inputs are made from the images, such as --set task.degrade=4x."
        )

    def measure_targets(self, data: Data, width: np.ndarray, height: np.ndarray) -> np.ndarray:  # -> N 2
        """Return width and height of the targets."""
        if self.domains or self.joined or self.options.degrade:
            return np.stack([width, height], 1)
        sizes = []
        for path in data.rows[self.target.name].to_list():
            with images.open_image(path) as opened:
                sizes.append(opened.size)
        return np.array(sizes, dtype=np.float64)

    def count_target_channels(self, data: Data) -> int:
        """Return 3 if the targets have colors, else 1."""
        if self.joined:
            return 3 if (data.rows[CHANNELS] == 3).any() else 1
        some = data.rows[self.target.name].head(EVALUATION_ROWS).to_list()
        return 3 if any(check.channels == 3 for check in images.check(some)) else 1

    def main_metric(self) -> Metric:
        return super().main_metric() if self.paired or self.metric else self.find_metric("feature_distance")

    def monitored_metric(self) -> Metric:
        """Return the metric that selects the best weights; without pairs one that needs no evaluation network."""
        return super().monitored_metric() if self.paired or self.metric else self.find_metric("thumbnail_distance")

    def find_metric(self, name: str) -> Metric:
        """Return a metric by its name."""
        return next(metric for metric in self.metrics if metric.name == name)

    # Models

    def model_dims(self) -> dict[str, Any]:
        return {
            "image": self.pictures.side,
            "channels": self.pictures.channels,
            "outputs": self.target_pictures.channels,
            "paired": self.paired,
        }

    def data_facts(self) -> dict[str, Any]:
        return {"side": self.pictures.side, "paired": self.paired}

    def part_names(self, card: Card) -> Mapping[str, str]:
        if self.paired:
            return card.parts if self.options.adversarial else {}
        return {**card.parts, "back_critic": card.parts["critic"]} if card.parts else {}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        loss = LOSSES[settings.loss]() if settings.loss else None
        o = self.options
        if card.input_type == "noisy-target":
            return TranslationDiffusion(model, build_process("cosine", "v"), outputs=self.target_pictures.channels)
        if self.paired:
            critic = parts.get("critic") or torch.nn.Identity()
            return PairedTranslation(model, critic, distance=o.distance, adversarial=o.adversarial, loss=loss)
        shape = (self.pictures.channels, self.pictures.side, self.pictures.side)
        back, critics = card.make(model.config), (parts["critic"], parts["back_critic"])
        return UnpairedTranslation(model, back, *critics, shape=shape, cycle=o.cycle, identity=o.identity, loss=loss)

    # Images as tensors

    def load_pairs(self, data: Data) -> tuple[Tensor, Tensor | None]:
        """Return inputs and known targets, uint8 N C S S. Without pairs, both are the images."""
        paths = data.rows[self.column].to_list()
        if self.options.degrade:
            real = self.target_pictures.load(paths)
            return degrade(real, self.options.degrade, self.pictures.channels), real
        if self.joined:
            return self.load_halves(paths)
        first = self.pictures.load(paths)
        if not self.paired:
            return first, first
        if self.target.name not in data.rows.columns or data.rows[self.target.name].null_count():
            return first, None
        second = data.rows[self.target.name].to_list()
        if self.options.reverse:
            return self.pictures.load(second), self.target_pictures.load(paths)
        return first, self.target_pictures.load(second)

    def open_pairs(self, data: Data) -> Callable[[np.ndarray], tuple[Tensor, Tensor | None]]:
        """Return a function that loads rows as `load_pairs` does. They are kept in memory if all of them take a small part of it."""
        p, q = self.pictures, self.target_pictures
        size = len(data) * (p.channels * p.side**2 + q.channels * q.side**2)
        if size > MAX_IMAGE_CACHE_FRACTION_OF_RAM * ram():
            return lambda index: self.load_pairs(data.take(index))
        inputs, real = self.load_pairs(data)
        return lambda index: (inputs[index], real[index] if real is not None else None)

    def load_halves(self, paths: list[str]) -> tuple[Tensor, Tensor]:
        """Return the halves of files that hold input and target."""
        side, halves = self.pictures.side, []
        resize = lambda image: image.resize((ASPECT_OF_JOINED * side, side), Image.Resampling.BILINEAR)
        for transform in (self.pictures, self.target_pictures):
            halves.append(torch.stack(images.load_each(paths, transform.channels, resize, transform.scale)))
        first, second = halves[0][..., :side], halves[1][..., side:]
        if self.options.reverse:
            return halves[0][..., side:], halves[1][..., :side]
        return first, second

    def is_second(self, data: Data) -> np.ndarray:
        """Return which images are of the second domain, N bool; those without a domain are of the first."""
        if self.paired or self.target.name not in data.rows.columns:
            return np.zeros(len(data), dtype=bool)
        return (data.rows[self.target.name].cast(pl.String) == self.domains[1]).fill_null(False).to_numpy()

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        load, reverse = self.open_pairs(data), torch.from_numpy(self.is_second(data))

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            rows = torch.from_numpy(index)
            inputs, real = load(index)
            if not self.paired:
                return {"image": self.pictures.apply(inputs), "row": rows, "reverse": reverse[rows]}
            pair = {"image": inputs, **({"target": real} if real is not None else {})}
            if generator is not None:
                pair = self.augment(pair, generator)
            transforms = {"image": self.pictures, "target": self.target_pictures}
            return {"row": rows, **{name: transforms[name].apply(x) for name, x in pair.items()}}

        return Batches(len(data), make)

    def train_batches(self, data: Data, card: Card, settings: Settings) -> Batches:
        """Return pairs; or images of both domains, of which those of the smaller one are drawn more often."""
        if self.paired:
            return self.batches(data, card, settings)
        load, second = self.open_pairs(data), self.is_second(data)
        own = [np.flatnonzero(rows) for rows in (~second, second)]
        larger = int(len(own[1]) > len(own[0]))

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            other = torch.randint(len(own[1 - larger]), (len(index),), generator=generator).numpy()
            rows = [own[larger][index], own[1 - larger][other]]
            if larger:
                rows.reverse()
            batch = {name: load(chosen)[0] for name, chosen in zip(("image", "target"), rows)}
            if generator is not None:  # each domain is moved in its own way
                batch = {name: self.augment({name: x}, generator)[name] for name, x in batch.items()}
            return {name: self.pictures.apply(x) for name, x in batch.items()}

        return Batches(len(own[larger]), make)

    def augment(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Mirror and shift images, all of a row in the same way; what is shifted in is a reflection."""
        rows = len(next(iter(batch.values())))
        side, most = self.pictures.side, round(self.options.shift * self.pictures.side)
        mirrored = torch.rand(rows, generator=generator) < (0.5 if self.options.flip else 0.0)
        moved = torch.randint(-most, most + 1, (2, rows), generator=generator)
        places = torch.arange(side) + moved[..., None]  # 2 B S
        places = places.abs()
        places = torch.where(places >= side, 2 * (side - 1) - places, places)

        def change(x: Tensor) -> Tensor:
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
            height, width = (p[:, None] for p in places)  # B 1 S
            x = x.gather(2, height[..., None].expand_as(x))
            return x.gather(3, width[:, :, None].expand_as(x))

        return {name: change(x) for name, x in batch.items()}

    # Predictions

    def check_options(self) -> None:
        """Raise `SettingsError` for options of predictions that this model does not have."""
        to = self.predict_options.to
        if to and self.paired:
            raise SettingsError("to: this model was trained on pairs, so it translates in one direction only.")
        if to and to not in self.domains:
            raise SettingsError(f"to={to!r} is no domain.{nearest(to, self.domains)} Domains are: {', '.join(self.domains)}.")

    def read_one(self, source: Any, answered: bool) -> Data:
        data = super().read_one(source, answered)
        if answered and not self.paired and self.target.name in data.rows.columns:
            strange = set(data.rows[self.target.name].drop_nulls().cast(pl.String)) - set(self.domains)
            if strange:
                raise DataError(f"{data.source}: {sorted(strange)[0]!r} is no domain of this model: {', '.join(self.domains)}.")
        return data

    def predict_batches(self, data: Data, card: Card) -> Batches:
        self.check_options()
        paths, sizes = data.rows[self.column].to_list(), data.rows.select(WIDTH, HEIGHT).to_numpy()
        to_first = bool(self.domains) and self.predict_options.to == self.domains[0]
        largest = self.pictures.side / self.zoom
        if self.options.degrade.endswith("x") and (sizes.max(1) > largest).any():
            self.add_note(f"images larger than {largest:.0f} pixels are reduced first, so they gain no details")

        def make(index: np.ndarray, _: torch.Generator | None) -> dict[str, Tensor]:
            image = self.pictures.apply(self.pictures.load([paths[i] for i in index]))
            batch = {"image": image, "row": torch.from_numpy(index)}
            return batch if self.paired else batch | {"reverse": torch.full((len(index),), to_first)}

        return Batches(len(paths), make, meta={"size": np.round(sizes * self.zoom).astype(np.int64)})

    def predict_step(self, objective: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
        self.check_options()
        o, usual = self.predict_options, self.PredictOptions()
        if isinstance(objective, TranslationDiffusion):
            objective.sampler, objective.guidance = DPMSolver(steps=o.steps), o.guidance
            objective.seed = max(o.seed, 0)
        elif changed := [name for name in ("steps", "guidance") if getattr(o, name) != getattr(usual, name)]:
            raise SettingsError(f"{', '.join(changed)}: not supported. This model translates an image in one step.")
        if isinstance(objective, PairedTranslation) and o.seed >= 0:
            objective.draw = o.seed
        return objective.outputs

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        records = []
        for made, size in zip(outputs["made"], outputs["size"]):
            levels = np.rint((made.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
            image = Image.fromarray(levels if levels.shape[2] > 1 else levels[..., 0])
            image, out = image.resize((int(size[0]), int(size[1])), Image.Resampling.BICUBIC), io.BytesIO()
            image.save(out, "PNG")
            records.append({"image": Media(out.getvalue(), ".png"), "width": image.width, "height": image.height})
        return records

    # Evaluation

    def prepare_test(self, train: Data, held: Data) -> None:
        rows = np.sort(np.random.default_rng(0).permutation(len(train))[:EVALUATION_ROWS])
        some = train.take(rows)
        inputs, real = self.load_pairs(some)
        assert real is not None  # training data has targets
        self.known = self.target_pictures.apply(real)
        self.known_inputs = self.pictures.apply(inputs)
        self.known_second = self.is_second(some)
        label = None if self.paired else torch.from_numpy(self.known_second.astype(np.int64))
        self.judge = generative.train_classifier(self.known, label, 2)

    def estimate_scoring_seconds(self) -> float:
        return generative.TRAINING_STEPS * generative.measure_step_seconds(
            self.target_pictures.channels, self.target_pictures.side
        )

    def targets(self, data: Data) -> Arrays:
        inputs, real = self.load_pairs(data)
        if real is None:
            raise DataError(
                f"{data.source}: there are no target images to evaluate with. Use `fieldguide predict` without targets."
            )
        found = {"real": self.target_pictures.apply(real).numpy(), "input": self.pictures.apply(inputs).numpy()}
        return found if self.paired else found | {"reverse": self.is_second(data)}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        scores = {name: float(values.mean()) for name, values in self.score_each(outputs, targets).items()}
        for name, pairs in self.list_clouds(outputs, targets).items():
            scores[name] = float(np.mean([generative.frechet_distance(*pair) for pair in pairs]))
        return scores

    def score_each(self, outputs: Arrays, targets: Arrays) -> dict[str, np.ndarray]:
        """Return the scores that are means over images, for each image."""
        made, real = torch.from_numpy(outputs["made"]).clamp(-1, 1), torch.from_numpy(targets["real"])
        if not self.paired:
            again = torch.from_numpy(outputs["again"]).clamp(-1, 1)
            return {"round_trip_error": image_quality.absolute_error(again, real).numpy()}
        scores = {
            "l1": image_quality.absolute_error(made, real).numpy(),
            "ssim": image_quality.ssim(made, real).numpy(),
            "psnr": image_quality.psnr(made, real).numpy(),
        }
        if self.judge is not None:
            seen = [generative.extract_features(self.judge, x) for x in (made, real)]
            scores["perceptual_distance"] = np.linalg.norm(seen[0] - seen[1], axis=1)
        return scores

    def list_clouds(self, outputs: Arrays, targets: Arrays) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        """Return metric -> features of real and of translated images of each domain, N D and M D; empty for pairs."""
        if self.paired:
            return {}
        real, made = torch.from_numpy(targets["real"]), torch.from_numpy(outputs["made"]).clamp(-1, 1)
        second = targets["reverse"].astype(bool)
        if second.all() or not second.any():
            return {}
        kinds: dict[str, Callable[[Tensor], np.ndarray]] = {"thumbnail_distance": lambda x: compute_thumbnails(x.numpy())}
        if self.judge is not None:
            kinds["feature_distance"] = lambda x: generative.extract_features(self.judge, x)
        return {
            name: [(see(real[second]), see(made[~second])), (see(real[~second]), see(made[second]))]
            for name, see in kinds.items()
        }

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return bootstrap intervals over images."""
        ranges = {
            name: generative.bootstrap_mean_interval(values) for name, values in self.score_each(outputs, targets).items()
        }
        for name, pairs in self.list_clouds(outputs, targets).items():
            low, high = np.mean([generative.bootstrap_distance_interval(*pair) for pair in pairs], 0)
            ranges[name] = (float(low), float(high))
        return ranges

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        targets = self.targets(test)
        inputs = torch.from_numpy(targets["input"])
        shaped = convert_channels(inputs, self.target_pictures.channels)
        if not self.paired:
            second = torch.from_numpy(targets["reverse"])
            first_known, second_known = (self.known[torch.from_numpy(rows)] for rows in (~self.known_second, self.known_second))
            matched = inputs.clone()
            matched[~second] = match_colors(inputs[~second], first_known, second_known)
            matched[second] = match_colors(inputs[second], second_known, first_known)
            same = {"made": inputs.numpy(), "again": inputs.numpy()}
            return [
                Baseline("copy", "returns the image unchanged", same),
                Baseline("colors", "mean and spread of each channel as in the other domain", {**same, "made": matched.numpy()}),
            ]
        colors = fit_colors(self.known_inputs, self.known)
        nearest_rows = [int(((self.known_inputs - image) ** 2).flatten(1).sum(1).argmin()) for image in inputs]
        return [
            Baseline("copy", "returns the input unchanged", {"made": shaped.numpy()}),
            Baseline(
                "mean", "the mean of the training targets", {"made": self.known.mean(0).expand(len(inputs), -1, -1, -1).numpy()}
            ),
            Baseline("colors", "a linear function of the channels at each pixel", {"made": colors(inputs).numpy()}),
            Baseline("nearest", "the target of the most similar training input", {"made": self.known[nearest_rows].numpy()}),
        ]

    # Report

    def log_eval_samples(self, objective: Objective) -> list[ReportElement]:
        return []

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        if self.paired:
            return {"Images": show_pairs(test, outputs, targets)}
        return {"Images": show_domains(self.domains, outputs, targets)}

    # Saved with the run

    STATE: ClassVar = {
        "pictures": ImageTransform.STATE,
        "target_pictures": ImageTransform.STATE,
        "domains": list[str],
        "zoom": float,
        "joined": bool,
    }

    def state(self) -> dict[str, Any]:
        return {
            "pictures": self.pictures.to_json(),
            "target_pictures": self.target_pictures.to_json(),
            "domains": self.domains,
            "zoom": self.zoom,
            "joined": self.joined,
        }

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.pictures, task.target_pictures = (
            ImageTransform.from_json(state[name]) for name in ("pictures", "target_pictures")
        )
        task.zoom, task.joined = state["zoom"], state["joined"]
        task.set_domains(list(state["domains"]))
        if (folder / "judge.safetensors").exists():
            task.judge = generative.load_state(load_file(folder / "judge.safetensors"))
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.judge is not None:
            save_file({k: t.contiguous() for k, t in self.judge.state_dict().items()}, folder / "judge.safetensors")


TASKS = (ImageToImage,)
