"""Distillation to few steps on Fashion-MNIST: the student's 1, 2 and 4 steps against the teacher's 4, 12 and 50.

    python benchmarks/few_steps.py [--method consistency] [--steps 1500] [--distill 500] [--images 500] [--seeds 3] [--save]

The teacher is a network of `benchmarks/samplers.py` (406,672 parameters), trained for --steps; the student starts from its weights and
is distilled for --distill steps, with guidance of 1.5. Both make the same number of images, by class, from the same noise. The classifier
score is the accuracy on real test images of a CNN that was trained on generated images alone (as in the test of a run), the mean over
--seeds draws of noise; distance, precision and recall are those of `benchmarks/samplers.py`, of the first draw. A step of the teacher calls
its network twice, for guidance. Options of the objective are set by name: `--set levels=4,4 solver=heun`.
"""

from __future__ import annotations

import argparse
import ast
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import make_parser, parse_options, report
from loops import read_recipe
from safetensors.torch import load_file, save_file
from samplers import BATCH, CLASSES, SIDE, SIZE, SMALL, Judge, draw, read, show, train
from torch import Tensor, nn

from fieldguide import create
from fieldguide.automl.fit import NullCallback
from fieldguide.core.settings import Settings
from fieldguide.data.loader import Batches
from fieldguide.metrics import generative
from fieldguide.objectives import (
    AdversarialDistillation,
    ConsistencyDistillation,
    DPMSolver,
    LatentConsistency,
    Objective,
    build_process,
)
from fieldguide.objectives.diffusion import Boundary, Consistency, DirectBoundary, SigmaBoundary, TimeBoundary, Timesteps
from fieldguide.training.trainer import Trainer

GUIDANCE = 1.5
TESTED = 2000  # real test images that are classified
KEPT = 0.95  # of the teacher's score, the goal


class NamedInputs(nn.Module):
    """Calls a network of images as those of latents are called."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, latent: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return self.network(latent, time, label)


def build_consistency(student: nn.Module, teacher: nn.Module, schedule: str, **options: Any) -> Objective:
    return ConsistencyDistillation(
        student, teacher, build_process(schedule), **{"guidance": GUIDANCE, "levels": (8, 8), **options}
    )


def build_adversarial(student: nn.Module, teacher: nn.Module, schedule: str, **options: Any) -> Objective:
    shape = {"shape": (1, SIDE, SIDE), "label": torch.tensor(0)}
    return AdversarialDistillation(student, teacher, build_process(schedule), **shape, **{"guidance": GUIDANCE, **options})


def build_lcm(student: nn.Module, teacher: nn.Module, schedule: str, **options: Any) -> Objective:
    named, empty = (NamedInputs(student), NamedInputs(teacher)), {"label": torch.zeros(1, dtype=torch.int64)}
    found = {"guidance": (GUIDANCE, GUIDANCE), **options}
    return LatentConsistency(*named, build_process(schedule), inputs=("label",), empty=empty, **found)


@dataclass(frozen=True)
class Method:
    """How a student is trained, and how it generates."""

    build: Callable[..., Objective]
    boundary: Boundary
    spacing: Timesteps | None = None


METHODS = {
    "consistency": Method(build_consistency, SigmaBoundary()),
    "adversarial": Method(build_adversarial, DirectBoundary()),
    "lcm": Method(build_lcm, TimeBoundary(), Timesteps(kind="lcm")),
}


def distill(teacher: nn.Module, name: str, options: argparse.Namespace) -> nn.Module:
    """Return the distilled student, from the folder if it is there."""
    path, student = options.folder / f"{name}.safetensors", create(SIZE, **SMALL)
    if not path.exists():
        images, label = read("train")
        torch.manual_seed(0)
        student.load_state_dict(teacher.state_dict())
        objective = METHODS[options.method].build(student, teacher, options.process, **options.set)
        nothing = torch.zeros(1, 1, SIDE, SIDE)  # latents have a deviation, images none

        def make(rows: Any, _: Any) -> dict[str, Tensor]:
            return {"image": images[rows], "mean": images[rows], "deviation": nothing, "label": label[rows]}

        settings = {
            "minutes": 0,
            "batch": BATCH,
            "channels_last": False,
            "steps": options.distill,
            **read_recipe(SIZE),
            "optimizer": "adamw",
            "lr": options.lr,
            "ema": options.ema,
        }
        data, device = Batches(len(images), make), torch.device("cpu")
        loop = Trainer(objective, data, Settings().with_(settings), device=device, callback=NullCallback())
        started = time.perf_counter()
        loop.train()
        print(f"student: {options.distill} steps in {time.perf_counter() - started:.0f} s", flush=True)
        save_file({key: x.contiguous() for key, x in student.state_dict().items()}, path)
    student.load_state_dict(load_file(path))
    return student.eval()


def classify(images: Tensor, label: Tensor) -> float:
    """Return the accuracy on real images of a CNN that is trained on these."""
    pupil = generative.train_classifier(images.clamp(-1, 1), label - 1, CLASSES, steps=800)
    real, wanted = (x[:TESTED] for x in read("t10k"))
    return float((generative.extract_features(pupil, real, return_classes=True) == (wanted - 1).numpy()).mean())


def judge_samples(make: Callable[[int], Tensor], judge: Judge, seeds: int) -> dict[str, Any]:
    """Return the classifier accuracy for each seed of the noise, and the scores of the first draw."""
    drawn = [make(seed) for seed in range(seeds)]
    return {"accuracy": [classify(images, judge.label) for images in drawn], "scores": judge.score(drawn[0])}


def remember(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a file holds, or compute it and write the file."""
    if not path.exists():
        path.write_text(json.dumps(compute()))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def parse_set(text: str) -> tuple[str, Any]:
    """Return name and value of an option: numbers, tuples of them, or text."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def read_options() -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="consistency")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of the teacher")
    parser.add_argument("--distill", type=int, default=500, help="training steps of the student")
    parser.add_argument("--images", type=int, default=500, help="images made by each sampler")
    parser.add_argument("--seeds", type=int, default=1, help="draws of noise")
    parser.add_argument(
        "--teacher", type=int, nargs="*", default=(50, 12, 4), help="steps of the teacher that are compared; 50 is the goal"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/samplers"))
    parser.add_argument("--process", default="flow", help="cosine, edm or flow")
    parser.add_argument("--lr", type=float, default=5e-4, help="of AdamW, for the student")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the average of the student's weights")
    parser.add_argument("--set", nargs="*", type=parse_set, default=[], help="options of the objective, name=value")
    options = parse_options(parser)
    options.set = dict(options.set)
    return options


def main() -> None:
    options = read_options()
    method, sizes = METHODS[options.method], f"{options.images}-{options.seeds}"
    told = "".join(f", {key} {value}" for key, value in options.set.items())
    how = f"{options.method}, {options.distill} steps, rate {options.lr:g}{told}"
    key = "-".join(map(str, (options.process, options.steps, how, options.ema))).replace("/", "-").replace(" ", "_")
    teacher, judge = train(options.process, options.steps, options.folder), Judge(options.images)
    student = distill(teacher, key, options)

    def run(model: nn.Module, sampler: Any, guidance: float) -> dict[str, Any]:
        make = lambda seed: draw(model, options.process, sampler, judge.label, guidance=guidance, seed=seed)
        return judge_samples(make, judge, options.seeds)

    found = {}
    for n in dict.fromkeys((50, *options.teacher)):
        path = options.folder / f"teacher-{options.process}-{options.steps}-{n}-{sizes}.json"
        found[f"teacher, {n} steps"] = 2 * n, remember(path, lambda n=n: run(teacher, DPMSolver(steps=n), GUIDANCE))
    for n in (1, 2, 4):
        sampler = Consistency(steps=n, boundary=method.boundary, spacing=method.spacing)
        path = options.folder / f"{key}-{n}-{sizes}.json"
        found[f"student, {n} step{'s' if n > 1 else ''}"] = (
            n,
            remember(path, lambda sampler=sampler: run(student, sampler, 1.0)),
        )
    mean = lambda values: sum(values) / len(values)
    goal, rows = mean(found["teacher, 50 steps"][1]["accuracy"]), []
    for title, (calls, scores) in found.items():
        right = scores["accuracy"]
        spread = f"{100 * mean(right):.1f} % ({100 * min(right):.1f} to {100 * max(right):.1f})"
        rows.append([title, str(calls), spread, f"{100 * mean(right) / goal:.1f} %", show(scores["scores"])])
        print(" | ".join(rows[-1]), flush=True)
    note = f"The goal of a student is {100 * KEPT:.0f} % of the teacher's 50 steps."
    title = f"Fewer steps on Fashion-MNIST, {options.process}, {how}, {options.images} images"
    columns = [
        "",
        "calls of the network",
        f"classifier accuracy, {options.seeds} draws",
        "of the teacher",
        "distance / precision / recall",
    ]
    report(title, columns, rows, options.save, note)


if __name__ == "__main__":
    main()
