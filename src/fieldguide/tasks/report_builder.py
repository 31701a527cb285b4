"""The report builder of a task: tables, charts and samples that the report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fieldguide.core.report_elements import ReportElement
from fieldguide.data.dataset import Column, Data
from fieldguide.objectives import Objective
from fieldguide.tasks.analysis.context import ReportContext
from fieldguide.tasks.analysis.preview import build_preview
from fieldguide.tasks.evaluator import Arrays

INPUT_ROLES = ("feature", "user", "item")
MAX_EXAMPLE_CHARACTERS = 200  # of a text that is shown as an example of an input


@dataclass(frozen=True)
class ExampleInput:
    """An input as `predict` takes it: a path, a text, or the cells of a row by column; the options it needs; what it is."""

    source: Any
    options: Mapping[str, str] = field(default_factory=dict)
    note: str = "The input is one of the test examples; use your own."


class ReportBuilder:
    """Builds report elements. They are data: the report decides how they look."""

    columns: list[Column]
    feature: ClassVar[tuple[str, ...]]
    further: ClassVar[tuple[str, ...]]
    has_own_rows: ClassVar[bool]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        """Return the report's elements for the test rows, by section title.

        `objective` holds the trained model, for elements that need more than the outputs, such as attention.
        """
        return {}

    def explain(self, context: ReportContext) -> list[ReportElement]:
        """Return elements that show what the predictions depend on. They must respect the context's deadline."""
        return []

    def preview_data(self, training: Data) -> list[ReportElement]:
        """Return the distribution of the target and some examples of the training rows."""
        return build_preview(training, self.columns)

    def input_columns(self) -> list[Column]:
        """Return the columns that the model reads."""
        kinds = (*self.feature, *self.further)
        return [c for c in self.columns if c.role in INPUT_ROLES and (not kinds or c.kind in kinds)]

    def example_input(self, test: Data) -> ExampleInput | None:
        """Return an input from the test rows for the instructions in the report; None to show the data itself."""
        columns = [c for c in self.input_columns() if c.name in test.rows.columns]
        if not self.has_own_rows or not columns or not len(test):
            return None
        row = {c.name: test.rows[c.name][0] for c in columns}
        if len(columns) > 1 or not isinstance(value := row[columns[0].name], str):
            return ExampleInput(
                {name: v if isinstance(v, int | float | bool) else str(v) for name, v in row.items() if v is not None}
            )
        if columns[0].kind == "text":
            value = " ".join(value.split())
            value = value if len(value) <= MAX_EXAMPLE_CHARACTERS else value[:MAX_EXAMPLE_CHARACTERS].rsplit(" ", 1)[0]
        return ExampleInput(value)

    def log_eval_samples(self, objective: Objective) -> list[ReportElement]:
        """Return a few samples to log during training. Must not depend on torch's global generator."""
        return []
