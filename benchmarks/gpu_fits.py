"""Fit samples on the accelerator and compare predictions there and on the CPU: python benchmarks/gpu_fits.py [SAMPLE...]

Prints for each sample the network, the test score, seconds, peak memory of the device, and the largest difference between the
outputs of the trained network on the device and on the CPU.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

import fieldguide
from fieldguide.core import distributed
from fieldguide.core.errors import FieldguideError
from fieldguide.data import samples
from fieldguide.training.inference_loop import collect

SAMPLES = ("digits", "iris", "docstrings", "phrases", "manual", "inked", "scattered", "figures", "demand", "series", "clicks")
STEPS = 60


def compare(run: fieldguide.Run, name: str) -> float:
    """Return the largest difference of the outputs between device and CPU, in standard deviations of the output."""
    data = run.task.read([str(samples.path(name))], answered=True).take(np.arange(16))
    batches = run.task.batches(data, run.card)
    on_device = collect(run.objective, batches, batch=16, device=distributed.device())
    on_cpu = collect(run.objective.cpu(), batches, batch=16, device=torch.device("cpu"))
    worst = 0.0
    for key, value in on_cpu.items():
        if value.dtype.kind == "f" and np.isfinite(value).all() and value.std() > 0:
            worst = max(worst, float(np.abs(value - on_device[key]).max() / value.std()))
    return worst


def main() -> None:
    """Fit each sample; a failure is printed and counted, not raised."""
    failed = 0
    print("device:", distributed.device(), torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    for name in sys.argv[1:] or SAMPLES:
        started = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            with tempfile.TemporaryDirectory() as folder:
                run = fieldguide.fit(name, out=Path(folder) / "run", settings={"steps": STEPS})
                metric = run.task.metrics[0]
                peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0
                taken = time.monotonic() - started
                print(
                    f"{name}: {run.record['model']['size']}, {run.settings.precision}, {metric.name} "
                    f"{run.scores[metric.name]:.4g}, {taken:.1f} s, {peak:,.0f} MiB, differs by {compare(run, name):.1e}",
                    flush=True,
                )
        except (RuntimeError, TypeError, ValueError, FieldguideError) as error:
            failed += 1
            traceback.print_exc()
            print(f"{name}: FAILED {type(error).__name__}: {error}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
