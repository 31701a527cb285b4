"""Errors of torch that a user can act on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from fieldguide.core.errors import TrainingError

# What torch says if a process that prepares batches ended; at any place of the main process, or where a batch is expected.
LOST_WORKER = re.compile(r"DataLoader worker \(pid")


@contextmanager
def explain_errors() -> Iterator[None]:
    """Raise `TrainingError` in place of errors of torch that a user can act on."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if LOST_WORKER.search(text):
            raise build_lost_worker_error() from error
        if "deterministic" in text and "does not have a deterministic implementation" in text:
            raise TrainingError(
                f"deterministic=true is not possible for this network on this device: {text.split('.')[0]}. Train on the CPU "
                "(CUDA_VISIBLE_DEVICES=), or without --deterministic."
            ) from error
        raise


def build_lost_worker_error() -> TrainingError:
    """Return the error for a worker that ended before its time."""
    return TrainingError(
        "a process that prepares batches was killed, probably because the memory is used up. The last checkpoint is intact. "
        "Continue with `fieldguide fit --resume RUN --set num_workers=0`."
    )
