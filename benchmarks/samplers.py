"""Network calls against quality of samplers, on Fashion-MNIST: one small U-Net for each noise process.

    python benchmarks/samplers.py [--steps 1500] [--images 400] [--folder build/samplers] [--only flow] [--save]

The same network (`ddpm-mini` with classes and large patches) is trained three times with equal batches: discrete diffusion with the
cosine schedule that predicts v, EDM, and a rectified flow. Each sampler then makes the same number of images from the same noise,
without guidance.
Scores are those of `fieldguide.metrics.generative` against test images: distances in the features of a small CNN that is trained on
real images, precision and recall. A second table varies guidance with the sampler that `predict` uses by default; the guide of
autoguidance is the same network after a quarter of the training.

The data is that of Debian's package dataset-fashion-mnist: `apt-get download dataset-fashion-mnist && dpkg -x *.deb FOLDER`, and
FIELDGUIDE_FASHION=FOLDER/usr/share/datasets/fashion-mnist. Trained networks are kept in --folder.
"""

from __future__ import annotations

import argparse
import gzip
import os
import time
from pathlib import Path

import numpy as np
import torch
from common import make_parser, parse_options, report
from loops import read_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fieldguide import create
from fieldguide.automl.fit import NullCallback
from fieldguide.core.settings import Settings
from fieldguide.data.loader import Batches
from fieldguide.metrics import generative
from fieldguide.objectives import DDIM, Diffusion, DPMSolver, Heun, build_process
from fieldguide.objectives.diffusion import Guidance, Sampler, sample
from fieldguide.training.trainer import Trainer

SIZE, SIDE, BATCH, CLASSES = "ddpm-mini", 28, 64, 10
SMALL = {"patch": 4, "dim": 48, "growth": (1,), "attend": (7,), "num_classes": CLASSES}  # 406,672 parameters
SCHEDULES = ("cosine", "edm", "flow")
CALLS = (4, 8, 12, 20, 50)  # of the network
SAMPLERS = {
    "ddim": lambda calls: DDIM(steps=calls),
    "ddim, eta 1": lambda calls: DDIM(steps=calls, eta=1.0),
    "dpm++ 2M": lambda calls: DPMSolver(steps=calls),
    "dpm++ 3M": lambda calls: DPMSolver(steps=calls, order=3),
    "dpm++ 2M, stochastic": lambda calls: DPMSolver(steps=calls, stochastic=True),
    "heun": lambda calls: Heun(steps=calls // 2),
}
FOLDER = Path(os.environ.get("FIELDGUIDE_FASHION", "/usr/share/datasets/fashion-mnist"))


def read(part: str) -> tuple[Tensor, Tensor]:
    """Return images N 1 28 28 from -1 to 1, and labels from 1."""

    def load(name: str, skip: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(gzip.open(FOLDER / f"{part}-{name}-ubyte.gz").read()[skip:], np.uint8).copy())

    return load("images-idx3", 16).view(-1, 1, SIDE, SIDE).float() / 127.5 - 1, load("labels-idx1", 8).long() + 1


def train(schedule: str, steps: int, folder: Path) -> nn.Module:
    """Return the trained network, from the folder if it is there."""
    path, model = folder / f"{schedule}-{steps}.safetensors", create(SIZE, **SMALL)
    if not path.exists():
        images, label = read("train")
        torch.manual_seed(0)
        model = create(SIZE, **SMALL)
        objective = Diffusion(model, build_process(schedule))
        data = Batches(len(images), lambda rows, _: {"image": images[rows], "label": label[rows]})
        settings = Settings().with_({"minutes": 0, "batch": BATCH, "channels_last": False, "steps": steps, **read_recipe(SIZE)})
        loop = Trainer(objective, data, settings, device=torch.device("cpu"), callback=NullCallback())
        started = time.perf_counter()
        loop.train()
        print(f"{schedule}: {steps} steps in {time.perf_counter() - started:.0f} s", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: x.contiguous() for key, x in model.state_dict().items()}, path)
    model.load_state_dict(load_file(path))
    return model.eval()


class Judge:
    """Scores images against test images."""

    def __init__(self, count: int, first: int = 0):
        images, label = read("train")
        self.classifier = generative.train_classifier(images, label - 1, CLASSES)
        images, self.label = (x[first : first + count] for x in read("t10k"))
        self.real = generative.extract_features(self.classifier, images)

    def score(self, images: Tensor) -> list[float]:
        made = generative.extract_features(self.classifier, images.clamp(-1, 1))
        return [generative.frechet_distance(self.real, made), *generative.precision_recall(self.real, made)]


def draw(
    model: nn.Module, schedule: str, sampler: Sampler, label: Tensor, guidance: float | Guidance = 1.0, seed: int = 0
) -> Tensor:
    """Return an image for each label."""
    process, parts = build_process(schedule), []
    for i in range(0, len(label), 200):
        numbers = range(i, min(i + 200, len(label)))
        parts.append(
            sample(model, process, sampler, label[i : i + 200], (1, SIDE, SIDE), numbers=numbers, guidance=guidance, seed=seed)
        )
    return torch.cat(parts)


def show(scores: list[float]) -> str:
    return f"{scores[0]:.2f} / {100 * scores[1]:.0f} / {100 * scores[2]:.0f}"


def confirm(options: argparse.Namespace) -> None:
    """Compare what `predict` may do by default, with its guidance: other noise and other test images than those of the first table, from
    which the default was chosen."""
    judge, model = Judge(options.images, options.images), train("cosine", options.steps, options.folder)
    choices = {
        "ddim, 20 steps": DDIM(steps=20),
        "dpm++ 2M, 12 steps": DPMSolver(steps=12),
        "dpm++ 2M, stochastic, 8 steps": DPMSolver(steps=8, stochastic=True),
        "dpm++ 2M, stochastic, 12 steps": DPMSolver(steps=12, stochastic=True),
        "dpm++ 2M, stochastic, 20 steps": DPMSolver(steps=20, stochastic=True),
    }
    rows = []
    for title, sampler in choices.items():
        made = [draw(model, "cosine", sampler, judge.label, guidance=1.5, seed=seed) for seed in (1, 2, 3)]
        rows.append([title, *(show(judge.score(images)) for images in made)])
        print(" | ".join(rows[-1]), flush=True)
    title = "Defaults of predict on Fashion-MNIST, cosine, guidance 1.5, further test images"
    report(
        f"{title}: feature distance / precision / recall", ["sampler", *(f"seed {i}" for i in (1, 2, 3))], rows, options.save
    )


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="training steps of each network")
    parser.add_argument("--images", type=int, default=400, help="images made by each sampler")
    parser.add_argument("--folder", type=Path, default=Path("build/samplers"))
    parser.add_argument("--only", default="", help="this process alone")
    options = parse_options(parser)
    schedules = [name for name in SCHEDULES if options.only in name]
    for name in schedules:
        train(name, options.steps, options.folder)
    judge, rows = Judge(options.images), []
    label, bounds = judge.label, judge.score(read("train")[0][-options.images :])
    for name in schedules:
        model = train(name, options.steps, options.folder)
        for title, make in SAMPLERS.items():
            cells = [show(judge.score(draw(model, name, make(calls), label))) for calls in CALLS]
            rows.append([name, title, *cells])
            print(" | ".join(rows[-1]), flush=True)
    note = f"Training images instead of generated ones: {show(bounds)}."
    columns = ["process", "sampler", *(f"{calls} calls" for calls in CALLS)]
    title = f"Samplers on Fashion-MNIST, {options.steps} training steps, {options.images} images"
    report(f"{title}: feature distance / precision / recall", columns, rows, options.save, note)

    rows = []
    for name in schedules:
        model, weak = (train(name, steps, options.folder) for steps in (options.steps, options.steps // 4))
        guides = {
            "none": Guidance(),
            "classifier-free, 1.5": Guidance(1.5),
            "classifier-free, 3": Guidance(3.0),
            "classifier-free, 3, noise .2 to 2": Guidance(3.0, low=0.2, high=2.0),
            "autoguidance, 1.5": Guidance(1.5, guide=weak),
            "autoguidance, 2": Guidance(2.0, guide=weak),
        }
        for title, guidance in guides.items():
            rows.append([name, title, show(judge.score(draw(model, name, DPMSolver(steps=20), label, guidance)))])
            print(" | ".join(rows[-1]), flush=True)
    title = "Guidance on Fashion-MNIST, dpm++ 2M with 20 steps"
    report(f"{title}: feature distance / precision / recall", ["process", "guidance", "scores"], rows, options.save)
    if not options.only:
        confirm(options)


if __name__ == "__main__":
    main()
