"""Graphs of image generation: one forward pass of a GAN, or one call of a diffusion model, whose sampler is a table of numbers.

A step of a sampler that calls the network once is linear in x, in the last predictions of the clean image and in new noise. Its
factors do not depend on the data, so they are computed here once and written to `loop.json`, and the program needs no sampler.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.exporting.graph import BATCH, ExportError, Graph
from fieldguide.objectives import Adversarial, Diffusion, UnCLIP
from fieldguide.objectives.diffusion import NoiseProcess, Sampler
from fieldguide.tasks.vision.image_generation import build_sampler

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

TEST_OPTIONS = {"count": 1}  # image of each requested class or caption
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
    task: Any = predictor.task
    if isinstance(predictor.objective, UnCLIP):
        raise ExportError(
            "the prior and CLIP that this run generates with would be graphs of their own. There is no other format yet."
        )
    objective: Any = copy.deepcopy(predictor.objective).eval().requires_grad_(False).float().cpu()
    options, channels, side = task.PredictOptions(), task.pictures.channels, task.pictures.side
    label, values = describe_conditions(task)
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    shape: tuple[int, ...] = (channels, side, side)
    if isinstance(objective, Diffusion):
        loop = tabulate_sampler(objective.process, objective.adapt_sampler(build_sampler(options)))
        loop["guidance"] = options.guidance if task.labels or task.text else 1.0
        inputs = (
            TensorSpec("image", "float32", (BATCH, *map(Axis, ("channels", "height", "width"), shape))),
            TensorSpec("time", "float32", (BATCH,), low=0, high=999),
            label,
        )
        module, outputs = DenoisingStep(objective.model), ("output",)
    else:
        loop, shape = {"prior": 1.0, "clip": 0.0, "steps": [], "guidance": 1.0}, (objective.noise,)
        inputs = (TensorSpec("noise", "float32", (BATCH, Axis("width", objective.noise))), label)
        module, outputs = GeneratorStep(objective), ("image",)
    signature_loop = asdict(predictor.signature.loop) if predictor.signature.loop else {}
    return Graph(
        module,
        inputs,
        outputs,
        (*choose_conditions(task), "samples", "sample_images"),
        values | {"shape": list(shape), "sample": "image", "sampler": loop},
        requires=("pillow", "tokenizers") if task.text else ("pillow",),
        files=("tokenizer.json",) if task.text else (),
        loop={**signature_loop, **loop} if loop["steps"] else {},
        test_options=TEST_OPTIONS,
    )


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
    return ("tokens", "captions") if task.text else ("named_classes",)
