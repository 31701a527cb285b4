"""Text-to-image: fine-tuning of a pipeline on captioned images, or on a few photos of one subject (DreamBooth)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fieldguide.checkpoints.config_mapping import read_network_config
from fieldguide.checkpoints.load import build_network, inspect_folder
from fieldguide.checkpoints.pipeline_parts import SCHEDULER_FILE, copy_frozen_parts, read_pipeline
from fieldguide.core import distributed
from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.core.files import write_atomically
from fieldguide.core.report_elements import Gallery, Picture, ReportElement
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.core.validation import read_json
from fieldguide.data import read
from fieldguide.data.column_spec import CAPTION_NAMES, ColumnSpec
from fieldguide.data.dataset import Column, Data, Manifest
from fieldguide.data.loader import Batches, iterate_in_order
from fieldguide.data.preprocessing import ImageTransform
from fieldguide.objectives.base import Objective
from fieldguide.objectives.diffusion import LatentDiffusion, LogitNormalTimes
from fieldguide.objectives.diffusion.loss_weighting import WEIGHTINGS
from fieldguide.objectives.diffusion.noise_process import FlowProcess
from fieldguide.objectives.diffusion.scheduler_config import describe_lcm_scheduler
from fieldguide.objectives.latent_consistency import GUIDANCE_RANGE, LatentConsistency
from fieldguide.tasks.base import Arrays, Baseline, Media, Metric, Task
from fieldguide.tasks.latent_diffusion.diffusion_pipeline import LCM_STEPS, DiffusionPipeline, check_family, load_frozen
from fieldguide.tasks.latent_diffusion.generation import ImageOptions, ImageRequest, generate
from fieldguide.tasks.latent_diffusion.latent_examples import LatentExamples
from fieldguide.tasks.latent_diffusion.signature import TextToImageSignature
from fieldguide.tasks.report_builder import ExampleInput
from fieldguide.tasks.vision.image_encoding import encode_png, encode_sheet

METHODS = ("diffusion", "lcm")
PARTS_FOLDER = "pipeline"  # in the preprocessing of a run: the frozen networks
MAX_SHOWN_PROMPTS = 4  # for which the report shows images
MAX_SHOWN_STEPS = 20  # sampler steps of images in the report


class TextToImage(TextToImageSignature, Task):
    name = "text-to-image"
    reads = (
        "images with captions: a folder with a .txt next to each image, a table of paths and captions, or a folder of images of one "
        "subject with task.prompt (DreamBooth); it starts from a pipeline of diffusers: --weights FOLDER"
    )
    input_types = ("noisy-latent", "noisy-latent-pooled")
    output_types = ("image",)
    feature = ("image",)
    column_spec = ColumnSpec("named", names=CAPTION_NAMES, kinds={"target": lambda values: "text"})
    metrics = (Metric("held_out_loss", "min", "error of the predicted noise on held-out images, at fixed noise"),)
    recipe: ClassVar = {"patience": 0}
    finetune_rate = 0.1  # of LoRA 1e-4, as in the scripts of diffusers
    finetune_mode = "lora"
    max_validation_examples, max_test_examples = 100, 200
    min_batch_size = 4

    @dataclass(frozen=True)
    class Options:
        pipeline: str | None = None  # folder of diffusers with the frozen networks; that of --weights
        side: Annotated[int, Limits(8, 4096)] | None = None  # pixels per side; by default those of the pipeline
        prompt: str | None = None  # caption of all images, such as "a photo of sks dog", with a rare word for the subject
        class_images: str | None = None  # folder of images of the subject's class, which keep the class as it was
        class_prompt: str | None = None  # their caption, such as "a photo of a dog"
        prior_weight: Annotated[float, Limits(0, 100)] = 1.0  # of the loss of class images
        weighting: str = "uniform"  # weight of noise levels in the loss: uniform | min-snr | sigmoid
        method: str = "diffusion"  # diffusion | lcm: the network learns to generate in 1 to 4 steps (latent consistency model)
        min_guidance: Annotated[float, Limits(1, 100)] = GUIDANCE_RANGE[0]  # lcm: least guidance scale that is learned
        max_guidance: Annotated[float, Limits(1, 100)] = GUIDANCE_RANGE[1]  # lcm: largest guidance scale that is learned

    @dataclass(frozen=True)
    class PredictOptions(ImageOptions):
        """Options of a request; the default size is that of training."""

    prompts: list[str]  # some captions of the training images
    parts_folder: Path  # of the frozen networks
    requested: Sequence[str] = ()  # prompts of a request

    def __init__(self, columns: list[Column], options: Any):
        super().__init__(columns, options)
        self.needs_reference = options.method == "lcm"  # the teacher

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        return None if len(data.features("image")) == 1 else "an image column"

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        if options.pipeline is None:
            raise SettingsError(f"{cls.name} trains the network of a pipeline of diffusers. Name its folder: --weights FOLDER.")
        if (options.class_images is None) != (options.class_prompt is None):
            raise SettingsError("task.class_images and task.class_prompt belong together: set both, or none.")
        if options.weighting not in WEIGHTINGS:
            raise SettingsError(f"weighting={options.weighting!r} is unknown. Choose one of {', '.join(WEIGHTINGS)}.")
        check_method(options)
        if data.target is None and options.prompt is None:
            raise DataError(
                f"{data.source} has no captions. Put a .txt file next to each image, or a column {' or '.join(CAPTION_NAMES)} into a "
                'table, or set one for all images: --set task.prompt="a photo of sks dog".'
            )
        task = cls(list(data.columns.values()), options)
        task.parts_folder = Path(options.pipeline)
        made = task.examples.pipeline
        if options.side % made.multiple:
            raise SettingsError(f"task.side={options.side} must be a multiple of {made.multiple} for {made.card.name}.")
        if options.method == "lcm" and made.family.distilled:
            raise SettingsError(f"task.method=lcm: {options.pipeline} is told the guidance scale, and can be no teacher.")
        if getattr(made.config, "extra", 0):
            raise SettingsError(f"{options.pipeline} fills in a part of an image. Training it is not supported.")
        captions = task.get_captions(data)
        if empty := sum(not caption.strip() for caption in captions):
            task.notes.append(f"{empty:,} of {len(captions):,} training images have an empty caption")
        different = list(dict.fromkeys(captions))
        task.prompts = different[:: max(1, len(different) // MAX_SHOWN_PROMPTS)][:MAX_SHOWN_PROMPTS]
        return task

    @functools.cached_property
    def examples(self) -> LatentExamples:
        """The frozen networks, loaded when they are first needed."""
        parts = read_pipeline(self.parts_folder)
        card, config = read_network_config(parts.denoiser)
        check_family(card, parts)
        dtype = torch.float32 if distributed.device().type == "cpu" else torch.bfloat16
        made = load_frozen(parts, card, config, dtype)
        made.vae.float()  # latents are computed once, so precision costs little
        if self.options.method == "lcm":
            made = replace(made, scheduler=describe_lcm_scheduler(made.scheduler))
        return LatentExamples(made, ImageTransform(self.options.side, 3, (0.5,) * 3, (0.5,) * 3))

    def get_captions(self, data: Data) -> list[str]:
        """Return the caption of each image: that of all images if one is set."""
        if self.options.prompt is None:
            return [caption or "" for caption in data.rows[self.target.name].to_list()]
        if target := [c.name for c in self.columns if c.role == "target"]:
            self.add_note(f"the column {target[0]} is not used, since task.prompt is the caption of all images")
        return [self.options.prompt] * len(data)

    def model_dims(self) -> dict[str, Any]:
        return {}  # the pipeline determines its network

    # Training

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Return latents and encoded captions of images."""
        paths, captions, examples = data.rows[self.column].to_list(), self.get_captions(data), self.examples
        examples.encode_all(paths, captions)
        self.note_truncated_captions(captions)

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            batch = examples.make([paths[i] for i in index], [captions[i] for i in index])
            return batch | {"row": torch.from_numpy(index)}

        return Batches(len(paths), make)

    def train_batches(self, data: Data, card: Card, settings: Settings) -> Batches:
        """Return training examples, with as many images of the subject's class in each batch, if there are any."""
        plain = self.batches(data, card, settings)
        if self.options.class_images is None:
            return plain
        paths, prompt, examples = list_images(Path(self.options.class_images)), self.options.class_prompt, self.examples
        examples.encode_all(paths, [prompt] * len(paths))

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            batch = plain.make(index, generator)
            drawn = torch.randint(len(paths), (len(index),), generator=generator).tolist() if generator else index % len(paths)
            prior = examples.make([paths[i] for i in drawn], [prompt] * len(index))
            joined = {name: torch.cat([x, prior.get(name, x)]) for name, x in batch.items()}
            return joined | {"is_prior": torch.arange(2 * len(index)) >= len(index)}

        return Batches(len(plain), make)

    def note_truncated_captions(self, captions: Sequence[str]) -> None:
        """Tell the user about captions that the text encoders do not read to their end."""
        if cut := sum(caption in self.examples.truncated for caption in captions):
            self.add_note(f"{cut:,} of {len(captions):,} captions are longer than the text encoders read, and are truncated")

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        made = self.examples.pipeline
        process, _, _ = made.build_sampler(made.family.steps, None)
        times = None
        if isinstance(process, FlowProcess):  # as published for Stable Diffusion 3, with the shift of its scheduler
            dynamic = made.scheduler.get("use_dynamic_shifting", False)
            times = LogitNormalTimes(shift=1.0 if dynamic else float(made.scheduler.get("shift", 1.0)))
        empty = self.examples.encode_texts([""])[0]
        names = tuple(empty)
        if self.options.method == "lcm":
            o, teacher = self.options, parts.get("reference")
            none = {name: x[None] for name, x in empty.items()}
            tells = bool(getattr(model.config, "guidance_dim", 0))
            scales = (o.min_guidance, o.max_guidance)
            return LatentConsistency(model, teacher, process, inputs=names, empty=none, guidance=scales, tells_guidance=tells)
        weighting, prior = WEIGHTINGS[self.options.weighting](), self.options.prior_weight
        return LatentDiffusion(model, process, weighting, inputs=names, times=times, prior_weight=prior)

    # Generation

    def read(self, sources: Sequence[Any], *, answered: bool = False) -> Data:
        """Read prompts; without input, some captions of the training images."""
        if answered:
            return super().read(sources, answered=True)
        if wrong := [source for source in sources if not isinstance(source, str)]:
            raise DataError(f"{wrong[0]!r} is no prompt: give a text.")
        self.requested = [prompt for prompt in sources or self.prompts for _ in range(self.predict_options.count)]
        return Data("prompts", pl.DataFrame({"prompt": self.requested}), {}, Manifest(""))

    def predict_batches(self, data: Data, card: Card) -> Batches:
        return Batches(len(data), lambda index, _: {"row": torch.from_numpy(index)})

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            if "mean" in batch:
                return objective.outputs(batch)
            rows = batch["row"].tolist()
            made = [self.generate(objective, self.requested[i], i, self.predict_options) for i in rows]
            return {"image": torch.stack(made), "row": batch["row"]}

        return answer

    def generate(self, objective: Any, prompt: str, number: int, options: Any) -> Tensor:  # -> 3 H W in -1 .. 1
        """Return the image of a prompt; its noise depends on the seed of the options and on its number."""
        made = self.build_pipeline(objective.model)
        side, notes = self.options.side, list[str]()
        chosen = replace(options, count=1, width=options.width or side, height=options.height or side)
        image = generate(made, ImageRequest(prompt), chosen, notes=notes, first=number)[0]
        for note in notes:
            self.add_note(note)
        return image

    def build_pipeline(self, network: Any) -> DiffusionPipeline:
        """Return the pipeline with the network of the run; a latent consistency model takes few steps, without further guidance."""
        made: DiffusionPipeline = self.examples.pipeline
        family = made.family
        if self.options.method == "lcm":
            tells = bool(getattr(network.config, "guidance_dim", 0))
            family = replace(family, steps=LCM_STEPS, distilled=tells, guidance=family.guidance if tells else 1.0)
        return replace(made, network=network, config=network.config, family=family)

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        return [
            {"prompt": self.requested[row], "image": Media(encode_png(image), ".png")}
            for row, image in zip(outputs["row"], outputs["image"])
        ]

    # Evaluation

    def targets(self, data: Data) -> Arrays:
        return {"row": np.arange(len(data))}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        return {"held_out_loss": float(outputs["loss"].mean())}

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        """Return the loss of the pipeline as it was before; nothing if its folder is gone."""
        if self.options.pipeline is None or not Path(self.options.pipeline).is_dir():
            return []
        found = inspect_folder(read_pipeline(Path(self.options.pipeline)).denoiser, None)
        network = build_network(found.card, found.values, found.state, found.origin, str(found.path)).to(distributed.device())
        objective = self.objective(network, found.card, Settings()).eval()
        batches, parts = self.batches(test, found.card), []
        with torch.no_grad():
            for _, batch in iterate_in_order(batches, self.min_batch_size):
                on_device = {name: x.to(distributed.device()) for name, x in batch.items()}
                parts.append(objective.outputs(on_device)["loss"].cpu().numpy())
        return [Baseline("pipeline before", "the pipeline without this training", {"loss": np.concatenate(parts)})]

    # Report

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        captions, paths = self.get_captions(test), test.rows[self.column].to_list()
        first = {caption: i for i, caption in reversed(list(enumerate(captions)))}  # one image of each caption
        rows = sorted(first.values())[:MAX_SHOWN_PROMPTS]
        real = self.examples.pictures.apply(self.examples.pictures.load([paths[i] for i in rows]))
        pictures = [
            Picture(encode_sheet(np.stack([self.show(objective, captions[i], n), real[n].numpy()])), captions[i])
            for n, i in enumerate(rows)
        ]
        note = "Left the generated image, right a test image of that caption."
        return {"Samples": [Gallery("Generated images", note, pictures)]}

    def log_eval_samples(self, objective: Objective) -> list[ReportElement]:
        prompt = self.prompts[0]
        picture = Picture(encode_sheet(self.show(objective, prompt, 0)[None]), prompt)
        return [Gallery("Samples during training", "Generated from the same noise each time.", [picture])]

    def show(self, objective: Any, prompt: str, number: int) -> np.ndarray:  # -> 3 S S
        """Return an image for the report, in few steps."""
        steps = min(self.build_pipeline(objective.model).family.steps, MAX_SHOWN_STEPS)
        return self.generate(objective, prompt, number, ImageOptions(steps=steps)).cpu().numpy()

    def example_input(self, test: Data) -> ExampleInput | None:
        return ExampleInput(self.prompts[0], note="The input is a prompt.")

    # Saved with the run

    STATE: ClassVar = {"prompts": list[str]}

    def state(self) -> dict[str, Any]:
        return {"prompts": self.prompts}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.prompts, task.parts_folder = state["prompts"], folder / PARTS_FOLDER
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        copy_frozen_parts(self.parts_folder, folder / PARTS_FOLDER)
        if self.options.method == "lcm":
            path = folder / PARTS_FOLDER / "scheduler" / SCHEDULER_FILE
            write_atomically(path, json.dumps(describe_lcm_scheduler(read_json(path, WeightsError)), indent=2).encode())


def check_method(options: Any) -> None:
    """Raise `SettingsError` for options of text-to-image that exclude each other."""
    if options.method not in METHODS:
        raise SettingsError(f"method={options.method!r} is unknown. Choose one of {', '.join(METHODS)}.")
    if options.method == "diffusion":
        return
    if options.class_images is not None or options.weighting != "uniform":
        raise SettingsError("task.class_images and task.weighting are options of task.method=diffusion. Leave them out.")
    if options.min_guidance > options.max_guidance:
        raise SettingsError(f"task.min_guidance={options.min_guidance} is above task.max_guidance={options.max_guidance}.")


def list_images(source: Path) -> list[str]:
    """Return the paths of the images in a folder or table. Raises `DataError` if there are none."""
    data = read(source, column_spec=ColumnSpec("named", names=CAPTION_NAMES))
    if len(columns := data.features("image")) != 1:
        raise DataError(f"task.class_images={source} holds no images.")
    return data.rows[columns[0].name].to_list()


TASKS = (TextToImage,)
