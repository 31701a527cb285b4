"""The signature of forecasting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fieldguide.core.card import Card
from fieldguide.core.signature import Axis, InputField, OptionSpec, RecordField, RecordUnit, SeriesFormat, Step, TensorSpec
from fieldguide.data.preprocessing.covariates import Covariates
from fieldguide.data.timeseries.frequency import Frequency
from fieldguide.tasks.signature_builder import INPUT_ROLES, SignatureBuilder
from fieldguide.tasks.signature_parts import describe_column, request_tensor

INTERVALS = (0.8, 0.9)  # nominal coverages for which widths are calibrated
LAYOUT_OF_ROWS = "rows"  # one series per row; its columns are the steps


class ForecastSignature(SignatureBuilder):
    """The signature of forecasting. A request holds the past of series, and covariates of their future, one row per step."""

    record_for: ClassVar[RecordUnit] = "step"
    options: Any
    covariates: Covariates
    frequency: Frequency
    standards: dict[str, tuple[float, float]]
    layout: str

    def describe_inputs(self) -> Sequence[InputField]:
        if self.layout == LAYOUT_OF_ROWS:
            name = next((c for c in self.columns if c.role == "series" or c.kind in ("identifier", "category")), None)
            about = "the values of the series, oldest first; empty cells at the end"
            steps = InputField("*", "number", required=False, nullable=True, about=about)
            return [*([describe_column(name, about="name of the series")] if name else []), steps]
        used = {covariate.column: covariate for covariate in self.covariates.columns}
        found = []
        for column in self.columns:
            if column.role == "target":
                found.append(describe_column(column, nullable=True, about="the series; empty for steps of the future"))
            elif column.role in ("series", "time"):
                about = "name of the series" if column.role == "series" else "time of the step"
                values = list(self.standards) if column.role == "series" else ()
                found.append(describe_column(column, values, nullable=False, about=about))
            elif column.role in INPUT_ROLES:
                covariate = used.get(column.name)
                about = "not used" if covariate is None else "known for the past"
                about = "known for past and future" if covariate is not None and covariate.ahead else about
                found.append(describe_column(column, covariate.values if covariate else (), about=about))
        return found

    def describe_series(self) -> SeriesFormat:
        o = self.options
        return SeriesFormat(o.length, o.horizon, self.frequency.article, o.season)

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        steps = [
            Step("parse_cells", "read numbers and times in the format of each column", False),
            Step("arrange", "series on a regular grid of times; gaps are filled and marked", False),
            Step(
                "standardize", "by mean and deviation of the series in training, or of its own values", True, state="standards"
            ),
        ]
        if "known" in card.inputs:
            steps.append(Step("build_covariates", "standardized covariates, calendar features", False, state="covariates"))
        if self.options.normalise:
            steps.append(Step("normalize_window", "by the mean and deviation of the window (reversible)", True))
        return steps

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        axes = Axis("time", self.options.length), Axis("channels", 1)
        return [request_tensor("observed", "bool", *axes, about="False for filled values", required=False)]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        undo = [Step("undo_normalize_window", "times the deviation plus the mean of the window", True)]
        return [
            *(undo if self.options.normalise else []),
            Step("widen_intervals", "calibrated widths of the intervals, by step", True, state="widths"),
            Step("rescale", "times the deviation plus the mean of the series", True, state="standards"),
            Step("label_times", "times of the forecast steps", False, {"frequency": self.frequency.article}),
        ]

    def describe_options(self) -> tuple[OptionSpec, ...]:
        return tuple(replace(o, choices=INTERVALS) if o.name == "interval" else o for o in super().describe_options())

    def describe_record(self) -> Sequence[RecordField]:
        return [
            RecordField("series", "string", "name of the series"),
            RecordField("time", "string", "time of the step"),
            RecordField("value", "number", "the point forecast, in the unit of the series"),
            RecordField("low", "number", "lower end of the interval (option interval)"),
            RecordField("high", "number", "upper end of the interval"),
        ]
