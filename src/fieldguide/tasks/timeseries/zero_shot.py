"""Forecasting with a pretrained network that was never trained on the series: `fieldguide predict hf:amazon/chronos-bolt-small`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.dataset import Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing.covariates import Covariates
from fieldguide.data.timeseries import panel as panels
from fieldguide.data.timeseries.frequency import Frequency
from fieldguide.data.timeseries.windows import all_windows, resolve_options, windows_at_end
from fieldguide.data.validation import checks
from fieldguide.tasks.base import CheckpointAssets, Task
from fieldguide.tasks.timeseries.forecasting import Forecasting
from fieldguide.tasks.timeseries.signature import LAYOUT_OF_ROWS

MAX_LENGTH = 2048  # past steps that are read


class ZeroShotForecasting(Forecasting):
    """Forecasts of new series. Nothing is fitted: every series has its own scale and frequency, and intervals are not calibrated."""

    name = "zero-shot-forecasting"
    input_types = ("series",)  # type: ignore[assignment]  # the inferred type of the base class has its own length

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self | None:
        if not assets.horizon:
            return None
        options = cls.Options(horizon=assets.horizon, length=MAX_LENGTH, season=1, calendar=False, normalise=False)
        task = cls([], options)
        task.covariates, task.standards, task.widths = Covariates([], []), {}, {}
        task.frequency, task.layout, task.series, task.digest = Frequency("number", 1, "step"), LAYOUT_OF_ROWS, 0, ""
        return task

    def read_one(self, source: Any, answered: bool) -> Data:
        return read(source, column_spec=self.column_spec, labels_optional=True)

    def read(self, sources: Sequence[Any], *, answered: bool = False) -> Data:
        """Read one window at the end of every series; for evaluation windows at all of its steps."""
        data = Task.read(self, sources, answered=answered)
        found, findings = panels.arrange_series(data)
        checks.enforce(findings, len(data), source=data.source)
        assert found is not None  # `enforce` raises if there is an error
        for finding in findings:
            if finding.severity == "warning":
                self.add_note(str(finding))
        season = resolve_options(found, replace(self.options, season=None)).season
        length = min(MAX_LENGTH, int((found.high - found.low).max()))
        self.options, self.frequency = replace(self.options, season=season, length=length), found.frequency
        if answered:
            return all_windows(data, found, self.options)
        self.request = windows_at_end(data, found, self.options)
        return self.request

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Return windows whose missing values, and those before the start of a series, are NaN."""
        filled = super().batches(data, card, settings)

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            batch = filled.make(index, generator)
            if "observed" in batch:
                batch["series"] = torch.where(batch.pop("observed"), batch["series"], torch.nan)
            return batch

        return replace(filled, make=make)
