"""Experiment trackers that receive losses and scores in addition to metrics.jsonl (`--set tracker=tensorboard`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fieldguide.core.errors import SettingsError


class TensorBoard:
    """TensorBoard event files in the `events/` folder of the run. Raises `SettingsError` if tensorboard is not installed."""

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SettingsError("tracker=tensorboard needs an optional package: pip install 'fieldguide[track]'.") from None
        # Hide events that were written after the checkpoint from which the run resumes.
        self.writer = SummaryWriter(str(folder / "events"), purge_step=step + 1 if step else None)

    def log_metrics(self, line: Mapping[str, Any]) -> None:
        """Write one line of metrics.jsonl."""
        for name, value in line.items():
            if isinstance(value, Mapping):
                for score, number in value.items():
                    self.writer.add_scalar(f"{name}/{score}", number, line["step"])
            elif name != "step":
                self.writer.add_scalar(f"train/{name}", value, line["step"])
        self.writer.flush()


TRACKERS = {"tensorboard": TensorBoard}
