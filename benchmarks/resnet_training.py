"""Training a ResNet-18 on 64 x 64 pictures: our loop and network against timm's network in a plain PyTorch loop.

    python benchmarks/resnet_training.py [--steps 4] [--rounds 5] [--save]

Pictures are random bytes in memory, scaled and normalised for every batch by both. "like for like": float32,
contiguous, clipped, fused AdamW on both sides. "defaults": our precision and layout as `fit` chooses them by timing,
against timm as its examples begin: float32, contiguous, plain AdamW.
"""

from __future__ import annotations

import numpy as np
import torch
from common import compute_ratio, make_parser, parse_options, report, time_in_turns
from loops import run_ours, run_plain

from fieldguide import create
from fieldguide.data.loader import Batches
from tv import timm

BATCH, SIDE, CLASSES = 64, 64, 10
MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parse_options(parser)
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(rng.integers(0, 256, (4 * BATCH, 3, SIDE, SIDE), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, CLASSES, len(pictures)))

    def make(rows: np.ndarray, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        index = torch.from_numpy(rows)
        return {"image": (pictures[index] / 255 - MEAN) / STD, "target": labels[index]}

    class Made:
        """Apply the same augmentation to images in the plain loop."""

        def __len__(self) -> int:
            return len(pictures) // BATCH

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            if i >= len(self):
                raise IndexError
            return make(np.arange(i * BATCH, (i + 1) * BATCH))

    batches, steps = Batches(len(pictures), make), options.steps
    new = lambda: create("resnet18", num_classes=CLASSES)
    peer = lambda: timm.create_model("resnet18", num_classes=CLASSES)
    runs = {
        "ours, float32": run_ours(new(), ("image",), batches, BATCH, precision="float32"),
        "timm, float32": run_plain(peer(), ("image",), Made(), lr=1e-3, fused=True, clip=1.0),
        "ours, defaults": run_ours(new(), ("image",), batches, BATCH),
        "timm, defaults": run_plain(peer(), ("image",), Made(), lr=1e-3),
    }
    times = time_in_turns({name: lambda run=run: run(steps) for name, run in runs.items()}, options.rounds)
    rows = []
    for what in ("float32", "defaults"):
        us, them = f"ours, {what}", f"timm, {what}"
        best, low, high = compute_ratio(times, us, them)
        speed = [steps * BATCH / min(times[name]) for name in (us, them)]
        rows.append(
            [
                "like for like" if what == "float32" else "defaults",
                *(f"{s:.0f}" for s in speed),
                f"{best:.2f}",
                f"{low:.2f} to {high:.2f}",
            ]
        )
    report(
        "Training ResNet-18 at 64 x 64, batch 64",
        ["", "ours, pictures/s", "timm, pictures/s", "ratio", "rounds"],
        rows,
        options.save,
    )


if __name__ == "__main__":
    main()
