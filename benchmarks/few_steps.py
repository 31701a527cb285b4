"""Consistency distillation on Fashion-MNIST: the student's 1, 2 and 4 steps against the teacher's 4, 12 and 50.

    python benchmarks/few_steps.py [--steps 1500] [--distill 500] [--images 500] [--folder build/samplers] [--process flow] [--save]

The teacher is a network of `benchmarks/samplers.py` (406,672 parameters), trained for --steps; the student starts from its weights and
is distilled for --distill steps, with guidance of 1.5. Both make the same number of images, by class, from the same noise. The classifier
score is the accuracy on real test images of a CNN that was trained on generated images alone (as in the test of a run); distance,
precision and recall are those of `benchmarks/samplers.py`. A step of the teacher calls its network twice, for guidance.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from common import make_parser, parse_options, report
from loops import read_recipe
from safetensors.torch import load_file, save_file
from samplers import BATCH, CLASSES, SIZE, SMALL, Judge, draw, read, show, train
from torch import Tensor, nn

from fieldguide import create
from fieldguide.automl.fit import NullCallback
from fieldguide.core.settings import Settings
from fieldguide.data.loader import Batches
from fieldguide.metrics import generative
from fieldguide.objectives import ConsistencyDistillation, DPMSolver, build_process
from fieldguide.objectives.diffusion import Consistency
from fieldguide.training.trainer import Trainer

GUIDANCE = 1.5
TESTED = 2000  # real test images that are classified


def distill(teacher: nn.Module, schedule: str, steps: int, lr: float, folder: Path, rest: str, **options: object) -> nn.Module:
    """Return the distilled student, from the folder if it is there."""
    path, student = folder / f"{schedule}-{rest}-student-{steps}.safetensors", create(SIZE, **SMALL)
    if not path.exists():
        images, label = read("train")
        torch.manual_seed(0)
        student.load_state_dict(teacher.state_dict())
        objective = ConsistencyDistillation(student, teacher, build_process(schedule), guidance=GUIDANCE, **options)
        data = Batches(len(images), lambda rows, _: {"image": images[rows], "label": label[rows]})
        settings = {
            "minutes": 0,
            "batch": BATCH,
            "channels_last": False,
            "steps": steps,
            **read_recipe(SIZE),
            "optimizer": "adamw",
            "lr": lr,
        }
        loop = Trainer(objective, data, Settings().with_(settings), device=torch.device("cpu"), callback=NullCallback())
        started = time.perf_counter()
        loop.train()
        print(f"student: {steps} steps in {time.perf_counter() - started:.0f} s", flush=True)
        save_file({key: x.contiguous() for key, x in student.state_dict().items()}, path)
    student.load_state_dict(load_file(path))
    return student.eval()


def classify(images: Tensor, label: Tensor) -> float:
    """Return the accuracy on real images of a CNN that is trained on these."""
    pupil = generative.train_classifier(images.clamp(-1, 1), label - 1, CLASSES, steps=800)
    real, wanted = (x[:TESTED] for x in read("t10k"))
    return float((generative.extract_features(pupil, real, return_classes=True) == (wanted - 1).numpy()).mean())


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="training steps of the teacher")
    parser.add_argument("--distill", type=int, default=500, help="training steps of the student")
    parser.add_argument("--images", type=int, default=500, help="images made by each sampler")
    parser.add_argument("--folder", type=Path, default=Path("build/samplers"))
    parser.add_argument("--process", default="flow", help="cosine, edm or flow")
    parser.add_argument("--lr", type=float, default=5e-4, help="of AdamW, for the student")
    parser.add_argument("--levels", type=int, nargs=2, default=(8, 8), help="noise levels at the start and at the end")
    parser.add_argument("--solver", default="ddim", help="of the teacher: ddim or heun")
    options = parse_options(parser)
    teacher, judge = train(options.process, options.steps, options.folder), Judge(options.images)
    student = distill(
        teacher,
        options.process,
        options.distill,
        options.lr,
        options.folder,
        f"{options.steps}-{options.solver}-{options.levels[0]}-{options.levels[1]}-{options.lr:g}",
        levels=tuple(options.levels),
        solver=options.solver,
    )
    runs = [(f"student, {n} step{'s' if n > 1 else ''}", student, Consistency(steps=n), 1.0, n) for n in (1, 2, 4)]
    runs += [(f"teacher, {n} steps", teacher, DPMSolver(steps=n), GUIDANCE, 2 * n) for n in (4, 12, 50)]
    rows = []
    for title, model, sampler, guidance, calls in runs:
        made = draw(model, options.process, sampler, judge.label, guidance=guidance)
        rows.append([title, str(calls), f"{100 * classify(made, judge.label):.1f} %", show(judge.score(made))])
        print(" | ".join(rows[-1]), flush=True)
    real, label = (x[-options.images :] for x in read("train"))
    note = f"Training images instead of generated ones: {100 * classify(real, label):.1f} %, {show(judge.score(real))}."
    title = f"Consistency distillation on Fashion-MNIST, {options.process}, {options.distill} steps, {options.images} images"
    columns = ["", "calls of the network", "classifier accuracy", "distance / precision / recall"]
    report(title, columns, rows, options.save, note)


if __name__ == "__main__":
    main()
