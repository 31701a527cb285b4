"""Graphs of image generation: one forward pass of a GAN, or one call of a diffusion model, whose sampler is a table of numbers; for
unCLIP, such calls of the prior and of the decoder, and the text encoder.

A step of a sampler that calls the network once is linear in x, in the last predictions of the clean image and in new noise. Its
factors do not depend on the data, so they are computed here once and written to `loop.json`, and the program needs no sampler.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.loader import mix_seeds
from fieldguide.exporting.graph import BATCH, ExportError, Graph
from fieldguide.exporting.image_text import describe_ended_tokens
from fieldguide.objectives import DDIM, Adversarial, UnCLIP
from fieldguide.objectives.diffusion import NoiseProcess, Sampler
from fieldguide.objectives.diffusion.unclip import CANDIDATES, MAX_DEVIATIONS, PRIOR_SPACING
from fieldguide.objectives.noise import Noise
from fieldguide.tasks.vision.image_generation_sampling import build_sampler

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

TEST_OPTIONS = {"count": 1}  # image of each requested class or caption
SAMPLING = {"sampling": ("sampling_module",)}  # module of run.py and its parts
SYMBOLS = ("x", "clean", "before", "earlier", "noise")  # what a step depends on: x, the last three clean images, new noise


class DenoisingStep(nn.Module):
    """Return the network's output for noisy images, a time and labels."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.network(*inputs).float(),)


class GeneratorStep(nn.Module):
    """Return generated images for noise and classes."""

    def __init__(self, objective: Adversarial):
        super().__init__()
        self.objective = objective

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        noise, label = inputs
        classes = torch.arange(1, self.objective.num_classes + 1)
        condition = (label[:, None] == classes).to(noise.dtype)  # as `Adversarial.add_condition`
        return (self.objective.model(torch.cat([noise, condition], 1)).float(),)


class TextStep(nn.Module):
    """Return the states of texts, their embeddings, and which tokens are real."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states, pooled, mask = self.encoder.encode_texts(*inputs)  # type: ignore[operator]  # of `ClipEncoder`
        return states.float(), pooled.float(), mask


class PriorStep(nn.Module):
    """Return the embeddings that a prior predicts from noisy ones."""

    def __init__(self, prior: nn.Module):
        super().__init__()
        self.prior = prior

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        embedding, *others = inputs
        return (self.prior(embedding[:, :, None, None], *others)[:, :, 0, 0].float(),)


def tabulate_sampler(process: NoiseProcess, sampler: Sampler) -> dict[str, Any]:
    """Return the factors of all steps: {"prior": factor of the first noise, "clip": ..., "steps": [...]}.

    Each step has the `time` and the `scale` of the network's input, the factors of x and of the output in the prediction of the `clean`
    image, and those of `SYMBOLS` in the next x. Raises `ExportError` for a sampler that calls the network twice.
    """
    if type(sampler).update is Sampler.update or sampler.calls_per_step > 1:
        raise ExportError(f"the sampler {type(sampler).__name__} has no table of steps, so its models have no graph yet.")
    symbol = {name: torch.eye(len(SYMBOLS), dtype=torch.float64)[i] for i, name in enumerate(SYMBOLS)}
    state = sampler.start(process, lambda: symbol["noise"], noise=torch.ones(1, dtype=torch.float64))
    prior, steps = float(state.x), []
    while not state.done:
        level, pair = state.level, torch.eye(2, dtype=torch.float64)
        clean = process.predict_clean(pair[0], pair[1], level)
        past = [level for level, _ in state.history[-2:]]
        state.history = list(zip(past, (symbol["earlier"], symbol["before"])[2 - len(past) :]))
        state.x = symbol["x"]
        noise = (symbol["x"] - level.signal * symbol["clean"]) / level.noise
        factors = sampler.update(state, symbol["clean"], noise)
        scale = float(process.get_input_scale(level))
        steps.append({"time": float(level.time), "scale": scale, "clean": clean.tolist(), "next": factors.tolist()})
        sampler.end_step(state, factors)
    return {"prior": prior, "clip": sampler.clip, "steps": steps}


def build_image_generation(predictor: TaskPredictor) -> Graph:
    """Return the graph of image generation. Raises `ExportError` for samplers without a table."""
    if predictor.task.upsamplers.members:  # type: ignore[attr-defined]  # of image generation
        raise ExportError("run.py does not enlarge images (task.upsamplers). Export the runs that do, and a run without them.")
    objective: Any = copy.deepcopy(predictor.objective).eval().requires_grad_(False).float().cpu()
    if isinstance(objective, Adversarial):
        return build_generator(predictor, objective)
    return build_unclip(predictor, objective) if isinstance(objective, UnCLIP) else build_denoiser(predictor, objective)


def build_generator(predictor: TaskPredictor, objective: Any) -> Graph:
    """Return the graph of a GAN's generator."""
    label, values = describe_conditions(predictor.task)
    inputs = (TensorSpec("noise", "float32", (BATCH, Axis("width", objective.noise))), label)
    loop = {"prior": 1.0, "clip": 0.0, "steps": [], "guidance": 1.0}
    values |= {"shape": [objective.noise], "sample": "image", "sampler": loop}
    return Graph(GeneratorStep(objective), inputs, ("image",), **choose_program(predictor.task), values=values)


def build_denoiser(predictor: TaskPredictor, objective: Any, label: TensorSpec | None = None) -> Graph:
    """Return the graph of one call of a network that denoises images; `label` describes its condition, by default that of the data."""
    task: Any = predictor.task
    options, channels, side = task.PredictOptions(), task.pictures.channels, task.pictures.side
    loop = tabulate_sampler(objective.process, objective.adapt_sampler(build_sampler(options)))
    loop["guidance"] = options.guidance if task.labels or task.text else 1.0
    axes = (Axis("channels", channels), Axis("height", side), Axis("width", side))
    time, (usual, values) = TensorSpec("time", "float32", (BATCH,), low=0, high=999), describe_conditions(task)
    inputs = (TensorSpec("image", "float32", (BATCH, *axes)), time, label or usual)
    values |= {"shape": [channels, side, side], "sample": "image", "sampler": loop}
    signature_loop = asdict(predictor.signature.loop) if predictor.signature.loop else {}
    program = choose_program(task)
    return Graph(DenoisingStep(objective.model), inputs, ("output",), **program, values=values, loop={**signature_loop, **loop})


def build_unclip(predictor: TaskPredictor, objective: UnCLIP) -> Graph:
    """Return the graph of a decoder, with those of the prior and of the text encoder (see `objectives.diffusion.unclip`)."""
    task: Any = predictor.task
    encoder: Any = objective.encoder
    options, prior, length = task.PredictOptions(), objective.prior, task.options.length
    # DDIM with eta = 1 is the ancestral sampling of `UnCLIP.sample_embedding`, in a form that has a table.
    sampler = DDIM(steps=options.prior_steps, eta=1.0, clip=MAX_DEVIATIONS, spacing=PRIOR_SPACING)
    loop = tabulate_sampler(objective.prior_process, sampler) | {
        "guidance": options.prior_guidance,
        "candidates": CANDIDATES,
        "mean": prior.clip_mean.flatten().tolist(),
        "std": prior.clip_std.flatten().tolist(),
    }
    width, words = Axis("width", encoder.width), Axis("words", length)
    texts = (
        TensorSpec("states", "float32", (BATCH, words, width)),
        TensorSpec("pooled", "float32", (BATCH, width)),
        TensorSpec("mask", "bool", (BATCH, words)),
    )
    time = TensorSpec("time", "float32", (BATCH,), low=0, high=999)
    further = {
        "text": Graph(TextStep(encoder), (describe_conditions(task)[0],), tuple(spec.name for spec in texts), ()),
        "prior": Graph(
            PriorStep(prior), (TensorSpec("embedding", "float32", (BATCH, width)), time, *texts), ("predicted",), ()
        ),
    }
    graph = build_denoiser(predictor, objective, TensorSpec("label", "float32", (BATCH, width)))
    tokens = describe_ended_tokens(task.text, encoder.task.end, length)
    parts = ("tokens", "ended_tokens", "captions", "samples", "sample_images", "embeddings")
    return replace(graph, parts=parts, further=further, values={**graph.values, **tokens, "prior": loop})


def describe_conditions(task: Any) -> tuple[TensorSpec, dict[str, Any]]:
    """Return the graph input for classes or captions, and what the program needs to read them."""
    words = (Axis("words", task.options.length),) if task.text else ()
    label = TensorSpec("label", "int64", (BATCH, *words), low=0, high=task.text.size - 1 if task.text else len(task.labels))
    return label, {
        "classes": task.labels,
        "column": "caption" if task.text else "class",
        "length": task.options.length if task.text else 0,
        "batch": 64,
    }


def choose_conditions(task: Any) -> tuple[str, ...]:
    """Return the parts of the program that read classes or captions."""
    return ("tokens", "own_tokens", "captions") if task.text else ("named_classes",)


def choose_program(task: Any) -> dict[str, Any]:
    """Return parts, packages and files of run.py for classes or captions."""
    return {
        "parts": (*choose_conditions(task), "samples", "sample_images"),
        "modules": SAMPLING,
        "requires": ("pillow", "tokenizers") if task.text else ("pillow",),
        "files": ("tokenizer.json",) if task.text else (),
        "test_options": TEST_OPTIONS,
    }


def draw_noise(predictor: TaskPredictor, rows: int) -> dict[str, Any]:
    """Return the noise from which the original generates, by stage: rows, draws, then the axes of a sample."""
    objective: Any = predictor.objective
    task: Any = predictor.task
    options, loop = task.PredictOptions(), predictor.signature.loop
    shape = (objective.noise,) if loop is None else tuple(axis.size or 0 for axis in loop.latent)
    stages = {"sample": (options.seed, rows, shape, 1 if loop is None else 1 + options.steps)}
    if isinstance(objective, UnCLIP):
        width = (objective.prior.config.channels,)
        stages["prior"] = mix_seeds(options.seed, 1), CANDIDATES * rows, width, 1 + options.prior_steps
    found = {}
    for name, (seed, count, axes, draws) in stages.items():
        draw = Noise(seed, range(count), axes, torch.empty(()))
        found[name] = torch.stack([draw() for _ in range(draws)], 1).numpy()
    return found
