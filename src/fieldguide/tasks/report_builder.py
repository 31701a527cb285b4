"""The report builder of a task: tables, charts and samples that the report shows."""

from __future__ import annotations

from fieldguide.core.report_elements import ReportElement
from fieldguide.data.dataset import Data
from fieldguide.objectives import Objective
from fieldguide.tasks.evaluator import Arrays


class ReportBuilder:
    """Builds report elements. They are data: the report decides how they look."""

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        """Return the report's elements for the test rows, by section title.

        `objective` holds the trained model, for elements that need more than the outputs, such as attention.
        """
        return {}

    def log_eval_samples(self, objective: Objective) -> list[ReportElement]:
        """Return a few samples to log during training. Must not depend on torch's global generator."""
        return []
