"""Trackers: where losses and scores go beside metrics.jsonl, on request (`--set track=tensorboard`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fieldguide.core.errors import SettingsError


class TensorBoard:
    """Event files in the run folder's `events/`. Raises `SettingsError` with the install line where it is missing."""

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SettingsError("track=tensorboard needs a package: pip install 'fieldguide[track]'.") from None
        # What was written after the checkpoint that is resumed from is hidden by its reader.
        self.writer = SummaryWriter(str(folder / "events"), purge_step=step + 1 if step else None)

    def log_metrics(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if isinstance(value, Mapping):
                for score, number in value.items():
                    self.writer.add_scalar(f"{name}/{score}", number, line["step"])
            elif name != "step":
                self.writer.add_scalar(f"train/{name}", value, line["step"])
        self.writer.flush()


TRACKERS = {"tensorboard": TensorBoard}
