"""Time series forecasting: point forecasts and prediction intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError, nearest
from fieldguide.core.report_elements import ReportElement
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing.covariates import Covariate, Covariates
from fieldguide.data.read import load
from fieldguide.data.timeseries import panel as panels
from fieldguide.data.timeseries.frequency import Frequency
from fieldguide.data.timeseries.windows import CUT, SERIES, Windows, all_windows, build_windows, windows_at_end
from fieldguide.data.validation import checks
from fieldguide.metrics.forecasts import compute_interval_widening, pinball_loss, seasonal_scale, smape
from fieldguide.objectives import Forecast, Objective
from fieldguide.tasks.base import Arrays, Baseline, Metric, Task
from fieldguide.tasks.timeseries import report
from fieldguide.tasks.timeseries.signature import ForecastSignature

QUANTILES = (0.05, 0.1, 0.5, 0.9, 0.95)
LEVELS = {0.8: (1, 3), 0.9: (0, 4)}  # coverage of an interval -> indices of its ends in QUANTILES
WEIGHED_WINDOWS = 256  # test windows whose weights of variables and steps are averaged in the report
MIN_STEP_CALIBRATION_WINDOWS = 50  # with fewer validation windows, all steps share one interval width


class Forecasting(ForecastSignature, Task):
    name = "time-series-forecasting"
    has_own_rows = False
    reads = (
        "a table with a time column and, for many series, a series column (long), or one column per "
        "series (wide); or one series per row, without time"
    )
    input_types = ("series", "covariates", "static-covariates")
    output_types = ("forecast",)
    column_spec = ColumnSpec(
        "numbers",
        names=("value", "values", "sales", "demand"),
        roles=("series", "time"),
        kinds={"series": "category", "target": "number"},
        gaps=True,
        checks=(panels.check,),
    )
    metrics = (
        Metric(
            "mase", "min", "mean absolute scaled error (1: the in-sample error of the seasonal naive forecast)", label="MASE"
        ),
        Metric("mse", "min", "squared error of standardized values", label="MSE"),
        Metric("mae", "min", "absolute error of standardized values", label="MAE"),
        Metric("smape", "min", "symmetric percentage error, 0 to 200, in the series' unit", label="sMAPE"),
        Metric(
            "pinball",
            "min",
            f"loss of the quantiles {', '.join(f'{q:g}' for q in QUANTILES)}, standardized",
            label="pinball loss",
        ),
        Metric("coverage_80", "near 80 %", "of values inside the 80 % interval", percent=True, label="80 % coverage"),
        Metric("coverage_90", "near 90 %", "of values inside the 90 % interval", percent=True, label="90 % coverage"),
    )
    baseline_models: ClassVar = ("exponential-smoothing",)
    recipe: ClassVar = {"patience": 10}
    min_batch_size = 32
    scores_untrained = True

    @dataclass(frozen=True)
    class Options:
        horizon: int | None = None  # steps to forecast; None: from the frequency
        length: int | None = None  # past steps that the model reads; None: from the horizon and the season
        season: int | None = None  # steps of a season; None: from the frequency, else from the autocorrelation
        train: float | None = None  # training part of every series, as steps (>= 1) or a fraction; None: all before validation
        validation: float | None = (
            None  # the same for validation; None: a tenth, or with many series the last horizon before the test
        )
        test: float | None = None  # the same for test; None: the last fifth, or with many series the last horizon
        known: str = ""  # columns that are known for the future, separated by commas; others are known for the past only
        calendar: bool = True  # use calendar features of each step
        point: str = "mae"  # loss of the point forecast: mae (median), mse (mean), or mase (median, as MASE weights the series)
        others: bool = False  # other series of a wide table are covariates known for the past
        normalise: bool = True  # normalize each window by its own past (reversible instance normalization)

    @dataclass(frozen=True)
    class PredictOptions:
        interval: float = 0.9  # 0.8 or 0.9: the nominal coverage of the intervals

    covariates: Covariates
    standards: dict[str, tuple[float, float]]  # series -> mean and standard deviation of its training part
    widths: dict[str, list[float]]  # level -> relative widening of the interval, per step
    frequency: Frequency
    layout: str
    series: int
    digest: str  # digest of the training data
    request: Data

    # Before training

    @classmethod
    def match(cls, data: Data) -> str | None:
        time = panels.find_plain_series(data)
        return f"a numeric target at regular steps of time, in column {time!r}, without other features" if time else None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if panels.arrange_series(data)[0] is not None:
            return None
        return "numeric columns, or one row per series, and a time column (--time) unless rows are equal steps"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        return build_windows(data, options)

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        windows: Windows = data.context
        found, options = windows.panel, windows.options
        task = cls(list(data.columns.values()), options)
        task.frequency, task.layout, task.series, task.digest = found.frequency, found.layout, len(found), data.manifest.digest
        task.widths = {}
        task.standards = {
            name: mean_and_std(found.values[low:end, column])
            for name, low, end, column in zip(found.names, found.low, windows.train_end, found.column)
        }
        trained = np.zeros(len(found.row), dtype=bool)
        for low, end in zip(found.low, windows.train_end):
            trained[low:end] = True
        rows = np.unique(found.row[trained & (found.row >= 0)])
        columns = [] if task.layout == "rows" else [c for c in task.columns if c.role == "feature"]
        ahead = [name.strip() for name in options.known.split(",") if name.strip()]
        names = [c.name for c in columns]
        for name in ahead:
            if name not in names:
                raise SettingsError(
                    f"task.known names {name!r}, which is no covariate.{nearest(name, names)} Covariates "
                    f"are: {', '.join(names) or 'none'}."
                )
        steps = int((windows.train_end - found.low).max()) if options.calendar else 0
        static = find_static_columns(windows, [c.name for c in columns], trained)
        task.covariates = Covariates.fit(windows.table[rows], columns, ahead, found.frequency, steps, static, found.names)
        if options.others and (found.layout != "wide" or len(found) < 2):
            raise SettingsError(
                "task.others=true needs a wide table: one row per time, and a column for each of two or more series."
            )
        season = f"a season of {options.season} steps" if options.season > 1 else "no season"
        task.notes.append(
            f"{len(found):,} series, one step is {found.frequency.article}, {season}; {options.length} steps "
            f"are read, {options.horizon} forecast (task.season, task.length, task.horizon)"
        )
        for known, what in (
            (False, "known for the past only (task.known=NAME marks columns that are known for the future)"),
            (True, "known for the future"),
        ):
            names = list(dict.fromkeys(c.column for c in task.covariates.columns if c.ahead == known))
            if names:
                task.notes.append(f"{', '.join(names)}: {what}; models that read only the series ignore them")
        return task

    @property
    def others(self) -> int:
        """Number of other series that are read."""
        return self.series - 1 if self.options.others else 0

    def model_dims(self) -> dict[str, Any]:
        groups = {name: tuple(sizes.values()) for name, sizes in self.covariates.group_variables().items()}
        return {
            "length": self.options.length,
            "horizon": self.options.horizon,
            "values": 1 + len(QUANTILES),
            "quantiles": QUANTILES,
            "season": self.options.season,
            "channels": 1,
            "past": self.covariates.past + self.others,
            "known": self.covariates.known,
            "past_variables": groups["past"] + (1,) * self.others,
            "known_variables": groups["known"],
            "static_variables": groups["static"],
        }

    def data_facts(self) -> dict[str, Any]:
        return {
            "series": self.series,
            "length": self.options.length,
            "horizon": self.options.horizon,
            "known": sum(c.ahead for c in self.covariates.columns),
        }

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return Forecast(model, card.inputs, QUANTILES, self.options.point, self.options.normalise)

    # Windows as tensors

    def scales(self, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of every series: of its training part, or of a new series' own values."""
        found = windows.panel
        pairs = [self.standards.get(name) or mean_and_std(found.series_values(i)) for i, name in enumerate(found.names)]
        mean, std = np.array(pairs).T
        return mean, std

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Return windows that are cut per batch; the series are in memory once."""
        if settings and self.covariates.columns and "known" not in card.inputs:
            names = dict.fromkeys(c.column for c in self.covariates.columns)
            self.add_note(
                f"{card.name} reads only the series: {', '.join(names)} {'is' if len(names) == 1 else 'are'} not used"
            )
        return self.cut_windows(data, card.inputs, settings is not None)

    def cut_windows(self, data: Data, inputs: Sequence[str], answered: bool) -> Batches:
        """Return the inputs of a network, with the outcomes if `answered`."""
        windows: Windows = data.context
        found, length, horizon = windows.panel, self.options.length, self.options.horizon
        series, at = (data.rows[name].to_numpy().copy() for name in (SERIES, CUT))  # polars returns read-only memory
        mean, std = (torch.from_numpy(x) for x in self.scales(windows))
        low, column, group = (torch.from_numpy(x) for x in (found.low, found.column, found.group))
        filled, observed = torch.from_numpy(found.filled), torch.from_numpy(found.observed)
        gaps = bool((~found.observed).any()) or bool((at - found.low[series] < length).any())
        has_static = "static" in inputs
        covariates = self.covariate_tensors(windows, not has_static) if "known" in inputs else None
        static = torch.from_numpy(self.covariates.static_values(windows.table, found)) if has_static else None
        others = self.find_others(found) if self.options.others and covariates is not None else None
        weights = self.weigh_series(windows) if self.options.point == "mase" else None
        past, future = torch.arange(-length, 0), torch.arange(horizon)

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            s, cuts = torch.from_numpy(series[index]), torch.from_numpy(at[index])
            steps = cuts[:, None] + past  # B T
            real = steps >= low[s][:, None]
            steps = steps.maximum(low[s][:, None])  # before its start, a series repeats its first value
            own, centre, scale = column[s][:, None], mean[s][:, None], std[s][:, None]
            batch = {"series": ((filled[steps, own] - centre) / scale).float()[..., None]}
            if gaps:
                batch["observed"] = (real & observed[steps, own])[..., None]
            if answered:
                batch["target"] = ((self.outcomes(found, s, cuts[:, None] + future) - centre) / scale).float()[..., None]
                if weights is not None:
                    batch["weight"] = weights[s, None, None]
            if covariates is not None:
                measured, known = covariates
                shift = (group[s] * horizon)[:, None]  # `known` has one extra horizon per group
                batch |= {"past": measured[steps], "known": known[torch.cat([steps, cuts[:, None] + future], 1) + shift]}
            if others is not None:
                beside = others[s]  # B C-1
                values = (filled[steps[..., None], column[beside][:, None]] - mean[beside][:, None]) / std[beside][:, None]
                batch["past"] = torch.cat([batch["past"], values.float()], 2)
            if static is not None:
                batch["static"] = static[s]
            return batch

        return Batches(len(data), make)

    def weigh_series(self, windows: Windows) -> Tensor:  # -> U
        """Return the weights that turn errors of standardized values into scaled ones; 0 for a series that its past forecasts exactly."""
        found = windows.panel
        parts = zip(found.low, windows.train_end, found.column)
        naive = np.array([seasonal_scale(found.values[low:end, column], self.options.season) for low, end, column in parts])
        usual = np.isfinite(naive) & (naive > 0)
        return torch.from_numpy(np.where(usual, self.scales(windows)[1] / np.where(usual, naive, 1), 0)).float()

    def outcomes(self, found: panels.Panel, series: Tensor, steps: Tensor) -> Tensor:  # B, B H -> B H
        """Return the actual values in the series' unit; NaN if unknown."""
        values = torch.from_numpy(found.values)
        high, column = torch.from_numpy(found.high)[series][:, None], torch.from_numpy(found.column)[series][:, None]
        return torch.where(steps < high, values[steps.minimum(high - 1), column], float("nan"))

    def find_others(self, found: panels.Panel) -> Tensor:  # -> U C-1
        """Return the other series of each, in the order of training."""
        if set(found.names) != set(self.standards):
            missing = sorted(set(self.standards) - set(found.names))
            more = sorted(set(found.names) - set(self.standards))
            raise DataError(
                f"The network reads all series of the table together. Missing: {', '.join(missing) or 'none'}; not in training: "
                f"{', '.join(more) or 'none'}. Give the columns of the training data."
            )
        order = [found.names.index(name) for name in self.standards]
        return torch.tensor([[other for other in order if other != series] for series in range(len(found.names))])

    def covariate_tensors(self, windows: Windows, static: bool = True) -> tuple[Tensor, Tensor]:
        """Return the past covariates of each step, and the future covariates, with one extra horizon per group."""
        found, horizon = windows.panel, self.options.horizon
        sizes = np.diff(found.start)
        group = np.repeat(np.arange(len(sizes)), sizes + horizon)
        step = np.arange(len(group)) - group * horizon  # panel step
        inside = step < found.start[group + 1]
        row = np.where(inside, found.row[np.minimum(step, len(found.row) - 1)], -1)
        times = np.concatenate([found.frequency.times(found.times[a], n + horizon) for a, n in zip(found.start, sizes)])
        known = self.covariates.future_values(windows.table, row, times)
        measured = self.covariates.past_values(windows.table, found.row, found.start, static)
        return torch.from_numpy(measured), torch.from_numpy(known)

    def add_note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return the actual values and the scales that metrics need; `block` numbers windows with correlated errors."""
        windows: Windows = data.context
        found, options = windows.panel, self.options
        series, at = (data.rows[name].to_numpy().copy() for name in (SERIES, CUT))
        mean, std = self.scales(windows)
        before = [
            [seasonal_scale(found.values[low:end, c], options.season) for end in ends]
            for low, c, *ends in zip(found.low, found.column, windows.train_end, windows.val_end)
        ]
        tested = (at >= windows.val_end[series]).astype(int)
        steps = torch.from_numpy(at)[:, None] + torch.arange(options.horizon)
        future = self.outcomes(found, torch.from_numpy(series), steps).numpy()
        # Overlapping windows are correlated, and so are series of one table at one time.
        block = found.group[series].astype(np.int64) * (len(found.row) + 1) + at // options.horizon
        return {
            "future": future,
            "mean": mean[series],
            "std": std[series],
            "naive": np.array(before)[series, tested],
            "block": block,
        }

    def window_errors(self, outputs: Arrays, targets: Arrays) -> dict[str, np.ndarray]:
        """Return, per window (B), the number of known values and the sums or means of their errors."""
        values = outputs["values"][:, :, 0].astype(np.float64)  # B H Q
        future = (targets["future"] - targets["mean"][:, None]) / targets["std"][:, None]
        known = np.isfinite(future)
        point, error = values[..., 0], values[..., 0] - future
        natural = point * targets["std"][:, None] + targets["mean"][:, None]
        count = known.sum(1)
        mean = lambda x: np.where(known, x, 0).sum(1) / np.maximum(count, 1)
        found = {
            "count": count,
            "se": np.where(known, error**2, 0).sum(1),
            "ae": np.where(known, abs(error), 0).sum(1),
            "mase": mean(abs(error)) * targets["std"] / targets["naive"],
            "smape": mean(smape(natural, targets["future"])),
        }
        if values.shape[-1] > 1:
            q = values[..., 1:]
            found["pinball"] = np.where(known, pinball_loss(q, future, np.array(QUANTILES)).mean(-1), 0).sum(1)
            for level, (a, b) in LEVELS.items():
                found[f"coverage_{100 * level:.0f}"] = (known & (q[..., a] <= future) & (future <= q[..., b])).sum(1)
        return found

    def aggregate(self, errors: dict[str, np.ndarray]) -> dict[str, float]:
        """Aggregate the errors of windows to scores.

        MASE and sMAPE are means over windows, as in the M4 competition; the others are means over values. Windows
        of constant series have no MASE.
        """
        count = max(int(errors["count"].sum()), 1)
        scaled = errors["mase"][np.isfinite(errors["mase"])]
        scores = {
            "mase": float(scaled.mean()) if len(scaled) else float("nan"),
            "mse": float(errors["se"].sum() / count),
            "mae": float(errors["ae"].sum() / count),
            "smape": float(errors["smape"].mean()),
        }
        return scores | {
            name: float(errors[name].sum() / count) if name in errors else float("nan")
            for name in (m.name for m in self.metrics)
            if name not in scores
        }

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        return self.aggregate(self.window_errors(outputs, targets))

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return 95 % intervals from a block bootstrap: windows that overlap in time are drawn together (Künsch 1989)."""
        errors, rng = self.window_errors(outputs, targets), np.random.default_rng(0)
        _, block = np.unique(targets["block"], return_inverse=True)
        order = np.argsort(block, kind="stable")
        rows = np.split(order, np.flatnonzero(np.diff(block[order])) + 1)
        drawn = []
        for _ in range(200):
            chosen = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
            drawn.append(self.aggregate({name: x[chosen] for name, x in errors.items()}))
        return {name: tuple(np.quantile([d[name] for d in drawn], [0.025, 0.975]).tolist()) for name in drawn[0]}

    def calibrate(self, outputs: Arrays, targets: Arrays) -> None:
        """Fit the widening of the intervals, per step, so that they have nominal coverage on the validation data."""
        q = outputs["values"][:, :, 0, 1:].astype(np.float64)
        future = (targets["future"] - targets["mean"][:, None]) / targets["std"][:, None]
        steps = (
            [slice(h, h + 1) for h in range(q.shape[1])]
            if len(q) >= MIN_STEP_CALIBRATION_WINDOWS
            else [slice(None)] * q.shape[1]
        )
        self.widths = {
            f"{level:g}": [compute_interval_widening(q[:, h, a], q[:, h, b], future[:, h], level) for h in steps]
            for level, (a, b) in LEVELS.items()
        }

    def postprocess(self, outputs: Arrays) -> Arrays:
        values = outputs["values"].astype(np.float32)
        for level, grow in self.widths.items():
            a, b = LEVELS[float(level)]
            low, high = values[..., 1 + a].copy(), values[..., 1 + b].copy()
            more = np.array(grow, dtype=np.float32)[:, None] * (high - low)
            values[..., 1 + a], values[..., 1 + b] = low - more, high + more
        values[..., 1:] = np.sort(values[..., 1:], -1)
        for a, b in LEVELS.values():  # an interval contains its point forecast
            values[..., 1 + a] = np.minimum(values[..., 1 + a], values[..., 0])
            values[..., 1 + b] = np.maximum(values[..., 1 + b], values[..., 0])
        return {**outputs, "values": values}

    def naive_forecasts(self, test: Data) -> dict[str, tuple[str, np.ndarray]]:
        """Return naive forecasts by name: a description, and standardized values (B, H)."""
        windows: Windows = test.context
        found, season, ahead = windows.panel, self.options.season, np.arange(self.options.horizon)
        series, at = test.rows[SERIES].to_numpy(), test.rows[CUT].to_numpy()
        low, column = found.low[series], found.column[series]
        mean, std = (x[series][:, None] for x in self.scales(windows))
        last, first = found.filled[at - 1, column], found.filled[low, column]
        again = np.maximum(at[:, None] - season + ahead % season, low[:, None])
        slope = (last - first) / np.maximum(at - 1 - low, 1)
        made = {
            "naive": ("repeats the last value", np.repeat(last[:, None], len(ahead), 1)),
            "seasonal naive": (f"repeats the last season of {season} steps", found.filled[again, column[:, None]]),
            "drift": ("continues the line from the first value to the last", last[:, None] + slope[:, None] * (ahead + 1)),
        }
        if season == 1:
            del made["seasonal naive"]
        return {name: (what, (x - mean) / std) for name, (what, x) in made.items()}

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        return [Baseline(name, what, {"values": x[:, :, None, None]}) for name, (what, x) in self.naive_forecasts(test).items()]

    # Predictions

    def read(self, sources: Sequence[Any], *, answered: bool = False) -> Data:
        """Read one window at the end of every series; for evaluation the test windows, or all windows of new data."""
        data = super().read(sources, answered=answered)
        found, findings = panels.arrange_series(data, self.frequency)
        checks.enforce(findings, len(data), source=data.source)
        assert found is not None  # `enforce` raises if there is an error
        for finding in findings:
            if finding.severity == "warning":
                self.add_note(str(finding))
        if answered:
            return (
                build_windows(data, self.options)
                if data.manifest.digest == self.digest
                else all_windows(data, found, self.options)
            )
        if found.frequency.article != self.frequency.article:
            self.add_note(f"the frequency is {found.frequency.article}, but training used {self.frequency.article}")
        self.request = windows_at_end(data, found, self.options)
        return self.request

    def read_one(self, source: Any, answered: bool) -> Data:
        if self.layout == "rows":  # the columns are steps, whose number may differ
            loaded = load(source, labels_optional=True, target_kind="number", target_names=self.column_spec.names)
            ignored = {*self.list_ignored()} & {*loaded.raw.rows.columns}
            name = self.get_series_name()
            return loaded.interpret(
                kinds=dict.fromkeys(ignored, "identifier"),
                column_spec=self.column_spec,
                roles={"series": name} if name else {},
                last=True,
            )
        return read(source, schema=self.columns, column_spec=self.column_spec, labels_optional=True)

    def get_series_name(self) -> str | None:
        """Return the column that names one series per row."""
        return next((c.name for c in self.columns if c.role == "series" or c.kind in ("identifier", "category")), None)

    def list_ignored(self) -> list[str]:
        """Return the columns of one series per row that are no steps. A step of different whole numbers is an identifier, too."""
        words = [c.name for c in self.columns if c.kind == "identifier" and c.number_format is None]
        return [name for name in words if name != self.get_series_name()]

    def predict_batches(self, data: Data, card: Card) -> Batches:
        batches = self.batches(data, card)
        if "known" in card.inputs and self.covariates.known > 2 * len(self.covariates.turns):
            self.note_missing_covariates(data)
        return batches

    def note_missing_covariates(self, data: Data) -> None:
        """Add notes with the number of future steps whose known covariates are missing: without a row, and with an empty cell."""
        found, horizon = data.context.panel, self.options.horizon
        steps = found.high[:, None] + np.arange(horizon)
        given = steps < found.start[found.group + 1][:, None]
        lacking = int((~given).sum())
        if lacking:
            names = ", ".join(dict.fromkeys(c.column for c in self.covariates.columns if c.ahead))
            self.add_note(
                f"{lacking:,} of {given.size:,} future steps have no row with {names}: the mean is used. Append "
                "rows with the time and these columns, and no value"
            )
        row = np.where(given, found.row[np.minimum(steps, len(found.row) - 1)], -1)
        for covariate in (c for c in self.covariates.columns if c.ahead):
            empty = np.isnan(self.covariates.values_at(covariate, data.context.table, row[given])).any(1)
            if count := int(empty.sum()):
                self.add_note(
                    f"{count:,} of {given.size:,} future steps have an empty cell in {covariate.column!r}: the mean is used. Fill it in"
                )

    def format_predictions(self, outputs: Arrays) -> list[list[dict[str, Any]]]:
        if self.predict_options.interval not in LEVELS:
            raise SettingsError(f"interval={self.predict_options.interval:g} is not available. Choose 0.8 or 0.9.")
        windows: Windows = self.request.context
        found, (a, b) = windows.panel, LEVELS[self.predict_options.interval]
        mean, std = self.scales(windows)
        records = []
        for i, values in enumerate(outputs["values"][:, :, 0].astype(np.float64)):
            natural = values * std[i] + mean[i]
            last = found.times[found.high[i] - 1]
            times = found.frequency.times(last, len(natural) + 1)[1:]
            records.append(
                [
                    {
                        "series": found.names[i],
                        "time": found.frequency.label(time),
                        "value": float(step[0]),
                        "low": float(step[1 + a]),
                        "high": float(step[1 + b]),
                    }
                    for time, step in zip(times, natural)
                ]
            )
        return records

    # Report

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        simple = {name: values for name, (_, values) in self.naive_forecasts(test).items()}
        found = report.build_elements(test, outputs["values"][:, :, 0].astype(np.float64), targets, simple, LEVELS)
        if weights := self.weigh_inputs(test, objective):
            found["What the forecasts depend on"] = report.draw_weights(weights, self.name_variables())
        return found

    def weigh_inputs(self, test: Data, objective: Objective | None) -> dict[str, np.ndarray]:
        """Return the mean weights of variables and steps over some test windows; empty if the network has none."""
        if not isinstance(objective, Forecast) or not hasattr(objective.model, "weigh_inputs"):
            return {}
        rows = np.sort(np.random.default_rng(0).permutation(len(test))[:WEIGHED_WINDOWS])
        place = next(objective.model.parameters()).device
        batch = {name: x.to(place) for name, x in self.cut_windows(test, objective.inputs, False).make(rows, None).items()}
        return {name: weights.float().mean(0).cpu().numpy() for name, weights in objective.weigh_inputs(batch).items()}

    def name_variables(self) -> dict[str, list[str]]:
        """Return the names of the variables of networks with static inputs."""
        names = {name: list(sizes) for name, sizes in self.covariates.group_variables().items()}
        known = names["known"] or ["place in the window"]
        others = ["another series"] * self.others
        return {"past": ["the series itself", *names["past"], *others, *known], "known": known, "static": names["static"]}

    def preview_data(self, training: Data) -> list[ReportElement]:
        return report.draw_series(training.context.panel)

    # Saved with the run

    STATE: ClassVar = {
        "covariates": {"columns": list[Covariate], "turns": list[str | float], "series?": list[str]},
        "standards": dict[str, tuple[float, float]],
        "widths": dict[str, list[float]],
        "layout": str,
        "frequency": Frequency,
        "series": int,
        "digest": str,
    }

    def state(self) -> dict[str, Any]:
        f = self.frequency
        return {
            "covariates": self.covariates.to_json(),
            "standards": self.standards,
            "widths": self.widths,
            "layout": self.layout,
            "frequency": {k: v for k, v in asdict(f).items() if v not in ("", ())},
            "series": self.series,
            "digest": self.digest,
        }

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.covariates = Covariates.from_json(state["covariates"])
        task.frequency = Frequency(**{**state["frequency"], "days": tuple(state["frequency"].get("days", ()))})
        task.standards = {name: tuple(pair) for name, pair in state["standards"].items()}
        task.widths, task.layout, task.series, task.digest = (state[k] for k in ("widths", "layout", "series", "digest"))
        return task


def find_static_columns(windows: Windows, names: Sequence[str], trained: np.ndarray) -> list[str]:
    """Return the columns that are constant in each of several series (in groups of a long table)."""
    found = windows.panel
    if len(found.start) < 3 or not names:  # one group
        return []
    group = np.repeat(np.arange(len(found.start) - 1), np.diff(found.start))
    used = trained & (found.row >= 0)
    rows = windows.table[found.row[used]].select(names).with_columns(pl.Series("\0group", group[used]))
    counts = rows.group_by("\0group").agg(pl.col(name).drop_nulls().n_unique() for name in names)
    return [name for name in names if (counts[name] <= 1).all()]


def mean_and_std(values: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of the finite values; (0, 1) if there are none."""
    known = values[np.isfinite(values)]
    return (float(known.mean()), float(known.std()) or 1.0) if len(known) else (0.0, 1.0)


TASKS = (Forecasting,)
