"""GAN or diffusion? Every network that generates images, trained on Fashion-MNIST by `fit` for the same minutes.

    python benchmarks/gan_or_diffusion.py [--minutes 2] [--seeds 0 1 2] [--only dcgan] [--out gan_or_diffusion.jsonl] [--page]

Each network is trained by class on 6,000 images at 32 x 32 and scored on 1,000 others by `fit`: distances in the features of a small CNN
trained on real images, precision, recall, density, coverage, and the accuracy of a CNN that is trained on samples alone. Seconds per
image are those of `predict` with its default sampler. Finished fits are kept in --out, and --page writes docs/generative.md from them.

The data is that of Debian's package dataset-fashion-mnist: `apt-get download dataset-fashion-mnist && dpkg -x *.deb FOLDER`, and
FIELDGUIDE_FASHION=FOLDER/usr/share/datasets/fashion-mnist.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import describe_machine, read_commit
from PIL import Image
from samplers import read

import fieldguide

IMAGES = {"train": 6_000, "test": 1_000}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {  # title -> size, settings
    "DCGAN": ("dcgan-32", {}),
    "WGAN": ("wgan-32", {}),
    "SNGAN": ("sngan-32", {"model.dim": 32}),
    "WGAN-GP": ("wgan-gp-32", {"model.dim": 32}),
    "StyleGAN 1": ("stylegan1-mini", {}),
    "StyleGAN 2": ("stylegan2-mini", {}),
    "StyleGAN 3": ("stylegan3-mini", {}),
    "R3GAN": ("r3gan-mini", {}),
    "DDPM U-Net": ("ddpm-mini", {}),
    "DDPM U-Net, EDM": ("ddpm-mini", {"task.schedule": "edm"}),
    "DDPM U-Net, flow": ("ddpm-mini", {"task.schedule": "flow"}),
    "DiT": ("dit-mini", {}),
    "DiT, flow (SiT)": ("dit-mini", {"task.schedule": "flow"}),
}
SCORES = ("feature_distance", "kernel_distance", "precision", "recall", "density", "coverage", "classifier_accuracy")
HEAD = """# GAN or diffusion?

Networks that generate images by class, each trained by `fit` on 6,000 images of Fashion-MNIST at 32 x 32, best first. A run has
{minutes:g} minutes of one core, of which training takes {training:.0f} s ({seeds} seeds; {machine}). Written by
`python benchmarks/gan_or_diffusion.py --page`.

"""
LEGEND = """
Feature distance (Fréchet) and KID are in the features of a small CNN trained on real images, lower is better; density and coverage count
samples among the neighbors of real images; accuracy is that of a CNN trained on samples alone, on real images. Calls are those of the
network for an image with the default sampler.

So short a training says which network is useful soonest. GANs were published with hundreds of times as many steps as they make here.
"""
LINES = Path(__file__).resolve().parent / "gan_or_diffusion.jsonl"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "generative.md"


def write_images(folder: Path) -> None:
    """Write train and test images as PNG, one folder per class."""
    for split, part in (("train", "train"), ("test", "t10k")):
        images, label = read(part)
        rows = np.random.default_rng(0).permutation(len(images))[: IMAGES[split]]
        for row in rows:
            path = folder / split / str(int(label[row])) / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(((images[row, 0] + 1) * 127.5).round().byte().numpy()).save(path)


def measure(title: str, seed: int, minutes: float, data: Path) -> dict[str, Any]:
    """Train one network, and return its scores and the seconds of a sample."""
    size, settings = NETWORKS[title]
    with tempfile.TemporaryDirectory() as home:
        run = fieldguide.fit(
            data,
            task="image-generation",
            model=size,
            minutes=minutes,
            out=Path(home) / "run",
            settings={"task.side": 32, "seed": seed, **settings},
        )
        record = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
        run.predict([], count=64)
        started = time.perf_counter()
        run.predict([], count=256)
        seconds = (time.perf_counter() - started) / 256
    return {
        "network": title,
        "seed": seed,
        "minutes": minutes,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "training": record["cost"]["parts"].get("training"),
        "steps": record["settings"].get("steps") or record["cost"].get("steps"),
        "calls": 1 if run.signature.loop is None else run.task.PredictOptions().steps,
        "seconds_per_image": seconds,
        "commit": read_commit(),
        **{name: run.scores[name] for name in SCORES if name in run.scores},
    }


def summarize(rows: list[dict[str, Any]]) -> str:
    """Return the table of means over seeds, with the spread of the first score."""
    lines = [
        "| network | parameters | feature distance | KID | precision / recall | density / coverage | accuracy "
        "| steps | calls | ms per image |",
        "| --- " * 10 + "|",
    ]
    groups = {title: [row for row in rows if row["network"] == title] for title in NETWORKS}
    order = sorted((t for t in groups if groups[t]), key=lambda t: np.mean([row["feature_distance"] for row in groups[t]]))
    for title in order:
        mean = {name: float(np.mean([row[name] for row in groups[title]])) for name in (*SCORES, "seconds_per_image")}
        spread = np.ptp([row["feature_distance"] for row in groups[title]])
        lines.append(
            f"| {title} | {groups[title][0]['parameters']:,} | {mean['feature_distance']:.2f} (range {spread:.2f}) | "
            f"{mean['kernel_distance']:.3f} | {100 * mean['precision']:.0f} / {100 * mean['recall']:.0f} | "
            f"{mean['density']:.2f} / {100 * mean['coverage']:.0f} | {100 * mean['classifier_accuracy']:.1f} % | "
            f"{np.mean([row['steps'] for row in groups[title]]):.0f} | {groups[title][0]['calls']} | "
            f"{1000 * mean['seconds_per_image']:.1f} |"
        )
    return "\n".join(lines)


def conclude(rows: list[dict[str, Any]]) -> str:
    """Return what the table says about the best GAN and the best diffusion model."""
    groups = {title: [row for row in rows if row["network"] == title] for title in NETWORKS}
    mean = lambda title, name: float(np.mean([row[name] for row in groups[title]]))
    best = [
        min((t for t in groups if groups[t] and is_kind(groups[t][0]["calls"])), key=lambda t: mean(t, "feature_distance"))
        for is_kind in (lambda calls: calls == 1, lambda calls: calls > 1)
    ]
    gan, diffusion = best
    faster = mean(diffusion, "seconds_per_image") / mean(gan, "seconds_per_image")
    describe = lambda title: (
        f"{title}: feature distance {mean(title, 'feature_distance'):.1f}, coverage {100 * mean(title, 'coverage'):.0f} %, accuracy "
        f"{100 * mean(title, 'classifier_accuracy'):.0f} %"
    )
    return (
        f"The best GAN is {describe(gan)}. The best diffusion model is {describe(diffusion)}. The GAN generates an image {faster:.0f} "
        "times as fast.\n\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()] if options.out.exists() else []
    known = {(row["network"], row["seed"], row["minutes"]) for row in done}
    missing = [(s, t) for s in options.seeds for t in options.only if (t, s, options.minutes) not in known]
    data = Path(tempfile.mkdtemp())
    try:
        if missing:
            write_images(data)
        for seed, title in missing:
            done.append(measure(title, seed, options.minutes, data))
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")
            print(json.dumps(done[-1]), flush=True)
    finally:
        shutil.rmtree(data)
    rows = [row for row in done if row["minutes"] == options.minutes and row["seed"] in options.seeds]
    table = summarize(rows)
    print(f"{describe_machine()}\n\n{table}")
    if options.page:
        training = float(np.mean([row["training"] for row in rows]))
        head = HEAD.format(minutes=options.minutes, training=training, seeds=len(options.seeds), machine=describe_machine())
        PAGE.write_text(f"{head}{conclude(rows)}{table}\n{LEGEND}", encoding="utf-8")


if __name__ == "__main__":
    main()
